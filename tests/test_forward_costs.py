"""What a forward call costs, without a GPU: launches, host time with the launches stubbed out, DRAM bytes."""

import statistics
import time

import numpy as np
import pytest
import torch

from lsh_kernels import LSHConfig, lsh_attention

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")


@pytest.fixture
def launches(monkeypatch, device):
    """Names of the kernels launched, in order; nothing runs if `launches.stub` is set."""
    if device.type != "cpu":
        pytest.skip("counts launches of Triton's interpreter")
    run = interpreter.InterpretedFunction.run

    class Launches(list):
        stub = False

    seen = Launches()

    def counted(self, *args, **kwargs):
        seen.append(self.fn.__name__)
        return None if seen.stub else run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)
    return seen


@pytest.mark.parametrize("n_buckets, most", [(8, 6), (256, 6), ((16, 32), 9), (512, 9)])
def test_forward_takes_few_launches(launches, n_buckets, most):
    qk, v = torch.randn(2, 1, 1, 40, 16)
    lsh_attention(qk, None, v, config=LSHConfig(n_buckets=n_buckets), is_causal=True, backend="triton")
    assert launches[0] == "_hashing_fwd_kernel" and launches[-1] == "_combine_rounds_fwd_kernel"
    assert len(launches) <= most, launches


def test_forward_host_time_is_short(launches):
    # the buffers are garbage if nothing runs: filling them with NaN is the tests' own affair
    torch.use_deterministic_algorithms(False)
    try:
        launches.stub = True
        qk, v = torch.randn(2, 1, 1, 64, 64)
        config, times = LSHConfig(), []
        for _ in range(300):
            start = time.perf_counter()
            lsh_attention(qk, None, v, config=config, is_causal=True, backend="triton")
            times.append(time.perf_counter() - start)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    # what is wanted is 150 us; measured are 210 (2-core EPYC, idle), so this guards against more, on a busy machine too
    microseconds = statistics.quantiles(times, n=5)[0] * 1e6
    print(f"host time per forward call: {microseconds:.0f} us")
    assert microseconds <= 600


class Traffic:
    """Distinct bytes that a launch loads and stores: what DRAM sees where an L2 serves every second access."""

    def __init__(self, module):
        self.module, self.addresses, self.accessed = module, {"load": [], "store": []}, {"load": 0, "store": 0}

    def load(self, pointers, mask, other, dtype):
        self.count("load", pointers[mask], np.dtype(dtype).itemsize)
        return self.module.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.count("store", pointers[mask], value.dtype.itemsize)
        return self.module.store(pointers, value, mask)

    def count(self, kind, pointers, itemsize):
        self.accessed[kind] += pointers.size * itemsize
        self.addresses[kind].append((pointers.ravel().copy(), itemsize))

    def distinct(self):
        total = 0
        for accesses in self.addresses.values():
            for size in {itemsize for _, itemsize in accesses}:
                pointers = [p for p, itemsize in accesses if itemsize == size]
                total += size * np.unique(np.concatenate(pointers)).size
        return total

    def __getattr__(self, name):
        return getattr(self.module, name)


def test_forward_dram_traffic_is_near_its_floor(launches, monkeypatch):
    L, floor, bar = 512, 1408, 1760
    run, rows = interpreter.InterpretedFunction.run, []

    def counted(self, *args, **kwargs):
        traffic = Traffic(interpreter._interpreter)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter, "_interpreter", traffic)
            run(self, *args, **kwargs)
        rows.append((self.fn.__name__, traffic.distinct() / L, sum(traffic.accessed.values()) / L))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)
    # 16-bit elements, D = Dv = 64, R = 4
    qk, v = torch.randn(2, 1, 1, L, 64, dtype=torch.float16)
    lsh_attention(qk, None, v, config=LSHConfig(), is_causal=True, backend="triton")
    for name, distinct, accessed in rows:
        print(f"{name:32} {distinct:7.0f} bytes per token and head from DRAM, {accessed:7.0f} accessed")
    total = sum(distinct for _, distinct, _ in rows)
    print(f"{'total':32} {total:7.0f}, floor {floor}, bar {bar}")
    assert floor <= total <= bar
