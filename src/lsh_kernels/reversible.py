"""Reversible residual blocks: activation memory that does not grow with depth."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lsh_kernels.tape import OntoGrid, Recorder, residual_add


class ReversibleBlock(nn.Module):
    """Two residual layers that can be undone: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)` for the halves x1, x2 of x.

    Backward gets x back from y (`x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`) and runs each of f and g once more on the way, so
    that a block keeps y and nothing else. Under `torch.compile` a block on its own is an ordinary one: the compiler
    decides what is kept.

    Args:
        f, g: modules that map [.., E] to [.., E].

    Raises:
        TypeError: f or g is no module.

    See `ReversibleSequence` for what f and g may do.

    Source: Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", NeurIPS 2017 (arXiv 1707.04585).
    """

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        for name, module in (("f", f), ("g", g)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: got {type(module).__name__}, wanted an nn.Module")
        self.f = f
        self.g = g

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        f_kwargs: dict | None = None,
        g_kwargs: dict | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: [.., 2E], or its halves as a pair ([.., E], [.., E]).
            f_kwargs, g_kwargs: keyword arguments of f and of g, masks for example.
            recorder: of the sequence that the block is run by.

        Returns: [.., 2E]; a pair if x is one.

        Raises:
            ValueError: the last dimension of x is odd, or f or g returned another shape than it got.
        """
        halves = x if isinstance(x, tuple) else _halves(x)
        if recorder is None and torch.compiler.is_compiling():
            y1 = halves[0] + self.f(halves[1], **(f_kwargs or {}))
            halves = y1, halves[1] + self.g(y1, **(g_kwargs or {}))
        else:
            halves = _run_block(self, halves, f_kwargs or {}, g_kwargs or {}, recorder or Recorder())
        return halves if isinstance(x, tuple) else torch.cat(halves, -1)

    def inverse(
        self, y: Tensor | tuple[Tensor, Tensor], f_kwargs: dict | None = None, g_kwargs: dict | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The x that `forward` maps to y, up to rounding. f and g have to be functions: without dropout, in eval mode.

        Arguments and result are shaped as in `forward`; differentiable, and as ordinary code: it keeps all activations.
        """
        y1, y2 = y if isinstance(y, tuple) else _halves(y)
        x2 = y2 - self.g(y1, **(g_kwargs or {})).to(y2.dtype)
        x1 = y1 - self.f(x2, **(f_kwargs or {})).to(y1.dtype)
        return (x1, x2) if isinstance(y, tuple) else torch.cat((x1, x2), -1)


class ReversibleSequence(nn.Module):
    """Reversible blocks one after another; of all their activations only the last output is kept.

    Backward walks the blocks from the last to the first, subtracting what each layer had added. Gradients are those of
    the same blocks run as ordinary code, but for the rounding of these sums, and parameters receive theirs through their
    own AccumulateGrad nodes: DistributedDataParallel, `fully_shard` (per block or on the whole), gradient accumulation,
    autocast, gradient scalers, hooks and `torch.autograd.grad` work as ever. A second backward through a retained graph
    first runs the blocks forward again. `torch.compile` leaves a sequence as it is: compile its f and g (`block.f.compile()`).

    Each layer is run a second time in the autocast state and the modes (training or eval) of the first, with the same
    random draws (the generators that the caller sees stay where they are) and, of LSH attention, with the same bucket
    ids, which are kept: 1 or 2 bytes per head, round and position. Buffers that a layer updates, as BatchNorm does, are
    updated by the first run only, and the second sees them as the first did. Forward hooks of f and g and of what is in
    them see both runs. A layer that draws from a generator of its own, other than through LSH attention, would draw anew.

    In exact mode x is rounded to a fixed-point grid of steps of 2^-16, and so is what each layer adds (see
    `lsh_kernels.fixed_point` for the format, its error and its range, 2^15). What backward recomputes is then equal to
    the bit to what forward had, at any depth. Gradients pass the rounding as they are. That needs layers that return the
    same when they are run again: the same kernels in a fixed order of sums (`torch.use_deterministic_algorithms` on a
    GPU), launched alike; grad mode, autocast state, training or eval mode, random draws, bucket ids, buffers and strides
    are set as in forward. A checksum of what each layer returned is compared, and where it differs all gradients of that
    layer and of those before it are NaN. A value that is not finite or out of range makes the output NaN, and these
    gradients too.
    `inverse(sequence(x))` gives the grid point nearest x for float32 values below 256, provided that layers return the
    same there too (eval mode, grad mode as in forward); the output of a 16-bit model is rounded further, so only
    its backward is exact.

    Args:
        blocks: `ReversibleBlock`s; the same one may come several times.
        exact: whether the streams live on the grid.

    Raises:
        TypeError: a block is no `ReversibleBlock`.

    Example:
        >>> from lsh_kernels import LSHSelfAttention
        >>> block = ReversibleBlock(LSHSelfAttention(64, 4), nn.Linear(64, 64))
        >>> ReversibleSequence([block])(torch.randn(2, 1000, 128)).shape
        torch.Size([2, 1000, 128])

    Source: as `ReversibleBlock`; Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020.
    """

    def __init__(self, blocks: Iterable[ReversibleBlock], exact: bool = False):
        super().__init__()
        blocks = list(blocks)
        for i, block in enumerate(blocks):
            # a compiled block is wrapped
            if not isinstance(getattr(block, "_orig_mod", block), ReversibleBlock):
                raise TypeError(f"blocks[{i}]: got {type(block).__name__}, wanted a ReversibleBlock")
        self.blocks = nn.ModuleList(blocks)
        self.exact = exact

    @torch.compiler.disable
    def forward(self, x: Tensor, f_kwargs: dict | None = None, g_kwargs: dict | None = None) -> Tensor:
        """Run the blocks.

        Args:
            x: [.., 2E].
            f_kwargs, g_kwargs: keyword arguments of every f and of every g.

        Returns: [.., 2E].

        Raises:
            ValueError: as `ReversibleBlock.forward`; or a layer changed its input in place.
            RuntimeError: in backward, if a layer did not do what it had done in forward (it saved other tensors, or a
                parameter or argument of it has been changed since), or for a gradient of a gradient.
        """
        recorder = Recorder(self.exact)
        halves = _halves(x)
        for block in self.blocks:
            halves = block(halves, f_kwargs, g_kwargs, recorder=recorder)
        return torch.cat(halves, -1)

    def inverse(self, y: Tensor, f_kwargs: dict | None = None, g_kwargs: dict | None = None) -> Tensor:
        """The x that `forward` maps to y, see `ReversibleBlock.inverse`. In exact mode there is no gradient."""
        halves = _halves(y)
        if not self.exact:
            for block in reversed(self.blocks):
                halves = block.inverse(halves, f_kwargs, g_kwargs)
            return torch.cat(halves, -1)
        grid = []
        y1, y2 = (OntoGrid.apply(half.detach(), grid) for half in halves)
        n1, n2 = grid
        for block in reversed(self.blocks):
            n2, y2, _ = residual_add(n2, block.g(y1, **(g_kwargs or {})).detach(), y2.dtype, True)
            n1, y1, _ = residual_add(n1, block.f(y2, **(f_kwargs or {})).detach(), y1.dtype, True)
        return torch.cat((y1, y2), -1)


def _halves(x):
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [.., 2E]")
    return x.chunk(2, -1)


# hooks on what autograd saves can't be traced
@torch.compiler.disable
def _run_block(block, halves, f_kwargs, g_kwargs, recorder):
    x1, x2 = halves
    x2, y1 = recorder.add("f", block.f, x1, x2, f_kwargs)
    return recorder.add("g", block.g, x2, y1, g_kwargs)
