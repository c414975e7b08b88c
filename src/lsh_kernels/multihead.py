"""A drop-in for `nn.MultiheadAttention` that computes LSH attention, and the swap of one for the other in a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsh_kernels.config import LSHConfig, check_int
from lsh_kernels.functional import lsh_attention
from lsh_kernels.modules import FixedInEval, bool_padding, check_config, check_dropout, merge_heads, split_heads


class LSHMultiheadAttention(FixedInEval, nn.MultiheadAttention):
    """`nn.MultiheadAttention` that computes LSH attention: same constructor, parameters, state_dict and forward.

    In training every call draws new rotations from torch's default generator, so `torch.manual_seed` reproduces a run;
    in eval they are fixed: same input, same output.

    What it can't do yet is an error: attention weights (call with `need_weights=False`), an `attn_mask` that is not the
    causal one, `add_bias_kv`, `add_zero_attn`, and nested tensors unless batch first, self-attention and strided.

    `nn.TransformerEncoderLayer` never takes its fast path, which would compute full attention from these weights.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `nn.MultiheadAttention`.
        config: an `LSHConfig`; None means `LSHConfig()`.
        shared_qk: the paper's layer: keys are the normalised queries (self-attention only). The rows of the key
            projection stay in the state_dict, with zero gradient.
        exact_below: where query and key lengths are both below it, attention is exact: that of `nn.MultiheadAttention`
            with everything it can do; with `shared_qk` one softmax over all shared keys.

    Raises:
        TypeError, ValueError: an argument of the wrong type or size, or one that asks for what it can't do.
            (AssertionError or ValueError from `nn.MultiheadAttention` for what that checks.)

    Example:
        >>> attention = LSHMultiheadAttention(256, 4, batch_first=True)
        >>> x = torch.randn(2, 1000, 256)
        >>> out, _ = attention(x, x, x, need_weights=False, is_causal=True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        config: LSHConfig | None = None,
        shared_qk: bool = False,
        exact_below: int = 0,
    ):
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        self._set_options(config, shared_qk, exact_below)

    def _set_options(self, config, shared_qk, exact_below):
        """Check and set what `nn.MultiheadAttention` does not have."""
        self.config = LSHConfig() if config is None else config
        check_config(self.config)
        check_dropout(self.dropout)
        check_int("exact_below", exact_below, 0)
        if self.bias_k is not None:
            raise ValueError("add_bias_kv: got True, wanted False (LSH attention has no extra key yet)")
        if self.add_zero_attn:
            raise ValueError("add_zero_attn: got True, wanted False (LSH attention has no extra key yet)")
        if shared_qk and self.kdim != self.embed_dim:
            raise ValueError(f"kdim: got {self.kdim}, wanted embed_dim = {self.embed_dim} with shared_qk=True")
        self.shared_qk = shared_qk
        self.exact_below = exact_below
        # keeps nn.TransformerEncoderLayer and nn.TransformerEncoder off their fast paths; how the weights are stored is
        # told by `in_proj_weight is None`
        self._qkv_same_embed_dim = False
        self.register_buffer("rotations", None, persistent=False)

    def _reset_parameters(self):
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. Shapes are batch first: without `batch_first` B and the length are swapped; unbatched input has no B.

        Args:
            query: [B, L, E]. key: [B, S, kdim]. value: [B, S, vdim].
            key_padding_mask: [B, S] bool, True = ignore; or float, where -inf = ignore and any other value counts as 0
                (the values are not checked; exact attention adds them, as `nn.MultiheadAttention` does).
            need_weights: must be False, unless attention is exact at this length.
            attn_mask: not read if `is_causal`; otherwise must be None, unless attention is exact at this length.
            average_attn_weights: whether exact attention averages the weights over the heads.
            is_causal: position i sees positions up to i only, with or without `attn_mask`; needs L = S.

        Returns: (out [B, L, E], None); in place of None the weights where exact attention was asked for them.

        Raises:
            TypeError, ValueError: a shape or dtype that does not fit, or something that LSH attention can't do.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        self._check_inputs(query, key, value)
        batched = query.dim() == 3
        along = 1 if batched and self.batch_first else 0
        q_len, k_len = query.shape[along], key.shape[along]
        if is_causal and q_len != k_len:
            raise ValueError(f"is_causal: got True with lengths {q_len} and {k_len}, wanted equal lengths")
        padding = bool_padding(key_padding_mask, (query.shape[1 - along], k_len) if batched else (k_len,))

        exact = max(q_len, k_len) < self.exact_below
        if exact and not self.shared_qk:
            return self._exact(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if need_weights:
            raise ValueError(
                "need_weights: got True, wanted False (LSH attention has no [L, S] weights to return); "
                "call with need_weights=False"
            )
        if attn_mask is not None and not is_causal:
            raise ValueError(
                "attn_mask: got a mask without is_causal, wanted None (if it is the causal mask, pass is_causal=True; "
                "LSH attention reads no other mask yet)"
            )
        # activation checkpointing hands over views of one tensor
        if self.shared_qk and not (query is key or query.is_set_to(key)):
            raise ValueError("key: got another tensor than query, wanted the same (shared_qk=True is self-attention)")

        q, k, v = self.project_heads(query, key, value)
        if exact:
            # one bucket that holds everything: the softmax over all keys
            config = LSHConfig(n_hashes=1, n_buckets=2, span="bucket", norm_eps=self.config.norm_eps)
            buckets, rotations = q.new_zeros(*q.shape[:2], 1, q_len, dtype=torch.int32), None
        else:
            config, buckets, rotations = self.config, None, self._rotations_for(k_len)
        out = lsh_attention(
            q,
            k,
            v,
            config=config,
            is_causal=is_causal,
            key_padding_mask=padding if padding is None or batched else padding[None],
            dropout_p=self.dropout if self.training else 0.0,
            buckets=buckets,
            rotations=rotations,
        )
        out = self.out_proj(merge_heads(out, self.batch_first or not batched))
        return (out if batched else out[0]), None

    def project_heads(self, query, key, value):
        """Queries, keys (None if shared) and values as [B, H, L, D]."""
        projected = self._project(query, key, value)
        return tuple(None if x is None else split_heads(x, self.num_heads, self.batch_first) for x in projected)

    def _project(self, query, key, value):
        """Queries, keys and values in E; keys are None if shared."""
        if self.in_proj_weight is not None:
            w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        else:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        b_q, b_k, b_v = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.shared_qk:
            if self.in_proj_weight is None:
                # the key weight in the graph gets a zero gradient, which DDP and optimizers expect, instead of None
                w_q = torch.cat([w_q, w_k])[: self.embed_dim]
            return F.linear(query, w_q, b_q), None, F.linear(value, w_v, b_v)
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

    def _exact(self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal):
        """What `nn.MultiheadAttention` computes, off its fast path."""
        transposed = query.dim() == 3 and self.batch_first
        if transposed and query is key and key is value:
            # one tensor stays one tensor: a single matmul projects it
            query = key = value = query.transpose(0, 1)
        elif transposed:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if is_causal:
            length = query.shape[0]
            attn_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            if key_padding_mask is not None and key_padding_mask.is_floating_point():
                attn_mask = torch.zeros_like(attn_mask, dtype=key_padding_mask.dtype).masked_fill(attn_mask, -torch.inf)
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            None,
            None,
            False,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if transposed else out), weights

    def _forward_nested(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal):
        """Self-attention of a nested tensor [B, *, E], as `nn.TransformerEncoder` makes it from padded input."""
        if not (query is key and key is value) or query.layout != torch.strided or not self.batch_first:
            raise ValueError(
                "query, key, value: got a nested tensor, wanted dense ones (or, with batch_first=True, one nested "
                "tensor of the strided layout for all three)"
            )
        if key_padding_mask is not None or attn_mask is not None or need_weights:
            raise ValueError("key_padding_mask, attn_mask, need_weights: got one with nested input, wanted None, None and False")
        lengths = [row.shape[0] for row in query.unbind()]
        x = query.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]  # [B, L]
        out, _ = self.forward(x, x, x, key_padding_mask=padding, need_weights=False, is_causal=is_causal)
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(out, lengths, strict=True)]), None

    def _check_inputs(self, query, key, value):
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        n_dims = query.dim()
        if n_dims not in (2, 3):
            raise ValueError(f"query: got shape {tuple(query.shape)}, wanted 2 dimensions or, with a batch, 3")
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if x.dim() != n_dims or x.shape[-1] != width:
                wanted = f"{n_dims} dimensions (those of query), the last of size {width}"
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {wanted}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value: got shape {tuple(value.shape)}, wanted key's but for the last: {tuple(key.shape)}")
        batch = 0 if self.batch_first else 1
        if n_dims == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(f"key: got batch size {key.shape[batch]}, wanted {query.shape[batch]} (that of query)")


