"""The compiler's options that a target asks for: registers until nothing is spilled, warps of 64 lanes."""

from dataclasses import replace

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
        return Loaded(*usage(options))

    return _compile(compile_once, None, None, 0, {}, options, {}, False), tried


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
def test_options_more_registers_cost_programs(num_warps):
    n_registers, programs = 8, 65536 // (32 * num_warps * 8)
    while (more := more_registers(n_registers, num_warps)) is not None:
        assert n_registers < more <= 255
        # as many as fit beside as many programs
        n_programs = 65536 // (32 * num_warps * -(-more // 8) * 8)
        assert n_programs < programs and (more == 255 or 32 * num_warps * (more + 8) * n_programs > 65536)
        n_registers, programs = more, n_programs
    assert n_registers == 255 or programs == 1


def test_options_registers_until_nothing_is_spilled():
    """At 72 registers and two warps one program less leaves no eight more to each thread."""
    options = CUDAOptions(arch="sm90", num_warps=2)
    kernel, tried = compiled_with(options, lambda options: (72, 3) if (options.maxnreg or 72) < 88 else (84, 0))
    assert kernel.n_spills == 0 and [o.maxnreg for o in tried] == [None, 80, 88]
    kernel, tried = compiled_with(options, lambda options: (72, 0))
    assert [o.maxnreg for o in tried] == [None]


def test_options_fetch_nothing_ahead_where_registers_do_not_help():
    options = CUDAOptions(arch="sm90", num_warps=4, num_stages=2)
    kernel, tried = compiled_with(options, lambda options: (255, 4 * (options.num_stages > 1)))
    assert kernel.n_spills == 0 and [(o.num_stages, o.maxnreg) for o in tried] == [(2, None), (1, None)]


@pytest.mark.parametrize("n_registers", [128, 254, 255])
def test_options_end_where_a_stack_remains(n_registers):
    kernel, tried = compiled_with(CUDAOptions(arch="sm90", num_warps=4), lambda options: (n_registers, 1))
    assert kernel.n_spills == 1 and len({(o.maxnreg, o.num_stages) for o in tried}) == len(tried) <= 6


@pytest.mark.parametrize(("arch", "num_warps", "wanted"), [("gfx942", 4, 2), ("gfx942", 1, 1), ("gfx1100", 4, 4)])
def test_options_halve_warps_of_64_lanes(arch, num_warps, wanted):
    before = HIPOptions(arch=arch, num_warps=num_warps)
    _, (after,) = compiled_with(before, lambda options: (255, 9))
    assert after == (replace(before, num_warps=wanted, matrix_instr_nonkdim=16) if arch == "gfx942" else before)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_options_leave_no_spill_on_this_gpu(head_dim):
    """The driver agrees with what the machine code said offline."""
    qk, v = (torch.randn(1, 2, 512, head_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(2))
    lsh_attention(qk, None, v, is_causal=True, backend="triton").sum().backward()
    kernels = (
        attention_fwd._attention_fwd_kernel, attention_bwd._attention_bwd_kernel, hashing._hashing_fwd_kernel,
        combine_rounds._combine_rounds_fwd_kernel, combine_rounds._combine_rounds_bwd_kernel,
    )  # fmt: skip
    for kernel in kernels:
        variants = kernel.device_caches[torch.cuda.current_device()][0].values()
        assert variants and all(compiled.n_spills == 0 for compiled in variants), kernel
