"""The torch backend, through the public API, against the float64 oracle: outputs, lse and gradients."""

import itertools
import random
import subprocess
import sys

import pytest
import torch

from lsh_kernels import LSHConfig, local_attention, lsh_attention, lsh_hash, random_rotations, reference

B, H, D, Dv, R = 2, 4, 8, 6, 3
SPANS = {
    "window": {"window": 9},
    "window counted twice": {"window": 9, "dedupe": False},
    "bucket": {"span": "bucket"},
    "paper": {"span": "chunk", "chunk_length": 16, "chunks_after": 1},
    "across buckets": {"span": "chunk", "chunk_length": 16, "within_bucket": False},
    "trax": {"span": "chunk", "chunk_length": 16, "within_bucket": False, "dedupe": False, "wrap": True, "norm_eps": 1e-6},
}
CASES = list(itertools.product((1, 7, 64, 100, 151), SPANS, (0, 5), (True, False), (True, False), (True, False)))
# every span meets every other factor; the full product takes minutes
CASES = random.Random(0).sample(CASES, 160)


def make(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def seeds():
    """A generator, and the seed that a call with buckets given draws from it."""
    draw = torch.Generator().manual_seed(5)
    return torch.Generator().manual_seed(5), torch.randint(-(2**63), 2**63 - 1, (1,), generator=draw)


def assert_agree(inputs, got, truth, tolerance=1e-10):
    seen = truth[1] != -torch.inf
    assert torch.equal(got[1] == -torch.inf, ~seen)
    dout, dlse = torch.randn_like(truth[0]), torch.randn_like(truth[1])

    def results(out, lse):
        loss = (out * dout).sum() + (lse * dlse)[seen].sum()
        return [out, lse[seen], *torch.autograd.grad(loss, inputs)]

    for a, b in zip(results(*got), results(*truth)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("L, span, local, shared, causal, padded", CASES)
def test_attention_agrees_with_the_oracle(L, span, local, shared, causal, padded):
    config = LSHConfig(n_hashes=R, n_buckets=4, local_window=local, **SPANS[span])
    kv_heads = H if shared else 2
    query, value = make(B, H, L, D), make(B, kv_heads, L, Dv)
    key = None if shared else make(B, kv_heads, L, D)
    mask = torch.rand(B, L) < 0.3 if padded else None
    if padded:
        mask[0] = True
    rotations = random_rotations(D, 4, R, n_heads=kv_heads)
    buckets = lsh_hash(query, rotations, 4) if shared else (lsh_hash(query, rotations, 4), lsh_hash(key, rotations, 4))
    arguments = {"config": config, "is_causal": causal, "key_padding_mask": mask, "buckets": buckets}
    inputs = [x for x in (query, key, value) if x is not None]
    got = lsh_attention(query, key, value, **arguments, return_lse=True)
    assert_agree(inputs, got, reference.lsh_attention(query, key, value, **arguments))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_attention_drops_what_the_oracle_drops(span, shared, dropout_p):
    config = LSHConfig(n_hashes=R, n_buckets=4, **SPANS[span])
    query, key, value = make(B, H, 40, D), None if shared else make(B, H, 40, D), make(B, H, 40, Dv)
    buckets = torch.randint(0, 4, (B, H, R, 40))
    arguments = {"config": config, "buckets": buckets if shared else (buckets, buckets.flip(-1)), "dropout_p": dropout_p}
    generator, seed = seeds()
    got = lsh_attention(query, key, value, **arguments, generator=generator, return_lse=True)
    inputs = [x for x in (query, key, value) if x is not None]
    assert_agree(inputs, got, reference.lsh_attention(query, key, value, **arguments, seed=seed))


@pytest.mark.parametrize("L, S", [(1, 7), (7, 1), (50, 130), (130, 50), (257, 64)])
@pytest.mark.parametrize("span", ["window", "window counted twice", "bucket"])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_of_two_lengths_agrees_with_the_oracle(L, S, span, padded):
    config = LSHConfig(n_hashes=R, n_buckets=(2, 4), **SPANS[span])
    query, key, value = make(B, H, L, D), make(B, 2, S, D), make(B, 2, S, Dv)
    mask = torch.rand(B, S) < 0.3 if padded else None
    # ids out of range are clamped
    buckets = torch.randint(-1, 9, (B, H, R, L)), torch.randint(-1, 9, (B, 2, R, S))
    arguments = {"config": config, "key_padding_mask": mask, "buckets": buckets}
    got = lsh_attention(query, key, value, **arguments, return_lse=True)
    assert_agree([query, key, value], got, reference.lsh_attention(query, key, value, **arguments))


LOCAL = [
    {"window": 5},
    {"window": 1000},
    {"chunk_length": 16},
    {"chunk_length": 16, "chunks_before": 2, "chunks_after": 1, "wrap": True},
    {"chunk_length": 100, "chunks_after": 1},
    {"chunk_length": 7, "chunks_before": 0},
]


@pytest.mark.parametrize("L", [1, 7, 64, 100, 300])
@pytest.mark.parametrize("span", LOCAL)
@pytest.mark.parametrize("causal, padded", [(False, False), (True, True), (False, True)])
def test_local_attention_agrees_with_the_oracle(L, span, causal, padded):
    query, key, value = make(B, H, L, D), make(B, 2, L, D), make(B, 2, L, Dv)
    mask = torch.rand(B, L) < 0.3 if padded else None
    arguments = {"is_causal": causal, "key_padding_mask": mask, **span}
    got = local_attention(query, key, value, **arguments, return_lse=True)
    assert_agree([query, key, value], got, reference.local_attention(query, key, value, **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("span", ["window", "bucket", "paper", "trax"])
def test_attention_stays_within_the_error_budget(dtype, shared, span):
    L = 151
    config = LSHConfig(n_hashes=R, n_buckets=4, local_window=3, **SPANS[span])
    query, value = make(B, H, L, 32, dtype=dtype), make(B, H, L, 32, dtype=dtype)
    key = None if shared else make(B, H, L, 32, dtype=dtype)
    buckets = torch.randint(0, 4, (B, H, R, L))
    arguments = {"config": config, "is_causal": True, "buckets": buckets if shared else (buckets, buckets)}
    inputs = [x for x in (query, key, value) if x is not None]
    dout = torch.randn_like(value)

    def results(call, **more):
        out, lse = call(query, key, value, **arguments, **more)
        return [out, lse, *torch.autograd.grad((out.double() * dout.double()).sum(), inputs)]

    truth = results(reference.lsh_attention)
    rounded = results(reference.lsh_attention, dtype=dtype)
    for got, true, other in zip(results(lsh_attention, return_lse=True), truth, rounded):
        error, allowed = ((x.double() - true.double()).abs().max() for x in (got, other))
        assert error <= 2 * allowed + 2 * torch.finfo(dtype).eps * true.double().abs().max()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("span", SPANS)
def test_attention_gradients_pass_gradcheck_through_lse(shared, span):
    config = LSHConfig(n_hashes=2, n_buckets=2, local_window=1, **SPANS[span])
    inputs = [make(1, 2, 9, 3) for _ in range(2 if shared else 3)]
    buckets = torch.randint(0, 2, (1, 2, 2, 9))

    def attend(*x):
        query, key, value = (x[0], None, x[1]) if shared else x
        given = buckets if shared else (buckets, buckets)
        out, lse = lsh_attention(query, key, value, config=config, is_causal=True, buckets=given, return_lse=True)
        # self-only rows have a constant of -1e5 in lse
        return out, torch.where(lse < -5e4, lse + 1e5, lse)

    torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("span", ["window", "bucket"])
def test_attention_is_prefix_invariant(span):
    config = LSHConfig(n_hashes=R, n_buckets=4, local_window=2, **SPANS[span])
    query, value, rotations = make(1, H, 200, D), make(1, H, 200, Dv), random_rotations(D, 4, R, n_heads=H)
    whole, part = (
        lsh_attention(query[:, :, :n], None, value[:, :, :n], config=config, is_causal=True, rotations=rotations)
        for n in (200, 83)
    )
    torch.testing.assert_close(whole[:, :, :83], part, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_attention_of_a_row_does_not_depend_on_its_batch(shared):
    config = LSHConfig(n_hashes=R, n_buckets=4, window=9)
    query, key, value = make(3, H, 96, D), None if shared else make(3, H, 96, D), make(3, H, 96, Dv)
    lengths = torch.tensor([96, 50, 0])
    mask = torch.arange(96) >= lengths[:, None]
    rotations = random_rotations(D, 4, R, n_heads=H)
    together = lsh_attention(query, key, value, config=config, rotations=rotations, key_padding_mask=mask)
    alone = [None if x is None else x[1:2, :, :50] for x in (query, key, value)]
    torch.testing.assert_close(
        together[1:2, :, :50], lsh_attention(*alone, config=config, rotations=rotations), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("shared", [True, False])
def test_attention_never_shows_padded_values_and_reruns_equal(span, shared):
    config = LSHConfig(n_hashes=R, n_buckets=4, local_window=2, **SPANS[span])
    query, key, value = make(B, H, 90, D), None if shared else make(B, H, 90, D), make(B, H, 90, Dv)
    mask = torch.rand(B, 90) < 0.3
    poison = torch.tensor([torch.nan, torch.inf]).double()[torch.randint(0, 2, (90,))][:, None]
    buckets = torch.randint(0, 4, (B, H, R, 90))
    given = buckets if shared else (buckets, buckets)

    def run(poisoned):
        inputs = []
        for i, x in enumerate((query, key, value)):
            hidden = x is not None and poisoned and (shared or i > 0)
            inputs.append(torch.where(mask[:, None, :, None], poison, x.detach()) if hidden else x)
        inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
        out = lsh_attention(*inputs, config=config, key_padding_mask=mask, buckets=given)
        return [out, *torch.autograd.grad(out.square().sum(), [x for x in inputs if x is not None])]

    for clean, again, poisoned in zip(run(False), run(False), run(True)):
        assert torch.equal(clean, again)
        assert torch.equal(clean, poisoned)


def test_attention_leaves_the_global_generator_alone():
    x, state = make(1, 2, 64, 8), torch.get_rng_state()
    draws = [lsh_attention(x, None, x, dropout_p=0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(lsh_attention(x, None, x, dropout_p=0.5), lsh_attention(x, None, x, dropout_p=0.5))


def test_attention_takes_hostile_rows():
    x = torch.randn(1, 2, 100, 8)
    x[0, 0, 3], x[0, 1, 7] = torch.nan, 0
    buckets = lsh_hash(x, random_rotations(8, (4, 8), 5), (4, 8))
    assert 0 <= buckets.min() and buckets.max() < 32
    big = (x.nan_to_num() * 1e4).requires_grad_()
    out, lse = lsh_attention(big, None, big, is_causal=True, return_lse=True)
    (gradient,) = torch.autograd.grad(out.sum() + lse.sum(), big)
    assert out.isfinite().all() and lse.isfinite().all() and gradient.isfinite().all()
    empty = lsh_attention(x[:0], None, x[:0])
    assert empty.shape == (0, 2, 100, 8)


def x(*shape, **options):
    return torch.zeros(*shape, **options)


Q = x(2, 4, 10, 8)
ERRORS = [
    (TypeError, "query: got list", lambda: lsh_attention([1], None, Q)),
    (ValueError, r"query: got shape \(10, 8\)", lambda: lsh_attention(Q[0, 0], None, Q)),
    (TypeError, "query: got torch.int64", lambda: lsh_attention(Q.long(), None, Q)),
    (ValueError, "value: got torch.float64", lambda: lsh_attention(Q, None, Q.double())),
    (ValueError, "query: got shape", lambda: lsh_attention(Q[:, :, :0], None, Q[:, :, :0])),
    (ValueError, "query: got shape", lambda: lsh_attention(x(1, 1, 4, 300), None, x(1, 1, 4, 8))),
    (ValueError, "shared QK", lambda: lsh_attention(Q, None, Q[:, :2])),
    (ValueError, "key: got head dim 4", lambda: lsh_attention(Q, Q[..., :4], Q)),
    (ValueError, "key: got 3 heads", lambda: lsh_attention(Q, Q[:, :3], Q[:, :3])),
    (ValueError, "batch sizes", lambda: lsh_attention(Q, Q[:1], Q[:1])),
    (
        ValueError,
        "is_causal=True: got query length 10 and key length 5",
        lambda: lsh_attention(Q, Q[:, :, :5], Q[:, :, :5], is_causal=True),
    ),
    (TypeError, "config: got str", lambda: lsh_attention(Q, None, Q, config="paper")),
    (TypeError, "key_padding_mask: got torch.float32", lambda: lsh_attention(Q, None, Q, key_padding_mask=x(2, 10))),
    (ValueError, "key_padding_mask: got shape", lambda: lsh_attention(Q, None, Q, key_padding_mask=x(2, 9, dtype=torch.bool))),
    (ValueError, "dropout_p: got 1.5", lambda: lsh_attention(Q, None, Q, dropout_p=1.5)),
    (ValueError, "scale: got inf", lambda: lsh_attention(Q, None, Q, scale=float("inf"))),
    (ValueError, "buckets: got shape", lambda: lsh_attention(Q, None, Q, buckets=x(2, 4, 3, 10, dtype=torch.int32))),
    (TypeError, "buckets: got torch.float32", lambda: lsh_attention(Q, None, Q, buckets=x(2, 4, 4, 10))),
    (TypeError, "wanted a pair", lambda: lsh_attention(Q, Q, Q, buckets=x(2, 4, 4, 10, dtype=torch.int32))),
    (ValueError, "buckets and rotations", lambda: lsh_attention(Q, None, Q, buckets=x(1), rotations=x(1))),
    (ValueError, "rotations: got shape", lambda: lsh_attention(Q, None, Q, rotations=x(4, 8, 4, 77))),
    (TypeError, "generator: got int", lambda: lsh_attention(Q, None, Q, generator=3)),
    (ValueError, "backend: got 'cuda'", lambda: lsh_attention(Q, None, Q, backend="cuda")),
    (TypeError, "key: got None", lambda: local_attention(Q, None, Q, window=3)),
    (ValueError, "exactly one", lambda: local_attention(Q, Q, Q)),
    (ValueError, "wrap: got True", lambda: local_attention(Q, Q, Q, window=3, wrap=True)),
    (ValueError, "chunk_length: got 0", lambda: local_attention(Q, Q, Q, chunk_length=0)),
    (ValueError, "n_buckets: got 3", lambda: LSHConfig(n_buckets=3)),
    (ValueError, "wrap: got True", lambda: LSHConfig(wrap=True)),
    (ValueError, "within_bucket: got False", lambda: LSHConfig(within_bucket=False)),
    (ValueError, "span: got 'chunks'", lambda: LSHConfig(span="chunks")),
    (TypeError, "n_hashes: got 2.0", lambda: LSHConfig(n_hashes=2.0)),
]


@pytest.mark.parametrize("error, message, call", ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_arguments_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("span", ["window", "bucket"])
@pytest.mark.parametrize("shared", [True, False])
def test_attention_keeps_samples_apart(span, shared):
    config = LSHConfig(n_hashes=R, n_buckets=4, **SPANS[span])
    query, value = (torch.randn(2, H, 70, D) for _ in range(2))
    key = None if shared else torch.randn(2, H, 70, D)
    for x in (query, key, value):
        if x is not None:
            x[0] = torch.nan
            x.requires_grad_()
    buckets = torch.randint(0, 4, (2, H, R, 70))
    out = lsh_attention(query, key, value, config=config, buckets=buckets if shared else (buckets, buckets))
    inputs = [x for x in (query, key, value) if x is not None]
    for x in (out, *torch.autograd.grad(out[1].sum(), inputs)):
        assert x[1].isfinite().all()


PEAK = """
import re, sys, torch
from lsh_kernels import lsh_attention
def run(L):
    q, v = (torch.randn(1, 8, L, 64, requires_grad=True) for _ in range(2))
    lsh_attention(q, None, v, is_causal=True).sum().backward()
    # of this program alone: ru_maxrss begins with what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
start = run(256)
print(run(int(sys.argv[1])) - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_attention_memory_grows_linearly():
    def peak(length):
        return int(subprocess.run([sys.executable, "-c", PEAK, str(length)], capture_output=True, check=True, text=True).stdout)

    # H = 8, D = 64, R = 4, C = 64; a process each, since the peak of one never falls
    assert peak(16_384) <= 2.2 * peak(8_192)
