"""Diagnostics against the dense oracle; layers captured while a model runs."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsh_kernels import (
    LSHConfig,
    LSHMultiheadAttention,
    LSHSelfAttention,
    diagnostics,
    lsh_attention,
    lsh_hash,
    random_rotations,
    reference,
    replace_multihead_attention,
)
from lsh_kernels.diagnostics import AttentionInputs, attention_recall, bucket_occupancy, capture_attention, config_grid

B, H, D, Dv, R, N = 2, 4, 8, 6, 3, 4
SPANS = {
    "window": {"window": 5},
    "window counted twice": {"window": 5, "dedupe": False},
    "bucket": {"span": "bucket"},
    "paper": {"span": "chunk", "chunk_length": 8, "chunks_after": 1},
    "across buckets": {"span": "chunk", "chunk_length": 8, "within_bucket": False},
    "trax": {"span": "chunk", "chunk_length": 8, "within_bucket": False, "dedupe": False, "wrap": True, "norm_eps": 1e-2},
}
# L, S, span, local window, shared, causal, padded
CASES = [
    (L, L, *rest)
    for L, *rest in random.Random(0).sample(
        list(itertools.product((1, 7, 61), SPANS, (0, 3), (True, False), (True, False), (True, False))), 70
    )
]
CASES += [(61, 37, "window", 0, False, False, True), (37, 61, "bucket", 0, False, False, False)]
CASES += [(61, 61, span, 3, shared, True, True) for span in SPANS for shared in (True, False)]
ONE_BUCKET = LSHConfig(n_hashes=1, n_buckets=2, span="bucket")


def make_inputs(L, S, shared, causal, padded):
    kv_heads = H if shared else 2
    query = torch.randn(B, H, L, D, dtype=torch.float64)
    key = None if shared else torch.randn(B, kv_heads, S, D, dtype=torch.float64)
    mask = torch.rand(B, S) < 0.3 if padded else None
    if padded:
        mask[0] = True
    return AttentionInputs(query, key, torch.randn(B, kv_heads, S, Dv, dtype=torch.float64), causal, mask)


def hash_buckets(inputs):
    rotations = random_rotations(D, N, R, n_heads=inputs.value.shape[1])
    query = lsh_hash(inputs.query, rotations, N)
    return query if inputs.key is None else (query, lsh_hash(inputs.key, rotations, N))


def one_bucket(inputs):
    query, key = (torch.zeros(*x.shape[:2], 1, x.shape[2], dtype=torch.int32) for x in (inputs.query, inputs.value))
    return query if inputs.key is None else (query, key)


def dense(inputs, config, buckets, scale):
    """Recall, cosine error, number of keys and perplexity, straight from the definitions."""
    query, key, value, causal, mask, _ = inputs
    (L, S), shared = (query.shape[2], value.shape[2]), key is None
    arguments = {"is_causal": causal, "key_padding_mask": mask}
    counts = reference.candidates(config, buckets, L, S, shared=shared, **arguments)
    visible = reference.candidates(ONE_BUCKET, one_bucket(inputs), L, S, shared=shared, **arguments) > 0
    seen = counts > 0
    if L == S and not shared:
        seen = seen | (torch.eye(L, dtype=torch.bool) & ~seen.any(-1, keepdim=True) & visible)
    k = query / (query.square().sum(-1, keepdim=True) + D * config.norm_eps).sqrt() if shared else key
    logits = scale * query @ k.repeat_interleave(H // k.shape[1], 1).mT
    probs = logits.masked_fill(~visible, -math.inf).softmax(-1)
    recall = torch.where(seen, probs, 0 * probs).sum(-1)
    got, _ = reference.lsh_attention(query, key, value, config=config, buckets=buckets, scale=scale, **arguments)
    full = value if mask is None else value.masked_fill(mask[:, None, :, None], 0)
    error = 1 - F.cosine_similarity(got, probs @ full.repeat_interleave(H // value.shape[1], 1), dim=-1)
    perplexity = (1 / probs.pow(probs)).prod(-1)
    if mask is not None and L == S:
        recall, error, perplexity = (x.masked_fill(mask[:, None], math.nan) for x in (recall, error, perplexity))
    return recall, error, seen.sum(-1), perplexity


@pytest.mark.parametrize("L, S, span, local, shared, causal, padded", CASES)
def test_recall_agrees_with_the_oracle(L, S, span, local, shared, causal, padded, monkeypatch):
    monkeypatch.setattr(diagnostics, "_BLOCK_PAIRS", 7 * S)  # several blocks, the last one shorter
    config = LSHConfig(n_hashes=R, n_buckets=N, local_window=local, **SPANS[span])
    inputs = make_inputs(L, S, shared, causal, padded)
    buckets = hash_buckets(inputs)
    found = attention_recall(inputs, config, scale=0.7, buckets=buckets)
    recall, error, n_keys, perplexity = dense(inputs, config, buckets, 0.7)
    assert torch.equal(found.queries, torch.arange(L)) and torch.equal(found.n_keys, n_keys)
    torch.testing.assert_close(found.recall, recall, rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(found.cosine_error, error, rtol=1e-8, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(found.perplexity, perplexity, rtol=1e-10, atol=0, equal_nan=True)


def test_recall_cases_meet_every_kind_of_query():
    """Some queries see part of the mass, some all, some none, and for some there is nothing to see."""
    inputs = make_inputs(61, 61, True, True, True)
    config = LSHConfig(n_hashes=R, n_buckets=N, window=5)
    recall = attention_recall(inputs, config, buckets=hash_buckets(inputs)).recall
    assert (recall == 0).any() and ((recall > 0) & (recall < 1)).any() and (recall == 1).any() and recall.isnan().any()


@pytest.mark.parametrize("shared", [True, False])
def test_recall_default_scale_is_that_of_lsh_attention(shared):
    inputs = make_inputs(61, 61, shared, False, False)
    config, buckets = LSHConfig(n_hashes=R, n_buckets=N), hash_buckets(inputs)
    wanted = dense(inputs, config, buckets, 1.0 if shared else D**-0.5)[0]
    torch.testing.assert_close(attention_recall(inputs, config, buckets=buckets).recall, wanted)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("config", [ONE_BUCKET, LSHConfig(n_hashes=1, n_buckets=2, window=61)], ids=["bucket", "window"])
def test_recall_is_1_and_the_output_exact_where_all_keys_are_candidates(config, shared):
    inputs = make_inputs(61, 61, shared, True, False)
    found = attention_recall(inputs, config, buckets=one_bucket(inputs))
    first = int(shared)  # a shared query alone has nothing to see
    torch.testing.assert_close(found.recall[..., first:], torch.ones(B, H, 61 - first, dtype=torch.float64))
    assert found.cosine_error[..., first:].max() < 1e-12
    assert found.recall[..., :first].isnan().all() and found.cosine_error[..., :first].isnan().all()
    assert torch.equal(found.n_keys[0, 0], torch.arange(61) + 1 - first)
    assert (found.bucket_sizes == 61).all()


def test_perplexity_of_even_attention_is_the_number_of_keys():
    found = attention_recall(AttentionInputs(torch.zeros(1, 1, 9, 4), torch.randn(1, 1, 9, 4), is_causal=True))
    torch.testing.assert_close(found.perplexity[0, 0], torch.arange(1.0, 10))


def test_recall_of_fewer_rounds_is_part_of_that_of_more():
    inputs = make_inputs(200, 200, True, True, False)
    found = [attention_recall(inputs, LSHConfig(n_hashes=rounds, window=8)) for rounds in (1, 2, 4)]
    for less, more in itertools.pairwise(found):
        assert torch.equal(more.bucket_sizes[:, :, : less.bucket_sizes.shape[2]], less.bucket_sizes)
        assert (more.recall.nan_to_num() >= less.recall.nan_to_num() - 1e-12).all()
        assert more.recall.nanmean() > less.recall.nanmean()


@pytest.mark.parametrize("shared", [True, False])
def test_recall_of_sampled_queries_is_theirs_among_all(shared):
    inputs = make_inputs(61, 61, shared, True, True)
    every = attention_recall(inputs, LSHConfig(window=5), seed=3)
    some = attention_recall(inputs, LSHConfig(window=5), seed=3, n_queries=10)
    assert len(set(some.queries.tolist())) == 10 and some.queries.tolist() == sorted(some.queries.tolist())
    for name in ("recall", "cosine_error", "n_keys", "perplexity", "bucket_sizes"):
        torch.testing.assert_close(getattr(some, name), getattr(every, name)[..., some.queries], equal_nan=True)
    again, other = (attention_recall(inputs, LSHConfig(window=5), seed=seed, n_queries=10) for seed in (3, 4))
    assert torch.equal(again.queries, some.queries) and torch.equal(again.n_keys, some.n_keys)
    assert not torch.equal(other.queries, some.queries)
    assert torch.equal(attention_recall(inputs, LSHConfig(), n_queries=1000).queries, torch.arange(61))


def test_recall_without_values_and_with_the_layers_config():
    inputs = make_inputs(61, 61, True, True, False)
    config = LSHConfig(window=5, n_hashes=2)
    wanted = attention_recall(inputs, config)
    found = attention_recall(inputs._replace(value=None, config=config))
    assert found.cosine_error is None and wanted.cosine_error is not None
    assert torch.equal(found.recall.nan_to_num(), wanted.recall.nan_to_num())
    assert attention_recall(inputs).bucket_sizes.shape[2] == LSHConfig().n_hashes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_recall_takes_every_dtype(dtype):
    inputs = make_inputs(61, 61, False, True, True)
    rounded = inputs._replace(**{name: getattr(inputs, name).to(dtype) for name in ("query", "key", "value")})
    wide = inputs._replace(**{name: getattr(rounded, name).double() for name in ("query", "key", "value")})
    buckets = hash_buckets(inputs)
    found, wanted = (attention_recall(x, LSHConfig(n_hashes=R, n_buckets=N), buckets=buckets) for x in (rounded, wide))
    assert found.recall.dtype == torch.float32
    torch.testing.assert_close(found.recall.double(), wanted.recall, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_recall_ignores_what_stands_in_padding():
    inputs = make_inputs(61, 61, False, False, True)
    wanted = attention_recall(inputs)
    mask = inputs.key_padding_mask[:, None, :, None]
    spoilt = inputs._replace(key=inputs.key.masked_fill(mask, math.nan), value=inputs.value.masked_fill(mask, math.inf))
    found = attention_recall(spoilt)
    for name in ("recall", "cosine_error"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), equal_nan=True)


def test_recall_never_holds_a_dense_matrix(monkeypatch):
    L, largest = 1500, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            largest = max(largest, *sizes, 0)
            return out

    monkeypatch.setattr(diagnostics, "_BLOCK_PAIRS", 2**14)
    qk, v = torch.randn(2, 1, 1, L, 8)
    with Largest():
        attention_recall(AttentionInputs(qk, None, v, True), LSHConfig(n_hashes=2, n_buckets=2, span="bucket"))
    # 8 bytes of a slot number per pair of a block
    assert 2**13 * 4 < largest <= 2**14 * 8 < L * L


def test_recall_leaves_random_state_alone():
    state, inputs = torch.get_rng_state(), make_inputs(61, 61, True, True, False)
    torch.set_rng_state(state)
    attention_recall(inputs, n_queries=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"query": None}, {}, "query: got NoneType, wanted a tensor of 4 dimensions"),
        ({"key": torch.ones(3, 4)}, {}, r"key: got \(3, 4\), wanted a tensor of 4 dimensions"),
        ({"value": torch.ones(1, 1, 2, 2)}, {}, "value"),
        ({}, {"n_queries": 0}, "n_queries: got 0, wanted >= 1"),
        ({}, {"buckets": torch.zeros(1, 1, 1, 1, dtype=torch.int32)}, "buckets: got shape"),
    ],
)
def test_recall_checks_its_arguments(fields, options, message):
    inputs = make_inputs(7, 7, True, False, False)
    with pytest.raises(ValueError, match=message):
        attention_recall(inputs._replace(**fields), **options)
    with pytest.raises(TypeError, match="config: got str, wanted an LSHConfig or None"):
        attention_recall(inputs, "paper")
    with pytest.raises(TypeError, match="n_queries: got 0.5, wanted an int"):
        attention_recall(inputs, n_queries=0.5)


# buckets and configs


def test_bucket_occupancy_counts():
    buckets = torch.tensor([[[[0, 3, 3, 1, -5, 99]], [[1, 1, 1, 1, 1, 1]]]])
    assert bucket_occupancy(buckets, 4).tolist() == [[[[2, 1, 0, 3]], [[0, 6, 0, 0]]]]
    mask = torch.tensor([[False, True, False, False, False, True]])
    assert bucket_occupancy(buckets.int(), (2, 2), mask).tolist() == [[[[2, 1, 0, 1]], [[0, 4, 0, 0]]]]


@pytest.mark.parametrize("padded", [True, False])
def test_bucket_occupancy_sums_to_the_tokens(padded):
    mask = torch.rand(B, 61) < 0.4 if padded else None
    buckets = lsh_hash(torch.randn(B, H, 61, D), random_rotations(D, 16, R), 16)
    counts = bucket_occupancy(buckets, 16, mask)
    tokens = torch.full((B,), 61) if mask is None else 61 - mask.sum(1)
    assert counts.shape == (B, H, R, 16) and torch.equal(counts.sum(3), tokens[:, None, None].expand(B, H, R))


def test_bucket_sizes_are_those_of_the_queries_buckets():
    inputs = make_inputs(61, 61, False, False, True)
    q_buckets, k_buckets = buckets = hash_buckets(inputs)
    sizes = attention_recall(inputs, LSHConfig(n_hashes=R, n_buckets=N), buckets=buckets).bucket_sizes
    same = q_buckets[..., :, None] == k_buckets.repeat_interleave(2, 1)[..., None, :]
    assert torch.equal(sizes, (same & ~inputs.key_padding_mask[:, None, None, None]).sum(-1))


def test_config_grid_is_the_product():
    base = LSHConfig.trax(chunk_length=32, n_buckets=8)
    grid = config_grid(base, n_hashes=(1, 2), spans=("window", "bucket"), local_windows=(0, 16))
    got = [(c.span, c.local_window, c.n_hashes) for c in grid]
    assert got == list(itertools.product(("window", "bucket"), (0, 16), (1, 2)))
    assert all((c.chunk_length, c.n_buckets, c.norm_eps, c.wrap) == (32, 8, 1e-6, False) for c in grid)
    assert len(config_grid()) == 24


# layers of a running model


def mha(kind, **options):
    if kind == "plain":
        return nn.MultiheadAttention(32, 4, **options)
    config = LSHConfig(n_hashes=2, window=8)
    return LSHMultiheadAttention(32, 4, config=config, shared_qk=kind == "shared", **options)


def attend_again(layer, inputs):
    """The output of an eval layer from what was captured."""
    query, key, value, causal, padding, config = inputs
    if config is None:
        allowed = None if padding is None else ~padding[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, allowed, is_causal=causal)
    else:
        arguments = {"config": config, "is_causal": causal, "key_padding_mask": padding}
        out = lsh_attention(query, key, value, rotations=layer._rotations_for(value.shape[2]), **arguments)
    return layer.out_proj(out.transpose(1, 2).flatten(2))  # [B, L, E]


@pytest.mark.parametrize("kind", ["plain", "shared", "separate"])
@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
@pytest.mark.parametrize("padding", [None, torch.bool, torch.float32])
def test_capture_multihead_attention(kind, layout, padding):
    layer, x = mha(kind, batch_first=layout == "batch first").eval(), torch.randn(2, 50, 32)
    mask = None if padding is None else torch.rand(2, 50) < 0.3
    mask = torch.zeros(2, 50).masked_fill(mask, -math.inf) if padding == torch.float32 else mask
    if layout == "unbatched":
        x, mask = x[0], None if mask is None else mask[0]
    x = x.transpose(0, 1) if layout == "length first" else x
    with capture_attention(layer) as calls:
        out, _ = layer(x, x, value=x, key_padding_mask=mask, need_weights=False)
    assert list(calls) == [""] and (calls[""].key is None) == (kind == "shared") and not calls[""].is_causal
    assert calls[""].config is (None if kind == "plain" else layer.config)
    assert calls[""].query.shape == (1 if layout == "unbatched" else 2, 4, 50, 8) and not calls[""].query.requires_grad
    again = attend_again(layer, calls[""])
    again = again[0] if layout == "unbatched" else again.transpose(0, 1) if layout == "length first" else again
    torch.testing.assert_close(again, out)


def causal_mask(kind, length=50):
    if kind == "float":
        return nn.Transformer.generate_square_subsequent_mask(length)
    return torch.ones(length, length, dtype=torch.bool).triu(1)


# LSH attention itself takes only the hint, its exact fall-back for short lengths takes masks
@pytest.mark.parametrize("kind, exact_below", [("plain", 0), ("shared", 0), ("separate", 0), ("separate", 100)])
@pytest.mark.parametrize("mask", ["hint", "bool", "float"])
def test_capture_knows_the_causal_mask(kind, exact_below, mask):
    hint = mask == "hint" or kind != "plain" and not exact_below
    layer, x = mha(kind, batch_first=True), torch.randn(1, 50, 32)
    layer.exact_below = exact_below
    # beside the hint the mask is not read
    attn_mask = torch.zeros(50, 50) if mask == "hint" else causal_mask(mask)
    with capture_attention(layer) as calls:
        layer(x, x, x, attn_mask=attn_mask, is_causal=hint, need_weights=False)
    assert calls[""].is_causal


@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("change", ["one more", "one less", "per head"])
def test_capture_refuses_other_masks(mask, change):
    layer, x, attn_mask = mha("plain", batch_first=True), torch.randn(1, 50, 32), causal_mask(mask)
    if change == "per head":
        attn_mask = attn_mask.expand(4, 50, 50)
    else:
        i, j = (3, 2) if change == "one more" else (2, 3)
        attn_mask[i, j] = attn_mask[j, i]
    with capture_attention(nn.Sequential(layer)), pytest.raises(ValueError, match="^0: got an attn_mask that is not the causal"):
        layer(x, x, x, attn_mask=attn_mask, need_weights=False)


@pytest.mark.parametrize("causal", [True, False])
def test_capture_self_attention_inside_a_model(causal):
    layer = LSHSelfAttention(32, 4, config=LSHConfig(n_hashes=2, window=8), causal=causal, bias=True)
    model, x = nn.Sequential(nn.Linear(32, 32), layer, nn.Identity()).eval(), torch.randn(2, 50, 32)
    with capture_attention(model, ["1"]) as calls:
        model(torch.randn(1, 7, 32))
        out = model(x)  # the last call stays
    assert list(calls) == ["1"] and calls["1"].config is layer.config and calls["1"].is_causal is causal
    torch.testing.assert_close(attend_again(layer, calls["1"]), out)


def test_capture_cross_attention_of_other_widths():
    layer = nn.MultiheadAttention(32, 4, kdim=20, vdim=12, bias=False, batch_first=True).eval()
    query, key, value = torch.randn(2, 50, 32), torch.randn(2, 30, 20), torch.randn(2, 30, 12)
    with capture_attention(layer) as calls:
        out, _ = layer(query, key, value, need_weights=False)
    torch.testing.assert_close(attend_again(layer, calls[""]), out)
    assert attention_recall(calls[""]).recall.shape == (2, 4, 50)


@pytest.mark.parametrize("shared_qk", [None, True, False])
@pytest.mark.parametrize("training", [True, False])
def test_capture_leaves_a_model_and_random_state_alone(shared_qk, training):
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(block, 2).train(training)
    if shared_qk is not None:
        replace_multihead_attention(model, LSHConfig(n_hashes=2, window=8), shared_qk=shared_qk)
    x, mask = torch.randn(2, 50, 32), torch.arange(50) >= torch.tensor([[50], [30]])

    def run():
        torch.manual_seed(1)
        out = model(x, src_key_padding_mask=mask)
        return out.masked_fill(mask[..., None], 0), torch.get_rng_state()

    fastpath = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        wanted, state = run()
        with capture_attention(model) as calls:
            out, after = run()
    assert list(calls) == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(out, wanted)
    assert torch.equal(after, state)
    assert torch.equal(calls["layers.1.self_attn"].key_padding_mask, mask)
    assert torch.backends.mha.get_fastpath_enabled() is fastpath and not any(m._forward_hooks for m in model.modules())


def test_capture_does_not_hold_the_graph_and_training_goes_on():
    layer, x = mha("shared", batch_first=True), torch.randn(1, 50, 32)
    grads = []
    for capture in (True, False):
        torch.manual_seed(1)
        layer.zero_grad()
        if capture:
            with capture_attention(layer) as calls:
                out, _ = layer(x, x, x, need_weights=False)
        else:
            out, _ = layer(x, x, x, need_weights=False)
        out.sum().backward()
        grads.append(layer.in_proj_weight.grad.clone())
    assert torch.equal(*grads) and not any(t.requires_grad for t in (calls[""].query, calls[""].value))


def test_capture_errors():
    model = nn.ModuleDict({"a": mha("plain"), "b": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"layers: got \['b'\], wanted names of attention layers, .* has \['a'\]"):
        capture_attention(model, ["b"]).__enter__()
    with pytest.raises(ValueError, match=r"layers: got None, .* has \[\]"):
        capture_attention(model["b"]).__enter__()
    with pytest.raises(ValueError, match="add_zero_attn"):
        capture_attention(nn.MultiheadAttention(8, 2, add_zero_attn=True)).__enter__()
    with pytest.raises(RuntimeError, match="mine"), capture_attention(model):
        raise RuntimeError("mine")
    assert not model["a"]._forward_hooks and torch.backends.mha.get_fastpath_enabled()
