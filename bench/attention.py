"""Suite: one causal attention call beside its peers, by length at a fixed batch and at a fixed number of tokens, by input."""

from __future__ import annotations

from cases import Case, by_importance
from peers import EXACT, OURS, PEERS, VARIANTS, Shape, build_call

MODES = ("forward", "forward+backward")


def lsh_flops(B, H, L, D, R, C, mode):
    """Multiply-adds count twice; R rounds, C queries against 2 C keys, two products forward and five backward."""
    return (2 if mode == "forward" else 7) * 2 * B * H * R * L * 2 * C * D


def exact_flops(B, H, L, D, mode):
    """Multiply-adds count twice; half of the pairs, two products forward and five backward."""
    return (2 if mode == "forward" else 7) * B * H * L * L * D


def attention_case(
    settings, providers, length, mode, *, regime="batch", kind="gaussian", batch=None, depth=1, measure="time", threads=0
):
    """A case of these providers; `mode` is "forward" or "forward+backward"."""
    row = settings.row("attention", length, batch)
    shape = Shape(*(row[letter] for letter in "BHLDRC"), settings.dtype, settings.device, mode == "forward+backward")
    lsh = lsh_flops(*shape[:6], mode)
    return Case(
        row={**row, "mode": f"{mode} graph" if measure == "graph" else mode, "regime": regime, "input": kind, "depth": depth},
        builds={name: build_call(peer, shape, kind, depth) for name, peer in providers.items()},
        measure=measure,
        threads=threads,
        flops={name: depth * (exact_flops(*shape[:4], mode) if name in EXACT else lsh) for name in providers},
    )


def cases(settings):
    lengths, on_gpu = by_importance(settings.lengths), settings.device.type == "cuda"
    longest = max(lengths)
    for length in lengths:
        for mode in MODES:
            yield attention_case(settings, PEERS | VARIANTS, length, mode)
        if on_gpu and length <= 2**16:
            for mode in MODES:
                yield attention_case(settings, PEERS, length, mode, measure="graph")
    if not on_gpu and not settings.quick:
        for mode in MODES:
            yield attention_case(settings, OURS, longest, mode, regime="one thread", threads=1)
        # does twice the length take twice the time?
        for mode in MODES:
            yield attention_case(settings, OURS, 2 * longest, mode)
    for kind in ("clustered", "equal"):
        for length in lengths[: 3 if on_gpu and not settings.quick else 1]:
            yield attention_case(settings, PEERS, length, MODES[1], kind=kind)
    for length in lengths[: 2 if settings.quick else None]:
        if length < longest:
            for mode in MODES:
                yield attention_case(settings, PEERS, length, mode, regime="tokens", batch=settings.batch * longest // length)
