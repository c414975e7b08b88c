"""Suite: one new token after L cached ones, by length: what it takes to append and to attend from it.

A CPU goes up to four times the longest length of the other suites: a single token costs little. Hugging Face's cache holds the
inputs of the layer, so that its rows contain the projections of the candidates as well, of every head apart.
"""

from __future__ import annotations

import torch
from cases import AbsentError, Case, by_importance
from peers import SDPA, Shape, exact, hugging_face_layer, tensors

from lsh_kernels import LSHConfig, random_rotations
from lsh_kernels.decoding import BucketCache

LONGEST = 2**17
# tokens that a provider may be asked for
NEW = 4096


def cases(settings):
    lengths = {length for length in settings.lengths if length <= LONGEST}
    if settings.device.type == "cpu" and not settings.quick:
        lengths |= {factor * max(settings.lengths) for factor in (2, 4)}
    for length in by_importance(lengths):
        row = settings.row("decode", length)
        shape = Shape(*(row[letter] for letter in "BHLDRC"), settings.dtype, settings.device, False)
        fields = {**row, "mode": "forward", "regime": "batch", "input": "gaussian", "depth": 1}
        yield Case(fields, {name: lambda build=build, shape=shape: build(shape) for name, build in PROVIDERS.items()})


def ours(separate):
    """Each call appends another token."""

    def build(shape):
        query, key, value = tensors("gaussian", shape._replace(L=shape.L + NEW))
        factors = LSHConfig(chunk_length=shape.C).factors(shape.L)
        config = LSHConfig(n_hashes=shape.R, chunk_length=shape.C, n_buckets=factors)
        rotations = random_rotations(shape.D, factors, shape.R, n_heads=shape.H, device=shape.device)

        def rows(positions):
            return query[:, :, positions], key[:, :, positions] if separate else None, value[:, :, positions]

        cache = BucketCache(*rows(slice(shape.L)), config=config, rotations=rotations, max_length=shape.L + NEW)
        return lambda: cache.step(*rows(slice(cache.length, cache.length + 1)))[0]

    return build


def cached_keys(backend):
    """Exact attention to a key and value cache, in which the new token always takes the last place."""

    def build(shape):
        attend = exact(backend, is_causal=False)(shape)
        query, key, value = tensors("gaussian", shape._replace(L=shape.L + 1))
        query, new_key, new_value = (x[:, :, -1:].clone() for x in (query, key, value))

        def call():
            key[:, :, -1:], value[:, :, -1:] = new_key, new_value
            return attend(query, key, value)

        return call

    return build


def hugging_face(shape):
    try:
        from transformers.models.reformer.modeling_reformer import ReformerDynamicCache
    except ImportError as error:
        raise AbsentError(f"transformers: {error}") from error
    layer = hugging_face_layer(shape).to(shape.dtype).eval()
    # else every call would hash by rotations of its own
    layer.hash_seed = 0
    hidden = tensors("gaussian", shape._replace(L=shape.L + 1))[0].transpose(1, 2).flatten(2)
    prompt, new = hidden[:, :-1], hidden[:, -1:]
    with torch.no_grad():
        buckets = layer._hash_vectors(layer.query_key(prompt).unflatten(2, (shape.H, -1)).transpose(1, 2), shape.R, None)
    buckets = buckets.unflatten(2, (shape.R, -1))

    @torch.no_grad()
    def call():
        # an update makes new tensors, so that each call starts from the prompt
        past = ReformerDynamicCache([(buckets, prompt)])
        found = layer(new, past_buckets_states=past, use_cache=True)
        past.update(found.buckets, new, 0)
        return found.hidden_states.unflatten(2, (shape.H, -1)).transpose(1, 2)

    return call


def reformer_pytorch(shape):
    raise AbsentError("reformer-pytorch has no cache: its generation runs the whole prefix again")


PROVIDERS = {
    "lsh_kernels BucketCache": ours(separate=False),
    "lsh_kernels separate keys": ours(separate=True),
    **{name: cached_keys(backend) for name, backend in SDPA.items()},
    "Hugging Face": hugging_face,
    "reformer-pytorch": reformer_pytorch,
}
