"""Blocks, the same as ordinary code, and gradients of both: what the tests of reversible sequences share."""

import torch
from torch import nn

from lsh_kernels import LSHConfig, LSHSelfAttention, ReversibleBlock

E, L = 16, 40
CONFIG = LSHConfig(chunk_length=8, n_hashes=2)


class Attention(nn.Module):
    """Pre-norm LSH attention with dropout on its probabilities and on its result."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(E)
        self.attention = LSHSelfAttention(E, 2, causal=True, dropout=dropout, config=CONFIG)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, key_padding_mask=None):
        return self.dropout(self.attention(self.norm(x), key_padding_mask))


def feed_forward(dropout=0.0):
    return nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 2 * E), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * E, E))


def blocks(depth, dropout=0.0):
    return [ReversibleBlock(Attention(dropout), feed_forward(dropout)) for _ in range(depth)]


def ordinary(sequence, x, f_kwargs=None, g_kwargs=None):
    """The same network without reversibility."""
    x1, x2 = x.chunk(2, -1)
    for block in sequence.blocks:
        x1 = x1 + block.f(x2, **(f_kwargs or {}))
        x2 = x2 + block.g(x1, **(g_kwargs or {}))
    return torch.cat((x1, x2), -1)


def reversible(sequence, x, *kwargs):
    return sequence(x, *kwargs)


def loss_of(y):
    return (y.float() if y.dtype.itemsize < 4 else y).square().mean() + (y * y.roll(1, -1)).sum()


def gradients(run, sequence, x, *kwargs, seed=1):
    """(output, [gradients of the input and of all parameters])"""
    torch.manual_seed(seed)
    y = run(sequence, x, *kwargs)
    wanted = [t for t in (x, *sequence.parameters()) if t.requires_grad]
    return y, torch.autograd.grad(loss_of(y), wanted)


def random_x(batch=2, dtype=torch.float64, requires_grad=True):
    return torch.randn(batch, L, 2 * E, dtype=dtype, requires_grad=requires_grad)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(E, E)

    def forward(self, x, scale):
        return torch.tanh(self.linear(x)) * scale
