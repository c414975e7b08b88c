"""Kernels compiled for GPUs that are not there, from their launchers.

Needs a process without TRITON_INTERPRET: Triton decides at import whether kernels are compiled.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .machine_code import Code, resources

KIB = 1024


class Limits(NamedTuple):
    """What one SM (AMD: compute unit) holds. Registers: 32-bit ones of all lanes."""

    target: GPUTarget
    registers: int
    warps: int
    ctas: int
    shared: int
    shared_per_cta: int
    shared_overhead: int  # what the system takes of each CTA


# CUDA C++ programming guide, "technical specifications per compute capability"; AMD CDNA 3 ISA guide
TARGETS = {
    "sm_80": Limits(GPUTarget("cuda", 80, 32), 65536, 64, 32, 164 * KIB, 163 * KIB, KIB),
    "sm_90": Limits(GPUTarget("cuda", 90, 32), 65536, 64, 32, 228 * KIB, 227 * KIB, KIB),
    "sm_100": Limits(GPUTarget("cuda", 100, 32), 65536, 64, 32, 228 * KIB, 227 * KIB, KIB),
    "sm_120": Limits(GPUTarget("cuda", 120, 32), 65536, 48, 24, 100 * KIB, 99 * KIB, KIB),
    "gfx942": Limits(GPUTarget("hip", "gfx942", 64), 4 * 512 * 64, 32, 32, 64 * KIB, 64 * KIB, 0),
}


class Launch(NamedTuple):
    """One kernel launch as its launcher made it, and what it compiled to (None: it did not, and `error` says why)."""

    name: str
    arguments: dict
    grid: int
    kernel: object
    error: str


@contextlib.contextmanager
def compile_only(target: str):
    """Launches inside compile for `target` and run nothing; yields the list of `Launch`, in order. Tensors may be meta.
    Afterwards the process still has Triton's driver for `target`, so it can launch nothing on a GPU."""
    launches, run, load = [], JITFunction.run, CompiledKernel._init_handles

    class Driver:
        def get_current_target(self):
            return TARGETS[target].target

        def get_current_device(self):
            # kernels are kept by device: no two targets may share one
            return list(TARGETS).index(target)

        def get_current_stream(self, device):
            return 0

    def only_compile(self, *args, grid, warmup, **kwargs):
        arguments = dict(zip(self.arg_names, args)) | kwargs
        kernel, error = None, ""
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            most = TARGETS[target].shared_per_cta
            if kernel.metadata.shared > most:
                error = f"{kernel.metadata.shared} bytes of shared memory, {target} has {most}"
        except Exception as failure:  # whatever the compiler's stages raise
            lines = [line.strip() for line in (str(failure).strip() or repr(failure)).splitlines() if line.strip()]
            error = f"{type(failure).__name__}: {lines[0]} .. {lines[-1]}"[:200]
        launches.append(Launch(self.fn.__name__, arguments, math.prod(grid), None if error else kernel, error))
        return kernel

    def describe(kernel):
        # what the driver says of a kernel once it is loaded
        kernel.n_regs, stack = resources(kernel)
        kernel.n_spills = stack // 4

    triton.runtime.driver.set_active(Driver())
    JITFunction.run, CompiledKernel._init_handles = only_compile, describe
    try:
        yield launches
    finally:
        JITFunction.run, CompiledKernel._init_handles = run, load


def occupancy(code: Code, target: str) -> tuple[int, str]:
    """(resident CTAs per SM, what limits them)."""
    sm, warp = TARGETS[target], TARGETS[target].target.warp_size
    # each of the four schedulers has a quarter of the registers and hands them to its warps in units of 8 per lane
    per_warp = -(-max(code.registers, 1) // 8) * 8 * warp
    bounds = {
        "registers": 4 * (sm.registers // 4 // per_warp) // code.warps,
        "warps": sm.warps // code.warps,
        "CTAs": sm.ctas,
        "shared memory": sm.shared // (code.shared + sm.shared_overhead) if code.shared + sm.shared_overhead else sm.ctas,
    }
    limit = min(bounds, key=bounds.get)
    return bounds[limit], limit
