"""Measures cases, and the machine: seconds of calls, extra peak memory, rates of a large copy and a large matmul.

On a GPU `triton.testing.do_bench` times one provider after the other, the L2 cache flushed before each run; a call of over
15 ms, to which that cache is nothing, runs three times, one of over a second once. On a CPU a round runs each provider of a
case once, so that a drift of the machine meets all of them.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from functools import cache

import torch
from cases import AbsentError

from lsh_kernels.functional import triton_problem
from lsh_kernels.measure import machine, peak, start_of_peak

MIN_ROUNDS, MAX_ROUNDS = 3, 15
# ms of a call on a GPU
LONG, VERY_LONG = 15, 1000
# where the GPU answers nothing more: exit status, start of the reason
DEVICE_LOST, LOST = 3, "the GPU was lost: "

_FAILED_GRAPHS = []


class BudgetSpentError(Exception):
    """The time budget is spent; what was measured is written."""


class DeviceLostError(Exception):
    """The GPU answers nothing more in this process; what was measured is written."""


class Budget:
    """Seconds that a run may take (None: no limit)."""

    def __init__(self, seconds=None):
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    def is_spent(self):
        return time.monotonic() >= self.end

    def check(self):
        if self.is_spent():
            raise BudgetSpentError


def measure(case, settings, budget, emit, seconds, child):
    """Measure a case; call `emit(provider, numbers)` once per provider, also for those that failed and those half done.

    Args:
        budget: a `Budget`, checked between calls.
        emit: takes a dict of status, reason, and either ms_min, ms_p20, ms_p50, ms_p80, ms_max, runs, or peak_mib, or drift.
        seconds: what the rounds of one case should take, between `MIN_ROUNDS` and `MAX_ROUNDS` of them; 0: one.
        child: command of a process that prints the peak of one provider of this case, for measure="memory" on a CPU.

    Raises:
        BudgetSpentError, DeviceLostError, KeyboardInterrupt: after what was measured is emitted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    try:
        if case.measure == "memory":
            _each(case, budget, emit, lambda name: {"peak_mib": _peak(case, settings, child, name) - case.result_bytes / 2**20})
        elif case.measure == "drift":
            _each(case, budget, emit, lambda name: {"drift": case.builds[name]()()})
        elif settings.device.type == "cuda":
            _each(case, budget, emit, lambda name: _time_on_gpu(case, name, budget))
        else:
            _alternate(case, budget, emit, seconds)
    finally:
        torch.set_num_threads(threads)


def _failure(error):
    """The row of a provider that raised: "absent" with its reason, or "failed" with the first line of the error."""
    status = "absent" if isinstance(error, AbsentError) else "failed"
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in message:
        message = f"out of memory: {message}"
    return {"status": status, "reason": message[:160]}


def _each(case, budget, emit, numbers):
    for name in case.builds:
        budget.check()
        try:
            result = {"status": "ok", **numbers(name)}
        except BudgetSpentError:
            raise
        except Exception as error:
            result = _failure(error)
        lost = False
        if torch.cuda.is_initialized():
            try:
                # after an illegal access every call raises, until the process ends
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                lost, result = True, {"status": "failed", "reason": f"{LOST}{result.get('reason') or error}"[:160]}
        emit(name, result)
        if lost:
            raise DeviceLostError


def _alternate(case, budget, emit, seconds):
    """Rounds of one call each; the first one warms up and tells how many there can be."""
    calls, times, failures, spent = {}, {name: [] for name in case.builds}, {}, 0.0
    try:
        for name, build in case.builds.items():
            budget.check()
            try:
                calls[name] = build()
                start = time.perf_counter()
                calls[name]()
                spent += time.perf_counter() - start
            except Exception as error:
                failures[name] = error
                calls.pop(name, None)
        fewest = MIN_ROUNDS if seconds else 1
        n_rounds = max(fewest, int(min(seconds / spent, MAX_ROUNDS))) if calls else 0
        for _ in range(n_rounds):
            for name, call in list(calls.items()):
                budget.check()
                start = time.perf_counter()
                try:
                    call()
                    times[name].append(time.perf_counter() - start)
                except Exception as error:
                    failures[name] = error
                    del calls[name]
    finally:
        for name in case.builds:
            if name in failures:
                emit(name, _failure(failures[name]))
            elif times[name]:
                emit(name, {"status": "ok", **_spread([1e3 * t for t in times[name]])})


