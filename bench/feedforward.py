"""Suite: ChunkedFeedForward beside the plain MLP: time, and extra peak memory.

16K tokens in 32 chunks, with half of the attention suite's heads (E = 256 by default) and 4 E inside. Memory is what a call takes
beyond input, output, their gradients and those of the weights.
"""

from __future__ import annotations

import torch
from attention import MODES
from cases import Case
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsh_kernels import ChunkedFeedForward

TOKENS, N_CHUNKS = 16384, 32


def ours(embed_dim, chunk):
    return ChunkedFeedForward(embed_dim, 4 * embed_dim, chunk)


def plain(embed_dim, chunk):
    return nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim))


class Checkpointed(nn.Module):
    def __init__(self, embed_dim, chunk):
        super().__init__()
        self.layer = plain(embed_dim, chunk)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


PROVIDERS = {"plain MLP": plain, "lsh_kernels": ours, "torch.utils.checkpoint": Checkpointed}


def flops(tokens, embed_dim, mode):
    """Of the plain MLP: multiply-adds count twice; two products forward, four backward; what is recomputed does not count."""
    return (2 if mode == "forward" else 6) * 2 * tokens * embed_dim * 4 * embed_dim


def result_bytes(tokens, embed_dim, mode, itemsize):
    """Output; backward also the gradients of the input and of two weights and biases. The output's gradient is an input."""
    n_weights = 2 * embed_dim * 4 * embed_dim + 5 * embed_dim
    return itemsize * (tokens * embed_dim if mode == "forward" else 2 * tokens * embed_dim + n_weights)


def cases(settings):
    embed_dim, tokens = max(1, settings.heads // 2) * settings.head_dim, min(TOKENS, max(settings.lengths))
    for measure in ("memory", "time"):
        for mode in MODES[::-1][: 1 if settings.quick else None]:
            row = settings.row("feedforward", tokens) | {
                "B": 1, "H": "", "D": "", "R": "", "C": max(1, tokens // N_CHUNKS), "embed_dim": embed_dim, "mode": mode,
                "input": "gaussian", "depth": 1,
            }  # fmt: skip
            yield Case(
                row,
                {name: call_build(make, row, settings) for name, make in PROVIDERS.items()},
                measure,
                flops=dict.fromkeys(PROVIDERS, flops(tokens, embed_dim, mode)),
                result_bytes=result_bytes(tokens, embed_dim, mode, settings.dtype.itemsize),
            )


def call_build(make, row, settings):
    def build():
        torch.manual_seed(0)
        layer = make(row["embed_dim"], row["C"]).to(settings.device, settings.dtype)
        x, dout = torch.randn(2, row["L"], row["embed_dim"], device=settings.device, dtype=settings.dtype)
        leaves = (x.requires_grad_(row["mode"] != "forward"), *layer.parameters())

        def call():
            with torch.set_grad_enabled(row["mode"] != "forward"):
                out = layer(x)
            if row["mode"] != "forward":
                out.backward(dout)
                for leaf in leaves:
                    leaf.grad = None
            return out

        return call

    return build
