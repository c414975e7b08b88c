"""Decoding one token at a time: every step equals the last row of attention over the whole prefix."""

import pytest
import torch
from attention_problems import covering_cases, name_of

from lsh_kernels import LSHConfig, lsh_attention, random_rotations, reference
from lsh_kernels.decoding import BucketCache

FACTORS = {
    "heads": ["shared", "separate", "grouped"],
    "dedupe": [True, False],
    "local_window": [0, 5],
    "R": [1, 4],
    "n_buckets": [6, (2, 4)],
    "window": [1, 7, 500],
    "norm_eps": [0.0, 1e-6],
    "prompt": [1, 33],
    "dtype": [torch.float32, torch.float64],
    "D": [5, 16],
}
B, H, L, DV = 2, 4, 60, 9


def inputs(heads="shared", D=5, dtype=torch.float32, length=L):
    """Query, key (None if shared) and value; some equal rows, and a zero row."""
    Hkv = 2 if heads == "grouped" else H
    query, key, value = (torch.randn(B, n, length, d) for n, d in ((H, D), (Hkv, D), (Hkv, DV)))
    for x in (query, key):
        x[:, :, 3:4] = 0
        x[0, :, 20:30] = x[0, :, 19:20]
    return [x if x is None else x.to(dtype) for x in (query, None if heads == "shared" else key, value)]


def part(tensors, positions):
    return [x if x is None else x[:, :, positions] for x in tensors]


@pytest.mark.parametrize("case", covering_cases(FACTORS), ids=name_of)
def test_decoding_equals_the_last_row_at_every_step(case):
    heads, R, n_buckets, D, dtype, prompt = (case[name] for name in ("heads", "R", "n_buckets", "D", "dtype", "prompt"))
    fields = {name: case[name] for name in ("dedupe", "local_window", "window", "norm_eps")}
    config = LSHConfig(n_hashes=R, n_buckets=n_buckets, **fields)
    tensors = inputs(heads, D, dtype)
    rotations = random_rotations(D, n_buckets, R, n_heads=tensors[2].shape[1])
    cache = BucketCache(*part(tensors, slice(prompt)), config=config, rotations=rotations, max_length=L)
    error = 1e-12 if dtype == torch.float64 else 1e-5
    for i in range(prompt, L):
        got = cache.step(*part(tensors, slice(i, i + 1)))
        assert cache.length == i + 1
        prefix = part(tensors, slice(i + 1))
        out, lse = lsh_attention(*prefix, config=config, is_causal=True, rotations=rotations, return_lse=True, backend="torch")
        for found, whole in zip(got, (out, lse)):
            torch.testing.assert_close(found, whole[:, :, -1:], rtol=error, atol=error, msg=lambda text, i=i: f"step {i}: {text}")


@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_decoding_falls_back_on_a_token_of_its_own_where_it_has_no_other(heads):
    """Opposite rows never share a bucket."""
    query, _, value = inputs(length=1)
    key = None if heads == "shared" else -query
    config, rotations = LSHConfig(n_hashes=2, n_buckets=4), random_rotations(5, 4, 2)
    cache = BucketCache(query, key, value, config=config, rotations=rotations, max_length=2)
    # separate: the new query meets neither the old key, its opposite, nor its own
    new = -query if heads == "shared" else query
    out, lse = cache.step(new, key, 2 * value)
    logit = (query * query).sum(-1) * (1 / query.norm(dim=-1) if heads == "shared" else -(5**-0.5))
    torch.testing.assert_close(out, 2 * value)
    torch.testing.assert_close(lse, logit - 1e5 if heads == "shared" else logit, rtol=0, atol=0.01)


