"""Tile shapes, warps and stages of a kernel, ranked by the time model: evidence for the `_launch_config` functions.

Stages only cost here, as the model does not see what fetching ahead hides: attention keeps those that it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
import triton
from tqdm import tqdm

from . import audit_cases, machine_code, offline, time_model


def _attention(config, call):
    tile, _, num_stages = config
    # products on FMA units are unrolled, with whole rows in registers
    most_products = 512 if torch.float32 in call else math.inf
    for m, n, num_warps in product((16, 32, 64, 128), (16, 32, 64), (1, 2, 4, 8)):
        # a warp needs 16 rows or columns for a tensor instruction; more threads than there are 16 bytes in a tile would have
        # `block_dim` widen it; half of the registers of a thread for logits and one sum are too many, as most live twice
        n_lanes = 32 * num_warps
        if m * (n + tile.BLOCK_DV) > 128 * n_lanes or m * n * tile.BLOCK_D > most_products * n_lanes:
            continue
        if m >= 8 * num_warps and n_lanes <= min(m, n) * tile.BLOCK_D * 2 // 16:
            yield tile._replace(M=m, N=n), num_warps, num_stages


def _hashing(config, call):
    _, block_d, *_ = config
    most_sums = 32 if torch.float32 in call else math.inf  # of a thread; more spill beside products on FMA units
    for block_m, block_w, num_warps, num_stages in product((32, 64, 128, 256), (16, 32, 64), (4, 8), (1, 2)):
        if block_m * block_w <= most_sums * 32 * num_warps:
            yield block_m, block_d, block_w, num_warps, num_stages


def _warps(config, call):
    return (1, 2, 4, 8)


def _rows(config, call):
    """Around (size of a block, what is left as it is .., num_warps)."""
    size, *others, _ = config
    for log2_times, num_warps in product((-2, -1, 0, 1, 2), (1, 2, 4, 8)):
        if size * 2.0**log2_times >= 1:
            yield int(size * 2.0**log2_times), *others, num_warps


class Space(NamedTuple):
    """Where the configuration of a kernel comes from, and what else it may be, given what it is and for which arguments.
    Kernels that share one are judged together."""

    module: str  # of csrc_triton
    function: str
    candidates: Callable


# by name, less what all names of kernels have
SPACES = {
    "attention_fwd": Space("attention_fwd", "_launch_config", _attention),
    "attention_bwd": Space("attention_bwd", "_launch_config", _attention),
    "attention_bwd_prepare": Space("attention_bwd_prepare", "_launch_config", _rows),
    "bucket_bounds": Space("intervals", "_launch_config", _rows),
    "bucket_sort_count": Space("bucket_sort", "_launch_config", _warps),
    "bucket_sort_scan": Space("bucket_sort", "_scan_launch_config", _rows),
    "bucket_sort_scatter": Space("bucket_sort", "_launch_config", _warps),
    "combine_rounds_bwd": Space("combine_rounds", "_bwd_launch_config", _rows),
    "combine_rounds_fwd": Space("combine_rounds", "_launch_config", _rows),
    "hashing_fwd": Space("hashing", "_launch_config", _hashing),
    "inverse_norm": Space("attention_fwd", "_norm_launch_config", _rows),
    "residual_fwd": Space("residual", "_launch_config", _rows),
    "stretched_intervals": Space("intervals", "_launch_config", _rows),
}


class Part(NamedTuple):
    """One launch of a trial: what tells it from another, its modelled time, warp instructions, code."""

    identity: tuple
    stage: time_model.Stage | None
    issued: float
    code: machine_code.Code | None
    error: str


class Trial(NamedTuple):
    """One configuration for one call of the function: seconds and warp instructions of the launches that any candidate changes;
    bound and code of the slowest of them."""

    config: object
    shipped: bool
    time: float
    issued: float
    bound: str
    spills: bool
    code: machine_code.Code | None
    error: str

    @property
    def rank(self):
        return bool(self.error), self.spills, self.time


def sweep(kernel: str, case: audit_cases.Case, target: str, pool) -> list[list[Trial]]:
    """Trials of the configurations of a kernel, for each set of arguments that its `_launch_config` is called with in a case
    (none where the case has no such kernel): the fastest first, those that spill or do not compile last. The rates are those
    of `time_model.H100`, whatever the target. pool: of `audit.workers`."""
    shipped, configs = launch_with(kernel, case, target)
    found = []
    for call, config in configs.items():
        others = [other for other in dict.fromkeys(SPACES[kernel].candidates(config, call)) if other != config]
        tasks = [pool.submit(launch_with, kernel, case, target, call, other) for other in others]
        launched = {config: shipped}
        for other, task in zip(others, tqdm(tasks, f"{kernel} {target}", leave=False)):
            launched[other], _ = task.result()
        changed = sorted(
            {i for parts in launched.values() for i, part in enumerate(parts) if part.identity != shipped[i].identity}
        )
        if not changed:
            continue
        trials = [_trial(other, other == config, [parts[i] for i in changed]) for other, parts in launched.items()]
        found.append(sorted(trials, key=lambda trial: trial.rank))
    return found


def launch_with(kernel, case, target, call=None, config=None) -> tuple[list[Part], dict]:
    """Launches of a case where the kernel's function returns `config` if it is called with `call`, and what it returns of itself
    for each call."""
    space, card, configs = SPACES[kernel], time_model.H100._replace(target=target), {}
    module = import_module(f"lsh_kernels.csrc_triton.{space.module}")
    original = getattr(module, space.function)

    def launch_config(*arguments):
        configs.setdefault(arguments, original(*arguments))
        return config if arguments == call else configs[arguments]

    with mock.patch.object(module, space.function, launch_config), offline.compile_only(target) as launches:
        audit_cases.launch(case)
    parts = []
    for launched in launches:
        stage = code = kernel_hash = None
        issued = 0.0
        if not launched.error:
            stage, code = time_model.stage_of(launched, card), machine_code.inspect(launched.kernel)
            kernel_hash = launched.kernel.hash
            issued = launched.grid * code.total("issue", audit_cases.work_of(launched).trips)
        parts.append(Part((launched.name, kernel_hash, launched.grid), stage, issued, code, launched.error))
    return parts, configs


def _trial(config, is_shipped, parts):
    errors = [part.error for part in parts if part.error]
    if errors:
        return Trial(config, is_shipped, 0.0, 0.0, "", False, None, errors[0])
    slowest = max(parts, key=lambda part: part.stage.time)
    time, issued = sum(part.stage.time for part in parts), sum(part.issued for part in parts)
    spills = any(part.code.spills for part in parts)
    return Trial(config, is_shipped, time, issued, slowest.stage.bound, spills, slowest.code, "")


FIELDS = (
    *"triton target case kernel n_trials shipped_rank shipped shipped_ms shipped_issued best best_ms best_issued".split(),
    *"best_bound fewest fewest_ms fewest_issued".split(),
)


def summary(trials: list[Trial], kernel: str) -> dict:
    """The row of `FIELDS`, but for target and case, that says how good what is shipped is, beside the best one and the one
    with the fewest instructions that does not spill."""
    rank = next(i for i, trial in enumerate(trials) if trial.shipped)
    fewest = min(trials, key=lambda trial: (trial.rank[:2], trial.issued))
    row = {"triton": triton.__version__, "kernel": kernel, "n_trials": len(trials), "shipped_rank": rank + 1}
    for name, trial in (("shipped", trials[rank]), ("best", trials[0]), ("fewest", fewest)):
        row |= {name: _shown(trial.config), f"{name}_ms": f"{trial.time * 1e3:.4f}", f"{name}_issued": f"{trial.issued:.4g}"}
    return row | {"best_bound": trials[0].bound}


def print_trials(trials: list[Trial], target: str, n_best: int = 10):
    """The best ones, and the shipped one wherever it is."""
    for i, trial in enumerate(trials):
        if i >= n_best and not trial.shipped:
            continue
        mark = "shipped" if trial.shipped else ""
        if trial.error:
            print(f"{i + 1:3} {_shown(trial.config):32} {trial.error[:60]} {mark}")
            continue
        code, (ctas, limit) = trial.code, offline.occupancy(trial.code, target)
        spills = "spills" if trial.spills else ""
        print(
            f"{i + 1:3} {_shown(trial.config):32} {trial.time * 1e3:8.4f} ms by {trial.bound:6} {trial.issued:8.3g} issued, "
            f"{code.registers:3} registers, "
            f"{ctas} CTAs by {limit:13} {spills} {mark}"
        )


def _shown(config) -> str:
    if isinstance(config, tuple) and hasattr(config[0], "M"):
        config = f"{config[0].M}x{config[0].N}, warps {config[1]}, stages {config[2]}"
    return str(config)
