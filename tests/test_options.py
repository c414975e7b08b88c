"""The compiler's options that a target asks for: registers until nothing is spilled, warps of 64 lanes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions
from triton.compiler import CompiledKernel

from lsh_kernels import lsh_attention
from lsh_kernels.csrc_triton import attention_bwd, attention_fwd, combine_rounds, hashing
from lsh_kernels.csrc_triton._options import _compile, more_registers


class Loaded(CompiledKernel):
    """What the driver says of a kernel."""

    def __init__(self, n_regs, n_spills):
        self.n_regs, self.n_spills = n_regs, n_spills

    def _init_handles(self):
        pass


def compiled_with(options, usage):
    """(what comes out, options of each compilation) where usage(options) gives registers and spills."""
    tried = []

    def compile_once(key, signature, device, constexprs, options, attrs, warmup):
        tried.append(options)
        assert len(tried) < 50, "does not end"
        found = usage(options)
        return found and Loaded(*found)

    return _compile(compile_once, None, None, 0, {}, options, {}, False), tried


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
@pytest.mark.parametrize("n_registers", [32, 65, 72, 96, 127, 128, 168, 200, 250])
def test_options_more_registers_cost_programs_and_no_more_than_needed(n_registers, num_warps):
    def n_programs(n):
        return 4 * (16384 // (32 * -(-n // 8) * 8)) // num_warps

    more = more_registers(n_registers, num_warps)
    assert n_registers < more <= 255
    # the next step up would not do with fewer programs, and one step beyond would cost more of them
    assert n_programs(more) == n_programs(n_registers // 8 * 8 + 8)
    assert more == 255 or n_programs(more + 1) < n_programs(more)


@pytest.mark.parametrize(("n_registers", "num_warps"), [(255, 4), (128, 16), (64, 32)])
def test_options_more_registers_than_there_are(n_registers, num_warps):
    assert more_registers(n_registers, num_warps) is None


def test_options_registers_until_nothing_is_spilled():
    options = CUDAOptions(arch="sm90", num_warps=2)
    kernel, tried = compiled_with(options, lambda options: (72, 3) if (options.maxnreg or 72) < 88 else (84, 0))
    assert kernel.n_spills == 0 and [o.maxnreg for o in tried] == [None, 80, 96]
    kernel, tried = compiled_with(options, lambda options: (72, 0))
    assert [o.maxnreg for o in tried] == [None]


def test_options_fetch_nothing_ahead_where_registers_do_not_help():
    options = CUDAOptions(arch="sm90", num_warps=4, num_stages=2)
    kernel, tried = compiled_with(options, lambda options: (255, 4 * (options.num_stages > 1)))
    assert kernel.n_spills == 0 and [(o.num_stages, o.maxnreg) for o in tried] == [(2, None), (1, None)]


@pytest.mark.parametrize("n_registers", [128, 254, 255])
def test_options_keep_the_first_where_nothing_helps(n_registers):
    first = CUDAOptions(arch="sm90", num_warps=4)
    _, tried = compiled_with(first, lambda options: (n_registers, 1))
    assert tried[0] == tried[-1] == first and len(set(map(str, tried))) == len(tried) - 1


@pytest.mark.parametrize("num_stages", [1, 2])
def test_options_keep_the_fewest_spills(num_stages):
    first = CUDAOptions(arch="sm90", num_warps=4, num_stages=num_stages)
    kernel, tried = compiled_with(first, lambda options: (168, 2 + abs((options.maxnreg or 168) - 250)))
    assert kernel.n_spills == 7 and tried[-1].maxnreg == 255


def test_options_leave_what_is_compiled_in_the_background():
    kernel, tried = compiled_with(CUDAOptions(arch="sm90"), lambda options: None)
    assert kernel is None and len(tried) == 1


def test_options_are_of_every_kernel():
    for path in (Path(__file__).parents[1] / "csrc_triton").glob("*.py"):
        source = path.read_text()
        kernels = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
        assert kernels == re.findall(r"^@target_options\n@triton.jit.*\ndef (\w+_kernel)\(", source, re.MULTILINE), path.name


@pytest.mark.parametrize(("arch", "num_warps", "wanted"), [("gfx942", 4, 2), ("gfx942", 1, 1), ("gfx1100", 4, 4)])
def test_options_halve_warps_of_64_lanes(arch, num_warps, wanted):
    before = HIPOptions(arch=arch, num_warps=num_warps)
    _, (after,) = compiled_with(before, lambda options: (255, 9))
    assert after == (replace(before, num_warps=wanted, matrix_instr_nonkdim=16) if arch == "gfx942" else before)
    # as for a kernel that was compiled ahead
    _, (again,) = compiled_with(after, lambda options: (255, 9))
    assert again == after


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_options_leave_no_spill_on_this_gpu(head_dim):
    """The driver agrees with what the machine code said offline."""
    kernels = (
        attention_fwd._attention_fwd_kernel, attention_bwd._attention_bwd_kernel, hashing._hashing_fwd_kernel,
        combine_rounds._combine_rounds_fwd_kernel, combine_rounds._combine_rounds_bwd_kernel,
    )  # fmt: skip
    for kernel in kernels:
        # what other tests have left
        kernel.device_caches.clear()
    qk, v = (torch.randn(1, 2, 512, head_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(2))
    lsh_attention(qk, None, v, is_causal=True, backend="triton").sum().backward()
    for kernel in kernels:
        variants = kernel.device_caches[torch.cuda.current_device()][0].values()
        assert variants and all(compiled.n_spills == 0 for compiled in variants), kernel