@pytest.mark.parametrize("heads", ["shared", "grouped"])
def test_decoding_equals_the_oracle_in_16_bits(heads):
    tensors, config = inputs(heads, 16, torch.float16), LSHConfig(n_hashes=2, n_buckets=4, window=8)
    rotations = random_rotations(16, 4, 2)
    cache = BucketCache(*part(tensors, slice(-1)), config=config, rotations=rotations, max_length=L, scale=0.3)
    out, lse = cache.step(*part(tensors, slice(-1, None)))
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    wanted = reference.lsh_attention(*tensors, config=config, is_causal=True, rotations=rotations, scale=0.3)
    torch.testing.assert_close(out.double(), wanted[0][:, :, -1:], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), wanted[1][:, :, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", ["shared", "grouped"])
def test_decoding_takes_an_empty_batch(heads):
    tensors = [None if x is None else x[:0] for x in inputs(heads)]
    cache = BucketCache(*tensors, config=LSHConfig(n_buckets=4), rotations=random_rotations(5, 4, 4), max_length=L + 1)
    out, lse = cache.step(*part(tensors, slice(-1, None)))
    assert out.numel() == lse.numel() == 0 and cache.length == L + 1


def test_decoding_is_the_same_under_autocast():
    tensors, config = inputs(), LSHConfig(n_hashes=2, n_buckets=4, window=8)
    rotations = random_rotations(5, 4, 2)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cache = BucketCache(*part(tensors, slice(-1)), config=config, rotations=rotations, max_length=L)
            found.append(cache.step(*part(tensors, slice(-1, None)))[0])
    assert torch.equal(*found)


def test_decoding_reads_and_holds_no_more_than_the_windows_of_its_buckets():
    """By hand: rings of W + 1 positions; keys and values that no ring names may be anything."""
    tensors, config = inputs(length=400), LSHConfig(n_hashes=2, n_buckets=4, window=8, local_window=3)
    tensors[2].requires_grad_()
    cache = BucketCache(*tensors, config=config, rotations=random_rotations(5, 4, 2), max_length=1000)
    assert not cache.keys.requires_grad and not cache.values.requires_grad
    assert cache.rings.shape == (B, H, 2, 4, 9) and cache.rings.dtype == torch.int32
    assert cache.keys.shape == (B, H, 1000, 5) and cache.values.shape == (B, H, 1000, DV)
    lost = torch.ones(400, dtype=torch.bool)
    lost[torch.cat([cache.rings.flatten().long(), torch.arange(390, 400)])] = False
    assert lost.sum() > 100
    for x in (cache.keys, cache.values):
        x[:, :, :400][:, :, lost] = torch.nan
    assert all(x.isfinite().all() for x in cache.step(*part(tensors, slice(1))))


def test_decoding_says_what_it_cannot_do():
    tensors, good = inputs(), LSHConfig(n_hashes=2, n_buckets=4)
    rotations = random_rotations(5, 4, 2)

    def cache(config=good, tensors=tensors, rotations=rotations, max_length=L + 1):
        return BucketCache(*tensors, config=config, rotations=rotations, max_length=max_length)

    for config, words in (
        (LSHConfig(n_hashes=2, n_buckets=4, span="bucket"), 'config.span: got "bucket", wanted "window"'),
        (LSHConfig.trax(n_hashes=2, n_buckets=4), 'config.span: got "chunk", wanted "window"'),
        (LSHConfig(n_hashes=2), "config.n_buckets: got None"),
        (LSHConfig(n_hashes=2, n_buckets=6), "rotations: got shape"),
    ):
        with pytest.raises(ValueError, match=words):
            cache(config)
    with pytest.raises(TypeError, match="config: got NoneType"):
        cache(None)
    with pytest.raises(TypeError, match="max_length: got 2.5"):
        cache(max_length=2.5)
    with pytest.raises(ValueError, match="max_length: got 59, wanted at least the prompt's 60"):
        cache(max_length=L - 1)
    with pytest.raises(ValueError, match="value: got"):
        cache(tensors=(tensors[0], None, tensors[2][:, :, 1:]))
    with pytest.raises(ValueError, match="value: got"):
        cache(tensors=(tensors[0], None, tensors[2][:, :2]))
    full, (query, _, value) = cache(), part(tensors, slice(1))
    with pytest.raises(ValueError, match="key: got .* wanted None"):
        full.step(query, query, value)
    with pytest.raises(ValueError, match=r"query: got \(\(2, 4, 2, 5\)"):
        full.step(*part(tensors, slice(2)))
    with pytest.raises(ValueError, match="query: got .*float64"):
        full.step(query.double(), None, value.double())
    full.step(query, None, value)
    with pytest.raises(ValueError, match="max_length: got 61, wanted at least 62"):
        full.step(query, None, value)
    assert full.length == 61
