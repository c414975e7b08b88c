"""Kernels compiled for GPUs that are not there, from their launchers, and what the machine code says.

Needs a process without TRITON_INTERPRET: Triton decides at import whether kernels are compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import pickle
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from . import control_flow
from .control_flow import Instruction, loop_depths

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


class Code(NamedTuple):
    """What the machine code of one kernel holds. counts[d]: per program, of the instructions inside d loops:

    issue (warp instructions), tensor, mufu, flops (of tensor instructions whose shape they show), and bytes of global
    memory by width in bits: load_128, load_64, load_32, load_16, store_128, ..; row_load and row_load_128: those of
    two-dimensional floating-point tiles, the gathers.
    """

    registers: int
    stack: int  # bytes
    spill_stores: int  # instructions: STL; AMD: scratch_store
    spill_loads: int  # LDL; scratch_load
    shared: int  # bytes
    warps: int
    fma_dots: int  # tile products that are not on tensor cores
    counts: dict[int, Counter]

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)

    @property
    def peeled(self) -> int:
        """Trips of the outermost loops that the compiler has put before or after them."""
        inside = self.counts.get(1, {"tensor": 0})["tensor"]
        return self.counts[0]["tensor"] // inside if inside else 0

    def total(self, what: str, trips: tuple = (1,)) -> float:
        """Of `what` per program, where loops make trips[0] trips, loops in them trips[1], ..; the last holds for all deeper.
        A loop that the compiler has unrolled counts too much: its code is taken for that of one trip."""
        trips = [trips[min(depth, len(trips) - 1)] - (self.peeled if depth == 0 else 0) for depth in range(max(self.counts))]
        return sum(math.prod(trips[:depth]) * counts[what] for depth, counts in self.counts.items())

    def static(self, what: str) -> int:
        """Of `what` in the code of a program."""
        return sum(counts[what] for counts in self.counts.values())


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


@functools.cache
def inspect(kernel) -> Code:
    """What a compiled kernel's machine code holds. Kept beside the kernel in Triton's cache: nvdisasm alone takes as long as
    Triton does to compile."""
    cache, name = get_cache_manager(kernel.hash), f"{_readers()}.code"
    if found := cache.get_file(name):
        return pickle.loads(Path(found).read_bytes())
    code = _read_cubin(kernel) if kernel.metadata.target.backend == "cuda" else _read_amdgcn(kernel)
    cache.put(pickle.dumps(code), name)
    return code


@functools.cache
def _readers() -> str:
    """Hash of the source that reads machine code."""
    sources = (Path(__file__), Path(control_flow.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


_SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")


@functools.cache
def resources(kernel) -> tuple[int, int]:
    """Registers per thread and bytes of stack of a kernel for CUDA: what of `inspect` costs next to nothing."""
    usage = _run_on(kernel.asm["cubin"], knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    return tuple(int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def _read_cubin(kernel) -> Code:
    # no jump through a table here, whose targets an analysis of the data flow would find
    sass = _run_on(kernel.asm["cubin"], knobs.nvidia.nvdisasm.path, "-gp", "-c", "-ndf")
    sources = _ptx_sources(kernel.asm["ptx"])
    instructions, source, labels = [], None, ()
    for line in sass.splitlines():
        if found := re.match(r'\s*//## File ".nv_debug_ptx_txt", line (\d+)', line):
            source = sources[int(found[1])]
        elif found := re.match(r"(\.L_\w+):", line):
            labels += (found[1],)
        elif (found := _SASS.match(line)) and found[2] != "NOP":
            predicate, opcode, operands = found.groups()
            # warps do not diverge here, as a rule
            jump = re.search(r"`\((\.L_\w+)\)", operands) if opcode.startswith("BRA") and opcode != "BRA.DIV" else None
            # a branch may have another predicate among its operands
            always = opcode.startswith(("EXIT", "RET")) or (jump and operands.lstrip().startswith("`"))
            falls = bool(predicate or not always)
            instructions.append(Instruction(opcode, source, jump[1] if jump else "", falls, labels))
            labels = ()
    opcodes = Counter(i.opcode.partition(".")[0] for i in instructions)
    return Code(
        *resources(kernel), opcodes["STL"], opcodes["LDL"], kernel.metadata.shared, kernel.metadata.num_warps,
        _fma_dots(kernel), _count(kernel, instructions, _classify_sass),
    )  # fmt: skip


def _ptx_sources(ptx: str) -> dict:
    """(file, line) by line of PTX, from 1."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"\n]+)"', ptx, re.MULTILINE))
    sources, source, inline = {}, None, False
    for number, line in enumerate(ptx.splitlines(), 1):
        # inside inline assembly LLVM may raise the source line with each line of assembly
        inline = line.strip() == "// begin inline asm" or inline and line.strip() != "// end inline asm"
        if not inline and (found := re.match(r"\s*\.loc\s+(\d+) (\d+)", line)):
            source = Path(files.get(found[1], "")).name, int(found[2])
        sources[number] = source
    return sources


