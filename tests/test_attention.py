"""The torch backend, through the public API, against the float64 oracle: outputs, lse and gradients."""

import itertools
import random
import subprocess
import sys
import time

import pytest
import torch

from lsh_kernels import (
    LSHConfig,
    bucket_sort,
    combine_rounds,
    local_attention,
    lsh_attention,
    lsh_hash,
    random_rotations,
    reference,
)

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


@pytest.mark.parametrize("number", [2**31 - 1, 10**12])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{"window": None}, {"local_window": None}]
    + [{"span": "chunk", name: None} for name in ("chunk_length", "chunks_before", "chunks_after")]
    + [{"span": "chunk", "within_bucket": False, "dedupe": False, "wrap": True, "chunks_before": None}],
    ids=str,
)
def test_numbers_beyond_the_length_are_as_good_as_the_length(fields, shared, number):
    L = 50
    query, key, value, buckets = make(1, 2, L, D), make(1, 2, L, D), make(1, 2, L, Dv), torch.randint(0, 4, (1, 2, 2, L))

    def attend(n):
        given = {name: n if value is None else value for name, value in fields.items()}
        config = LSHConfig(**{"n_hashes": 2, "n_buckets": 4, "chunk_length": 8, **given})
        given = (None, value, buckets) if shared else (key, value, (buckets, buckets))
        return lsh_attention(query, *given[:2], config=config, buckets=given[2], return_lse=True)

    for got, wanted in zip(attend(number), attend(2 * L)):
        torch.testing.assert_close(got, wanted)


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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("span", ["window", "bucket"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_attention_is_prefix_invariant(span, shared, dropout_p, dtype, tolerance):
    config = LSHConfig(n_hashes=R, n_buckets=4, local_window=2, **SPANS[span])
    query, value = make(1, H, 200, D, dtype=dtype), make(1, H, 200, Dv, dtype=dtype)
    key = None if shared else make(1, H, 200, D, dtype=dtype)
    rotations = random_rotations(D, 4, R, n_heads=H)

    def outputs(n):
        rows = (None if x is None else x[:, :, :n] for x in (query, key, value))
        generator = torch.Generator().manual_seed(1)
        return lsh_attention(*rows, config=config, is_causal=True, rotations=rotations, dropout_p=dropout_p, generator=generator)

    def candidates(n):
        buckets = lsh_hash(query[:, :, :n], rotations, 4)
        if not shared:
            buckets = buckets, lsh_hash(key[:, :, :n], rotations, 4)
        return reference.candidates(config, buckets, n, n, shared=shared, is_causal=True)

    assert torch.equal(candidates(200)[:, :, :83, :83], candidates(83))
    torch.testing.assert_close(outputs(200)[:, :, :83], outputs(83), rtol=0, atol=tolerance)


@pytest.mark.parametrize("span", ["window", "bucket", "paper"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_a_row_does_not_depend_on_its_batch(shared, span, causal):
    if span == "paper" and not shared:
        pytest.skip("padded queries keep their buckets, so that they move the chunks of separate keys")
    config = LSHConfig(n_hashes=R, n_buckets=4, local_window=2, **SPANS[span])
    query, key, value = make(3, H, 96, D), None if shared else make(3, H, 96, D), make(3, H, 96, Dv)
    lengths = torch.tensor([96, 50, 0])
    mask = torch.arange(96) >= lengths[:, None]
    rotations = random_rotations(D, 4, R, n_heads=H)
    arguments = {"config": config, "rotations": rotations, "is_causal": causal}
    together = lsh_attention(query, key, value, **arguments, key_padding_mask=mask)
    alone = [None if x is None else x[1:2, :, :50] for x in (query, key, value)]
    torch.testing.assert_close(together[1:2, :, :50], lsh_attention(*alone, **arguments), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_attention_takes_any_strides(shared):
    packed = make(B, 50, 3, H, D)
    query, key, value = packed.permute(2, 0, 3, 1, 4)  # as a fused projection leaves them
    sliced = make(B, H, 100, D + 5)[:, :, ::2, 3:-2]
    expanded = make(1, H, 50, D).expand(B, -1, -1, -1)
    config, buckets = LSHConfig(n_hashes=R, n_buckets=4, window=9), torch.randint(0, 4, (B, H, R, 50))
    for rows in (
        (query, key, value),
        (sliced, expanded, query),
        (expanded, sliced, sliced.flip(-1).transpose(0, 1).transpose(0, 1)),
    ):
        query, key, value = rows[0], None if shared else rows[1], rows[2]
        arguments = {"config": config, "buckets": buckets if shared else (buckets, buckets.flip(-1))}
        inputs = [x for x in (query, key, value) if x is not None]
        got = lsh_attention(query, key, value, **arguments, return_lse=True)
        truth = reference.lsh_attention(query, key, value, **arguments)
        for a, b in zip(got, truth):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        # a gradient of odd strides too
        dout = torch.randn(B, H, D, 50, dtype=torch.float64).transpose(2, 3)
        gradients = (torch.autograd.grad(out, inputs, dout, retain_graph=True) for out, _ in (got, truth))
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_attention_clamps_bucket_ids(dtype):
    hostile = torch.tensor([torch.iinfo(dtype).min, -1, 0, 3, 4, torch.iinfo(dtype).max], dtype=dtype)
    buckets = hostile[torch.randint(0, 6, (B, H, R, 60))]
    config, query, value = LSHConfig(n_hashes=R, n_buckets=4, window=9), make(B, H, 60, D), make(B, H, 60, Dv)
    outs = [lsh_attention(query, None, value, config=config, buckets=x) for x in (buckets, buckets.clamp(0, 3))]
    assert torch.equal(*outs)


@pytest.mark.parametrize("L", [16_000, 20_000])
def test_attention_of_long_sequences_agrees_with_the_oracle(L):
    """Rows of one bucket against their exact attention: 16-bit and 32-bit masks, several heads and blocks."""
    query, value = make(1, 2, L, 8, dtype=torch.float32), make(1, 2, L, 8, dtype=torch.float32)
    buckets = torch.randint(0, 512, (1, 2, 2, L))
    config = LSHConfig(n_hashes=2, n_buckets=512)
    out = lsh_attention(query, None, value, config=config, is_causal=True, buckets=buckets)
    for i in random.Random(0).sample(range(L - 200, L), 25) + [L - 1]:
        mates = torch.zeros(2, L, dtype=torch.bool)
        for head, r in itertools.product(range(2), range(2)):
            same = (buckets[0, head, r, :i] == buckets[0, head, r, i]).nonzero().flatten()
            mates[head, same[-64:]] = True
        keys = torch.nn.functional.normalize(query[0], dim=-1)
        logits = torch.einsum("hd,hjd->hj", query[0, :, i], keys).masked_fill(~mates, -torch.inf)
        want = torch.einsum("hj,hjd->hd", logits.softmax(-1), value[0])
        torch.testing.assert_close(out[0, :, i], want, rtol=1e-5, atol=1e-5)


def test_attention_saves_what_the_spec_allows():
    query, key, value = make(B, H, 64, D), make(B, H, 64, D), make(B, H, 64, Dv)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = lsh_attention(query, key, value, return_lse=True)
    floating = {x.data_ptr() for x in saved if x.is_floating_point()}
    assert floating == {x.data_ptr() for x in (query, key, value, out, lse)}
    # per round and position of queries and of keys: the order, and one int32 more
    assert sorted(x.shape for x in saved if not x.is_floating_point()) == [(B, H, 4, 64)] * 4
    assert all(x.dtype == torch.int32 for x in saved if not x.is_floating_point())


def test_attention_draws_rotations_then_the_seed():
    x = make(1, 2, 64, 8)
    drawn = torch.Generator().manual_seed(7)
    rotations = random_rotations(8, 2, 4, n_heads=2, generator=drawn)
    arguments = {"config": LSHConfig(n_buckets=2), "dropout_p": 0.5}
    want = lsh_attention(x, None, x, **arguments, rotations=rotations, generator=drawn)
    assert torch.equal(want, lsh_attention(x, None, x, **arguments, generator=torch.Generator().manual_seed(7)))


def test_attention_compiles_for_every_length():
    attend = torch.compile(lambda x: lsh_attention(x, None, x, is_causal=True), backend="eager", fullgraph=True)
    for L in (200, 330, 1000):
        x = make(1, 2, L, 8)
        torch.manual_seed(L)
        compiled = attend(x)
        torch.manual_seed(L)
        eager = lsh_attention(x, None, x, is_causal=True)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (compiled, eager)))


def test_attention_refuses_derivatives_that_it_does_not_have():
    x = make(1, 2, 20, 8)
    (gradient,) = torch.autograd.grad(lsh_attention(x, None, x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda y: lsh_attention(y, None, y), (x.detach(),), (x.detach(),))
    with pytest.raises(NotImplementedError, match="combine_rounds has no gradient"):
        combine_rounds(make(1, 1, 2, 3, 4), torch.zeros(1, 1, 2, 3).double())[0].sum().backward()


def test_attention_masks_are_hard_for_any_logits():
    x = torch.full((1, 1, 40, 4), 3e15)
    x[:, :, :32] *= -1
    value = torch.arange(40.0)[None, None, :, None]
    buckets = torch.zeros(1, 1, 1, 40, dtype=torch.int32)
    config = LSHConfig(n_hashes=1, n_buckets=2)
    out = lsh_attention(x, -x, value, config=config, is_causal=True, buckets=(buckets, buckets))
    assert (out[0, 0, :, 0] <= torch.arange(40)).all()


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


Q, S, L = x(2, 4, 10, 8), x(2, 4, 5, 8), x(1, 1, 60_000, 1)
LONGEST = x(1, 1, 1, 1).expand(1, 1, 2**24, 1)
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
    (ValueError, "local_window: got query length 10", lambda: lsh_attention(Q, S, S, config=LSHConfig(local_window=2))),
    (ValueError, 'span="chunk": got query length 10', lambda: lsh_attention(Q, S, S, config=LSHConfig(span="chunk"))),
    (ValueError, "key: got length 5 for query length 10", lambda: local_attention(Q, S, S, window=3)),
    (TypeError, "rotations: got torch.int64", lambda: lsh_attention(Q, None, Q, rotations=x(4, 8, 4, 1).long())),
    (TypeError, "rotations: got list", lambda: lsh_hash(Q, [1], 2)),
    (ValueError, "2\\^30", lambda: lsh_attention(L, None, L, config=LSHConfig(window=60_000, n_buckets=32_768))),
    (
        ValueError,
        "config: got a reach of 40000 chunks with 32768 buckets",
        lambda: lsh_attention(L, None, L, config=LSHConfig.paper(n_buckets=32_768, chunk_length=1, chunks_before=40_000)),
    ),
    (
        ValueError,
        "config: got 9 rounds of 16777216 keys with wrap",
        lambda: lsh_attention(LONGEST, None, LONGEST, config=LSHConfig.trax(n_hashes=9)),
    ),
    (TypeError, "chunk_length: got 2.5", lambda: local_attention(Q, Q, Q, chunk_length=2.5)),
    (TypeError, "dropout_p: got 'a'", lambda: lsh_attention(Q, None, Q, dropout_p="a")),
    (ValueError, "head_dim: got 0", lambda: random_rotations(0, 2, 4)),
    (TypeError, "n_hashes: got 1.5", lambda: random_rotations(8, 2, 1.5)),
    (TypeError, "nested or sparse", lambda: lsh_attention(Q.to_sparse(), None, Q)),
    (TypeError, "buckets: got list", lambda: bucket_sort([1], 2)),
    (ValueError, "buckets: got shape", lambda: bucket_sort(x(2, 3).int(), 2)),
    (TypeError, "out and lse: got list", lambda: combine_rounds([1], Q)),
    (ValueError, "out: got shape", lambda: combine_rounds(Q, Q)),
    (ValueError, "lse: got shape", lambda: combine_rounds(Q[None], Q)),
    (ValueError, "lse: got torch.float64", lambda: combine_rounds(Q[None], x(1, 2, 4, 10).double())),
    (TypeError, "wrap: got 1", lambda: LSHConfig(wrap=1)),
    (TypeError, "norm_eps: got 'x'", lambda: LSHConfig(norm_eps="x")),
    (ValueError, "norm_eps: got -1", lambda: LSHConfig(norm_eps=-1)),
    (TypeError, "n_buckets: got 2.0", lambda: LSHConfig(n_buckets=2.0)),
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
    (ValueError, "value: got .* heads and length of key", lambda: lsh_attention(Q, Q, x(2, 4, 20, 8))),
    (ValueError, "value: got .* heads and length of key", lambda: local_attention(Q, Q, x(2, 2, 10, 8), window=3)),
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
    q, k, v = (torch.randn(1, 8, L, 64, requires_grad=True) for _ in range(3))
    lsh_attention(q, k if sys.argv[2] == "separate" else None, v, is_causal=True).sum().backward()
    # of this program alone: ru_maxrss begins with what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
start = run(256)
print(run(int(sys.argv[1])) - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("keys", ["shared", "separate"])
def test_attention_memory_grows_linearly(keys):
    def peak(length):
        return int(
            subprocess.run([sys.executable, "-c", PEAK, str(length), keys], capture_output=True, check=True, text=True).stdout
        )

    # H = 8, D = 64, R = 4, C = 64; a process each, since the peak of one never falls
    assert peak(16_384) <= 2.2 * peak(8_192)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_attention_stays_on_the_threads_of_torch():
    """With one thread set, no stage of forward or backward starts another."""
    program = """
import os, torch
from lsh_kernels import lsh_attention
torch.set_num_threads(1)
qk, v = torch.randn(2, 1, 4, 4096, 32)
qk.requires_grad_()
(qk @ v.mT).sum().backward()
before = len(os.listdir("/proc/self/task"))
lsh_attention(qk, None, v, is_causal=True).sum().backward()
assert len(os.listdir("/proc/self/task")) == before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("span", ["window", "paper"])
def test_attention_of_one_full_bucket_takes_no_longer(span):
    config = LSHConfig.paper(n_buckets=128) if span == "paper" else LSHConfig(n_buckets=128)
    query, value = (torch.randn(1, 2, 4096, 32) for _ in range(2))

    def seconds(buckets):
        times = []
        for _ in range(4):
            start = time.process_time()
            lsh_attention(query, None, value, config=config, is_causal=True, buckets=buckets)
            times.append(time.process_time() - start)
        return min(times)

    usual = torch.randint(0, 128, (1, 2, 4, 4096))
    assert seconds(torch.zeros_like(usual)) <= 3 * seconds(usual)
