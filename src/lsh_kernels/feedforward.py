"""`ChunkedFeedForward`: the two-layer MLP of a transformer, some tokens at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import check_int

# name: the function, and its gradient from (gradient of its output, its input)
_ACTIVATIONS = {
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "relu": (F.relu, lambda dout, h: torch.ops.aten.threshold_backward(dout, h, 0)),
    "swiglu": (F.silu, torch.ops.aten.silu_backward),
}


class ChunkedFeedForward(nn.Module):
    """`out_proj(dropout(act(in_proj(x))))`, computed for `chunk` tokens at a time.

    Forward and backward hold O(chunk * ff_dim) beyond inputs, outputs and gradients, where the plain MLP holds
    O(B * L * ff_dim): hidden activations are not kept but recomputed in backward, chunk by chunk. Output and gradients are
    those of the plain MLP; weight gradients are summed over the chunks in float32 (float64 for float64). The gradient itself
    can't be differentiated again.

    With `glu` in_proj has 2 ff_dim rows, the gate's first: `act(gate) * up` takes the place of `act(h)`.

    Args:
        embed_dim: E.
        ff_dim: width of the hidden layer.
        chunk: tokens at a time, counted over the whole batch. Need not divide B * L.
        activation: "gelu" (the exact one), "relu", or "swiglu", which is SiLU with a gate.
        glu: whether the hidden layer is gated; None means as the activation has it: "swiglu" is, the others are not.
        dropout: probability that a hidden activation is dropped in training. Drawn as `nn.Dropout` does, from torch's
            default generator for the device; backward has the same draw again and leaves that generator alone.
        bias: whether both layers have a bias.
        device, dtype: of the parameters.

    Parameters: `in_proj` (E -> ff_dim, or 2 ff_dim if gated) and `out_proj` (ff_dim -> E), each an `nn.Linear` whose weights are
    used but whose forward is not called: hooks on these two do not run.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or `glu=False` with "swiglu".

    Example:
        >>> layer = ChunkedFeedForward(256, 1024, chunk=512, activation="swiglu")
        >>> layer(torch.randn(2, 1000, 256)).shape
        torch.Size([2, 1000, 256])

    Source: section 3 of Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020; gates: Shazeer 2020
    (arXiv 2002.05202).
    """

    def __init__(
        self,
        embed_dim: int,
        ff_dim: int,
        chunk: int = 512,
        activation: str = "gelu",
        glu: bool | None = None,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_feed_forward(ff_dim, chunk, activation, glu, dropout)
        check_int("embed_dim", embed_dim, 1)
        self.embed_dim = embed_dim
        self.ff_dim = ff_dim
        self.chunk = chunk
        self.activation = activation
        self.glu = activation == "swiglu" if glu is None else glu
        self.dropout = dropout
        self.in_proj = nn.Linear(embed_dim, 2 * ff_dim if self.glu else ff_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(ff_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., E] -> [.., E], in x's dtype, or in autocast's. ValueError, TypeError: another last dimension or dtype."""
        if x.dim() < 1 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [.., {self.embed_dim}]")
        dtype = matmul_dtype("x", x, self.in_proj.weight)
        options = _Options(self.chunk, self.activation, self.glu, self.dropout if self.training else 0.0, dtype)
        weights = (self.in_proj.weight, self.in_proj.bias, self.out_proj.weight, self.out_proj.bias)
        return _FeedForward.apply(x.reshape(-1, self.embed_dim), *weights, options).view(x.shape)

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}, activation={self.activation!r}, glu={self.glu}, dropout={self.dropout}"


def check_feed_forward(ff_dim, chunk, activation, glu, dropout, prefix="") -> None:
    """Raise the TypeError or ValueError of `ChunkedFeedForward` for these arguments, if there is one.

    `prefix`: of the names that the caller has for chunk and dropout.
    """
    check_int("ff_dim", ff_dim, 1)
    check_int(f"{prefix}chunk", chunk, 1)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(map(repr, _ACTIVATIONS))}")
    if glu is not None and not isinstance(glu, bool):
        raise TypeError(f"glu: got {glu!r}, wanted a bool or None")
    if activation == "swiglu" and glu is False:
        raise ValueError('glu: got False with activation="swiglu", wanted True or None (it is a gate)')
    if not 0 <= dropout < 1:
        raise ValueError(f"{prefix}dropout: got {dropout}, wanted a probability in [0, 1)")


