"""Suite: hash, sort, attention, its backward, combine and the exact residual sum, each beside its equivalent in plain torch and
beside its floor.

The floor of a stage is the larger of its bytes over the rate of a large copy and its FLOPs over the rate of a large matmul, both
measured on this machine; `roofline` in a row is floor / time. Bytes count each input read once and each output written once.
Our attention backward adds up its rounds too; the torch equivalent does not.
"""

from __future__ import annotations

import math

import torch
from cases import AbsentError, Case, by_importance
from peers import Shape, tensors

from lsh_kernels import LSHConfig, fixed_point, random_rotations, torch_backend
from lsh_kernels.functional import triton_problem
from lsh_kernels.stages import attention_rounds, bucket_sort, combine_rounds, lsh_hash, sort_rounds

BACKENDS = ("triton", "torch")


def hash_work(s, factors):
    """(FLOPs, bytes): one product of x with all rotations; x read, bucket ids written."""
    rows = s.B * s.H * s.L
    return 2 * rows * s.D * s.R * sum(factors) / 2, rows * (s.D * s.dtype.itemsize + 4 * s.R)


def sort_work(s):
    """Bucket ids read, order written, int32 each."""
    return 0, 8 * s.B * s.H * s.R * s.L


def attention_work(s):
    """Two products of a query with the C keys of its causal window per round; query, value and order read, output and lse
    of each round written."""
    rows = s.B * s.H * s.L
    return 2 * 2 * rows * s.R * s.C * s.D, rows * ((2 + s.R) * s.D * s.dtype.itemsize + 8 * s.R)


def attention_backward_work(s):
    """Five products of a query with the C keys of its causal window per round; query, value, out, dout and order, lse read, two
    gradients written. The rounds' shares are not counted."""
    rows = s.B * s.H * s.L
    return 5 * 2 * rows * s.R * s.C * s.D, rows * (6 * s.D * s.dtype.itemsize + 4 * s.R + 4)


def combine_work(s):
    """R partial rows and lse read, one of each written."""
    return 0, s.B * s.H * s.L * (s.R + 1) * (s.D * s.dtype.itemsize + 4)


def residual_work(s):
    """Stream and addend read, the new stream and its values written; the stream is int32."""
    return 0, s.B * s.H * s.L * s.D * (2 * 4 + 2 * s.dtype.itemsize)


def cases(settings):
    lengths = by_importance(settings.lengths)
    for length in lengths[: 1 if settings.quick else 3]:
        row = settings.row("", length)
        shape = Shape(*(row[letter] for letter in "BHLDRC"), settings.dtype, settings.device, False)
        config = LSHConfig(n_hashes=shape.R, chunk_length=shape.C)
        factors = config.factors(length)
        stages = {
            "attention": (attention_builds(shape, config), attention_work(shape)),
            "hash": (hash_builds(shape, factors), hash_work(shape, factors)),
            "sort": (sort_builds(shape, factors), sort_work(shape)),
            "combine": (combine_builds(shape), combine_work(shape)),
            "attention backward": (attention_backward_builds(shape, config), attention_backward_work(shape)),
            "residual": (residual_builds(shape), residual_work(shape)),
        }
        for op, (builds, (flops, n_bytes)) in stages.items():
            mode = "backward" if op == "attention backward" else "forward"
            fields = {**row, "op": op, "mode": mode, "regime": "batch", "input": "gaussian", "depth": 1}
            yield Case(fields, builds, flops=dict.fromkeys(builds, flops), bytes=dict.fromkeys(builds, n_bytes))


def by_backend(build, shape):
    """`build(backend)` for each of our backends, absent where it can't run."""

    def of(backend):
        def checked():
            problem = triton_problem(torch.empty(0, dtype=shape.dtype, device=shape.device)) if backend == "triton" else None
            if problem:
                raise AbsentError(problem)
            return build(backend)

        return checked

    return {f"lsh_kernels {backend}": of(backend) for backend in BACKENDS}


