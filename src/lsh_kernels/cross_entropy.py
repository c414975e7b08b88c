"""Cross-entropy from hidden states: the logits of some tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import check_int
from .feedforward import accumulate, matmul_dtype

_REDUCTIONS = ("mean", "sum", "none")


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 512,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias), target)` without the logits of all tokens.

    Logits exist for `chunk` tokens at a time, in forward and again in backward; kept are the inputs and one logsumexp per token.
    Memory beyond inputs and gradients is O(chunk * V) in place of O(tokens * V). The softmax is computed in float32 (float64
    for float64), and so is the sum of the gradients of weight and bias over the chunks. The gradient itself can't be
    differentiated again.

    Args:
        hidden: [.., E].
        weight: [V, E], of the head; that of the token embedding, where the two are tied.
        target: int64 [..], classes in [0, V).
        bias: [V].
        chunk: tokens at a time. Need not divide their number.
        ignore_index: targets that do not count.
        reduction: "mean" over the tokens that count (NaN if there is none, as in `F.cross_entropy`), "sum", or "none".

    Returns:
        A scalar, or [..] with "none"; float32, float64 for float64.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value. A target out of range is an error of
            torch's, from the device.

    Example:
        >>> hidden, weight = torch.randn(2, 1000, 64), torch.randn(50_000, 64)
        >>> chunked_cross_entropy(hidden, weight, torch.randint(50_000, (2, 1000))).shape
        torch.Size([])

    Source: the chunked loss of Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020, section 3.
    """
    check_int("chunk", chunk, 1)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, wanted one of {', '.join(map(repr, _REDUCTIONS))}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: got {target.dtype}, wanted torch.int64")
    if hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, wanted {tuple(hidden.shape[:-1])}, as hidden without its last"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted [V, {hidden.shape[-1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, wanted ({weight.shape[0]},)")
    dtype = matmul_dtype("hidden", hidden, weight)
    losses = _CrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1), chunk, ignore_index, dtype
    )  # [T], 0 where the target is ignored
    if reduction == "none":
        return losses.view(target.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum()


class _CrossEntropy(torch.autograd.Function):
    """hidden [T, E], target [T] -> losses [T]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, chunk, ignore_index, dtype):
        lse = hidden.new_empty(target.shape, dtype=torch.promote_types(dtype, torch.float32))
        losses = torch.empty_like(lse)
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in _chunks(target, chunk):
                logits = F.linear(hidden[rows].to(dtype), w, b).to(lse.dtype)  # [chunk, V]
                ignored = target[rows] == ignore_index
                own = logits.gather(1, target[rows].masked_fill(ignored, 0)[:, None])[:, 0]
                lse[rows] = logits.logsumexp(1)
                losses[rows] = (lse[rows] - own).masked_fill_(ignored, 0)
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.options = chunk, ignore_index, dtype
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses):
        hidden, weight, bias, target, lse = ctx.saved_tensors
        chunk, ignore_index, dtype = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=lse.dtype) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in _chunks(target, chunk):
                h = hidden[rows].to(dtype)
                dlogits = _dlogits(F.linear(h, w, b), lse[rows], target[rows], dlosses[rows], ignore_index)
                if needs_hidden:
                    dhidden[rows] = dlogits @ w
                if needs_weight:
                    accumulate(dweight, dlogits.T, h)
                if needs_bias:
                    dbias += dlogits.sum(0, dtype=dbias.dtype)
                # before the logits of the next chunk
                del dlogits
        dweight = None if dweight is None else dweight.to(weight.dtype)
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return dhidden, dweight, dbias, None, None, None, None


def _dlogits(logits, lse, target, dlosses, ignore_index):
    """(softmax - one-hot) * dlosses, [chunk, V], in the dtype of the logits; 0 where the target is ignored."""
    ignored = target == ignore_index
    probs = (logits.to(lse.dtype) - lse[:, None]).exp_()
    one_hot = (torch.arange(len(target), device=target.device), target.masked_fill(ignored, 0))
    probs[one_hot] -= 1
    return probs.mul_(dlosses[:, None]).masked_fill_(ignored[:, None], 0).to(logits.dtype)


def _chunks(target, chunk):
    return [slice(start, start + chunk) for start in range(0, len(target), chunk)]
