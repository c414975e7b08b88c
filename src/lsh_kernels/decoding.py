"""Decoding one token at a time: work per token does not grow with the prefix, nor does memory beside its keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import functional
from .config import LSHConfig
from .torch_backend import inverse_norm
from .torch_walk import compute_dtype


class BucketCache:
    """Keys and values of a prefix, and for every bucket the positions of its last W + 1 keys.

    `step` gives what `lsh_attention(.., is_causal=True)` with these rotations gives in the last row of the whole sequence. Causal
    self-attention without dropout, padding and gradients, in plain torch, on any device.

    Args:
        query, key, value: the prompt, of at least one token: [B, H, L, D], [B, Hkv, L, D] and [B, Hkv, L, Dv] as in
            `lsh_attention`, key None for shared QK.
        config: an `LSHConfig` with `span="window"` and its own `n_buckets`.
        rotations: [Hkv or 1, D, R, W_rot] as `random_rotations` makes them.
        max_length: the most tokens that will come, the prompt's among them; memory for as many is taken at once. Beside keys
            and values a head takes 4 R N (W + 1) bytes.
        scale: factor of the logits; default 1 for shared QK, D**-0.5 for separate keys.

    Attributes:
        length: tokens so far.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from lsh_kernels import LSHConfig, random_rotations
        >>> config, rotations = LSHConfig(n_buckets=16), random_rotations(64, 16, 4)
        >>> qk, v = torch.randn(2, 1, 8, 1000, 64)
        >>> cache = BucketCache(qk[:, :, :-1], None, v[:, :, :-1], config=config, rotations=rotations, max_length=2000)
        >>> out, lse = cache.step(qk[:, :, -1:], None, v[:, :, -1:])
        >>> out.shape, lse.shape
        (torch.Size([1, 8, 1, 64]), torch.Size([1, 8, 1]))
    """

    @torch.no_grad()
    def __init__(
        self, query: Tensor, key: Tensor | None, value: Tensor, *, config: LSHConfig, rotations: Tensor, max_length: int,
        scale: float | None = None,
    ):  # fmt: skip
        if not isinstance(config, LSHConfig):
            raise TypeError(f"config: got {type(config).__name__}, wanted an LSHConfig")
        if config.span != "window":
            raise ValueError(f'config.span: got "{config.span}", wanted "window" (others need more than a bucket\'s last keys)')
        if config.n_buckets is None:
            raise ValueError("config.n_buckets: got None, which follows the length, wanted a number of buckets")
        if isinstance(max_length, bool) or not isinstance(max_length, int):
            raise TypeError(f"max_length: got {max_length!r}, wanted an int")
        self.config, self.shared, self.max_length, self.length = config, key is None, max_length, 0
        functional.check_tensors(query, key, value, None)
        if query.shape[2] != value.shape[2] or self.shared and query.shape[1] != value.shape[1]:
            raise ValueError(f"value: got {tuple(value.shape)}, wanted the length (shared QK: and heads) of {tuple(query.shape)}")
        if query.shape[2] > max_length:
            raise ValueError(f"max_length: got {max_length}, wanted at least the prompt's {query.shape[2]}")
        B, Hkv, _, Dv = value.shape
        D, device = query.shape[-1], query.device
        factors = config.factors(max_length)
        functional.check_rotations(rotations, query, Hkv, config.n_hashes, factors)
        _, self.scale = functional.check_numbers(0.0, scale, 1.0 if self.shared else D**-0.5)
        self.rotations, self.n_heads = rotations.clone(), query.shape[1]
        self.keys = torch.zeros(B, Hkv, max_length, D, dtype=query.dtype, device=device)
        self.values = torch.zeros(B, Hkv, max_length, Dv, dtype=query.dtype, device=device)
        # a ring per bucket of n cells: key number c of a bucket stands at c % n
        cells = (B, Hkv, config.n_hashes, math.prod(factors), min(config.window_length + 1, max_length))
        self.rings = torch.full(cells, -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(cells[:-1], dtype=torch.int64, device=device)
        self._append(query if self.shared else key, value)

    @torch.no_grad()
    def step(self, query: Tensor, key: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token, and attend from it.

        Args:
            query, key, value: [B, H, 1, D], [B, Hkv, 1, D] (None for shared QK) and [B, Hkv, 1, Dv], of the prompt's dtype.

        Returns:
            out [B, H, 1, Dv] in query's dtype, and lse [B, H, 1] (float32, float64 for float64).

        Raises:
            TypeError, ValueError: as above; nothing is appended then.
        """
        functional.check_tensors(query, key, value, None)
        (B, Hkv, _, D), Dv = self.keys.shape, self.values.shape[-1]
        for name, x, heads, width in (("query", query, self.n_heads, D), ("key", key, Hkv, D), ("value", value, Hkv, Dv)):
            got = None if x is None else (tuple(x.shape), x.dtype, x.device)
            wanted = None if name == "key" and self.shared else ((B, heads, 1, width), self.keys.dtype, self.keys.device)
            if got != wanted:
                raise ValueError(f"{name}: got {got}, wanted {wanted} as the prompt has it")
        if self.length == self.max_length:
            raise ValueError(f"max_length: got {self.max_length}, wanted at least {self.length + 1}")
        buckets = self._append(query if self.shared else key, value)
        if not self.shared:
            buckets = functional.lsh_hash(query, self.rotations, self.config.n_buckets)
        positions, visible = self._candidates(buckets.view(B, Hkv, self.n_heads // Hkv, self.config.n_hashes))
        head = torch.arange(B * Hkv, device=query.device).view(B, Hkv, 1).repeat_interleave(self.n_heads // Hkv, 1)
        rows = positions + self.max_length * head  # [B, H, n]
        dtype = compute_dtype(query.dtype)
        q, k, v = query.to(dtype), *(x.flatten(0, 2)[rows].to(dtype) for x in (self.keys, self.values))
        if self.shared:
            k = k * inverse_norm(k, self.config.norm_eps, dtype).unsqueeze(-1)
        logits = ((q * k).sum(-1) * self.scale).masked_fill(~visible, -math.inf)  # [B, H, n]
        if self.shared:
            # what the paper takes off the logit of a token's own key
            logits[..., -1] -= 1e5
        out = (logits.softmax(-1).unsqueeze(-1) * v).sum(-2, keepdim=True)
        return out.to(query.dtype), logits.logsumexp(-1, keepdim=True)

    def _append(self, rows: Tensor, value: Tensor) -> Tensor:
        """Keep n keys [B, Hkv, n, D] and values, and enter the keys' positions into the rings of their buckets [B, Hkv, R, n]."""
        n, n_cells = rows.shape[2], self.rings.shape[-1]
        new = slice(self.length, self.length + n)
        self.keys[:, :, new], self.values[:, :, new] = rows, value
        of_rows = functional.lsh_hash(rows, self.rotations, self.config.n_buckets)
        order = functional.bucket_sort(of_rows, self.config.n_buckets).long()  # [B, Hkv, R, n]
        buckets = of_rows.long().gather(-1, order)
        slot = torch.arange(n, device=rows.device)
        number = self.counts.gather(-1, buckets) + slot - torch.searchsorted(buckets, buckets)
        total = number + torch.searchsorted(buckets, buckets, right=True) - slot
        # of new keys that share a cell all write the position of the last one
        last = slot + (total - 1 - number) // n_cells * n_cells
        positions = (self.length + order.gather(-1, last)).to(torch.int32)
        self.rings.flatten(-2).scatter_(-1, buckets * n_cells + number % n_cells, positions)
        self.counts.scatter_(-1, buckets, total)
        self.length += n
        return of_rows

    def _candidates(self, buckets: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, H, n] for the last token's queries in buckets [B, Hkv, H / Hkv, R], and which of them each sees; the last
        one is its own, seen if no other is."""
        B, Hkv, R, N, _ = self.rings.shape
        own = self.length - 1
        ring = torch.arange(B * Hkv * R, device=buckets.device).view(B, Hkv, 1, R) * N + buckets
        positions = self.rings.flatten(0, 3)[ring].flatten(3).flatten(1, 2).long()
        if self.config.local_window:
            near = torch.arange(max(0, own - self.config.local_window), self.length, device=buckets.device)
            positions = torch.cat([positions, near.expand(B, self.n_heads, -1)], -1)
        visible = positions >= 0
        if self.config.dedupe:
            positions = positions.sort(-1).values
            visible = positions >= 0
            visible[..., 1:] &= positions[..., 1:] != positions[..., :-1]
        if self.shared:
            visible &= positions != own
        alone = ~visible.any(-1, keepdim=True)
        positions = torch.cat([positions, torch.full_like(positions[..., :1], own)], -1)
        return positions.clamp_(min=0), torch.cat([visible, alone], -1)
