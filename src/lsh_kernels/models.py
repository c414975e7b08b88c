"""`ReformerLM`: the Reformer as a language model or an encoder, built of the parts of this package."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsh_kernels.config import LSHConfig, check_int
from lsh_kernels.cross_entropy import chunked_cross_entropy
from lsh_kernels.feedforward import ChunkedFeedForward, check_feed_forward
from lsh_kernels.modules import LocalSelfAttention, LSHSelfAttention
from lsh_kernels.reversible import ReversibleBlock, ReversibleSequence

ATTENTIONS = ("local", "lsh")
POSITIONS = ("axial", "rotary")
IGNORED = -100  # a target that does not count


@dataclass(frozen=True)
class ReformerConfig:
    """What a `ReformerLM` is built of.

    Args:
        vocab_size: V.
        max_length: the longest input, in tokens.
        embed_dim: E, of each of the two residual streams.
        num_heads: H.
        head_dim: D; None means E / H.
        n_layers: each one attention and one feed-forward layer.
        pattern: kinds of attention, "local" or "lsh", that the layers take in turn.
        window: of local attention: position i sees i - window .. i + window (.. i if causal).
        lsh: of LSH attention. Its `n_buckets=None` means what it gives for `max_length`, at every length, so that outputs at
            different lengths agree.
        ff_dim: width of the feed-forward layers; None means 4 E.
        ff_chunk, activation, glu: as in `ChunkedFeedForward`.
        dropout: of the embedding and of what attention and feed-forward layers return.
        attention_dropout: of attention probabilities.
        ff_dropout: of hidden activations.
        positions: "axial", an embedding of two factors, or "rotary", in the attention layers.
        axial_shape: (n_1, n_2), n_1 n_2 >= max_length: position p has vectors p // n_2 of the first factor and p % n_2 of the
            second, side by side. None means about a square.
        axial_dims: widths (E_1, E_2) of the two vectors, which sum to E; None means halves.
        causal: a decoder; False: an encoder.
        tied: the head has the weights of the token embedding.
        loss_chunk: tokens whose logits exist at a time when a loss is computed.
        reversible: activations are recomputed in backward, in memory that does not grow with `n_layers`. False keeps them: the
            same function, faster.
        exact: residual streams on a fixed-point grid, so that recomputed activations are equal to the bit; see
            `ReversibleSequence`. Needs `reversible`.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, or a combination that has no meaning.
    """

    vocab_size: int
    max_length: int
    embed_dim: int = 256
    num_heads: int = 4
    head_dim: int | None = None
    n_layers: int = 6
    pattern: tuple[str, ...] = ("local", "lsh")
    window: int = 64
    lsh: LSHConfig = LSHConfig()
    ff_dim: int | None = None
    ff_chunk: int = 512
    activation: str = "gelu"
    glu: bool | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    ff_dropout: float = 0.0
    positions: str = "axial"
    axial_shape: tuple[int, int] | None = None
    axial_dims: tuple[int, int] | None = None
    causal: bool = True
    tied: bool = False
    loss_chunk: int = 512
    reversible: bool = True
    exact: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "max_length", "embed_dim", "num_heads", "n_layers", "window", "loss_chunk"):
            check_int(name, getattr(self, name), 1)
        for name in ("head_dim", "ff_dim"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("causal", "tied", "reversible", "exact"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted a bool")
        if self.exact and not self.reversible:
            raise ValueError("exact: got True with reversible=False, wanted False (nothing is recomputed)")
        if not isinstance(self.lsh, LSHConfig):
            raise TypeError(f"lsh: got {type(self.lsh).__name__}, wanted an LSHConfig")
        for name, of in (("pattern", "names"), ("axial_shape", "ints"), ("axial_dims", "ints")):
            value = getattr(self, name)
            if value is not None:
                # JSON has lists
                if not isinstance(value, (tuple, list)):
                    raise TypeError(f"{name}: got {value!r}, wanted a tuple of {of}")
                object.__setattr__(self, name, tuple(value))
        if not self.pattern or set(self.pattern) - set(ATTENTIONS):
            raise ValueError(f"pattern: got {self.pattern}, wanted a tuple of {' and '.join(map(repr, ATTENTIONS))}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: got {self.positions!r}, wanted one of {', '.join(map(repr, POSITIONS))}")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim: got {self.embed_dim}, wanted a multiple of num_heads = {self.num_heads}, or head_dim")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted a probability between 0 and 1")
        ff_dim = self.ff_dim or 4 * self.embed_dim
        check_feed_forward(ff_dim, self.ff_chunk, self.activation, self.glu, self.ff_dropout, prefix="ff_")
        self._check_positions()

    def _check_positions(self):
        if self.positions == "rotary":
            head_dim = self.head_dim or self.embed_dim // self.num_heads
            if head_dim % 2:
                raise ValueError(f'head_dim: got {head_dim} with positions="rotary", wanted an even number')
            for name in ("axial_shape", "axial_dims"):
                if getattr(self, name) is not None:
                    raise ValueError(f'{name}: got {getattr(self, name)} with positions="rotary", wanted None')
            return
        shape, dims = self.axial_factors()
        for name, pair in (("axial_shape", shape), ("axial_dims", dims)):
            if len(pair) != 2:
                raise ValueError(f"{name}: got {pair}, wanted a pair")
            for size in pair:
                check_int(name, size, 1)
        if math.prod(shape) < self.max_length:
            raise ValueError(f"axial_shape: got {shape}, wanted a product >= max_length = {self.max_length}")
        if sum(dims) != self.embed_dim:
            raise ValueError(f"axial_dims: got {dims}, wanted a sum of embed_dim = {self.embed_dim}")

    def axial_factors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape and widths of the axial embedding, given or default."""
        n_2 = math.isqrt(self.max_length - 1) + 1
        half = self.embed_dim // 2
        return self.axial_shape or (-(-self.max_length // n_2), n_2), self.axial_dims or (half, self.embed_dim - half)

    def to_json(self) -> str:
        """All fields, as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ReformerConfig:
        """The config that `to_json` wrote. TypeError: a field that there is not."""
        fields = json.loads(text)
        if "lsh" in fields:
            fields["lsh"] = LSHConfig(**fields["lsh"])
        return cls(**fields)


class ReformerLM(nn.Module):
    """The Reformer: embedding, reversible layers of attention and chunked feed-forward, a head to the vocabulary.

    Both residual streams start as the embedding of the tokens. Layer by layer `x1 += attention(norm(x2))` and
    `x2 += feed_forward(norm(x1))`; the head reads `norm(x1 + x2)`.

    Args:
        config: a `ReformerConfig`.
        device, dtype: of the parameters.

    Raises:
        TypeError: config is no `ReformerConfig`.

    Example:
        >>> model = ReformerLM(ReformerConfig(vocab_size=256, max_length=16_384))
        >>> text = torch.randint(256, (1, 16_385))
        >>> model(text[:, :-1], text[:, 1:]).backward()

    Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020.
    """

    def __init__(self, config: ReformerConfig, *, device=None, dtype=None):
        super().__init__()
        if not isinstance(config, ReformerConfig):
            raise TypeError(f"config: got {type(config).__name__}, wanted a ReformerConfig")
        self.config = config
        factory = {"device": device, "dtype": dtype}
        E = config.embed_dim
        self.embed = nn.Embedding(config.vocab_size, E, **factory)
        self.positions = AxialPositions(*config.axial_factors(), **factory) if config.positions == "axial" else None
        self.dropout = nn.Dropout(config.dropout)
        blocks = [ReversibleBlock(_attention(config, i, factory), _feed_forward(config, factory)) for i in range(config.n_layers)]
        self.layers = ReversibleSequence(blocks, exact=config.exact)
        self.norm = nn.LayerNorm(E, **factory)
        self.head = None if config.tied else nn.Linear(E, config.vocab_size, bias=False, **factory)
        # embeddings as large as what the layers add; where they are the head's weights too, a stream that starts as the
        # embedding of a token would then predict that token
        nn.init.normal_(self.embed.weight, std=0.02 if config.tied else 1.0)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Logits, or with targets the loss, whose logits exist for `config.loss_chunk` tokens at a time.

        Args:
            tokens: int64 [B, L], L <= config.max_length.
            targets: int64 [B, L]: what to predict at each position, -100 = nothing. For a decoder the next token: of a text
                [B, L + 1] hand over `text[:, :-1]` and `text[:, 1:]`.
            key_padding_mask: bool [B, L], True = ignore: no token sees it, and its target does not count.

        Returns:
            Logits [B, L, V]; with targets the mean cross-entropy (natural log) over those that count, a float32 scalar (float64
            for float64).

        Raises:
            TypeError, ValueError: a tensor of the wrong dtype or shape, or too long.
        """
        hidden = self.encode(tokens, key_padding_mask)
        if targets is None:
            return F.linear(hidden, self.head_weight)
        if key_padding_mask is not None:
            targets = targets.masked_fill(key_padding_mask, IGNORED)
        return chunked_cross_entropy(hidden, self.head_weight, targets, chunk=self.config.loss_chunk, ignore_index=IGNORED)

    def encode(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """What the head reads, [B, L, E]; arguments and errors as in `forward`."""
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.config.max_length:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, wanted [B, 1 <= L <= {self.config.max_length}]")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens: got {tokens.dtype}, wanted torch.int64")
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask: got {key_padding_mask.dtype}, wanted torch.bool (True = ignore)")
        x = self.embed(tokens)  # [B, L, E]
        if self.positions is not None:
            x = x + self.positions(tokens.shape[1])
        x = self.dropout(x)
        mask = {"key_padding_mask": key_padding_mask}
        if self.config.reversible:
            x1, x2 = self.layers(torch.cat([x, x], dim=-1), f_kwargs=mask).chunk(2, dim=-1)
        else:
            x1 = x2 = x
            for block in self.layers.blocks:
                x1 = x1 + block.f(x2, **mask)
                x2 = x2 + block.g(x1)
        return self.norm(x1 + x2)

    @property
    def head_weight(self) -> Tensor:
        """[V, E], of the head."""
        return self.embed.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        n_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue texts of one length. Runs in eval mode, and leaves the modes as they were; every step reads the whole text.

        Args:
            tokens: int64 [B, L].
            n_tokens: how many to add; L + n_tokens <= config.max_length.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: draw among the k most likely tokens; None means all.
            generator: of the draws; default torch's own for the device.

        Returns: int64 [B, L + n_tokens].

        Raises:
            TypeError, ValueError: an encoder, an argument out of range, or as in `forward`.
        """
        if not self.config.causal:
            raise ValueError("generate: got a model with causal=False, wanted a decoder")
        check_int("n_tokens", n_tokens, 0)
        if tokens.shape[-1] + n_tokens > self.config.max_length:
            wanted = f"at most {self.config.max_length} in all"
            raise ValueError(f"n_tokens: got {n_tokens} after {tokens.shape[-1]} tokens, wanted {wanted}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: got {temperature}, wanted a finite number >= 0")
        if top_k is not None:
            check_int("top_k", top_k, 1)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            for _ in range(n_tokens):
                logits = F.linear(self.encode(tokens)[:, -1], self.head_weight)  # [B, V]
                tokens = torch.cat([tokens, _draw(logits, temperature, top_k, generator)], dim=1)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return tokens

    def save(self, path) -> None:
        """Write config and weights to a file that `load`, or `torch.load(path, weights_only=True)`, reads."""
        torch.save({"config": self.config.to_json(), "state_dict": self.state_dict()}, path)

    @classmethod
    def load(cls, path, *, map_location=None) -> ReformerLM:
        """The model that `save` wrote, in training mode, with the dtypes that it had; nothing in the file is executed."""
        saved = torch.load(path, map_location=map_location, weights_only=True)
        model = cls(ReformerConfig.from_json(saved["config"]), device="meta")
        model.load_state_dict(saved["state_dict"], assign=True)
        return model


class AxialPositions(nn.Module):
    """A position embedding of two factors: n_1 E_1 + n_2 E_2 parameters for n_1 n_2 positions of width E_1 + E_2.

    Args:
        shape: (n_1, n_2). dims: (E_1, E_2).

    Source: Kitaev, Kaiser, Levskaya 2020, as in trax; Ho et al. 2019 (arXiv 1912.12180) for the name.
    """

    def __init__(self, shape: tuple[int, int], dims: tuple[int, int], *, device=None, dtype=None):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(shape[0], dims[0], device=device, dtype=dtype))
        self.columns = nn.Parameter(torch.empty(shape[1], dims[1], device=device, dtype=dtype))
        nn.init.normal_(self.rows, std=0.02)
        nn.init.normal_(self.columns, std=0.02)

    def forward(self, length: int) -> Tensor:
        """Of positions 0 .. length - 1: [length, E_1 + E_2]."""
        n_2 = self.columns.shape[0]
        n_1 = -(-length // n_2)
        rows = self.rows[:n_1, None].expand(-1, n_2, -1)  # [n_1, n_2, E_1]
        columns = self.columns.expand(n_1, -1, -1)  # [n_1, n_2, E_2]
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:length]


class _Attention(nn.Module):
    """`dropout(attention(norm(x)))`."""

    def __init__(self, norm: nn.Module, attention: nn.Module, dropout: nn.Module):
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.dropout = dropout

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return self.dropout(self.attention(self.norm(x), key_padding_mask))


def _attention(config, i, factory):
    """The attention layer of layer i."""
    options = {
        "causal": config.causal, "dropout": config.attention_dropout, "head_dim": config.head_dim,
        "rotary": config.positions == "rotary", **factory,
    }  # fmt: skip
    if config.pattern[i % len(config.pattern)] == "local":
        attention = LocalSelfAttention(config.embed_dim, config.num_heads, window=config.window, **options)
    else:
        lsh = replace(config.lsh, n_buckets=config.lsh.factors(config.max_length))
        attention = LSHSelfAttention(config.embed_dim, config.num_heads, config=lsh, **options)
    return _Attention(nn.LayerNorm(config.embed_dim, **factory), attention, nn.Dropout(config.dropout))


def _feed_forward(config, factory):
    """`dropout(feed_forward(norm(x)))`."""
    feed_forward = ChunkedFeedForward(
        config.embed_dim, config.ff_dim or 4 * config.embed_dim, config.ff_chunk, config.activation, config.glu,
        config.ff_dropout, **factory,
    )  # fmt: skip
    norm = nn.LayerNorm(config.embed_dim, **factory)
    return nn.Sequential(OrderedDict(norm=norm, feed_forward=feed_forward, dropout=nn.Dropout(config.dropout)))


def _draw(logits, temperature, top_k, generator):
    """One token for each row of logits [B, V], as [B, 1]."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    # the largest is 0: no temperature makes it overflow
    logits = (logits - logits.amax(1, keepdim=True)).float()
    if top_k is not None and top_k < logits.shape[1]:
        values, best = logits.topk(top_k, dim=1)
        logits = torch.full_like(logits, -math.inf).scatter_(1, best, values)
    return torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