def matmul_dtype(name: str, x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `F.linear(x, weight)` computes: autocast's if it is on, else that of both; `name` is x's."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: got {x.dtype}, wanted {weight.dtype} as the weights have it, or autocast")
    return x.dtype


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a buffer in between if the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class _Options(NamedTuple):
    chunk: int
    activation: str
    glu: bool
    dropout: float
    dtype: torch.dtype


class _FeedForward(torch.autograd.Function):
    """x [T, E] -> [T, E]. Keeps x, the weights, and where the generator stood before the draws of dropout."""

    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, options):
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out)
        ctx.options = options
        ctx.rng_state = _rng_state(x.device) if options.dropout else None
        out = x.new_empty(x.shape, dtype=options.dtype)
        with torch.autocast(x.device.type, enabled=False):
            w_in, b_in, w_out, b_out = (None if w is None else w.to(options.dtype) for w in (w_in, b_in, w_out, b_out))
            for rows in _chunks(x, options):
                hidden = _activate(F.linear(x[rows].to(options.dtype), w_in, b_in), options)  # [chunk, ff_dim]
                if options.dropout:
                    hidden *= _keep(hidden, options.dropout, None)
                out[rows] = F.linear(hidden, w_out, b_out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, *weights = ctx.saved_tensors
        options = ctx.options
        needs_x, *needs_weights = ctx.needs_input_grad[:5]
        generator = None
        if options.dropout:
            generator = torch.Generator(x.device)
            generator.set_state(ctx.rng_state)
        sum_dtype = torch.promote_types(options.dtype, torch.float32)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        sums = [torch.zeros_like(w, dtype=sum_dtype) if needed else None for w, needed in zip(weights, needs_weights)]
        with torch.autocast(x.device.type, enabled=False):
            w_in, b_in, w_out, _ = (None if w is None else w.to(options.dtype) for w in weights)
            for rows in _chunks(x, options):
                dx_rows = _backward(dout[rows], x[rows].to(options.dtype), w_in, b_in, w_out, sums, needs_x, options, generator)
                if needs_x:
                    dx[rows] = dx_rows
        return dx, *(None if total is None else total.to(w.dtype) for total, w in zip(sums, weights)), None


def _backward(dout, x, w_in, b_in, w_out, sums, needs_x, options, generator):
    """One chunk: adds to the weights' gradients in `sums`, where there are any, and returns that of x, or None."""
    dw_in, db_in, dw_out, db_out = sums
    h = F.linear(x, w_in, b_in)  # [chunk, ff_dim, or 2 ff_dim if gated]
    keep = _keep(h[:, : w_out.shape[1]], options.dropout, generator) if options.dropout else None
    if dw_out is not None:
        hidden = _activate(h, options)
        accumulate(dw_out, dout.T, hidden if keep is None else hidden.mul_(keep))
        del hidden
    if db_out is not None:
        db_out += dout.sum(0, dtype=db_out.dtype)
    if not needs_x and dw_in is None and db_in is None:
        return None
    dhidden = dout @ w_out
    dh = _activate_backward(dhidden if keep is None else dhidden.mul_(keep), h, options)
    if dw_in is not None:
        accumulate(dw_in, dh.T, x)
    if db_in is not None:
        db_in += dh.sum(0, dtype=db_in.dtype)
    return dh @ w_in if needs_x else None


def _chunks(x, options):
    return [slice(start, start + options.chunk) for start in range(0, x.shape[0], options.chunk)]


def _activate(h, options):
    """[chunk, ff_dim] of in_proj's output."""
    function = _ACTIVATIONS[options.activation][0]
    if not options.glu:
        return function(h)
    gate, up = h.chunk(2, dim=1)
    return function(gate).mul_(up)


def _activate_backward(dhidden, h, options):
    """The gradient of `_activate`, shaped as h."""
    function, backward = _ACTIVATIONS[options.activation]
    if not options.glu:
        return backward(dhidden, h)
    gate, up = h.chunk(2, dim=1)
    return torch.cat([backward(dhidden * up, gate), function(gate).mul_(dhidden)], dim=1)


def _keep(hidden, dropout, generator):
    """A draw of dropout shaped as `hidden`: 0 with probability `dropout`, else 1 / (1 - dropout)."""
    keep = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return keep.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _rng_state(device):
    """Of torch's default generator for the device."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)