def _read_amdgcn(kernel) -> Code:
    text = kernel.asm["amdgcn"]
    files = dict(re.findall(r'^\t\.file\t(\d+) .*"([^"\n]+)"', text, re.MULTILINE))
    instructions, source, labels = [], None, ()
    for line in text.splitlines():
        if found := re.match(r"\s+\.loc\s+(\d+) (\d+)", line):
            source = Path(files.get(found[1], "")).name, int(found[2])
        elif found := re.match(r"(\.LBB\w+):", line):
            labels += (found[1],)
        elif found := re.match(r"\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)(.*)", line):
            jump = re.search(r"\.LBB\w+", found[2]) if found[1].startswith(("s_branch", "s_cbranch")) else None
            falls = found[1] not in ("s_branch", "s_endpgm")
            instructions.append(Instruction(found[1], source, jump[0] if jump else "", falls, labels))
            labels = ()

    def metadata(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    # scalar registers spill into lanes of vector registers: the stack that is set aside for them stays untouched
    stores, loads = (sum(i.opcode.startswith(f"scratch_{what}") for i in instructions) for what in ("store", "load"))
    stack = metadata("private_segment_fixed_size") if stores or loads else 0
    return Code(
        metadata("vgpr_count"), stack, stores, loads, kernel.metadata.shared, kernel.metadata.num_warps,
        _fma_dots(kernel), _count(kernel, instructions, _classify_amdgcn),
    )  # fmt: skip


def row_loads(ttgir: str) -> set:
    """(file, line) of the loads of two-dimensional floating-point tiles."""
    locations = dict(re.findall(r"^#(loc\w*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    load = re.compile(r"(?:tt\.load|async_copy_global_to_local|buffer_load\w*) .*tensor<\d+x\d+x(?:!tt\.ptr<)?(?:bf16|f16|f32)\b")
    lines = set()
    for line in ttgir.splitlines():
        if not load.search(line):
            continue
        where = line.rpartition("loc(")[2]
        while where and not (found := re.search(r'"([^"]*)":(\d+):', where)):
            name = re.search(r"#(loc\w*)", where)
            where = name and locations.get(name[1])
        if where:
            lines.add((Path(found[1]).name, int(found[2])))
    return lines


def _fma_dots(kernel):
    return len(re.findall(r"tt\.dot .*-> tensor<[\dx]+x\w+, #blocked", kernel.asm["ttgir"]))


def _count(kernel, instructions, classify):
    lines, warp = row_loads(kernel.asm["ttgir"]), kernel.metadata.target.warp_size
    warps, counts = kernel.metadata.num_warps, defaultdict(Counter)
    for instruction, depth in zip(instructions, loop_depths(instructions)):
        if depth is None:
            continue
        kind, amount = classify(instruction.opcode)
        counts[depth]["issue"] += warps
        if kind == "tensor":
            counts[depth]["tensor"] += warps
            counts[depth]["flops"] += warps * amount
        elif kind == "mufu":
            counts[depth]["mufu"] += warps
        elif kind:
            n_bytes = warps * warp * amount // 8
            counts[depth][f"{kind}_{amount}"] += n_bytes
            if kind == "load" and instruction.source in lines:
                counts[depth]["row_load"] += n_bytes
                counts[depth]["row_load_128"] += n_bytes * (amount == 128)
    return dict(counts)


def _classify_sass(opcode):
    """("tensor", FLOPs), ("mufu", 1), ("load" or "store", bits) or (None, 0)."""
    name, *parts = opcode.split(".")
    if name in ("LDG", "LDGSTS", "STG"):
        widths = [int(part) for part in parts if part in ("64", "128", "256")]
        narrow = [16 if "16" in part else 8 for part in parts if re.fullmatch(r"[US](8|16)", part)]
        return "store" if name == "STG" else "load", (widths + narrow + [32])[0]
    if name == "MUFU":
        return "mufu", 1
    if name in ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "DMMA"):
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
            # by a group of four warps
            m, n, k = map(int, shape.groups())
            return "tensor", 2 * m * n * k // 4
        # the shape of UTCHMMA stands in a descriptor
        return "tensor", {"16816": 4096, "1688": 2048, "1684": 1024}.get("".join(parts[:1]), 0)
    return None, 0


def _classify_amdgcn(opcode):
    if found := re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", opcode):
        words = re.search(r"x(\d)$", found[2])
        bits = 32 * int(words[1]) if words else 8 if "byte" in found[2] else 16 if "short" in found[2] else 32
        return found[1], bits
    if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", opcode):
        return "mufu", 1
    if opcode.startswith("v_mfma"):
        shape = re.search(r"_(\d+)x(\d+)x(\d+)", opcode)
        m, n, k = map(int, shape.groups()) if shape else (0, 0, 0)
        return "tensor", 2 * m * n * k
    return None, 0


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


def _run_on(cubin, *command):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
