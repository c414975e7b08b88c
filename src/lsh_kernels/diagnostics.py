"""What LSH attention keeps of exact attention: bucket sizes, share of the softmax mass, error of the output.

For queries and keys at hand, or those of a layer of a running model. Exact attention is computed for some queries at a
time, so memory is O(queries of a block * S), never L * S. Random state outside stays as it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SPANS, LSHConfig, bucket_factors, check_int
from .functional import lsh_attention, lsh_hash, random_rotations
from .modules import LSHSelfAttention
from .multihead import LSHMultiheadAttention, replace_multihead_attention
from .torch_backend import head_walks, sort_rounds
from .torch_walk import Walk, compute_dtype

# (query, key) pairs of exact attention at a time
_BLOCK_PAIRS = 2**22


class AttentionInputs(NamedTuple):
    """What an attention layer attends with, as `lsh_attention` takes it, and the layer's config."""

    query: Tensor  # [B, H, L, D]
    key: Tensor | None  # [B, Hkv, S, D]; None: shared QK
    value: Tensor | None = None  # [B, Hkv, S, Dv]; None: nothing is said about the output
    is_causal: bool = False
    key_padding_mask: Tensor | None = None  # [B, S] bool, True = ignore
    config: LSHConfig | None = None


class AttentionRecall(NamedTuple):
    """What `attention_recall` found for M queries."""

    queries: Tensor  # [M] int64: their positions, ascending
    recall: Tensor  # [B, H, M]: share of the exact softmax mass on keys that LSH attention sees, 0 to 1
    cosine_error: Tensor | None  # [B, H, M]: 1 - cos(LSH output, exact output), 0 to 2; None without values
    n_keys: Tensor  # [B, H, M] int64: distinct keys that LSH attention sees
    perplexity: Tensor  # [B, H, M]: exp(entropy) of exact attention; as many keys, equally heavy, would be as spread out
    bucket_sizes: Tensor  # [B, H, R, M] int64: keys in the query's bucket per round; a shared key counts for itself too


