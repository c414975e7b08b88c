"""The audit on kernels with known properties: what it reads of their machine code, and its sweep.

Run as a script this file compiles KERNELS, below, and prints what the audit says of them as JSON. That needs a process of its
own: TRITON_INTERPRET, which the other tests rely on, breaks compilation.
"""

import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future

import pytest

from lsh_kernels import audit, audit_cases

if __name__ == "__main__":
    import torch
    import triton
    import triton.language as tl

    from lsh_kernels import LSHConfig, machine_code, offline, sweep, time_model

    @triton.jit
    def gather_kernel(x_ptr, index_ptr, out_ptr, row_stride, column_stride, BLOCK: tl.constexpr, MASKED: tl.constexpr):
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, 64)
        index = tl.load(index_ptr + rows)
        ptrs = x_ptr + index[:, None] * row_stride + columns[None, :] * column_stride
        if MASKED:
            x = tl.load(ptrs, mask=(index >= 0)[:, None], other=0.0)
        else:
            x = tl.load(ptrs)
        tl.store(out_ptr + rows[:, None] * 64 + columns[None, :], x)

    @triton.jit
    def walk_kernel(x_ptr, y_ptr, out_ptr, n, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
        rows, columns = tl.arange(0, M), tl.arange(0, N)
        x = tl.load(x_ptr + rows[:, None] * N + columns[None, :])
        acc = tl.zeros([M, N], tl.float32)
        for i in range(n):
            y = tl.load(y_ptr + i * N * N + columns[:, None] * N + columns[None, :])
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
        tl.store(out_ptr + rows[:, None] * N + columns[None, :], acc)

    @triton.jit
    def crowded_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
        x = tl.load(x_ptr + rows[:, None] * BLOCK + columns[None, :])
        total = tl.sum(x, 1)
        y = tl.load(y_ptr + rows)
        tl.store(out_ptr + rows[:, None] * BLOCK + columns[None, :], x * (total + y)[:, None])

    @triton.jit
    def switch_kernel(x_ptr, index_ptr, out_ptr, n, BLOCK: tl.constexpr):
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, 64)
        ptrs = x_ptr + tl.load(index_ptr + rows)[:, None]
        out_ptrs = out_ptr + rows[:, None] * 64 + columns[None, :]
        if n == 0:
            tl.store(out_ptrs, tl.load(x_ptr + rows[:, None] * 64 + columns[None, :]))
        elif n == 1:
            tl.store(out_ptrs, tl.load(ptrs + columns[None, :] * 3) * 2)
        elif n == 2:
            tl.atomic_add(out_ptrs, tl.load(ptrs + columns[None, :] * 5))
        elif n == 3:
            tl.store(out_ptrs, tl.exp(tl.load(ptrs + columns[None, :] * 7).to(tl.float32)))

    @triton.jit
    def broken_kernel(x_ptr, BLOCK: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros([2 * BLOCK], tl.float32))

    def tensor(dtype=torch.float16):
        return torch.empty(4096, dtype=dtype, device="meta")

    def gather(column_stride=1, block=64, masked=False):
        gather_kernel[(7,)](tensor(), tensor(torch.int32), tensor(), 64, column_stride, BLOCK=block, MASKED=masked)

    def switch():
        switch_kernel[(7,)](tensor(), tensor(torch.int32), tensor(), 7, BLOCK=64)

    def walk(dtype=torch.float16, m=64, n=64, precision="ieee", num_stages=2):
        x = tensor(dtype)
        walk_kernel[(7,)](x, x, tensor(torch.float32), 10, M=m, N=n, PRECISION=precision, num_stages=num_stages)

    def crowded(num_warps, block=128):
        x = tensor(torch.float32)
        crowded_kernel[(1,)](x, x, x, BLOCK=block, num_warps=num_warps)

    KERNELS = {
        "gather": gather,
        "gather of strided columns": lambda: gather(column_stride=3),
        "gather, masked": lambda: gather(masked=True),
        "gather of 128 rows": lambda: gather(block=128),
        # large enough that LLVM leaves their loops alone: it unrolls small ones, which the audit can't tell
        "dot": lambda: walk(n=128),
        "dot of 128 rows": lambda: walk(m=128, n=128),
        # a group of four warps works on 64
        "dot of 16 rows": lambda: walk(m=16, n=128),
        "dot in IEEE fp32": lambda: walk(torch.float32),
        "dot in TF32": lambda: walk(torch.float32, precision="tf32"),
        # few stages of large tiles: in triton 3.9 LLVM needs minutes for many stages on AMD
        "dot of too large tiles": lambda: walk(n=256, num_stages=3),
        "few registers": lambda: crowded(num_warps=16),
        "broken": lambda: broken_kernel[(1,)](tensor(torch.float32), BLOCK=16),
    }
    # AMD has 512 vector registers per lane, and warps of 64
    SPILLS = {"sm_90": lambda: crowded(num_warps=1), "gfx942": lambda: crowded(num_warps=1, block=256)}

    def measure_all(target):
        for name, launch in (KERNELS | {"spills": SPILLS[target]}).items():
            with offline.compile_only(target) as launches:
                launch()
            (launched,) = launches
            row = audit.measure(launched, target)
            if not launched.error:
                code = machine_code.inspect(launched.kernel)
                row["issue"] = [code.total("issue", (trips,)) for trips in range(4)]
                row["flops"] = [code.total("flops", (trips,)) for trips in range(4)]
                row["rows"] = [code.total("row_load", (trips,)) for trips in range(4)]
            yield name, row

    def compiled(target, *calls):
        with offline.compile_only(target) as launches:
            for launch in calls:
                launch()
        return [launched.kernel for launched in launches]

    def refusal(kernel):
        try:
            machine_code.inspect(kernel)
        except ValueError as error:
            return str(error)

    report = {target: dict(measure_all(target)) for target in sys.argv[1:]}
    report["switch"] = [refusal(*compiled("sm_90", switch)), machine_code.inspect(*compiled("gfx942", switch)).counts]
    several = compiled("sm_90", *(launch for name, launch in KERNELS.items() if not report["sm_90"][name]["error"]))
    one_by_one = [machine_code.inspect(kernel) for kernel in several]
    with tempfile.TemporaryDirectory() as triton.knobs.cache.dir:
        # where nothing is kept yet
        report["at once"] = machine_code.inspect_all(several) == one_by_one

    class Inline:
        """A pool that does what it is given at once, in this process."""

        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

    # the last two: too many elements per thread, more than a tile may have
    configs = [(512, 4), (1024, 1), (4096, 1), (2**21, 4)]
    residual = sweep.SPACES["residual_fwd"]
    sweep.SPACES["residual_fwd"] = residual._replace(candidates=lambda config, call: [config, *configs])
    (trials,) = sweep.sweep("residual_fwd", audit_cases.Case(residual=True), "sm_90", Inline())
    report["sweep"] = [trial._replace(code=None) for trial in trials], sweep.summary(trials, "residual_fwd")
    # a kernel's candidates do not change the others, and each call has its own
    sweep.SPACES["bucket_sort_scan"] = sweep.SPACES["bucket_sort_scan"]._replace(candidates=lambda config, call: [(8, 2)])
    case = audit_cases.Case(LSHConfig(n_buckets=(128, 130)))
    found = sweep.sweep("bucket_sort_scan", case, "sm_90", Inline())
    scans = [stage.time for stage in time_model.stages(case) if "scan" in stage.kernel]
    report["sweep of two calls"] = [[(trial.config, trial.shipped, trial.time) for trial in trials] for trials in found], scans
    report["sweep of none"] = sweep.sweep("stretched_intervals", audit_cases.Case(residual=True), "sm_90", Inline())
    print(json.dumps(report))
    sys.exit()


