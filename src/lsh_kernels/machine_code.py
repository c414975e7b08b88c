"""What the machine code of compiled kernels holds: registers, spills, instructions by kind and by depth of loops."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
import pickle
import re
import struct
import subprocess
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from triton import knobs
from triton.runtime.cache import get_cache_manager

from . import control_flow
from .control_flow import Instruction, leads_to, loop_depths


class Code(NamedTuple):
    """What the machine code of one kernel holds. counts[d]: per program, of the instructions inside d loops:

    issue (warp instructions), tensor, mufu, flops (of tensor instructions whose shape they show), and bytes of global
    memory by width in bits: load_128, load_64, load_32, load_16, store_128, ..; of LLVM's code instead, which tells them
    apart: row_load and row_load_128, those of two-dimensional floating-point tiles, the gathers.
    """

    registers: int
    stack: int  # bytes
    spill_stores: int  # instructions: STL; AMD: scratch_store
    spill_loads: int  # LDL; scratch_load
    shared: int  # bytes
    warps: int
    fma_dots: int  # tile products that are not on tensor cores
    tensor_path: str  # the kinds of tensor instructions, as HGMMA
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


def inspect(kernel) -> Code:
    """What a compiled kernel's machine code holds."""
    return inspect_all([kernel])[0]


def inspect_all(kernels) -> list[Code]:
    """What the machine code of each kernel holds, all of them compiled for one target. Kept beside the kernels in Triton's
    cache. Those that are not there are read at once: nvdisasm needs half as long to start as Triton needs to compile."""
    caches = {kernel: get_cache_manager(kernel.hash) for kernel in kernels}
    codes, name = {}, f"{_readers()}.code"
    for kernel, cache in caches.items():
        if found := cache.get_file(name):
            codes[kernel] = pickle.loads(Path(found).read_bytes())
    new = [kernel for kernel in caches if kernel not in codes]
    cubins = [kernel for kernel in new if "cubin" in kernel.asm]
    read = dict(zip(cubins, _read_cubins(cubins))) | {kernel: _read_amdgcn(kernel) for kernel in new if "amdgcn" in kernel.asm}
    for kernel, code in read.items():
        caches[kernel].put(pickle.dumps(code), name)
    return [(codes | read)[kernel] for kernel in kernels]


