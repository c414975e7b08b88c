"""`LSHConfig`, its presets, and the sizes that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

MAX_BUCKETS = 32_768
SPANS = ("window", "chunk", "bucket")

# one rotation wider than this would cost more FLOPs than the attention itself
_MAX_SINGLE_FACTOR = 128


@dataclass(frozen=True)
class LSHConfig:
    """What a query may see, and how it is hashed.

    The default is the *window* span: strictly causal, independent of any chunk grid. `LSHConfig.paper()` and
    `LSHConfig.trax()` give the layer of the paper and that of its public implementations.

    Args:
        n_hashes: R, hash rounds.
        n_buckets: N, buckets per round: an even int, a tuple of even factors (hashed from consecutive column blocks and
            combined lowest factor first), or None for about `2 * length / chunk_length`, following each call's key length.
            Fix it where outputs at different lengths must agree.
        chunk_length: C, slots per chunk of the sorted order.
        window: W, slots that a query looks back (and ahead, if not causal); None means `chunk_length`. Read by
            `span="window"`.
        span: "window", "chunk" or "bucket": the interval of sorted key slots that a query sees.
            With "chunk" and causal attention chunk borders move with *future* tokens: the output at a position is then
            not invariant to what comes after it. "window" and "bucket" are. With "chunk" and *separate* keys padded
            queries take part in the order, so that padding moves chunk borders too.
        chunks_before, chunks_after: chunks seen on either side of a query's own. Read by `span="chunk"`.
        within_bucket: only keys of the query's own bucket; always so for "window" and "bucket".
        dedupe: a pair found in several rounds counts once: one exact softmax over the union of the rounds.
        wrap: the rounds form one cyclic sequence of chunks, as in trax; needs `span="chunk"`, `within_bucket=False`,
            `dedupe=False`.
        local_window: w > 0 adds one round in identity order with window w; needs query length = key length.
        norm_eps: added inside the mean square that normalises shared keys.

    Raises:
        TypeError, ValueError: a field of the wrong type, out of range, or a combination that has no meaning.

    Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020.
    """

    n_hashes: int = 4
    n_buckets: int | tuple[int, ...] | None = None
    chunk_length: int = 64
    window: int | None = None
    span: str = "window"
    chunks_before: int = 1
    chunks_after: int = 0
    within_bucket: bool = True
    dedupe: bool = True
    wrap: bool = False
    local_window: int = 0
    norm_eps: float = 0.0

    def __post_init__(self):
        for name, least in (
            ("n_hashes", 1),
            ("chunk_length", 1),
            ("chunks_before", 0),
            ("chunks_after", 0),
            ("local_window", 0),
        ):
            check_int(name, getattr(self, name), least)
        if self.window is not None:
            check_int("window", self.window, 1)
        for name in ("within_bucket", "dedupe", "wrap"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted a bool")
        if self.span not in SPANS:
            raise ValueError(f"span: got {self.span!r}, wanted one of {', '.join(map(repr, SPANS))}")
        if isinstance(self.norm_eps, bool) or not isinstance(self.norm_eps, (int, float)):
            raise TypeError(f"norm_eps: got {self.norm_eps!r}, wanted a float")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps: got {self.norm_eps}, wanted a finite number >= 0")
        if self.n_buckets is not None:
            factors = bucket_factors(self.n_buckets)
            object.__setattr__(self, "n_buckets", factors if len(factors) > 1 else factors[0])
        if self.span != "chunk" and not self.within_bucket:
            raise ValueError(f'within_bucket: got False with span="{self.span}", wanted True (only span="chunk" crosses buckets)')
        if self.wrap and (self.span != "chunk" or self.within_bucket or self.dedupe):
            raise ValueError(
                f"wrap: got True with span={self.span!r}, within_bucket={self.within_bucket}, dedupe={self.dedupe}; "
                'wanted span="chunk", within_bucket=False, dedupe=False'
            )

    @classmethod
    def paper(cls, **fields) -> LSHConfig:
        """The layer of the paper: chunks, within the bucket, each pair counted once, no wrap. Other fields as keywords."""
        return cls(**{"span": "chunk", "within_bucket": True, "dedupe": True, "wrap": False, **fields})

    @classmethod
    def trax(cls, **fields) -> LSHConfig:
        """What trax and Hugging Face compute: chunks across buckets and rounds, copies of a pair counted each time."""
        preset = {"span": "chunk", "within_bucket": False, "dedupe": False, "wrap": True, "norm_eps": 1e-6}
        return cls(**{**preset, **fields})

    @property
    def window_length(self) -> int:
        """W: `window`, or `chunk_length` where that is None."""
        return self.chunk_length if self.window is None else self.window

    def factors(self, length: int) -> tuple[int, ...]:
        """The bucket factors (N_0, N_1, ..) used for `length` keys; their product is N."""
        if self.n_buckets is not None:
            return bucket_factors(self.n_buckets)
        return default_factors(length, self.chunk_length)

    def options(self, factors: tuple[int, ...], *, is_causal: bool, dropout_p: float, scale: float) -> AttentionOptions:
        """This config for one call, as the backends take it."""
        return AttentionOptions(
            factors=list(factors),
            hashed=True,
            span=self.span,
            window=self.window_length,
            chunk_length=self.chunk_length,
            chunks_before=self.chunks_before,
            chunks_after=self.chunks_after,
            within_bucket=self.within_bucket,
            dedupe=self.dedupe,
            wrap=self.wrap,
            local_window=self.local_window,
            norm_eps=float(self.norm_eps),
            is_causal=bool(is_causal),
            dropout_p=dropout_p,
            scale=scale,
        )


def bucket_factors(n_buckets) -> tuple[int, ...]:
    """Check `n_buckets` (an even int or a tuple of even ints, product 2 to 32,768) and return it as a tuple of factors."""
    factors = tuple(n_buckets) if isinstance(n_buckets, (tuple, list)) else (n_buckets,)
    if not factors or any(isinstance(n, bool) or not isinstance(n, int) for n in factors):
        raise TypeError(f"n_buckets: got {n_buckets!r}, wanted an even int, a tuple of even ints or None")
    if any(n < 2 or n % 2 for n in factors) or math.prod(factors) > MAX_BUCKETS:
        raise ValueError(f"n_buckets: got {n_buckets!r}, wanted even factors >= 2 with a product <= {MAX_BUCKETS}")
    return factors


def default_factors(length: int, chunk_length: int) -> tuple[int, ...]:
    """N = 2^p with p = round(log2(2 * length / chunk_length)), 2 <= N <= 32,768; two factors above 128."""
    p = min(max(round(math.log2(2 * length / chunk_length)), 1), 15)
    if 2**p <= _MAX_SINGLE_FACTOR:
        return (2**p,)
    return (2 ** (p // 2), 2 ** (p - p // 2))


def check_int(name: str, value, least: int) -> None:
    """TypeError, ValueError: value is no int, is less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, wanted an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted >= {least}")


class AttentionOptions(NamedTuple):
    """All that a backend needs to know beside the tensors, one field per argument of the custom ops."""

    factors: list[int]
    hashed: bool  # False: local attention, one round in identity order
    span: str
    window: int
    chunk_length: int
    chunks_before: int
    chunks_after: int
    within_bucket: bool
    dedupe: bool
    wrap: bool
    local_window: int
    norm_eps: float
    is_causal: bool
    dropout_p: float
    scale: float