def hash_builds(shape, factors):
    def inputs():
        x = tensors("gaussian", shape)[0]
        return x, random_rotations(shape.D, factors, shape.R, n_heads=shape.H, device=shape.device)

    def ours(backend):
        x, rotations = inputs()
        return lambda: lsh_hash(x, rotations, factors, backend=backend)

    def equivalent():
        x, rotations = inputs()
        rotations = rotations.flatten(2).to(x.dtype)  # [H, D, R * W_rot]

        def call():
            columns = (x @ rotations).unflatten(3, (shape.R, -1)).split([n // 2 for n in factors], -1)
            buckets, stride = 0, 1
            for n, y in zip(factors, columns):
                buckets = buckets + stride * torch.cat([y, -y], -1).argmax(-1)
                stride *= n
            return buckets.transpose(2, 3).to(torch.int32)  # [B, H, R, L]

        return call

    return {**by_backend(ours, shape), "matmul + argmax": equivalent}


def sort_builds(shape, factors):
    def buckets():
        x = tensors("gaussian", shape)[0]
        return lsh_hash(x, random_rotations(shape.D, factors, shape.R, n_heads=shape.H, device=shape.device), factors)

    def ours(backend):
        ids = buckets()
        return lambda: bucket_sort(ids, factors, backend=backend)

    def equivalent(dtype):
        def build():
            ids = buckets().to(dtype)
            return lambda: torch.sort(ids, dim=-1, stable=True).indices

        return build

    return {
        **by_backend(ours, shape), "torch.sort int16": equivalent(torch.int16), "torch.sort int32": equivalent(torch.int32),
    }  # fmt: skip


def hashed(shape, factors):
    """Query, value and buckets."""
    query, _, value = tensors("gaussian", shape)
    rotations = random_rotations(shape.D, factors, shape.R, n_heads=shape.H, device=shape.device)
    return query, value, lsh_hash(query, rotations, factors)


def our_attention(shape, config, backend):
    """(forward, backward): functions of nothing and of dout, out, lse."""
    factors = config.factors(shape.L)
    query, value, buckets = hashed(shape, factors)
    options = config.options(factors, is_causal=True, dropout_p=0.0, scale=1.0)
    state = torch_backend.sort_rounds(buckets, None, None, options)
    forward, backward = torch_backend.attention_fwd, torch_backend.attention_bwd
    if backend == "triton":
        from lsh_kernels.csrc_triton.attention_bwd import attention_bwd as backward
        from lsh_kernels.csrc_triton.attention_fwd import attention_fwd as forward

    def attend():
        return forward(query, None, value, None, None, state, options)

    def gradients(dout, out, lse):
        return backward(dout, None, query, None, value, None, None, out, lse, state, options)

    return attend, gradients


def chunked_attention(shape, factors):
    """(call, query, value): rows gathered by the order, then each chunk against itself and the one before it, as two batched
    products; no buckets in the mask, no pair counted once, rounds not combined."""
    query, value, buckets = hashed(shape, factors)
    B, H, L, C = shape.B, shape.H, shape.L, shape.C
    n_chunks = L // C
    if L % C:
        raise AbsentError(f"takes lengths that {C} divides")
    order = bucket_sort(buckets, math.prod(factors)).long().flatten(2)[..., None].expand(-1, -1, -1, shape.D)

    def with_previous(x):  # [.., n, C, D] -> [.., n, 2 * C, D]
        return torch.cat([x.roll(1, -3), x], -2)

    def call():
        q, v = (x.gather(2, order).view(B, H, shape.R, n_chunks, C, shape.D) for x in (query, value))
        k = with_previous(torch.nn.functional.normalize(q, dim=-1))
        p = (q @ k.transpose(-1, -2)).softmax(-1)  # [B, H, R, n_chunks, C, 2 * C]
        return p @ with_previous(v)

    return call, query, value


def attention_builds(shape, config):
    def ours(backend):
        query, value, buckets = hashed(shape, config.factors(shape.L))
        rounds = sort_rounds(bucket_sort(buckets, config.factors(shape.L)), buckets, config=config)
        return lambda: attention_rounds(query, None, value, rounds, config=config, is_causal=True, backend=backend)

    def equivalent():
        return chunked_attention(shape, config.factors(shape.L))[0]

    return {**by_backend(ours, shape), "gather + bmm": equivalent}


def attention_backward_builds(shape, config):
    """Gradients of query and value, from what a forward before the call has left."""

    def ours(backend):
        attend, gradients = our_attention(shape, config, backend)
        out, lse = attend()
        dout = torch.ones_like(out)
        return lambda: gradients(dout, out, lse)[::2]

    def equivalent():
        call, query, value = chunked_attention(shape._replace(backward=True), config.factors(shape.L))
        out = call()
        dout = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, (query, value), dout, retain_graph=True)

    return {**by_backend(ours, shape), "gather + bmm": equivalent}


def residual_builds(shape):
    """A sum on the grid of `fixed_point`, and the same without checks of the range and without its checksum."""

    def inputs():
        addend = tensors("gaussian", shape)[0]
        stream, _, _ = fixed_point.residual_add(torch.zeros_like(addend, dtype=torch.int32), addend, shape.dtype, False)
        return stream, addend

    def ours(backend):
        stream, addend = inputs()
        add = fixed_point.residual_add
        if backend == "triton":
            from lsh_kernels.csrc_triton.residual import residual_add as add
        return lambda: add(stream, addend, shape.dtype, False)

    def equivalent():
        stream, addend = inputs()
        scale = 2.0 ** fixed_point.fraction_bits(stream.dtype)

        def call():
            after = stream + (addend.float() * scale).round().to(stream.dtype)
            return after, (after.float() / scale).to(shape.dtype)

        return call

    return {**by_backend(ours, shape), "round + add": equivalent}


def combine_builds(shape):
    def inputs():
        generator = torch.Generator(shape.device).manual_seed(0)
        size = (shape.B, shape.H, shape.R, shape.L, shape.D)
        out = torch.randn(size, generator=generator, device=shape.device).to(shape.dtype)
        return out, torch.randn(size[:-1], generator=generator, device=shape.device)

    def ours(backend):
        out, lse = inputs()
        return lambda: combine_rounds(out, lse, backend=backend)

    def equivalent():
        out, lse = inputs()
        return lambda: ((lse.softmax(2)[..., None].to(out.dtype) * out).sum(2), lse.logsumexp(2))

    return {**by_backend(ours, shape), "softmax + sum": equivalent}