@functools.cache
def measured():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, "sm_90", "gfx942"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TARGETS = ("sm_90", "gfx942")


@pytest.mark.parametrize("target", TARGETS)
def test_audit_finds_spills(target):
    rows = measured()[target]
    for what in ("stack", "spill_stores", "spill_loads"):
        assert rows["few registers"][what] == 0
    assert rows["spills"]["stack"] > 0 and rows["spills"]["spill_stores"] > 0
    assert rows["spills"]["spill_loads"] > 0 or target == "gfx942"


@pytest.mark.parametrize("target", TARGETS)
def test_audit_tells_tensor_cores_from_fma(target):
    rows = measured()[target]
    for name, row in rows.items():
        if name.startswith("dot") and not row["error"]:
            # AMD's tensor cores take float32 as it is
            by_fma = "IEEE" in name and target == "sm_90"
            path = "" if by_fma else "MFMA" if target == "gfx942" else "HMMA" if "16 rows" in name else "HGMMA"
            assert (row["tensor"] > 0, row["fma_dots"], row["tensor_path"]) == (not by_fma, by_fma, path), name
    assert all(rows[name]["tensor"] == rows[name]["fma_dots"] == 0 for name in ("gather", "few registers"))


@pytest.mark.parametrize("target", TARGETS)
def test_audit_counts_flops_per_trip(target):
    """2 m n k of a tile product, once per trip."""
    rows = measured()[target]
    for name, m in (("dot", 64), ("dot of 128 rows", 128)):
        flops, issue = rows[name]["flops"], rows[name]["issue"]
        per_trip = {b - a for a, b in zip(flops, flops[1:])}
        assert per_trip == {2 * m * 128 * 128}, name
        assert issue[3] - issue[2] == issue[2] - issue[1] > 0
        assert rows[name]["sass_in_loops"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_audit_counts_bytes_of_rows_per_trip(target):
    """Of the tile that a trip loads, fetched ahead or not."""
    rows = measured()[target]
    for name, itemsize, n in (("dot", 2, 128), ("dot of 128 rows", 2, 128), ("dot in IEEE fp32", 4, 64)):
        fetched = rows[name]["rows"]
        assert {b - a for a, b in zip(fetched, fetched[1:])} == {n * n * itemsize}, name


@pytest.mark.parametrize("target", TARGETS)
def test_audit_finds_scalar_gathers(target):
    rows = measured()[target]
    assert rows["gather"]["row_load_128_share"] == "1.000"
    assert rows["gather"]["load_128"] == 64 * 64 * 2 and rows["gather"]["store_128"] == 64 * 64 * 2
    strided = rows["gather of strided columns"]
    assert strided["row_load_128_share"] == "0.000"
    assert strided["load_16"] == 64 * 64 * 2 and strided["load_128"] == 0


def test_audit_sweep_ranks_what_compiles_and_does_not_spill_by_time():
    trials, row = measured()["sweep"]
    configs, shipped, times, issued, _, _, _, errors = zip(*trials)
    assert set(map(tuple, configs)) == {(1024, 4), (512, 4), (1024, 1), (4096, 1), (2**21, 4)}
    assert configs[-2:] == ([4096, 1], [2**21, 4]) and errors[-1] and not any(errors[:-1])
    assert list(times[:3]) == sorted(times[:3]) and all(times[:4])
    assert [config for config, was in zip(configs, shipped) if was] == [[1024, 4]]
    assert (row["shipped"], row["best"]) == ("(1024, 4)", str(tuple(configs[0])))
    assert (row["shipped_rank"], row["n_trials"]) == (1 + configs.index([1024, 4]), 5)
    # not the one that spills
    assert row["fewest"] == str(tuple(configs[issued.index(min(issued[:3]))])) and float(row["fewest_issued"]) > 0


def test_audit_sweep_judges_each_call_by_its_own_launches():
    found, scans = measured()["sweep of two calls"]
    assert len(found) == len(scans) == 2
    for trials, scan in zip(found, scans):
        assert [time for _, shipped, time in trials if shipped] == [scan]
        assert [config for config, shipped, _ in trials if not shipped] == [[8, 2]]
    assert measured()["sweep of none"] == []


def test_audit_sweep_knows_every_kernel():
    pytest.importorskip("triton")
    from lsh_kernels import csrc_triton, sweep

    modules = [importlib.import_module(f"lsh_kernels.csrc_triton.{m.name}") for m in pkgutil.iter_modules(csrc_triton.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {f"_{name}_kernel" for name in sweep.SPACES} == set(audit_cases.WORK)
    functions = {(m.__name__.rpartition(".")[2], name) for m in modules for name in vars(m) if name.endswith("_launch_config")}
    assert functions == {space[:2] for space in sweep.SPACES.values()}


def test_audit_reads_many_kernels_as_it_reads_one():
    assert measured()["at once"]


def test_audit_follows_a_switch_or_says_that_it_does_not():
    refused, counts = measured()["switch"]
    assert "table" in (refused or "")
    assert sum(found.get("row_load", 0) for found in counts.values()) == 4 * 64 * 64 * 2
    assert sum(found.get("row_load_128", 0) for found in counts.values()) == 64 * 64 * 2


@pytest.mark.parametrize("target", TARGETS)
def test_audit_finds_what_does_not_compile(target):
    rows = measured()[target]
    assert "CompilationError" in rows["broken"]["error"]
    assert "shared memory" in rows["dot of too large tiles"]["error"]
    assert not any(row["error"] for name, row in rows.items() if name not in ("broken", "dot of too large tiles"))


@pytest.mark.parametrize("target", TARGETS)
def test_audit_sees_a_mask_and_a_tile(target):
    rows = measured()[target]
    assert rows["gather, masked"]["issue"][0] > rows["gather"]["issue"][0]
    assert rows["gather of 128 rows"]["load_128"] == 2 * rows["gather"]["load_128"]
    assert rows["dot of 128 rows"]["issue"][3] > rows["dot"]["issue"][3]


@pytest.mark.parametrize(
    "registers, shared, warps, ctas, limit",
    [
        (255, 0, 4, 2, "registers"),
        (16, 100_000, 4, 2, "shared memory"),
        (16, 0, 16, 4, "warps"),
        (16, 0, 1, 32, "CTAs"),
        (129, 0, 4, 3, "registers"),
    ],
)
def test_audit_occupancy(registers, shared, warps, ctas, limit):
    """On sm_90: 65,536 registers, 64 warps, 32 CTAs and 228 KiB per SM."""
    pytest.importorskip("triton")
    from lsh_kernels import machine_code, offline

    code = machine_code.Code(registers, 0, 0, 0, shared, warps, 0, "", {})
    assert offline.occupancy(code, "sm_90") == (ctas, limit)