@functools.cache
def _readers() -> str:
    """Hash of the source that reads machine code."""
    sources = (Path(__file__), Path(control_flow.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


@functools.cache
def resources(kernel) -> tuple[int, int]:
    """Registers per thread and bytes of stack of a kernel for CUDA: what of `inspect` costs next to nothing."""
    usage = _run_on(kernel.asm["cubin"], knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    return tuple(int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def _read_cubins(kernels) -> list[Code]:
    """Of kernels for one CUDA target."""
    if not kernels:
        return []
    texts = [_section(kernel.asm["cubin"], f".text.{kernel.name}") for kernel in kernels]
    arch = kernels[0].metadata.target.arch
    # the instructions alone, of one kernel behind the other: addresses tell which they are of
    sass = _run_on(b"".join(texts), knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}a" if arch >= 90 else f"SM{arch}")
    ends = list(itertools.accumulate(map(len, texts)))
    found = [[] for _ in kernels]
    for address, *instruction in re.findall(_SASS, sass):
        found[bisect.bisect(ends, int(address, 16))].append((int(address, 16), *instruction))
    return [_read_sass(kernel, lines) for kernel, lines in zip(kernels, found)]


_TENSOR = {"HMMA", "HGMMA", "UTCHMMA", "IMMA", "DMMA"}
_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", re.MULTILINE)


def _read_sass(kernel, lines) -> Code:
    """lines: (address, predicate, opcode, operands)."""
    instructions = sass_instructions(kernel.name, lines)
    opcodes = Counter(i.opcode.partition(".")[0] for i in instructions)
    return Code(
        *resources(kernel), opcodes["STL"], opcodes["LDL"], kernel.metadata.shared, kernel.metadata.num_warps,
        _fma_dots(kernel), " ".join(sorted(opcodes.keys() & _TENSOR)), _count(kernel, instructions, _classify_sass),
    )  # fmt: skip


def sass_instructions(name: str, lines: list[tuple]) -> list[Instruction]:
    """What follows what in a kernel's lines (address, predicate, opcode, operands). ValueError: that can't be told."""
    instructions, labels, calls = [], (), []
    for address, predicate, opcode, operands in lines:
        labels += (hex(address),)
        if opcode == "NOP":
            continue
        if opcode.startswith(("BRX", "JMX")):
            raise ValueError(f"{name}: jumps through a table are not followed")
        # warps do not diverge here, as a rule
        jump = re.search(r"0x[0-9a-f]+", operands) if opcode.startswith("BRA") and opcode != "BRA.DIV" else None
        # a branch may have another predicate among its operands
        always = opcode.startswith(("EXIT", "RET")) or (jump and operands.lstrip().startswith("0x"))
        if opcode.startswith("CALL.REL.NOINC"):
            if not (target := re.fullmatch(r"\s*(0x[0-9a-f]+)\s*", operands)):
                raise ValueError(f"{name}: calls {operands.strip()}, which is not followed")
            calls.append((len(instructions), target[1]))
            always = True
        instructions.append(Instruction(opcode, jump[0] if jump else "", bool(predicate or not always), labels))
        labels = ()
    # some loops are left by a call: a jump, where what is called does not return
    returning = {target for _, target in calls if leads_to(instructions, target, "RET")}
    for i, target in calls:
        change = {"falls": True} if target in returning else {"jump": target}
        instructions[i] = instructions[i]._replace(**change)
    return instructions


def _section(elf: bytes, name: str) -> bytes:
    """A section of a 64-bit little-endian ELF file."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    # name, type, flags, address, offset, size, ..
    sections = [struct.unpack_from("<2I4Q", elf, start + i * size) for i in range(count)]
    for section in sections:
        at = sections[names][4] + section[0]
        if elf[at : elf.index(0, at)] == name.encode():
            return elf[section[4] : section[4] + section[5]]
    raise ValueError(f"no section {name}")


def _read_amdgcn(kernel) -> Code:
    text = kernel.asm["amdgcn"]
    instructions, labels = [], ()
    for line in text.splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            labels += (found[1],)
        elif found := re.match(r"\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)(.*)", line):
            jump = re.search(r"\.LBB\w+", found[2]) if found[1].startswith(("s_branch", "s_cbranch")) else None
            falls = found[1] not in ("s_branch", "s_endpgm")
            instructions.append(Instruction(found[1], jump[0] if jump else "", falls, labels))
            labels = ()

    def metadata(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    # scalar registers spill into lanes of vector registers: the stack that is set aside for them stays untouched
    stores, loads = (sum(i.opcode.startswith(f"scratch_{what}") for i in instructions) for what in ("store", "load"))
    stack = metadata("private_segment_fixed_size") if stores or loads else 0
    tensor_path = "MFMA" if any(i.opcode.startswith("v_mfma") for i in instructions) else ""
    return Code(
        metadata("vgpr_count"), stack, stores, loads, kernel.metadata.shared, kernel.metadata.num_warps,
        _fma_dots(kernel), tensor_path, _count(kernel, instructions, _classify_amdgcn),
    )  # fmt: skip


_LLVM_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
# (what loads from global memory, its bits per lane): assembly for CUDA, instructions and builtins for AMD
_LLVM_LOADS = (
    (r"ld\.(?:volatile\.)?global[\w.:]*?(?:\.v(\d))?\.b(\d+) ", lambda words, bits: int(words or 1) * int(bits)),
    (r"cp\.async\.c[ag]\.shared\.global.*?\], 0x(\w+)", lambda n_bytes: 8 * int(n_bytes, 16)),
    (
        r"= (?:tail call|call|load|load volatile) (?:<(\d+) x )?(\w+)>?"
        r"(?:, ptr addrspace\(1\)| @llvm\.amdgcn\.raw\.ptr\.buffer\.load\.)",
        lambda words, kind: int(words or 1) * (_LLVM_BITS.get(kind) or int(kind[1:])),
    ),
    (r"@llvm\.amdgcn\.[\w.]*load[\w.]*\.lds[\w.]*\(ptr[^,]*, ptr[^,]*, i32 (\d+)", lambda n_bytes: 8 * int(n_bytes)),
)


def _llvm_load(line) -> int:
    """Bits per lane that a line of LLVM's code loads from global memory."""
    return next((bits(*found.groups()) for what, bits in _LLVM_LOADS if (found := re.search(what, line))), 0)


def _row_loads(kernel) -> dict[int, Counter]:
    """Bytes of the loads of rows, by loop depth. Of LLVM's code: not every machine instruction is told its source line."""
    llir, rows = kernel.asm["llir"], _row_lines(kernel.asm["ttgir"])
    sources = _llvm_sources(llir)
    body = llir[llir.index(f"@{kernel.name}(") :].partition("\n}\n")[0].splitlines()[1:]
    instructions, bits, labels = [], [], ()
    for line in body:
        if found := re.match(r"([\w.$-]+):", line):
            labels += (found[1],)
            continue
        targets = re.findall(r"\blabel %([\w.$-]+)", line)
        # a switch has its targets on several lines, up to a bracket
        ends = line.startswith(("  br ", "  ]", "  ret ", "  unreachable"))
        width, located = _llvm_load(line), re.search(r"!dbg !(\d+)", line)
        is_row = width and located and sources[located[1]] in rows
        for i, target in enumerate(targets or ("",)):
            instructions.append(Instruction("", target, not ends or i + 1 < len(targets), labels))
            bits.append(width if is_row else 0)
            labels = ()
    n_lanes, counts = kernel.metadata.num_warps * kernel.metadata.target.warp_size, defaultdict(Counter)
    for width, depth in zip(bits, loop_depths(instructions)):
        if width and depth is not None:
            counts[depth] += Counter(row_load=n_lanes * width // 8, row_load_128=n_lanes * width // 8 * (width == 128))
    return counts


def _llvm_sources(llir: str) -> dict:
    """(file, line) by number of the location."""
    files = dict(re.findall(r'^!(\d+) = !DIFile\(filename: "([^"]*)"', llir, re.MULTILINE))
    scopes = dict(re.findall(r"^!(\d+) = distinct !DI\w+\(.*\bfile: !(\d+)", llir, re.MULTILINE))
    locations = re.findall(r"^!(\d+) = (?:distinct )?!DILocation\(line: (\d+),.* scope: !(\d+)", llir, re.MULTILINE)
    return {number: (Path(files[scopes[scope]]).name, int(line)) for number, line, scope in locations}


def _row_lines(ttgir: str) -> set:
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
    warp, warps, counts = kernel.metadata.target.warp_size, kernel.metadata.num_warps, defaultdict(Counter)
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
            counts[depth][f"{kind}_{amount}"] += warps * warp * amount // 8
    for depth, loaded in _row_loads(kernel).items():
        counts[depth] += loaded
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
    if name in _TENSOR:
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


def _run_on(code, *command):
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