@torch.no_grad()
def attention_recall(
    inputs: AttentionInputs,
    config: LSHConfig | None = None,
    *,
    scale: float | None = None,
    buckets: Tensor | tuple[Tensor, Tensor] | None = None,
    n_queries: int | None = None,
    seed: int = 0,
) -> AttentionRecall:
    """How much of exact attention LSH attention keeps, query by query.

    E_i are the keys that exact attention sees: no padding, none after i if causal, not i itself if shared. C_i are those of
    them that `lsh_attention` sees in any round; without any, its own key where keys are separate and L = S. With p_ij the
    softmax of the logits s_ij of `lsh_attention` over all of E_i, `recall_i = sum of p_ij over C_i`. Where E_i is empty, and
    where query i is itself padding (L = S), recall, error and perplexity are NaN. A key found several times is one key, also
    where `config.dedupe` is off; the output, which is that of `lsh_attention`, weighs it as the config says.

    Args:
        inputs: from `capture_attention`, or made by hand.
        config: None means the layer's own, or `LSHConfig()` where it has none.
        scale, buckets: as in `lsh_attention`.
        n_queries: take so many queries, drawn without replacement, the same for every head; None means all.
        seed: of that draw and of the rotations; fewer rounds are the first ones of more.

    Raises:
        TypeError, ValueError: as `lsh_attention`; n_queries below 1.

    Example:
        >>> qk, v = torch.randn(2, 1, 8, 1000, 64)
        >>> found = attention_recall(AttentionInputs(qk, None, v, is_causal=True), LSHConfig(n_hashes=8))
        >>> found.recall.nanmean(), found.n_keys.float().mean()

    Source: the sets P_i of Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020.
    """
    query, key, value, is_causal, padding, own_config = inputs
    config = config or own_config or LSHConfig()
    if not isinstance(config, LSHConfig):
        raise TypeError(f"config: got {type(config).__name__}, wanted an LSHConfig or None")
    shared, keys = key is None, query if key is None else key
    for name, x in (("query", query), ("key", keys)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: got {got}, wanted a tensor of 4 dimensions")
    if n_queries is not None:
        check_int("n_queries", n_queries, 1)
    (B, H, L, D), (Hkv, S), device = query.shape, keys.shape[1:3], query.device
    factors, dtype = config.factors(S), compute_dtype(query.dtype)
    scale = scale if scale is not None else 1.0 if shared else D**-0.5

    generator = torch.Generator().manual_seed(seed)
    queries = torch.randperm(L, generator=generator)[:n_queries].sort().values.to(device)
    rotations = None
    if buckets is None:
        rounds = [random_rotations(D, factors, 1, n_heads=Hkv, generator=generator, device="cpu") for _ in range(config.n_hashes)]
        rotations = torch.cat(rounds, 2).to(device)
    # checks all arguments first
    out = lsh_attention(
        query, key, keys[..., :1] if value is None else value, config=config, is_causal=is_causal,
        key_padding_mask=padding, scale=scale, buckets=buckets, rotations=rotations,
    )  # fmt: skip
    if buckets is None:
        buckets = lsh_hash(query, rotations, factors)
        buckets = buckets if shared else (buckets, lsh_hash(key, rotations, factors))
    q_buckets, k_buckets = (buckets, buckets) if shared else buckets

    group = H // Hkv
    counts = bucket_occupancy(k_buckets, factors, padding).repeat_interleave(group, 1)  # [B, H, R, N]
    sizes = counts.gather(3, q_buckets[..., queries].long().clamp(0, counts.shape[3] - 1))
    options = config.options(factors, is_causal=is_causal, dropout_p=0.0, scale=scale)
    state = sort_rounds(q_buckets, None if shared else k_buckets, padding, options)
    recall, error, perplexity = torch.full((3, B, H, len(queries)), math.nan, dtype=dtype, device=device)
    n_keys = torch.empty(recall.shape, dtype=torch.int64, device=device)
    for b, h in product(range(B), range(H)):
        walks = head_walks(state, b, slice(h, h + 1), torch.tensor([h // group], device=device), options)
        k = keys[b, h // group].to(dtype)  # [S, D]
        if shared:
            k = _unit(k, config.norm_eps)
        for rows in torch.arange(len(queries), device=device).split(max(1, _BLOCK_PAIRS // S)):
            i = queries[rows]  # [M]
            hidden = _hidden_keys(i, S, shared, is_causal, None if padding is None else padding[b])
            probs = (query[b, h, i].to(dtype) @ k.T * scale).masked_fill(hidden, -math.inf).softmax(1)  # [M, S]
            seen = _seen_keys(walks, i, S) & ~hidden
            if L == S and not shared:
                own = rows - rows[0], i
                seen[own] |= ~seen.any(1) & ~hidden[own]
            recall[b, h, rows] = (probs * seen).sum(1).clamp(max=1)
            n_keys[b, h, rows] = seen.sum(1)
            perplexity[b, h, rows] = torch.special.entr(probs).sum(1).exp()
            if value is not None:
                v = value[b, h // group].to(dtype)
                exact = probs @ (v if padding is None else v.masked_fill(padding[b][:, None], 0))
                error[b, h, rows] = (1 - F.cosine_similarity(out[b, h, i].to(dtype), exact, dim=1)).clamp(min=0)
    if padding is not None and L == S:
        for x in (recall, error, perplexity):
            x.masked_fill_(padding[:, None, queries], math.nan)
    return AttentionRecall(queries, recall, None if value is None else error, n_keys, perplexity, sizes)


def _unit(x: Tensor, norm_eps: float) -> Tensor:
    """The rows of x [S, D] as shared keys; zero stays zero."""
    norm = (x.square().sum(1, keepdim=True) + x.shape[1] * norm_eps).sqrt()
    return x / norm.masked_fill(norm == 0, 1)


def _hidden_keys(i: Tensor, k_len: int, shared: bool, is_causal: bool, padding: Tensor | None) -> Tensor:
    """Keys that even exact attention does not see: bool [M, S] for the queries at positions i [M]."""
    i, j = i[:, None], torch.arange(k_len, device=i.device)
    hidden = (j > i) if is_causal else torch.zeros_like(j > i)
    if shared:
        hidden |= j == i
    return hidden if padding is None else hidden | padding


def _seen_keys(walks: list[Walk], i: Tensor, k_len: int) -> Tensor:
    """Keys in the intervals of the queries at positions i [M] in any round of one head: bool [M, S]."""
    # intervals of unequal length point into an extra column
    seen = torch.zeros(len(i), k_len + 1, dtype=torch.bool, device=i.device)
    for walk in walks:
        lo, hi, k_pos = (x.flatten() for x in (walk.lo, walk.hi, walk.k_pos))
        for (place,) in walk.q_places:
            first, end = lo[place[i]], hi[place[i]]
            slots = first[:, None] + torch.arange(int((end - first).max()), device=i.device)
            keys = k_pos[slots.clamp(max=len(k_pos) - 1)].masked_fill(slots >= end[:, None], k_len)
            seen.scatter_(1, keys, True)
    return seen[:, :k_len]


def bucket_occupancy(buckets: Tensor, n_buckets: int | tuple[int, ...], key_padding_mask: Tensor | None = None) -> Tensor:
    """Tokens per bucket, int64 [B, H, R, N]; they sum to the tokens of a row that are no padding.

    Args:
        buckets: [B, H, R, L] as from `lsh_hash`; ids out of range are clamped.
        n_buckets: N, or its factors.
        key_padding_mask: [B, L] bool, True = ignore.

    Example:
        >>> x = torch.randn(1, 8, 1000, 64)
        >>> sizes = bucket_occupancy(lsh_hash(x, random_rotations(64, 32, 4), 32), 32)
        >>> sizes.amax(3) / (1000 / 32)  # 1 where all buckets are equally full
    """
    n_buckets = math.prod(bucket_factors(n_buckets))
    counted = torch.ones_like(buckets, dtype=torch.int64)
    if key_padding_mask is not None:
        counted *= ~key_padding_mask[:, None, None, :]
    empty = counted.new_zeros(*buckets.shape[:3], n_buckets)
    return empty.scatter_add_(3, buckets.long().clamp(0, n_buckets - 1), counted)


def config_grid(
    base: LSHConfig | None = None,
    *,
    n_hashes: Sequence[int] = (1, 2, 4, 8),
    spans: Sequence[str] = SPANS,
    local_windows: Sequence[int] = (0, 64),
) -> list[LSHConfig]:
    """`base` (None: the default) with each span, local window and number of rounds; within the bucket, without wrap."""
    base = replace(base or LSHConfig(), span="chunk", within_bucket=True, wrap=False)
    return [replace(base, span=s, local_window=w, n_hashes=r) for s, w, r in product(spans, local_windows, n_hashes)]


@contextmanager
def capture_attention(model: nn.Module, layers: Sequence[str] | None = None) -> Iterator[dict[str, AttentionInputs]]:
    """Record what the attention layers of a model attend with, while it runs.

    Layers are `LSHSelfAttention`, `LSHMultiheadAttention` and `nn.MultiheadAttention`. Nothing is drawn, and the model computes
    what it computes without; only the fused encoder layers of torch, which pass the attention layers by, are off inside.
    Tensors are detached, not copied; of several calls of a layer the last one stays.

    Args:
        model: any module, or a layer itself (whose name is "").
        layers: names as in `model.named_modules()`; None means all attention layers.

    Yields:
        A dict name -> `AttentionInputs`, filled as the layers run.

    Raises:
        ValueError: there is no such layer; in a forward, an `attn_mask` that is not the causal one.
        TypeError, ValueError: an `nn.MultiheadAttention` that `replace_multihead_attention` can't swap.

    Example:
        >>> with capture_attention(model) as calls:
        ...     model(x)
        >>> attention_recall(calls["layers.0.self_attn"], LSHConfig(n_hashes=2)).recall.nanmean()
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, (LSHSelfAttention, nn.MultiheadAttention))}
    chosen = list(found) if layers is None else list(layers)
    if not chosen or set(chosen) - found.keys():
        raise ValueError(f"layers: got {layers}, wanted names of attention layers, of which the model has {list(found)}")
    calls, hooks = {}, []
    for name in chosen:
        # LSHMultiheadAttention projects to heads; its twin has the same parameters
        plain = not isinstance(found[name], (LSHSelfAttention, LSHMultiheadAttention))
        twin = replace_multihead_attention(found[name]) if plain else found[name]
        hooks.append((found[name], partial(_record, calls, name, twin)))
    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in hooks]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield calls
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _record(calls: dict, name: str, twin: nn.Module, layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
    """Forward hook of `layer`: its inputs, projected and split into heads."""
    bound = inspect.signature(layer.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    padding = call["key_padding_mask"]
    if padding is not None and padding.dtype != torch.bool:
        padding = padding.isneginf()
    if isinstance(layer, LSHSelfAttention):
        heads, is_causal = twin.project_heads(call["x"]), layer.causal
    else:
        heads = twin.project_heads(call["query"], call["key"], call["value"])
        is_causal = call["is_causal"] or _is_causal_mask(name, call["attn_mask"])
    if padding is not None and padding.dim() == 1:
        padding = padding[None]
    calls[name] = AttentionInputs(*heads, is_causal, padding, getattr(layer, "config", None))


def _is_causal_mask(name: str, mask: Tensor | None) -> bool:
    """Is this the causal mask, bool or float, and not None? Anything else raises."""
    if mask is None:
        return False
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype != torch.bool:
        causal = torch.zeros(causal.shape, dtype=mask.dtype, device=mask.device).masked_fill(causal, -math.inf)
    if not torch.equal(mask, causal):
        raise ValueError(f"{name}: got an attn_mask that is not the causal one, wanted None or the causal mask")
    return True