def _spread(ms):
    ms = sorted(ms)
    p20, p80 = (ms[0], ms[-1]) if len(ms) < 2 else (q := statistics.quantiles(ms, n=5, method="inclusive"))[:1] + q[-1:]
    return {
        "ms_min": ms[0], "ms_p20": p20, "ms_p50": statistics.median(ms), "ms_p80": p80, "ms_max": ms[-1], "runs": len(ms),
    }  # fmt: skip


def _time_on_gpu(case, name, budget):
    from triton.testing import do_bench

    call = case.builds[name]()
    call()
    torch.cuda.synchronize()
    budget.check()
    # a graph reads the memory of the inputs that the call keeps
    run = _captured(call) if case.measure == "graph" else call
    times = _events(run, 1)
    if times[0] > LONG:
        # do_bench runs a call at least eight times
        while len(times) < MIN_ROUNDS and times[0] <= VERY_LONG and not budget.is_spent():
            times += _events(run, 1)
        return _spread(times)
    return _spread(do_bench(run, warmup=10, rep=60, return_mode="all"))


def _events(call, n):
    times = []
    for _ in range(n):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def _captured(call):
    """The call as a CUDA graph: what is left when launches wait for nothing on the host."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        call()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        # else its stream stays the current one, and every later draw of random numbers raises: the generator still awaits the
        # capture's end; the allocator still asks the graph
        _FAILED_GRAPHS.append(graph)
        torch.cuda.set_stream(current)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator(generator.device))
        # the capture's end raises as well, and says less
        raise error.__context__ or error from None
    return graph.replay


def _peak(case, settings, child, name):
    """Extra peak MiB of one call: on a GPU its allocator's, on a CPU that of a process of its own."""
    if settings.device.type == "cuda":
        call = case.builds[name]()
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # what can't be set up needs no process
    case.builds[name]()
    # glibc then gives back what is freed, so that the resident set is what is in use
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, *child, name], capture_output=True, text=True, env=env)
    if done.returncode < 0:
        raise MemoryError(f"the process was ended by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        kind, _, message = lines[-1].partition(": ")
        raise (AbsentError if kind.endswith("AbsentError") else RuntimeError)(message or kind)
    return float(done.stdout)


def own_peak_mib(case, warm_case, name):
    """Extra peak of this process in one call of `case`, after one of the short `warm_case`."""
    warm_case.builds[name]()()
    call = case.builds[name]()
    resting = start_of_peak()
    call()
    return (peak() - resting) / 2**20


@cache
def matmul_gflops(device="cpu", dtype=torch.float32):
    """The rate of a large matmul on this device: the best of a few."""
    n = 2048 if torch.device(device).type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _best(lambda: a @ a, device) / 1e9


@cache
def copy_gbs(device="cpu"):
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e9


def _best(call, device):
    if torch.device(device).type == "cuda":
        call()
        return min(_events(call, 20)) / 1e3
    times = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def provenance(settings, commit=None) -> dict:
    """The fields of a row that say where its numbers come from."""
    facts = machine()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "cpu": facts["cpu"], "cores": facts["cores"], "torch": facts["torch"], "triton": triton,
        "commit": commit or facts["commit"], "device": device_name(settings.device),
        "matmul_gflops": matmul_gflops(settings.device, settings.dtype), "copy_gbs": copy_gbs(settings.device),
    }  # fmt: skip


def device_name(device) -> str:
    """The GPU's name, "cpu", or "cpu, interpreted Triton"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu" if triton_problem(torch.empty(0)) else "cpu, interpreted Triton"


def machine_name(device: str | torch.device = "cpu") -> str:
    """The stem of this machine's CSV."""
    facts, device = machine(), torch.device(device)
    name = f"{facts['cpu']} {facts['cores']} cores {platform.machine()}" if device.type == "cpu" else device_name(device)
    return re.sub(r"\W+", "_", name).lower()
