"""The functional API: check the arguments, draw what is random, choose the backend, call the op."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, recompute
from .config import AttentionOptions, LSHConfig, bucket_factors, check_int

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BACKENDS = ("auto", "torch", "triton")
_MAX_HEAD_DIM = 256
_MAX_LENGTH = 2**24
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def lsh_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    *,
    config: LSHConfig = LSHConfig(),  # noqa: B008 (frozen)
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    buckets: Tensor | tuple[Tensor, Tensor] | None = None,
    rotations: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LSH attention: softmax over the keys that share a bucket with the query in one of R hash rounds.

    With `P_ij = exp(s_ij - lse_i)` over the union of candidates of all rounds, `out_i = sum_j P_ij v_j`. Which candidates a
    round contributes is `config`'s business (`LSHConfig.span`).

    *Shared QK* (`key=None`, the paper's layer): keys are the queries at unit length, `s_ij = scale * q_i . q_j / |q_j|`, and a
    token attends itself only if it has no other candidate. *Separate keys*: `s_ij = scale * q_i . k_j`; queries and keys are
    hashed by the same rotations and sorted apart.

    Args:
        query: [B, H, L, D], float16, bfloat16, float32 or float64; any strides.
        key: [B, Hkv, S, D] with H % Hkv = 0 (query head h uses key head h // (H // Hkv)), or None for shared QK.
        value: [B, Hkv, S, Dv]; [B, H, L, Dv] for shared QK.
        config: see `LSHConfig`.
        is_causal: no key after the query's position; needs L = S.
        key_padding_mask: bool [B, S], True = ignore. What stands at padded keys never reaches an output.
        dropout_p: probability of dropping an attention weight, in [0, 1].
        scale: factor of the logits; default 1 for shared QK, D**-0.5 for separate keys.
        buckets: bucket ids that replace hashing: int32 or int64 [B, H, R, L], for separate keys a pair
            ([B, H, R, L], [B, Hkv, R, S]). Ids out of range are clamped to [0, N).
        rotations: [Hkv or 1, D, R, W_rot] as `random_rotations` makes them. Default: drawn from `generator`.
        generator: source of rotations and dropout; default torch's own for the device. `torch.utils.checkpoint` restores
            that one when it runs a layer again, but not a generator of yours: there pass rotations, and no dropout.
        return_lse: also return the logsumexp of each query's logits.
        backend: "torch" (any device), "triton", or "auto".

    Returns:
        out [B, H, L, Dv] in query's dtype; with `return_lse` a pair with lse [B, H, L] (float32, float64 for float64; natural
        log, before dropout, differentiable). A query without any candidate attends itself where L = S (shared: lse is
        s_ii - 1e5; a self that is padding does not count), else out is 0 and lse -inf.

    Raises:
        TypeError, ValueError: before anything is computed, naming the argument, what came and what was wanted.
        RuntimeError: `backend` can't run, and why.

    Example:
        >>> import torch
        >>> qk, v = torch.randn(2, 1, 8, 1000, 64)
        >>> lsh_attention(qk, None, v, is_causal=True).shape
        torch.Size([1, 8, 1000, 64])

    Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020.
    """
    shared = key is None
    query, key, value = _autocast(query, key, value)
    check_call(query, key, value, key_padding_mask, config, is_causal)
    B, H, L, D = query.shape
    Hkv, S = value.shape[1:3]
    dropout_p, scale = check_numbers(dropout_p, scale, 1.0 if shared else D**-0.5)
    factors = config.factors(S)
    if buckets is not None and rotations is not None:
        raise ValueError("buckets and rotations: got both, wanted one (buckets replace hashing)")
    q_buckets, k_buckets = _check_buckets(
        buckets, (B, H, config.n_hashes, L), None if shared else (B, Hkv, config.n_hashes, S), query.device
    )
    _check_generator(generator)
    generator = recompute.generator_to_draw_from(generator)
    backend = choose_backend(backend, query)
    if rotations is not None:
        check_rotations(rotations, query, Hkv, config.n_hashes, factors)
    elif buckets is None:
        rotations = random_rotations(D, factors, config.n_hashes, n_heads=Hkv, generator=generator, device=query.device)
    options = config.options(factors, is_causal=is_causal, dropout_p=dropout_p, scale=scale)
    seed = _draw_seed(dropout_p, generator, query.device)
    out, lse = ops.attention(query, key, value, key_padding_mask, seed, rotations, q_buckets, k_buckets, options, backend)
    return (out, lse) if return_lse else out


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    chunk_length: int | None = None,
    chunks_before: int = 1,
    chunks_after: int = 0,
    wrap: bool = False,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to near tokens: a sliding window, or the chunks around a query's own.

    Args:
        query, key, value: [B, H, L, D], [B, Hkv, L, D], [B, Hkv, L, Dv]; one length, H % Hkv = 0.
        window: query i sees keys i - window .. i + window (.. i if causal).
        chunk_length: query i in chunk c = i // chunk_length sees chunks c - chunks_before .. c + chunks_after.
            Give exactly one of `window` and `chunk_length`.
        wrap: the chunks form a cycle, as in Hugging Face's encoder layers; needs `chunk_length`.
        is_causal, key_padding_mask, dropout_p, generator, return_lse, backend: as in `lsh_attention`.
        scale: factor of the logits; default D**-0.5.

    Returns:
        out [B, H, L, Dv], with `return_lse` also lse [B, H, L]. A query that sees only padding gets 0 and -inf.

    Raises:
        TypeError, ValueError, RuntimeError: as `lsh_attention`.

    Source: the local layers of Kitaev et al. 2020 (as in trax); windows as in Beltagy et al. 2020 (arXiv 2004.05150).
    """
    if key is None:
        raise TypeError("key: got None, wanted a tensor (local attention has no shared-QK form)")
    query, key, value = _autocast(query, key, value)
    check_tensors(query, key, value, key_padding_mask)
    L, S = query.shape[2], key.shape[2]
    if L != S:
        raise ValueError(f"key: got length {S} for query length {L}, wanted equal lengths")
    if (window is None) == (chunk_length is None):
        raise ValueError(f"window and chunk_length: got {window} and {chunk_length}, wanted exactly one of them")
    sizes = {
        "window": window,
        "chunk_length": chunk_length,
        "chunks_before": chunks_before,
        "chunks_after": chunks_after,
    }
    for name, size in sizes.items():
        if size is not None:
            check_int(name, size, 0 if name.startswith("chunks") else 1)
    if wrap and chunk_length is None:
        raise ValueError("wrap: got True with a window, wanted chunk_length (only chunks can form a cycle)")
    dropout_p, scale = check_numbers(dropout_p, scale, query.shape[-1] ** -0.5)
    _check_generator(generator)
    generator = recompute.generator_to_draw_from(generator)
    backend = choose_backend(backend, query)
    options = AttentionOptions(
        factors=[1],
        hashed=False,
        span="window" if chunk_length is None else "chunk",
        window=window or 1,
        chunk_length=chunk_length or 1,
        chunks_before=chunks_before,
        chunks_after=chunks_after,
        within_bucket=False,
        dedupe=False,
        wrap=bool(wrap),
        local_window=0,
        norm_eps=0.0,
        is_causal=bool(is_causal),
        dropout_p=dropout_p,
        scale=scale,
    )
    seed = _draw_seed(dropout_p, generator, query.device)
    out, lse = ops.attention(query, key, value, key_padding_mask, seed, None, None, None, options, backend)
    return (out, lse) if return_lse else out


def random_rotations(
    head_dim: int,
    n_buckets: int | tuple[int, ...],
    n_hashes: int,
    *,
    n_heads: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gaussian matrices for `lsh_hash`: float32 [n_heads or 1, head_dim, n_hashes, W_rot], W_rot = sum(N_i) / 2.

    The columns of factor i start at `sum_{j<i} N_j / 2`. Drawn by one torch.randn from `generator`, or from torch's own for
    the device. Source: Andoni et al. 2015 (arXiv 1509.02897).
    """
    factors = bucket_factors(n_buckets)
    for name, value in (("head_dim", head_dim), ("n_hashes", n_hashes), ("n_heads", 1 if n_heads is None else n_heads)):
        if not isinstance(value, torch.SymInt):
            check_int(name, value, 1)
    _check_generator(generator)
    # the overload with a generator takes no symbolic sizes
    source = {} if generator is None else {"generator": generator}
    return torch.randn(n_heads or 1, head_dim, n_hashes, sum(factors) // 2, device=device, **source)


def lsh_hash(x: Tensor, rotations: Tensor, n_buckets: int | tuple[int, ...], *, backend: str = "auto") -> Tensor:
    """Bucket ids by angular LSH: per round `argmax([xR ; -xR])`, ties to the lowest index.

    Args:
        x: [B, H, L, D]; only directions matter. A row of NaN lands somewhere in [0, N).
        rotations: [Hr, D, R, W_rot] of `random_rotations`, Hr = 1 or a divisor of H (shared by the heads of a group).
        n_buckets: N, or its factors: ids combine as h_0 + N_0 * h_1 + N_0 * N_1 * h_2.
        backend: "torch", "triton" or "auto".

    Returns:
        int32 [B, H, R, L]. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        RuntimeError: `backend` can't run, and why.

    Source: Andoni et al. 2015 (arXiv 1509.02897).
    """
    _check_head_tensor("x", x)
    factors = bucket_factors(n_buckets)
    if not isinstance(rotations, Tensor):
        raise TypeError(f"rotations: got {type(rotations).__name__}, wanted a tensor")
    n_hashes = rotations.shape[2] if rotations.dim() == 4 else "R"
    if rotations.dim() == 4 and rotations.shape[0] > 0 and x.shape[1] % rotations.shape[0] == 0:
        heads = rotations.shape[0]
    else:
        heads = x.shape[1]
    check_rotations(rotations, x, heads, n_hashes, factors)
    return torch.ops.lsh_kernels.lsh_hash(x.detach(), rotations.detach(), list(factors), choose_backend(backend, x))


def bucket_sort(
    buckets: Tensor, n_buckets: int | tuple[int, ...], key_padding_mask: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Stable sort of positions by bucket: slot -> position, in a bucket ascending.

    Args:
        buckets: int32 or int64 [B, H, R, L]; ids out of [0, N) are clamped.
        n_buckets: N, or its factors.
        key_padding_mask: bool [B, L], True = ignore: these positions come last.
        backend: "torch", "triton" or "auto".

    Returns:
        order, int32 [B, H, R, L].

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        RuntimeError: `backend` can't run, and why.
    """
    n_buckets = math.prod(bucket_factors(n_buckets))
    if not isinstance(buckets, Tensor):
        raise TypeError(f"buckets: got {type(buckets).__name__}, wanted a tensor")
    if buckets.dim() != 4 or 0 in buckets.shape[1:]:
        raise ValueError(f"buckets: got shape {tuple(buckets.shape)}, wanted [B, H, R, L], only B may be 0")
    check_integer("buckets", buckets)
    check_padding(key_padding_mask, buckets.shape[0], buckets.shape[-1], buckets.device)
    return torch.ops.lsh_kernels.bucket_sort(buckets, n_buckets, key_padding_mask, choose_backend(backend, buckets))


def combine_rounds(out: Tensor, lse: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Combine the results of rounds by softmax(lse): `out_i = sum_r exp(lse_ri - lse_i) out_ri`, `lse_i = logsumexp_r lse_ri`.

    Args:
        out: [B, H, R, L, Dv], the rounds' outputs.
        lse: [B, H, R, L] float32 (float64 for float64), -inf where a round has no target for a query.
        backend: "torch", "triton" or "auto".

    Returns:
        (out [B, H, L, Dv], lse [B, H, L]); 0 and -inf for queries without a target in any round. No gradient: a stage for
        microbenchmarks, `lsh_attention` is what to train with.
    """
    if not isinstance(out, Tensor) or not isinstance(lse, Tensor):
        raise TypeError(f"out and lse: got {type(out).__name__} and {type(lse).__name__}, wanted tensors")
    if out.dim() != 5 or 0 in out.shape[1:]:
        raise ValueError(f"out: got shape {tuple(out.shape)}, wanted [B, H, R, L, Dv], only B may be 0")
    if lse.shape != out.shape[:-1]:
        raise ValueError(f"lse: got shape {tuple(lse.shape)}, wanted {tuple(out.shape[:-1])} as out has it")
    _check_dtype("out", out)
    wanted = torch.float64 if out.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted or lse.device != out.device:
        raise ValueError(f"lse: got {lse.dtype} on {lse.device}, wanted {wanted} on {out.device}")
    return torch.ops.lsh_kernels.combine_rounds(out, lse, choose_backend(backend, out))


def triton_problem(tensor: Tensor | None = None) -> str | None:
    """Why the Triton backend can't run (on `tensor`), or None if it can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    # torch.compile can't trace the switch of the interpreter; there a call that can't run fails when it runs
    if tensor is not None and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        import triton

        if not triton.knobs.runtime.interpret:
            return "the tensors are on the CPU, where Triton runs only under its interpreter (TRITON_INTERPRET=1)"
    if tensor is not None and tensor.device.type not in ("cpu", "cuda"):
        return f"Triton kernels need CUDA or ROCm tensors, these are on {tensor.device.type}"
    if tensor is not None and tensor.dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32, not float64"
    return None


def choose_backend(backend: str, tensor: Tensor) -> str:
    """The backend that will run on `tensor`: "torch" or "triton"."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(map(repr, _BACKENDS))}")
    if backend == "triton":
        problem = triton_problem(tensor)
        if problem:
            raise RuntimeError(f'backend: "triton" can\'t run: {problem}')
        return "triton"
    if backend == "auto" and tensor.is_cuda and triton_problem(tensor) is None:
        return "triton"
    return "torch"


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast what `F.scaled_dot_product_attention` does: all but float64 becomes autocast's dtype."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    is_cast = [isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 for x in tensors]
    return tuple(x.to(dtype) if cast else x for x, cast in zip(tensors, is_cast))


def check_tensors(query: Tensor, key: Tensor | None, value: Tensor, key_padding_mask: Tensor | None) -> None:
    shared = key is None
    key = query if shared else key
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_head_tensor(name, x)
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(f"{name}: got {x.dtype} on {x.device}, wanted {query.dtype} on {query.device} as query")
    B, H, _, D = query.shape
    if key.shape[0] != B or value.shape[0] != B:
        raise ValueError(f"key and value: got batch sizes {key.shape[0]} and {value.shape[0]}, wanted {B} as query")
    if key.shape[3] != D:
        raise ValueError(f"key: got head dim {key.shape[3]}, wanted {D} as query")
    if not shared and value.shape[1:3] != key.shape[1:3]:
        raise ValueError(f"value: got {tuple(value.shape)}, wanted the heads and length of key {tuple(key.shape)}")
    if H % key.shape[1]:
        raise ValueError(f"key: got {key.shape[1]} heads, wanted a divisor of query's {H}")
    check_padding(key_padding_mask, B, value.shape[2], query.device)


def check_call(
    query: Tensor, key: Tensor | None, value: Tensor, key_padding_mask: Tensor | None, config: LSHConfig, is_causal: bool
) -> None:
    """Raise if `lsh_attention` can't take these together."""
    if not isinstance(config, LSHConfig):
        raise TypeError(f"config: got {type(config).__name__}, wanted an LSHConfig")
    check_tensors(query, key, value, key_padding_mask)
    if key is None and value.shape[1:3] != query.shape[1:3]:
        raise ValueError(
            f"value: got {tuple(value.shape)} for shared QK (key=None), wanted the heads and length of query {tuple(query.shape)}"
        )
    L, S = query.shape[2], value.shape[2]
    for condition, name in (
        (is_causal, "is_causal=True"),
        (config.local_window, "config.local_window"),
        (config.span == "chunk", 'config.span="chunk"'),
    ):
        if condition and L != S:
            raise ValueError(f"{name}: got query length {L} and key length {S}, wanted equal lengths")
    check_slots(config, math.prod(config.factors(S)), S)


def _check_head_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{name}: got a dual tensor, wanted none (LSH attention has no forward-mode derivative)")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(x):
        raise NotImplementedError(f"{name}: got a tensor of a torch.func transform, wanted none (use torch.autograd.grad)")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: got a nested or sparse tensor, wanted a dense one")
    if x.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted 4 dimensions [B, H, L, D]")
    _check_dtype(name, x)
    if x.shape[1] < 1 or not 1 <= x.shape[2] <= _MAX_LENGTH or not 1 <= x.shape[3] <= _MAX_HEAD_DIM:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted [B, H >= 1, 1 <= L <= 2^24, 1 <= D <= {_MAX_HEAD_DIM}]")


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: got {x.dtype}, wanted float16, bfloat16, float32 or float64")


def check_padding(mask: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"key_padding_mask: got {got}, wanted a bool tensor (True = ignore)")
    if mask.shape != (batch, length):
        raise ValueError(f"key_padding_mask: got shape {tuple(mask.shape)}, wanted ({batch}, {length})")
    if mask.device != device:
        raise ValueError(f"key_padding_mask: got a tensor on {mask.device}, wanted {device}")


def check_slots(config: LSHConfig, n_buckets: int, S: int) -> None:
    """Slots and what dedupe compares must fit into int32, with room for differences."""
    if S + (n_buckets + 1) * (min(config.window_length, S) + 1) >= 2**30:
        raise ValueError(
            f"config: got window {config.window_length} with {n_buckets} buckets and {S} keys, wanted S + N * (W + 1) below 2^30"
        )
    reach = min(max(config.chunks_before, config.chunks_after), -(-S // config.chunk_length)) + 1
    if config.span == "chunk" and config.within_bucket and config.dedupe and S + (n_buckets + 2) * reach >= 2**30:
        raise ValueError(
            f"config: got a reach of {reach - 1} chunks with {n_buckets} buckets and {S} keys, wanted S + (N + 2) * (reach + 1) "
            "below 2^30"
        )
    if config.wrap and config.n_hashes * S > 2**27:
        raise ValueError(f"config: got {config.n_hashes} rounds of {S} keys with wrap, wanted R * S <= 2^27")


def check_numbers(dropout_p: float, scale: float | None, default_scale: float) -> tuple[float, float]:
    for name, value in (("dropout_p", dropout_p), ("scale", default_scale if scale is None else scale)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {value!r}, wanted a float")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p}, wanted a probability in [0, 1]")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, wanted a finite number")
    return float(dropout_p), float(default_scale if scale is None else scale)


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, wanted a torch.Generator")


def check_integer(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {x.dtype}, wanted int32 or int64")


def _check_buckets(buckets, q_shape: tuple[int, ...], k_shape: tuple[int, ...] | None, device: torch.device):
    if buckets is None:
        return None, None
    if k_shape is None:
        names, parts, shapes = ("buckets",), (buckets,), (q_shape,)
    else:
        if not isinstance(buckets, (tuple, list)) or len(buckets) != 2:
            raise TypeError(f"buckets: got {type(buckets).__name__}, wanted a pair (of queries, of keys) for separate keys")
        names, parts, shapes = ("buckets[0]", "buckets[1]"), tuple(buckets), (q_shape, k_shape)
    for name, part, shape in zip(names, parts, shapes):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: got {type(part).__name__}, wanted a tensor")
        check_integer(name, part)
        if part.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(part.shape)}, wanted {shape}")
        if part.device != device:
            raise ValueError(f"{name}: got a tensor on {part.device}, wanted {device}")
    return (*parts, None)[:2]


def check_rotations(rotations: Tensor, x: Tensor, n_heads: int, n_hashes, factors: tuple[int, ...]) -> None:
    if not isinstance(rotations, Tensor):
        raise TypeError(f"rotations: got {type(rotations).__name__}, wanted a tensor")
    if not rotations.is_floating_point():
        raise TypeError(f"rotations: got {rotations.dtype}, wanted a floating-point tensor")
    shape = (n_heads, x.shape[-1], n_hashes, sum(factors) // 2)
    if tuple(rotations.shape) not in (shape, (1, *shape[1:])):
        raise ValueError(
            f"rotations: got shape {tuple(rotations.shape)}, wanted [{n_heads} or 1, {', '.join(map(str, shape[1:]))}]"
        )
    if rotations.device != x.device:
        raise ValueError(f"rotations: got a tensor on {rotations.device}, wanted {x.device}")


def _draw_seed(dropout_p: float, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """The Philox key of this call, drawn only if something will be dropped."""
    if dropout_p == 0:
        return None
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=device)
    # compiled code has drawn from torch's own generator, whose state a repetition finds as it was
    return seed if torch.compiler.is_compiling() else recompute.keep(lambda: seed)
