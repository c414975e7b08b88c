"""Options of the compiler that a kernel's target asks for."""

import functools
from dataclasses import replace

from triton.compiler import CompiledKernel

# of an SM, in every CUDA GPU since compute capability 5.0
_REGISTERS = 65536
_MOST_REGISTERS = 255


def target_options(kernel):
    """Have a kernel of triton.jit compile with the options that its target asks for, beside those it is launched with:
    whatever Triton specialises on, each variant is settled before its first launch and the same in every process.

    num_warps is in warps of 32 lanes. On CUDA ptxas spills a few registers where that makes room for one more program per
    SM: such programs are taken away again until nothing is spilled, and where that does not help no tile is fetched ahead."""
    # the interpreter compiles nothing
    if hasattr(kernel, "_do_compile"):
        kernel._do_compile = functools.partial(_compile, kernel._do_compile)
    return kernel


def _compile(compile_once, key, signature, device, constexprs, options, attrs, warmup):
    if getattr(options, "warp_size", 32) == 64:
        # products of 16 x 16 hold half as many keys per lane as the 32 x 32 that the compiler prefers, and so half of what
        # is loaded for each key
        options = replace(options, num_warps=max(options.num_warps // 2, 1), matrix_instr_nonkdim=16)
    while True:
        compiled = compile_once(key, signature, device, constexprs, options, attrs, warmup)
        # compiled in the background it is not there yet
        if options.backend_name != "cuda" or not isinstance(compiled, CompiledKernel):
            return compiled
        # as in Triton's tutorial of fused softmax
        compiled._init_handles()
        more = more_registers(max(compiled.n_regs, options.maxnreg or 0), options.num_warps)
        if compiled.n_spills and more is not None:
            options = replace(options, maxnreg=more)
        elif compiled.n_spills and options.num_stages > 1:
            options = replace(options, maxnreg=None, num_stages=1)
        else:
            return compiled


def more_registers(n_registers, num_warps):
    """The next number of registers per thread that costs resident programs on an SM, None if there is none."""
    # registers are given out eight by eight
    n_programs = _REGISTERS // (32 * num_warps * -(-n_registers // 8) * 8)
    for n in range(n_programs - 1, 0, -1):
        most = min(_REGISTERS // (32 * num_warps * n) // 8 * 8, _MOST_REGISTERS)
        if most > n_registers:
            return most
    return None
