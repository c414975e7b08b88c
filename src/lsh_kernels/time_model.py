"""Expected times of attention on a card that is not there, from the machine code of its kernels, and what exact attention takes.

Modelled, not measured: a stage takes as long as the scarcest of issue slots, tensor cores, exponentials, L2 and DRAM, with the
rates and efficiencies of `Card`. `ASSUMPTIONS` says what else is taken for granted.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from . import audit_cases, machine_code, offline

# what is modelled if nothing else is said: causal, shared QK, bf16, B = 1, H = 8, D = 64, R = 4, C = W = 64
CALL = audit_cases.Case()
LENGTHS = (4096, 16384, 65536, 262144, 2**20)


class Card(NamedTuple):
    """Rates of a card and the shares of them that kernels reach."""

    name: str
    target: str
    sms: int  # NVIDIA H100 whitepaper: SXM5
    clock: float  # Hz, boost; the same
    tensor: float  # FLOP/s, dense 16-bit; H100 datasheet
    dram: float  # bytes/s; H100 datasheet
    l2: float  # bytes/s, reads that hit; microbenchmarks report 5.5 to 5.7e12
    mufu: float  # per cycle and SM; CUDA C++ programming guide, arithmetic throughput
    launch: float = 2e-6  # s between kernels of a CUDA graph
    host_call: float = 140e-6  # s per op; tests/test_costs.py prints it, launches stubbed out
    host_launch: float = 15e-6  # s per eager launch
    issue_share: float = 0.6  # of a slot per scheduler and cycle, forward
    issue_share_bwd: float = 0.5
    issue_share_sort: float = 0.4
    hiding_warps: int = 12  # resident on an SM, below which schedulers wait for memory in proportion
    tensor_share: float = 0.6
    dram_share: float = 0.85


H100 = Card("H100 SXM", "sm_90", 132, 1.83e9, 989e12, 3.35e12, 5.5e12, 16)

# FLOP/s forward and backward: 70% of peak; H100 results of Shah et al. 2024 (arXiv 2407.08608) at head dim 64 and 16K, forward
# causal, backward without a mask
EXACT = {
    "70% of peak": (0.7 * H100.tensor, 0.7 * H100.tensor),
    "FA3": (473e12, 474e12),
    "FA2": (300e12, 291e12),
}

ASSUMPTIONS = """\
every query walks the key tiles of a full window (with short buckets it walks fewer)
DRAM: each distinct tensor that a launch reads or writes moves once; L2 has the rest: one head's rows fit
L2: gathers of rows and all stores; index loads come from L1
a launch of fewer programs than SMs leaves SMs idle; a program of one warp keeps one scheduler of four busy
eager: the device waits for the host, or the host for the device, whichever takes longer
exact attention: 4 B H D L^2 / 2 FLOPs forward, 2.5 times as many backward, no launch or host time"""

# handed over for queries without any target, and hardly ever read
_UNREAD = {
    "_combine_rounds_fwd_kernel": ("q_ptr", "k_ptr", "v_ptr", "inverse_norm_ptr", "stretched_ptr"),
    "_combine_rounds_bwd_kernel": ("q_ptr", "k_ptr", "dout_ptr", "dlse_ptr", "inverse_norm_ptr"),
}


class Stage(NamedTuple):
    """One launch: seconds by resource, of which the largest bounds it."""

    kernel: str
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.seconds, key=self.seconds.get)

    @property
    def time(self) -> float:
        return self.seconds[self.bound]


def stage_of(launched, card: Card = H100) -> Stage:
    """The modelled time of one launch."""
    code, trips = machine_code.inspect(launched.kernel), audit_cases.work_of(launched).trips
    ctas, _ = offline.occupancy(code, card.target)
    per_sm = max(launched.grid / card.sms, 1)
    busy = min(4, code.warps * min(ctas, -(-launched.grid // card.sms)))
    share = card.issue_share
    if "_bucket_" in launched.name:
        share = card.issue_share_sort
    elif "_bwd" in launched.name:
        share = card.issue_share_bwd
    if launched.grid >= card.sms:
        share *= min(1, ctas * code.warps / card.hiding_warps)
    stored = sum(code.total(f"store_{width}", trips) for width in (128, 64, 32, 16, 8))
    return Stage(
        launched.name,
        {
            "issue": per_sm * code.total("issue", trips) / (busy * card.clock * share),
            "tensor": launched.grid * code.total("flops", trips) / (card.tensor * card.tensor_share),
            "exp": per_sm * code.total("mufu", trips) * 32 / (card.mufu * card.clock),
            "L2": launched.grid * (code.total("row_load", trips) + stored) / card.l2,
            "DRAM": _distinct_bytes(launched) / (card.dram * card.dram_share),
        },
    )


def stages(case: audit_cases.Case, card: Card = H100) -> list[Stage]:
    """The launches of a case, in order."""
    with offline.compile_only(card.target) as launches:
        audit_cases.launch(case)
    return [stage_of(launched, card) for launched in launches]


def whole(parts: list[Stage], graph: bool, card: Card = H100) -> float:
    """Seconds of a call whose launches are `parts`."""
    device = sum(part.time + card.launch for part in parts)
    n_calls = 1 + any("_bwd" in part.kernel for part in parts)
    return device if graph else max(device, n_calls * card.host_call + len(parts) * card.host_launch)


def exact(case: audit_cases.Case, backward: bool) -> dict[str, float]:
    """Seconds of exact causal attention at each of the rates of `EXACT`."""
    flops = 2 * case.batch * case.n_heads * case.head_dim * case.length**2
    return {name: flops / fwd + backward * 2.5 * flops / bwd for name, (fwd, bwd) in EXACT.items()}


class Estimate(NamedTuple):
    """Seconds at one length: forward's stages, and those of a backward that follows (none where no kernel does it)."""

    length: int
    forward: list[Stage]
    backward: list[Stage]


