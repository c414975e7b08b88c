"""What a suite is made of.

A suite is a module of this folder, listed in `__main__.SUITES`, with a function

    cases(settings: Settings) -> Iterable[Case]

that yields its cases, the most important first. A case is one comparison: the fields of its rows, and per provider a function
that builds the call to measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# one row per provider of a case; times in ms, rates of this machine in GFLOP/s and GB/s
FIELDS = (
    "op provider mode dtype B H L D R C ms_min ms_p50 ms_max peak_mib gflops share_of_matmul matmul_gflops "
    "cpu cores torch triton commit suite regime input depth threads runs ms_p20 ms_p80 copy_gbs roofline device status reason "
    "measure embed_dim drift"
).split()


class AbsentError(Exception):
    """A provider is not there or can't do this case; the message becomes the row's reason."""


@dataclass(frozen=True)
class Settings:
    """Shapes and device of a run: head counts and dims, hash rounds R and chunk length C that every case shares."""

    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...]
    quick: bool = False
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    n_hashes: int = 4
    chunk_length: int = 64

    def row(self, op: str, length: int, batch: int | None = None) -> dict:
        """The fields of a row that say what ran."""
        return {
            "op": op, "dtype": str(self.dtype).removeprefix("torch."), "B": batch or self.batch, "H": self.heads, "L": length,
            "D": self.head_dim, "R": self.n_hashes, "C": self.chunk_length,
        }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        row: fields of the rows, from `Settings.row`, plus any of mode, regime, input, depth, embed_dim.
        builds: provider -> a function without arguments that sets up and returns the call to measure, itself without
            arguments. It may raise: `AbsentError` or anything else becomes a row with its reason.
        measure: "time"; "graph" (time of a replayed CUDA graph); "memory" (extra peak of one call); or "drift" (what it returns).
        threads: torch's threads for this case (0: leave them).
        flops, bytes: provider -> work of one call, for rates and the roofline.
        result_bytes: of what a call of any provider leaves; its extra memory does not count them.
    """

    row: dict
    builds: dict[str, Callable[[], Callable[[], object]]]
    measure: str = "time"
    threads: int = 0
    flops: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    result_bytes: int = 0


def by_importance(lengths):
    """Around 16K first, where exact attention and LSH attention cross; of two as far from it, the longer first."""
    return sorted(lengths, key=lambda length: (abs(length.bit_length() - 15), -length))
