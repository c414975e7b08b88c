"""Suite: a training step of reversible sequences beside their alternatives: extra peak memory by depth, time, drift by depth.

Every provider trains the same layers, pre-norm LSH attention (shared QK, causal) and a pre-norm feed-forward layer of 4 E, with
half of the attention suite's heads: E = 256 by default. Memory is that of one step beyond parameters, gradients, input and its
gradient. Drift is the largest difference between what a layer was given in forward and when it was recomputed, over all layers.
"""

from __future__ import annotations

import torch
from cases import AbsentError, Case
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsh_kernels import LSHConfig, LSHSelfAttention, ReversibleBlock, ReversibleSequence

LENGTH, DRIFT_LENGTH = 4096, 512
# most important first
DEPTHS, QUICK_DEPTHS = (24, 2, 12), (12, 2)
DRIFT_DEPTHS, QUICK_DRIFT_DEPTHS = (48, 24, 12, 6, 2), (12, 2)


def layers(row, depth):
    """`depth` pairs of attention and feed-forward layer."""
    torch.manual_seed(0)
    E, config = row["embed_dim"], LSHConfig(n_hashes=row["R"], chunk_length=row["C"])
    return [
        (
            nn.Sequential(nn.LayerNorm(E), LSHSelfAttention(E, row["H"], config=config, causal=True)),
            nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E)),
        )
        for _ in range(depth)
    ]


class Ordinary(nn.Module):
    """The blocks without reversibility, each in a checkpoint if asked for."""

    def __init__(self, pairs, checkpointed=False):
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        self.checkpointed = checkpointed

    def forward(self, x):
        halves = x.chunk(2, -1)
        for f, g in self.pairs:
            halves = checkpoint(add_both, f, g, *halves, use_reentrant=False) if self.checkpointed else add_both(f, g, *halves)
        return torch.cat(halves, -1)


def add_both(f, g, left, right):
    left = left + f(right)
    return left, right + g(left)


def reversible(pairs, exact=False):
    return ReversibleSequence([ReversibleBlock(*pair) for pair in pairs], exact=exact)


def reformer_pytorch(pairs):
    try:
        from reformer_pytorch.reversible import ReversibleSequence
    except ImportError as error:
        raise AbsentError(f"reformer-pytorch: {error}") from error
    return ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in pairs))


RECOMPUTING = {
    "lsh_kernels float": reversible,
    "lsh_kernels exact": lambda pairs: reversible(pairs, exact=True),
    "reformer-pytorch": reformer_pytorch,
}
PROVIDERS = {
    **RECOMPUTING, "not reversible": Ordinary, "torch.utils.checkpoint": lambda pairs: Ordinary(pairs, checkpointed=True),
}  # fmt: skip


def cases(settings):
    heads = max(1, settings.heads // 2)
    longest = max(settings.lengths)

    def case(measure, build, providers, depth, length):
        row = settings.row("reversible", min(length, longest)) | {
            "H": heads, "embed_dim": heads * settings.head_dim, "mode": "forward+backward", "input": "gaussian", "depth": depth,
        }  # fmt: skip
        return Case(row, {name: build(wrap, row, settings) for name, wrap in providers.items()}, measure)

    length = LENGTH // 4 if settings.quick else LENGTH
    depths, drift_depths = (QUICK_DEPTHS, QUICK_DRIFT_DEPTHS) if settings.quick else (DEPTHS, DRIFT_DEPTHS)
    for depth in depths:
        yield case("memory", step_build, PROVIDERS, depth, length)
    yield case("time", step_build, PROVIDERS, 2 if settings.quick else 12, length)
    for depth in drift_depths:
        yield case("drift", drift_build, RECOMPUTING, depth, DRIFT_LENGTH)


def new_input(row, settings):
    """x [B, L, 2E], with a gradient as what comes from an embedding has (reformer-pytorch gives parameters none without)."""
    generator = torch.Generator(settings.device).manual_seed(1)
    size = (row["B"], row["L"], 2 * row["embed_dim"])
    x = torch.randn(size, generator=generator, device=settings.device).to(settings.dtype)
    return x.requires_grad_()


def step_build(wrap, row, settings):
    """A step on a model whose gradients, and those of its input, are there already."""

    def build():
        model = wrap(layers(row, row["depth"])).to(settings.device, settings.dtype)
        x = new_input(row, settings)
        for leaf in (x, *model.parameters()):
            leaf.grad = torch.zeros_like(leaf)
        return lambda: model(x).square().mean().backward()

    return build


def drift_build(wrap, row, settings):
    """The call returns max |x - recomputed x| over the inputs of all layers."""

    def build():
        pairs = layers(row, row["depth"])
        model, x = wrap(pairs).to(settings.device, settings.dtype), new_input(row, settings)
        first, differences = {}, []

        def compare(layer, args):
            given = args[0].detach()
            if layer in first:
                differences.append((given - first.pop(layer)).abs().max())
            else:
                first[layer] = given.clone()

        for layer in (layer for pair in pairs for layer in pair):
            layer.register_forward_pre_hook(compare)

        def call():
            model(x).square().mean().backward()
            if len(differences) != 2 * row["depth"]:
                raise RuntimeError(f"{len(differences)} of {2 * row['depth']} layers were recomputed")
            return torch.stack(differences).max().item()

        return call

    return build
