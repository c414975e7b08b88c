"""nn.Modules of self-attention: the layer of the paper, and the local one that the Reformer puts beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsh_kernels.config import MAX_BUCKETS, LSHConfig, check_int
from lsh_kernels.functional import local_attention, lsh_attention, random_rotations

EVAL_SEED = 0


class FixedInEval(nn.Module):
    """Rotations that are drawn anew in training and stay fixed in eval.

    `rotations` [H, D, R, W_max] float32 is a non-persistent buffer, drawn from a private generator when the module
    first enters eval mode. It is wide enough for every length, which takes the first W_rot columns that it needs.
    Subclasses set `config`, `num_heads`, `head_dim` and `out_proj`, and register the buffer as None.
    """

    def train(self, mode: bool = True):
        super().train(mode)
        # here and not in forward alone, so that a compiled forward finds them ready
        if not mode and self.rotations is None:
            self._draw_rotations()
        return self

    def _apply(self, fn, recurse=True):
        # a cast to half precision or to_empty() would spoil them
        self.rotations = None
        super()._apply(fn, recurse)
        if not self.training:
            self._draw_rotations()
        return self

    def _draw_rotations(self):
        device = self.out_proj.weight.device
        if device.type == "meta":
            return
        # drawn on the CPU: the same values on every device
        generator = torch.Generator().manual_seed(EVAL_SEED)
        widest = self.config.factors(MAX_BUCKETS * self.config.chunk_length)
        rotations = random_rotations(
            self.head_dim, widest, self.config.n_hashes, n_heads=self.num_heads, generator=generator, device="cpu"
        )
        self.rotations = rotations.to(device)

    def _rotations_for(self, length):
        """The rotations for `length` keys [H, D, R, W_rot]; None in training: lsh_attention then draws its own."""
        if self.training:
            return None
        if self.rotations is None:
            self._draw_rotations()
        return self.rotations[..., : sum(self.config.factors(length)) // 2]


class _SelfAttention(nn.Module):
    """Self-attention of x [B, L, E]: projections to heads, attention, a projection back.

    Subclasses name their projections in `_projections` and say in `project_heads` and `_attend` what becomes of them.
    """

    def __init__(self, embed_dim, num_heads, causal, dropout, bias, head_dim, rotary, device, dtype):
        super().__init__()
        check_int("embed_dim", embed_dim, 1)
        check_int("num_heads", num_heads, 1)
        if head_dim is not None:
            check_int("head_dim", head_dim, 1)
        elif embed_dim % num_heads:
            raise ValueError(f"embed_dim: got {embed_dim}, wanted a multiple of num_heads = {num_heads}, or head_dim")
        check_dropout(dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.causal = causal
        self.dropout = dropout
        self.rotary = rotary
        if rotary and self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim} with rotary=True, wanted an even number")
        width = self.num_heads * self.head_dim
        for name in self._projections:
            setattr(self, name, nn.Linear(embed_dim, width, bias=bias, device=device, dtype=dtype))
        self.out_proj = nn.Linear(width, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: [B, L, E].
            key_padding_mask: [B, L] bool, True = ignore; or float, where -inf = ignore and any other value counts as 0.

        Returns: [B, L, E].

        Raises:
            TypeError, ValueError: a mask of the wrong dtype, a shape that does not fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [B, L, {self.embed_dim}]")
        padding = bool_padding(key_padding_mask, x.shape[:2])
        out = self._attend(*self.project_heads(x), padding, self.dropout if self.training else 0.0)
        return self.out_proj(merge_heads(out, batch_first=True))

    def _project(self, x):
        """What each projection makes of x, as [B, H, L, D]."""
        return [split_heads(getattr(self, name)(x), self.num_heads, batch_first=True) for name in self._projections]


class LSHSelfAttention(FixedInEval, _SelfAttention):
    """The layer of the paper: self-attention whose queries and keys share one projection.

    `out_proj(lsh_attention(qk_proj(x), None, v_proj(x)))`, per head. In training every call draws new rotations from
    torch's default generator, so `torch.manual_seed` reproduces a run; in eval they are fixed: same input, same output.

    Args:
        embed_dim: E.
        num_heads: H.
        config: an `LSHConfig`.
        causal: position i sees positions up to i only.
        dropout: probability that an attention probability is dropped in training.
        bias: whether the three projections have a bias.
        head_dim: D, of queries, keys and values; None means E / H.
        rotary: turn queries (and so the keys) by their positions, before they are hashed; needs an even D.
        device, dtype: of the parameters.

    Parameters: `qk_proj` and `v_proj` (E -> H D), `out_proj` (H D -> E), each an `nn.Linear`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or size.

    Example:
        >>> layer = LSHSelfAttention(256, 4, causal=True)
        >>> layer(torch.randn(2, 1000, 256)).shape
        torch.Size([2, 1000, 256])

    Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020; rotary positions: Su et al. 2021
    (arXiv 2104.09864).
    """

    _projections = ("qk_proj", "v_proj")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        config: LSHConfig = LSHConfig(),  # noqa: B008 (frozen)
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        head_dim: int | None = None,
        rotary: bool = False,
        device=None,
        dtype=None,
    ):
        check_config(config)
        super().__init__(embed_dim, num_heads, causal, dropout, bias, head_dim, rotary, device, dtype)
        self.config = config
        self.register_buffer("rotations", None, persistent=False)

    def project_heads(self, x):
        """Queries, keys (None: shared) and values as [B, H, L, D]."""
        qk, v = self._project(x)
        return _rotate(qk) if self.rotary else qk, None, v

    def _attend(self, q, k, v, padding, dropout_p):
        return lsh_attention(
            q,
            k,
            v,
            config=self.config,
            is_causal=self.causal,
            key_padding_mask=padding,
            dropout_p=dropout_p,
            rotations=self._rotations_for(q.shape[2]),
        )


class LocalSelfAttention(_SelfAttention):
    """Self-attention to near tokens: the layer that the Reformer alternates with LSH attention.

    `out_proj(local_attention(q_proj(x), k_proj(x), v_proj(x)))`, per head.

    Args:
        embed_dim: E.
        num_heads: H.
        window: position i sees positions i - window .. i + window (.. i if causal).
        causal, dropout, bias, head_dim, rotary, device, dtype: as in `LSHSelfAttention`.

    Parameters: `q_proj`, `k_proj` and `v_proj` (E -> H D), `out_proj` (H D -> E), each an `nn.Linear`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or size.

    Example:
        >>> layer = LocalSelfAttention(256, 4, window=128, causal=True)
        >>> layer(torch.randn(2, 1000, 256)).shape
        torch.Size([2, 1000, 256])

    Source: as `local_attention`.
    """

    _projections = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int = 64,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        head_dim: int | None = None,
        rotary: bool = False,
        device=None,
        dtype=None,
    ):
        check_int("window", window, 1)
        super().__init__(embed_dim, num_heads, causal, dropout, bias, head_dim, rotary, device, dtype)
        self.window = window

    def project_heads(self, x):
        """Queries, keys and values as [B, H, L, D]."""
        q, k, v = self._project(x)
        return (_rotate(q), _rotate(k), v) if self.rotary else (q, k, v)

    def _attend(self, q, k, v, padding, dropout_p):
        return local_attention(q, k, v, window=self.window, is_causal=self.causal, key_padding_mask=padding, dropout_p=dropout_p)


def _rotate(x):
    """x [.., L, D], each (x_d, x_{d + D/2}) turned by the angle position * 10,000^(-2d/D)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    rates = 1e-4 ** (torch.arange(half, dtype=dtype, device=x.device) / half)
    angles = torch.arange(length, dtype=dtype, device=x.device)[:, None] * rates  # [L, D/2]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def split_heads(x, num_heads, batch_first):
    """[B, L, H D], or [L, B, H D], or unbatched [L, H D], as [B, H, L, D]."""
    x = x.unflatten(-1, (num_heads, -1))
    if x.dim() == 3:
        x = x[None]
    elif not batch_first:
        x = x.transpose(0, 1)
    return x.transpose(1, 2)


def merge_heads(x, batch_first):
    """[B, H, L, D] as [B, L, H D], or [L, B, H D]."""
    return (x.permute(0, 2, 1, 3) if batch_first else x.permute(2, 0, 1, 3)).flatten(2)


def bool_padding(mask, shape):
    """A key padding mask as bool (True = ignore), or None. `nn.TransformerEncoderLayer` hands over 0 and -inf."""
    if mask is None:
        return None
    if mask.shape != torch.Size(shape):
        raise ValueError(f"key_padding_mask: got shape {tuple(mask.shape)}, wanted {tuple(shape)}")
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"key_padding_mask: got {mask.dtype}, wanted torch.bool, or floating point with -inf = ignore")
    return torch.isneginf(mask)


def check_config(config):
    if not isinstance(config, LSHConfig):
        raise TypeError(f"config: got {type(config).__name__}, wanted an LSHConfig")


def check_dropout(dropout):
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: got {dropout}, wanted a probability between 0 and 1")
