"""Tile shapes, warps and stages of a kernel, ranked by the time model: evidence for the `_launch_config` functions."""

from __future__ import annotations

from importlib import import_module
from itertools import product
from typing import NamedTuple
from unittest import mock

from tqdm import tqdm

from . import audit, machine_code, offline, time_model


def _attention(config):
    tile, _, _ = config
    for m, n, num_warps, num_stages in product((16, 32, 64, 128), (16, 32, 64), (1, 2, 4, 8), (1, 2, 3)):
        # a warp needs 16 rows for a tensor instruction, and too many rows per warp do not fit into registers
        if 16 <= m / num_warps <= 64:
            yield tile._replace(M=m, N=n), num_warps, num_stages


def _hashing(config):
    _, block_d, *_ = config
    for block_m, block_w, num_warps, num_stages in product((64, 128, 256), (16, 32, 64), (4, 8), (1, 2)):
        yield block_m, block_d, block_w, num_warps, num_stages


def _combine_rounds(config):
    block_m, block_d, _ = config
    for rows, num_warps in product((block_m // 2, block_m, 2 * block_m, 4 * block_m), (1, 2, 4, 8)):
        if rows:
            yield rows, block_d, num_warps


# module of csrc_triton: what its `_launch_config` may return, given what it does return
SPACES = {
    "attention_fwd": _attention,
    "attention_bwd": _attention,
    "hashing": _hashing,
    "bucket_sort": lambda num_warps: (1, 2, 4, 8),
    "combine_rounds": _combine_rounds,
}


class Trial(NamedTuple):
    """One configuration: seconds of all launches of the kernels that it configures; code of the slowest."""

    config: object
    shipped: bool
    time: float
    bound: str
    code: machine_code.Code | None
    error: str

    @property
    def rank(self):
        return bool(self.error), self.code is not None and self.code.spills, self.time


def sweep(module_name: str, case: audit.Case, target: str = "sm_90") -> list[Trial]:
    """Trials of the configurations of a module's kernels, the fastest first, those that spill or do not compile last. The
    rates are those of `time_model.H100`, whatever the target."""
    module = import_module(f"lsh_kernels.csrc_triton.{module_name}")
    card = time_model.H100._replace(target=target)
    original, configs = module._launch_config, []

    def record(*arguments):
        configs.append(original(*arguments))
        return configs[-1]

    with mock.patch.object(module, "_launch_config", record):
        launches = _launches(target, case)
    shipped = configs[0]
    others = {launched.name for launched in launches} - _kernels_of(module)
    trials = []
    candidates = dict.fromkeys([shipped, *SPACES[module_name](shipped)])
    for config in tqdm(candidates, desc=f"{module_name} {target}", leave=False):
        with mock.patch.object(module, "_launch_config", lambda *arguments, config=config: config):
            launches = [launched for launched in _launches(target, case) if launched.name not in others]
        errors = [launched.error for launched in launches if launched.error]
        if errors:
            trials.append(Trial(config, config == shipped, 0.0, "", None, errors[0]))
            continue
        stages = [time_model.stage_of(launched, card) for launched in launches]
        slowest = max(range(len(stages)), key=lambda i: stages[i].time)
        time = sum(stage.time for stage in stages)
        code = machine_code.inspect(launches[slowest].kernel)
        trials.append(Trial(config, config == shipped, time, stages[slowest].bound, code, ""))
    return sorted(trials, key=lambda trial: trial.rank)


def print_trials(trials: list[Trial], target: str, n_best: int = 10):
    """The best ones, and the shipped one wherever it is."""
    for i, trial in enumerate(trials):
        if i >= n_best and not trial.shipped:
            continue
        config = trial.config
        if isinstance(config, tuple) and hasattr(config[0], "M"):
            config = f"{config[0].M}x{config[0].N}, warps {config[1]}, stages {config[2]}"
        mark = "shipped" if trial.shipped else ""
        if trial.error:
            print(f"{i + 1:3} {config!s:32} {trial.error[:60]} {mark}")
            continue
        ctas, limit = offline.occupancy(trial.code, target)
        spills = f"spills {trial.code.stack} B" if trial.code.spills else ""
        print(
            f"{i + 1:3} {config!s:32} {trial.time * 1e3:8.4f} ms by {trial.bound:6} {trial.code.registers:3} registers, "
            f"{ctas} CTAs by {limit:13} {spills} {mark}"
        )


def _launches(target, case):
    with offline.compile_only(target) as launches:
        audit.launch(case)
    return launches


def _kernels_of(module):
    return {name for name in vars(module) if name.endswith("_kernel")}