def replace_multihead_attention(
    model: nn.Module,
    config: LSHConfig | None = None,
    *,
    shared_qk: bool = False,
    exact_below: int = 0,
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Swap every `nn.MultiheadAttention` in `model` for an `LSHMultiheadAttention`, in place.

    The new layers hold the same Parameter objects, so optimizers and tied weights keep working; training mode, device,
    dtype and hooks stay. A layer used in several places becomes one new layer in those places. Layers that are an
    `LSHMultiheadAttention` already get the new options. Every `nn.TransformerEncoder` above a swapped layer stops
    turning padded input into nested tensors. If an error is raised, nothing has been changed.

    Args:
        model: any module, or an `nn.MultiheadAttention` itself.
        config, shared_qk, exact_below: of the new layers, see `LSHMultiheadAttention`.
        filter: `filter(name, module) -> bool` says which layers to swap; None means all. `name` is the path in `model`.

    Returns:
        `model`; the new layer if `model` is an `nn.MultiheadAttention` itself.

    Raises:
        TypeError: a layer is of another subclass of `nn.MultiheadAttention`, whose own behaviour would be lost.
        ValueError: there is nothing to swap, or a layer has `add_bias_kv`, `add_zero_attn` or a forward of its own
            (compiled or patched). Leave such layers out with `filter`.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, batch_first=True), 2)
        >>> encoder = replace_multihead_attention(encoder, LSHConfig(n_hashes=2))
    """
    places = [("", None, "", model)]  # path, parent, name in it, module
    for path, parent in model.named_modules():
        prefix = f"{path}." if path else ""
        places += [(prefix + name, parent, name, child) for name, child in parent._modules.items()]
    places = [place for place in places if isinstance(place[3], nn.MultiheadAttention)]
    chosen = [place for place in places if filter is None or filter(place[0], place[3])]
    if not chosen:
        why = f"filter took none of {len(places)}" if places else "there is none"
        raise ValueError(f"model: found no nn.MultiheadAttention to swap in {type(model).__name__} ({why})")

    swapped = {}  # id of the old layer: new layer
    for path, _, _, old in chosen:
        if id(old) not in swapped:
            swapped[id(old)] = _swap(path, old, config, shared_qk, exact_below)
    for _, parent, name, old in chosen:
        if parent is not None:
            setattr(parent, name, swapped[id(old)])
    model = swapped.get(id(model), model)

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, LSHMultiheadAttention) for m in module.modules()):
            module.enable_nested_tensor = module.use_nested_tensor = False
    return model


def _swap(path, old, config, shared_qk, exact_below):
    """An LSHMultiheadAttention with the parameters, sub-modules, hooks and mode of `old`."""
    name = path or "model"
    if type(old) not in (nn.MultiheadAttention, LSHMultiheadAttention):
        raise TypeError(f"{name}: got {type(old).__name__}, wanted nn.MultiheadAttention itself (filter can leave it out)")
    compiled = name.endswith("_orig_mod") or old.__dict__.get("_compiled_call_impl") is not None
    if compiled or "forward" in old.__dict__:
        raise ValueError(f"{name}: got a layer that is compiled or has its forward patched, wanted a plain one: swap first")
    new = LSHMultiheadAttention.__new__(LSHMultiheadAttention)
    # not through __init__: hooks and whatever else was attached have to come along
    new.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in old.__dict__.items()})
    try:
        new._set_options(config, shared_qk, exact_below)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not new.training:
        new._draw_rotations()
    return new
