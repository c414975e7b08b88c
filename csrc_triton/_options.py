"""Options of the compiler that a kernel's target asks for."""

import functools
from dataclasses import replace

from triton.compiler import CompiledKernel

# of an SM, in every CUDA GPU since compute capability 5.0, a quarter of them with each of its schedulers
_REGISTERS = 65536
_MOST_REGISTERS = 255


def target_options(kernel):
    """Have a kernel of triton.jit compile with the options that its target asks for, beside those it is launched with, in
    whatever variants Triton compiles it: launches go on as before.

    num_warps is in warps of 32 lanes. On CUDA ptxas spills a few registers where that makes room for one more program per
    SM: such programs are taken away again until nothing is spilled, and where that does not help no tile is fetched ahead.
    What is compiled in the background stays as the compiler leaves it."""
    # the interpreter compiles nothing
    if hasattr(kernel, "_do_compile"):
        kernel._do_compile = functools.partial(_compile, kernel._do_compile)
    return kernel


def _compile(compile_once, key, signature, device, constexprs, options, attrs, warmup):
    def compile_with(options):
        return compile_once(key, signature, device, constexprs, options, attrs, warmup)

    # a kernel compiled ahead comes again with the options that it got
    if getattr(options, "warp_size", 32) == 64 and not options.matrix_instr_nonkdim:
        # products of 16 x 16 hold half as many keys per lane as the 32 x 32 that the compiler prefers, and so half of what
        # is loaded for each key
        options = replace(options, num_warps=max(options.num_warps // 2, 1), matrix_instr_nonkdim=16)
    compiled = compile_with(options)
    if options.backend_name != "cuda" or not isinstance(compiled, CompiledKernel):
        return compiled
    best, best_options = compiled, options
    while True:
        # as in Triton's tutorial of fused softmax
        compiled._init_handles()
        if compiled.n_spills < best.n_spills:
            best, best_options = compiled, options
        more = more_registers(max(compiled.n_regs, options.maxnreg or 0), options.num_warps)
        if compiled.n_spills and more is not None:
            options = replace(options, maxnreg=more)
        elif compiled.n_spills and options.num_stages > 1:
            options = replace(options, maxnreg=None, num_stages=1)
        else:
            # the last one compiled is the one that Triton keeps
            return compiled if best is compiled else compile_with(best_options)
        compiled = compile_with(options)


def more_registers(n_registers, num_warps):
    """The most registers per thread with which an SM holds as many programs as with the least more than n_registers, None
    if there are no more."""

    def n_programs(n):
        return 4 * (_REGISTERS // 4 // (32 * n)) // num_warps

    # they are given out eight by eight
    least = n_registers // 8 * 8 + 8
    fitting = [n for n in range(least, _MOST_REGISTERS + 2, 8) if n_programs(n) == n_programs(least) > 0]
    return min(fitting[-1], _MOST_REGISTERS) if fitting and n_registers < _MOST_REGISTERS else None
