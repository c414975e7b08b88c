"""What the audit compiles: calls by name, launched on meta tensors so that kernels come from their own launchers, and the work
that one program of each kernel does."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from .config import AttentionOptions, LSHConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TRAX = LSHConfig.trax()
_EVERYTHING = LSHConfig(span="chunk", local_window=8)


class Case(NamedTuple):
    """One attention call, forward and backward. config None: local attention with a window of 64. residual: instead the sum
    of a reversible block in exact mode, there and back."""

    config: LSHConfig | None = LSHConfig()
    dtype: str = "bf16"
    head_dim: int = 64
    length: int = 4096
    causal: bool = True
    separate: bool = False
    masked: bool = False
    dropout_p: float = 0.0
    given_buckets: bool = False
    batch: int = 1
    n_heads: int = 8
    residual: bool = False

    def options(self) -> AttentionOptions:
        call = {"is_causal": self.causal, "dropout_p": self.dropout_p, "scale": 1.0}
        if self.config is not None:
            return self.config.options(self.config.factors(self.length), **call)
        local = LSHConfig(window=64, dedupe=False).options((1,), **call)
        return local._replace(hashed=False, within_bucket=False)


VARIANTS = {
    "": Case(),
    "-plain": Case(LSHConfig(dedupe=False)),
    "-full": Case(causal=False, masked=True),
    "-trax": Case(_TRAX, masked=True),
    "-paper": Case(LSHConfig.paper()),
    "-bucket": Case(LSHConfig(span="bucket")),
    "-separate": Case(separate=True),
    "-local": Case(None, separate=True),
    "-everything": Case(_EVERYTHING, masked=True, dropout_p=0.1),
}


def cases(full: bool = False) -> dict[str, Case]:
    """The calls that are audited, by name. full: fp16 and fp32 in all variants, too, as bf16 always is."""
    found = {f"bf16-D{dim}{name}": case._replace(head_dim=dim) for dim in (64, 128) for name, case in VARIANTS.items()}
    found |= {f"bf16-D{head_dim}": Case(head_dim=head_dim) for head_dim in (32, 96, 256)}
    for dtype, head_dim in (("fp16", 64), ("fp16", 128), ("fp32", 64), ("fp32", 128)):
        found[f"{dtype}-D{head_dim}"] = Case(dtype=dtype, head_dim=head_dim)
    found |= {f"bf16-D64-R{n_hashes}": Case(LSHConfig(n_hashes=n_hashes)) for n_hashes in (8, 17)}
    found["bf16-D128-separate-R9"] = Case(LSHConfig(n_hashes=9), head_dim=128, separate=True)
    found["bf16-D64-given-buckets"] = Case(given_buckets=True)
    found["bf16-D64-64K"] = Case(length=2**16)
    found |= {f"{dtype}-residual": Case(dtype=dtype, residual=True) for dtype in ("bf16", "fp32")}
    if full:
        # last: a kernel that several cases share is in the same row with them and without
        for dtype, head_dim, (name, case) in itertools.product(("fp16", "fp32"), (64, 128), VARIANTS.items()):
            found[f"{dtype}-D{head_dim}{name}"] = case._replace(dtype=dtype, head_dim=head_dim)
    return found


def launch(case: Case) -> None:
    """Launch the kernels of a case on meta tensors."""
    from .csrc_triton.attention_fwd import inverse_norms
    from .csrc_triton.pipeline import attention_backward, attention_forward
    from .csrc_triton.residual import residual_add

    if case.residual:
        stream = torch.empty(case.batch, case.length, case.n_heads * case.head_dim, dtype=torch.int32, device="meta")
        for undo in (False, True):
            residual_add(stream, stream.to(DTYPES[case.dtype]), DTYPES[case.dtype], undo)
        return
    options, shape = case.options(), (case.batch, case.n_heads, case.length, case.head_dim)
    query, key, value = (torch.empty(shape, dtype=DTYPES[case.dtype], device="meta") for _ in range(3))
    rotations = buckets = None
    if case.given_buckets:
        buckets = torch.empty(*shape[:2], case.config.n_hashes, case.length, dtype=torch.int64, device="meta")
    elif case.config is not None:
        width = sum(options.factors) // 2
        rotations = torch.empty(case.n_heads, case.head_dim, case.config.n_hashes, width, device="meta")
    padding = torch.empty(case.batch, case.length, dtype=torch.bool, device="meta") if case.masked else None
    seed = torch.empty(1, dtype=torch.int64, device="meta") if case.dropout_p else None
    key = key if case.separate else None
    k_buckets = buckets if case.separate else None
    out, lse, state = attention_forward(query, key, value, padding, seed, rotations, buckets, k_buckets, options)
    if case.given_buckets:
        # which attention takes for itself where it is called as a stage
        inverse_norms(query, padding)
    attention_backward(torch.empty_like(out), None, query, key, value, padding, seed, out, lse, state, options)


class Work(NamedTuple):
    """What one program of a kernel does: units of what, and trips of its loops by depth (the last holds for all deeper)."""

    units: float
    unit: str
    trips: tuple = (1,)


def attention_work(arguments) -> Work:
    """Pairs (query, candidate) as the span has them at full buckets; key tiles that hold them."""
    mode, tile = arguments["MODE"], arguments["TILE"]
    if mode.SPAN == "window":
        window = min(mode.WINDOW, arguments["S"])
        seen, walked = (window + 1, tile.M + window - 1) if mode.CAUSAL else (2 * window + 1, tile.M + 2 * window)
    elif mode.SPAN == "chunk":
        seen = (mode.BEFORE + 1 + mode.AFTER) * mode.CHUNK
        walked = seen + max(tile.M - mode.CHUNK, 0)
    else:
        seen = arguments["S"] / arguments["n_buckets"]
        walked = tile.M + seen
    trips = math.ceil(walked / tile.N)
    # dedupe of many rounds looks at those before, half of all as a rule, one after the other
    before = ((mode.ROUNDS - 1) / 2,) if mode.DEDUPE and mode.ROUNDS > 8 else ()
    # a key walks the queries of one head of its group after the other
    heads = arguments["H"] // arguments["HKV"] if arguments.get("PART") == "keys" else 0
    return Work(tile.M * seen * max(heads, 1), "pair", (heads, trips, *before) if heads else (trips, *before))


# a kernel that is not here counts as one unit and one trip
WORK = {
    "_attention_fwd_kernel": attention_work,
    "_attention_bwd_kernel": attention_work,
    "_attention_bwd_prepare_kernel": lambda a: Work(a["BLOCK_M"], "row"),
    "_combine_rounds_bwd_kernel": lambda a: Work(a["BLOCK_M"], "row"),
    "_hashing_fwd_kernel": lambda a: Work(
        a["BLOCK_M"] * a["R"], "row and round", (a["R"], math.ceil(max(a["FACTORS"], default=2) / 2 / a["MAX_BLOCK_W"]))
    ),
    "_bucket_sort_count_kernel": lambda a: Work(a["BLOCK_M"], "element"),
    "_bucket_sort_scan_kernel": lambda a: Work(
        a["n_tiles"] * a["BLOCK_BINS"], "counter", (math.ceil(a["n_tiles"] / a["BLOCK_T"]),)
    ),
    "_bucket_sort_scatter_kernel": lambda a: Work(a["BLOCK_M"], "element"),
    "_bucket_bounds_kernel": lambda a: Work(a["BLOCK"], "slot"),
    # a binary search in buckets of 32 to 64
    "_stretched_intervals_kernel": lambda a: Work(a["BLOCK"], "slot", (6,)),
    "_inverse_norm_kernel": lambda a: Work(a["BLOCK_M"], "row"),
    "_combine_rounds_fwd_kernel": lambda a: Work(a["BLOCK_M"], "row"),
    "_residual_fwd_kernel": lambda a: Work(a["BLOCK"], "element"),
}


def work_of(launched) -> Work:
    work = WORK.get(launched.name)
    return work(launched.arguments) if work else Work(1, "program")