def estimate(case: audit_cases.Case = CALL, lengths=LENGTHS, card: Card = H100) -> list[Estimate]:
    """`case` at each length."""
    found = []
    for length in lengths:
        parts = stages(case._replace(length=length), card)
        # backward begins with a kernel that forward has, too
        n_forward = 1 + [part.kernel for part in parts].index("_combine_rounds_fwd_kernel")
        found.append(Estimate(length, parts[:n_forward], parts[n_forward:]))
    return found


def print_model(estimates: list[Estimate], case: audit_cases.Case = CALL, card: Card = H100, measured=None):
    """Assumptions, time and bound of each stage, whole times beside exact attention; `measured`: a CSV file of bench."""
    print(f"modelled, not measured: {card.name}, causal, {case.dtype}, B = {case.batch}, H = {case.n_heads}, D = {case.head_dim}")
    print("\n".join(f"  {name} {value}" for name, value in card._asdict().items()))
    print("\n".join(f"  {line}" for line in ASSUMPTIONS.splitlines()))
    for point in estimates:
        print(f"\nL = {point.length}")
        for part in point.forward + point.backward:
            others = ", ".join(f"{name} {time * 1e3:.4f}" for name, time in part.seconds.items())
            print(f"  {part.kernel:32} {part.time * 1e3:8.4f} ms  {part.bound:6} ({others})")
    print("\n" + "\n".join(table(estimates, case, card)))
    if measured and Path(measured).exists():
        print_errors(estimates, measured, case, card)


def table(estimates: list[Estimate], case: audit_cases.Case = CALL, card: Card = H100) -> list[str]:
    """README's table, in ms: lines of Markdown."""
    names = [f"{name}" for name in EXACT]
    lines = [
        f"| ms | forward, eager | graph | + backward, eager | graph | exact forward: {' / '.join(names)} | + backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in estimates:
        at = case._replace(length=point.length)
        both = point.forward + point.backward
        cells = [_ms(whole(point.forward, graph, card)) for graph in (False, True)]
        cells += [_ms(whole(both, graph, card)) if point.backward else "-" for graph in (False, True)]
        cells += [" / ".join(_ms(time) for time in exact(at, backward).values()) for backward in (False, True)]
        lines.append(f"| {point.length:,} | {' | '.join(cells)} |")
    return lines


def print_errors(estimates: list[Estimate], path, case: audit_cases.Case, card: Card = H100):
    """How far off the model is, where the rows of bench have a time of the same call on the same card."""
    call = {
        "op": "attention", "provider": "lsh_kernels triton", "dtype": str(audit_cases.DTYPES[case.dtype]).removeprefix("torch."),
        "B": case.batch, "H": case.n_heads, "D": case.head_dim, "R": case.config.n_hashes, "C": case.config.chunk_length,
        "regime": "batch", "input": "gaussian", "depth": 1, "status": "ok",
    }  # fmt: skip
    with Path(path).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if card.name.split()[0] in row["device"]]
    times = {
        (int(row["L"]), row["mode"]): float(row["ms_p50"]) / 1e3
        for row in rows
        if all(row[name] == str(value) for name, value in call.items())
    }
    n_found = 0
    for point in estimates:
        for mode, parts in (("forward", point.forward), ("forward+backward", point.forward + point.backward)):
            for graph in (False, True):
                name = f"{mode} graph" if graph else mode
                if time := times.get((point.length, name)):
                    model = whole(parts, graph, card)
                    print(f"L = {point.length}, {name}: measured {_ms(time)} ms, modelled {_ms(model)}, {model / time - 1:+.0%}")
                    n_found += 1
    if not n_found:
        print(f"{path} has no time of this call on {card.name}: the model's error is not known")


def _distinct_bytes(launched):
    unread = _UNREAD.get(launched.name, ())
    tensors = {}
    for name, value in launched.arguments.items():
        if name.endswith("_ptr") and value is not None and name not in unread:
            # meta tensors all have address 0
            tensors[id(value)] = value.numel() * value.element_size()
    return sum(tensors.values())


def _ms(seconds):
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
