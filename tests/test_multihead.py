"""LSHMultiheadAttention as a drop-in: weights, masks, layouts, the traps of nn.Transformer; replace_multihead_attention."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lsh_kernels import LSHConfig, LSHMultiheadAttention, replace_multihead_attention
from lsh_kernels.functional import lsh_attention

E, H, L = 32, 4, 40
CONFIG = LSHConfig(n_hashes=2, chunk_length=8)
LENGTHS = (L, 17, 5)
PADDING = torch.arange(L) >= torch.tensor(LENGTHS)[:, None]  # [3, L]


def float_mask(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def causal_mask(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def multihead(**options):
    return LSHMultiheadAttention(E, H, **{"batch_first": True, "config": CONFIG, **options})


def attend(layer, x, **options):
    return layer(x, x, x, need_weights=False, **options)[0]


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(E, H, 2 * E, **{"batch_first": True, "dropout": 0.0, **options})


def by_hand(layer, x, padding=None, is_causal=False):
    """What a (post-norm) nn.TransformerEncoderLayer around an LSH layer has to compute."""
    x = layer.norm1(x + attend(layer.self_attn, x, key_padding_mask=padding, is_causal=is_causal))
    return layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))


@pytest.fixture
def spy(monkeypatch):
    """The keyword arguments of every call of lsh_attention that the layers make."""
    calls = []

    def lsh_attention_spied(query, key, value, **options):
        calls.append(options)
        return lsh_attention(query, key, value, **options)

    monkeypatch.setattr("lsh_kernels.multihead.lsh_attention", lsh_attention_spied)
    return calls


# weights


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 7, "vdim": 9}, {"vdim": 5}])
def test_multihead_weights_load_both_ways(options):
    exact = nn.MultiheadAttention(E, H, **options)
    lsh = LSHMultiheadAttention(E, H, **options)
    assert list(lsh.state_dict()) == list(exact.state_dict())
    lsh.load_state_dict(exact.state_dict(), strict=True)
    for name, weight in exact.state_dict().items():
        assert torch.equal(lsh.state_dict()[name], weight)
    lsh._reset_parameters()
    lsh.eval()
    exact.load_state_dict(lsh.state_dict(), strict=True)


def test_multihead_same_constructor_draws_the_same_weights():
    torch.manual_seed(5)
    exact = nn.MultiheadAttention(E, H, 0.1, True, False, False, 7, 9, True, "cpu", torch.float64)
    torch.manual_seed(5)
    lsh = LSHMultiheadAttention(E, H, 0.1, True, False, False, 7, 9, True, "cpu", torch.float64)
    for a, b in zip(exact.parameters(), lsh.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert (lsh.dropout, lsh.kdim, lsh.vdim, lsh.batch_first) == (0.1, 7, 9, True)


# forward against the functional call


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shared_qk", [False, True])
def test_multihead_is_the_functional_call(shared_qk, is_causal):
    layer, x = multihead(shared_qk=shared_qk).eval(), torch.randn(3, L, E)
    nn.init.normal_(layer.in_proj_bias)
    q, k, v = (
        y.unflatten(-1, (H, -1)).transpose(1, 2) for y in F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    out = lsh_attention(
        q, None if shared_qk else k, v, config=CONFIG, is_causal=is_causal, key_padding_mask=PADDING,
        rotations=layer._rotations_for(L),
    )  # fmt: skip
    expected = layer.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attend(layer, x, key_padding_mask=PADDING, is_causal=is_causal), expected)


def test_multihead_cross_attention_is_the_functional_call():
    layer = multihead(kdim=7, vdim=9).eval()
    nn.init.normal_(layer.in_proj_bias)
    query, key, value = torch.randn(3, 13, E), torch.randn(3, L, 7), torch.randn(3, L, 9)
    b_q, b_k, b_v = layer.in_proj_bias.chunk(3)
    q = F.linear(query, layer.q_proj_weight, b_q).unflatten(-1, (H, -1)).transpose(1, 2)
    k = F.linear(key, layer.k_proj_weight, b_k).unflatten(-1, (H, -1)).transpose(1, 2)
    v = F.linear(value, layer.v_proj_weight, b_v).unflatten(-1, (H, -1)).transpose(1, 2)
    out = lsh_attention(q, k, v, config=CONFIG, key_padding_mask=PADDING, rotations=layer._rotations_for(L))
    expected = layer.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(query, key, value, PADDING, False)[0], expected)


def test_multihead_one_tensor_or_three_equal_ones_is_the_same():
    layer, x, value = multihead().eval(), torch.randn(3, L, E), torch.randn(3, L, E)
    torch.testing.assert_close(layer(x, x.clone(), x.clone(), need_weights=False)[0], attend(layer, x))
    expected = layer(x, x.clone(), value, need_weights=False)[0]
    torch.testing.assert_close(layer(x, x, value, need_weights=False)[0], expected)


@pytest.mark.parametrize("shared_qk", [False, True])
def test_multihead_batch_first_both_ways_and_unbatched(shared_qk):
    layer, x = multihead(shared_qk=shared_qk).eval(), torch.randn(3, L, E)
    expected = attend(layer, x, key_padding_mask=PADDING)
    layer.batch_first = False
    y = x.transpose(0, 1)
    torch.testing.assert_close(attend(layer, y, key_padding_mask=PADDING), expected.transpose(0, 1))
    for batch_first in (False, True):
        layer.batch_first = batch_first
        row = attend(layer, x[1], key_padding_mask=PADDING[1])
        assert row.shape == (L, E)
        torch.testing.assert_close(row, expected[1])


def test_multihead_empty_batch():
    layer = multihead()
    assert attend(layer, torch.randn(0, L, E)).shape == (0, L, E)


@pytest.mark.parametrize("shared_qk", [False, True])
def test_multihead_float_padding_is_read_as_minus_infinity(shared_qk):
    layer, x = multihead(shared_qk=shared_qk).eval(), torch.randn(3, L, E)
    expected = attend(layer, x, key_padding_mask=PADDING)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(attend(layer, x, key_padding_mask=float_mask(PADDING).to(dtype)), expected)
    assert not torch.allclose(attend(layer, x)[1], expected[1])
    changed = attend(layer, torch.where(PADDING[..., None], torch.randn(3, L, E), x), key_padding_mask=PADDING)
    torch.testing.assert_close(changed[~PADDING], expected[~PADDING])


def test_multihead_is_causal_reads_no_mask():
    layer, x = multihead().eval(), torch.randn(2, L, E)
    expected = attend(layer, x, is_causal=True)
    assert torch.equal(attend(layer, x, is_causal=True, attn_mask=torch.zeros(1, 1).expand(L, L)), expected)
    changed = attend(layer, torch.cat([x[:, :20], torch.randn(2, 20, E)], dim=1), is_causal=True)
    torch.testing.assert_close(changed[:, :20], expected[:, :20])
    assert not torch.allclose(attend(layer, x), expected)


def test_multihead_dropout_in_training_only(spy):
    layer, x = multihead(dropout=0.3), torch.randn(2, L, E)
    attend(layer, x)
    attend(layer.eval(), x)
    assert [call["dropout_p"] for call in spy] == [0.3, 0.0]


# exact_below


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "causal", "causal bool", "causal float", "attn float"])
def test_multihead_exact_below_is_multihead_attention(spy, masks, batch_first, need_weights):
    exact = nn.MultiheadAttention(E, H, dropout=0.3, batch_first=batch_first)
    lsh = LSHMultiheadAttention(E, H, dropout=0.3, batch_first=batch_first, exact_below=L + 1, config=CONFIG)
    lsh.load_state_dict(exact.state_dict())
    x = torch.randn(3, L, E) if batch_first else torch.randn(L, 3, E)
    wanted, options = {}, {"need_weights": need_weights, "average_attn_weights": False}
    if "bool" in masks or "float" in masks:
        wanted["key_padding_mask"] = PADDING if "bool" in masks else float_mask(PADDING)
    given = dict(wanted)
    if "causal" in masks:
        wanted["attn_mask"] = float_mask(causal_mask(L)) if "float" in masks else causal_mask(L)
        wanted["is_causal"] = given["is_causal"] = True
    if "attn" in masks:
        wanted["attn_mask"] = given["attn_mask"] = torch.randn(3 * H, L, L)
    for training in (True, False):
        torch.manual_seed(1)
        expected, expected_weights = exact.train(training)(x, x, x, **options, **wanted)
        torch.manual_seed(1)
        out, weights = lsh.train(training)(x, x, x, **options, **given)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-6)
        else:
            assert weights is None
    assert not spy


def test_multihead_exact_below_counts_the_longer_length(spy):
    layer = multihead(exact_below=30)
    short, long = torch.randn(1, 29, E), torch.randn(1, 30, E)
    attend(layer, short)
    layer(short, short, short)
    assert not spy
    attend(layer, long)
    layer(short, long, long, need_weights=False)
    layer(long, short, short, need_weights=False)
    assert len(spy) == 3
    cross = multihead(exact_below=30, kdim=7, vdim=9)
    exact = nn.MultiheadAttention(E, H, batch_first=True, kdim=7, vdim=9)
    exact.load_state_dict(cross.state_dict())
    for query, key, value in (
        (short[0], torch.randn(11, 7), torch.randn(11, 9)),
        (short, torch.randn(1, 11, 7), torch.randn(1, 11, 9)),
    ):
        for a, b in zip(cross(query, key, value), exact(query, key, value), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("is_causal", [False, True])
def test_multihead_exact_below_with_shared_qk_is_one_softmax_over_shared_keys(is_causal):
    length, padding = 150, torch.arange(150) >= torch.tensor([150, 99, 5])[:, None]
    layer, x = multihead(shared_qk=True, exact_below=length + 1).eval(), torch.randn(3, length, E)
    q, _, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in F.linear(x, layer.in_proj_weight).chunk(3, -1))
    itself = torch.eye(length, dtype=torch.bool)
    hidden = padding[:, None, None, :] | itself | (causal_mask(length) if is_causal else False)
    alone = hidden.all(-1, keepdim=True) & itself
    logits = (q @ F.normalize(q, dim=-1).mT).masked_fill(hidden & ~alone, -torch.inf)
    expected = layer.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    got = attend(layer, x, key_padding_mask=padding, is_causal=is_causal)
    torch.testing.assert_close(got[~padding], expected[~padding])
    with pytest.raises(ValueError, match="need_weights"):
        layer(x, x, x)


# gradients


@pytest.mark.parametrize("options", [{}, {"vdim": 9}])
def test_multihead_shared_qk_key_rows_have_zero_gradient(options):
    layer, x = multihead(shared_qk=True, **options), torch.randn(3, L, E)
    value = torch.randn(3, L, layer.vdim) if options else x
    layer(x, x, value, need_weights=False)[0].square().sum().backward()
    if options:
        q, k, v = layer.q_proj_weight.grad, layer.k_proj_weight.grad, layer.v_proj_weight.grad
    else:
        q, k, v = layer.in_proj_weight.grad.chunk(3)
    assert q.abs().sum() > 0 and v.abs().sum() > 0 and torch.equal(k, torch.zeros_like(k))
    assert torch.equal(layer.in_proj_bias.grad.chunk(3)[1], torch.zeros(E))


@pytest.mark.parametrize("shared_qk", [False, True])
def test_multihead_a_few_steps_reduce_the_loss(shared_qk):
    layer = replace_multihead_attention(encoder_layer(), CONFIG, shared_qk=shared_qk)
    x, y = torch.randn(2, L, E), torch.randn(2, L, E)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_multihead_shared_qk_under_activation_checkpointing(use_reentrant):
    layer, x = multihead(shared_qk=True), torch.randn(2, L, E, requires_grad=True)
    torch.manual_seed(3)
    expected = attend(layer, x)
    gradient = torch.autograd.grad(expected.square().sum(), x)[0]
    torch.manual_seed(3)
    out, _ = torch.utils.checkpoint.checkpoint(layer, x, x, x, None, False, use_reentrant=use_reentrant)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, gradient)


# what it can't do


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"add_bias_kv": True}, ValueError, "add_bias_kv: got True, wanted False"),
        ({"add_zero_attn": True}, ValueError, "add_zero_attn: got True, wanted False"),
        ({"shared_qk": True, "kdim": 7}, ValueError, "kdim: got 7, wanted embed_dim = 32 with shared_qk=True"),
        ({"config": 3}, TypeError, "config: got int, wanted an LSHConfig"),
        ({"dropout": -0.1}, ValueError, "dropout: got -0.1"),
        ({"exact_below": -1}, ValueError, "exact_below: got -1, wanted >= 0"),
        ({"exact_below": 2.5}, TypeError, "exact_below: got 2.5, wanted an int"),
    ],
)
def test_multihead_says_what_it_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        multihead(**options)


X, Y = torch.randn(3, L, E), torch.randn(3, 13, E)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ((X, X, X), {"need_weights": True}, ValueError, "need_weights: got True, wanted False"),
        ((X, X, X), {"attn_mask": causal_mask(L)}, ValueError, "attn_mask: got a mask without is_causal"),
        ((X, Y, Y), {"is_causal": True}, ValueError, "is_causal: got True with lengths 40 and 13"),
        ((X[None], X, X), {}, ValueError, r"query: got shape \(1, 3, 40, 32\)"),
        ((X[..., :5], X, X), {}, ValueError, r"query: got shape \(3, 40, 5\), wanted 3 dimensions .* of size 32"),
        ((X, X[0], X), {}, ValueError, r"key: got shape \(40, 32\), wanted 3 dimensions"),
        ((X, X, X[..., :5]), {}, ValueError, r"value: got shape \(3, 40, 5\)"),
        ((X, X, Y), {}, ValueError, r"value: got shape \(3, 13, 32\), wanted key's"),
        ((X, Y[:2], Y[:2]), {}, ValueError, "key: got batch size 2, wanted 3"),
        (
            (X, Y, Y),
            {"key_padding_mask": PADDING},
            ValueError,
            r"key_padding_mask: got shape \(3, 40\), wanted \(3, 13\)",
        ),
        (
            (X[0], X[0], X[0]),
            {"key_padding_mask": PADDING[0, 1:]},
            ValueError,
            r"key_padding_mask: got shape \(39,\), wanted \(40,\)",
        ),
        (
            (X, X, X),
            {"key_padding_mask": PADDING.int()},
            TypeError,
            "key_padding_mask: got torch.int32, wanted torch.bool",
        ),
    ],
)
def test_multihead_says_what_it_cannot_do(inputs, options, error, message):
    with pytest.raises(error, match=message):
        multihead()(*inputs, **{"need_weights": False, **options})


def test_multihead_shared_qk_wants_query_as_key():
    layer, x = multihead(shared_qk=True).eval(), torch.randn(3, L, E)
    for key in (torch.randn(3, L, E), x.clone(), x[:, :13]):
        with pytest.raises(ValueError, match="key: got another tensor than query"):
            layer(x, key, key, need_weights=False)
    expected = layer(x, x, x * 2, need_weights=False)[0]
    assert torch.equal(layer(x, x.view_as(x), x * 2, need_weights=False)[0], expected)


# inside nn.Transformer*


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_multihead_encoder_in_eval_really_runs_lsh(spy, batch_first, norm_first):
    layer = encoder_layer(batch_first=batch_first, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first)
    exact = copy.deepcopy(encoder).eval()
    encoder = replace_multihead_attention(encoder, CONFIG).eval()
    x = torch.randn(3, L, E)
    x = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        plain, padded = encoder(x), encoder(x, src_key_padding_mask=PADDING)
        assert len(spy) == 4 and not torch.allclose(plain, exact(x), atol=1e-3)
    # with autograd on there is no fast path in any version of torch
    torch.testing.assert_close(plain, encoder(x))
    torch.testing.assert_close(padded, encoder(x, src_key_padding_mask=PADDING))


def replaced_encoder():
    return replace_multihead_attention(nn.TransformerEncoder(encoder_layer(), 2), CONFIG)


def hand_built_encoder():
    layer = encoder_layer()
    layer.self_attn = multihead()
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        return nn.TransformerEncoder(layer, 2)


def late_built_encoder():
    """The encoder was built before: it goes on making nested tensors."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    for layer in encoder.layers:
        layer.self_attn = multihead()
    return encoder


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("build", [replaced_encoder, hand_built_encoder, late_built_encoder])
def test_multihead_encoder_with_padding_in_eval(spy, build, way):
    encoder = way(build().eval())
    x = torch.randn(3, L, E)
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=PADDING)
        assert len(spy) == 2
        expected = by_hand(encoder.layers[1], by_hand(encoder.layers[0], x, PADDING), PADDING)
        torch.testing.assert_close(got[~PADDING], expected[~PADDING])
        noise = torch.where(PADDING[..., None], torch.randn(3, L, E), x)
        torch.testing.assert_close(encoder(noise, src_key_padding_mask=PADDING)[~PADDING], expected[~PADDING])
        # causal, as the mask that users pass: found to be causal by nn.TransformerEncoder itself
        got = encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(L))
        torch.testing.assert_close(got, by_hand(encoder.layers[1], by_hand(encoder.layers[0], x, None, True), None, True))


@pytest.mark.parametrize("fastpath", [True, False])
def test_multihead_encoder_layer_in_eval_by_hand(spy, fastpath):
    layer = encoder_layer().eval()
    layer.self_attn = multihead().eval()
    layer.self_attn._reset_parameters()
    x = torch.randn(3, L, E)
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        with torch.no_grad():
            torch.testing.assert_close(layer(x, src_key_padding_mask=PADDING), by_hand(layer, x, PADDING))
            with pytest.raises(ValueError, match="attn_mask"):
                layer(x, src_mask=causal_mask(L))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(spy) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_multihead_nested_tensors():
    layer, x = multihead().eval(), torch.randn(3, L, E)
    rows = [row[:n] for row, n in zip(x, LENGTHS, strict=True)]
    nested = torch.nested.nested_tensor(rows)
    expected = attend(layer, x, key_padding_mask=PADDING)
    for got, row, n in zip(attend(layer, nested).unbind(), expected, LENGTHS, strict=True):
        torch.testing.assert_close(got, row[:n])
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for query, key in ((jagged, jagged), (nested, nested.clone()), (x, nested)):
        with pytest.raises(ValueError, match="query, key, value: got a nested tensor"):
            layer(query, key, key, need_weights=False)
    for options in ({"key_padding_mask": PADDING}, {"attn_mask": causal_mask(L)}, {"need_weights": True}):
        with pytest.raises(ValueError, match="key_padding_mask, attn_mask, need_weights: got one with nested input"):
            layer(nested, nested, nested, **{"need_weights": False, **options})
    layer.batch_first = False
    with pytest.raises(ValueError, match="query, key, value: got a nested tensor"):
        attend(layer, nested)


@pytest.mark.parametrize("training", [False, True])
def test_multihead_transformer_with_decoder(spy, training):
    model = nn.Transformer(E, H, 1, 1, 2 * E, dropout=0.0, batch_first=True).train(training)
    replace_multihead_attention(model, CONFIG)
    assert isinstance(model.decoder.layers[0].multihead_attn, LSHMultiheadAttention)
    source, target = torch.randn(3, L, E), torch.randn(3, 13, E)
    mask = nn.Transformer.generate_square_subsequent_mask(13)
    with torch.set_grad_enabled(training):
        out = model(
            source, target, tgt_mask=mask, tgt_is_causal=True,
            src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING,
        )  # fmt: skip
    assert out.shape == target.shape
    assert [call["is_causal"] for call in spy] == [False, True, False]
    assert [call["key_padding_mask"] is not None for call in spy] == [True, False, True]


def test_multihead_torch_compile_traces_eval():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    layer, x = multihead(exact_below=L + 1).eval(), torch.randn(2, L, E)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], attend(layer, x))
    long = torch.randn(2, 3 * L, E)
    torch.testing.assert_close(
        compiled(long, long, long, need_weights=False, is_causal=True)[0], attend(layer, long, is_causal=True)
    )
    assert graphs


# replace_multihead_attention


def test_replace_keeps_parameters_mode_dtype_and_hooks():
    model = nn.Sequential(encoder_layer(dtype=torch.float64), nn.ModuleDict({"a": nn.MultiheadAttention(E, H, bias=False)}))
    model.eval()[1].train()
    seen = []
    model[0].self_attn.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    model[0].self_attn.in_proj_bias.requires_grad_(False)
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert replace_multihead_attention(model, CONFIG, shared_qk=True, exact_below=3) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == keys
    for layer, training in ((model[0].self_attn, False), (model[1]["a"], True)):
        assert type(layer) is LSHMultiheadAttention and layer.training is training and layer.out_proj.training is training
        assert (layer.config, layer.shared_qk, layer.exact_below) == (CONFIG, True, 3)
    x = torch.randn(2, L, E, dtype=torch.float64)
    weight = model[0].self_attn.in_proj_weight.clone()
    model[0](x).sum().backward()
    optimizer.step()
    assert seen == [LSHMultiheadAttention] and not torch.equal(model[0].self_attn.in_proj_weight, weight)
    assert model[0].self_attn.in_proj_bias.grad is None


def test_replace_shared_layers_stay_shared_and_ties_survive():
    attention = nn.MultiheadAttention(E, H)
    tied = nn.MultiheadAttention(E, H)
    tied.in_proj_weight = attention.in_proj_weight
    model = nn.ModuleDict({"a": attention, "b": nn.ModuleList([attention, tied]), "c": nn.Linear(E, E)})
    model["a_again"] = attention
    replace_multihead_attention(model)
    assert type(model["a"]) is LSHMultiheadAttention and model["a"] is model["b"][0] is model["a_again"]
    assert model["b"][1] is not model["a"] and model["b"][1].in_proj_weight is model["a"].in_proj_weight


def test_replace_a_layer_itself():
    exact = nn.MultiheadAttention(E, H, batch_first=True)
    lsh = replace_multihead_attention(exact, CONFIG)
    assert type(lsh) is LSHMultiheadAttention and lsh.in_proj_weight is exact.in_proj_weight
    x = torch.randn(1, L, E)
    with torch.no_grad():
        expected = exact.eval()(x, x, x)[0]
    assert exact._qkv_same_embed_dim and "rotations" not in exact._buffers  # the old one is as it was
    torch.testing.assert_close(replace_multihead_attention(exact, exact_below=10**6)(x, x, x)[0], expected)


def test_replace_filter_takes_by_path_and_module():
    model = nn.Transformer(E, H, 2, 2, 2 * E)
    names = []

    def only_decoder_self_attention(name, module):
        names.append(name)
        return name.startswith("decoder") and name.endswith("self_attn") and module.num_heads == H

    replace_multihead_attention(model, filter=only_decoder_self_attention)
    assert names == [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    swapped = [name for name, m in model.named_modules() if isinstance(m, LSHMultiheadAttention)]
    assert swapped == ["decoder.layers.0.self_attn", "decoder.layers.1.self_attn"]


def test_replace_turns_nested_tensors_off_above():
    model = nn.ModuleList([nn.TransformerEncoder(encoder_layer(), 1), nn.TransformerEncoder(encoder_layer(), 1)])
    replace_multihead_attention(model, filter=lambda name, module: name.startswith("0"))
    assert [encoder.use_nested_tensor for encoder in model] == [False, True]
    assert [encoder.enable_nested_tensor for encoder in model] == [False, True]


def test_replace_again_sets_the_new_options():
    model = replace_multihead_attention(encoder_layer(), CONFIG).eval()
    weight = model.self_attn.in_proj_weight
    replace_multihead_attention(model, LSHConfig(n_hashes=1), shared_qk=True)
    assert model.self_attn.config == LSHConfig(n_hashes=1) and model.self_attn.shared_qk
    assert model.self_attn.in_proj_weight is weight and model.self_attn.rotations.shape[2] == 1


def patched():
    attention = nn.MultiheadAttention(E, H)
    attention.forward = attention.forward
    return attention


def compiled():
    attention = nn.MultiheadAttention(E, H)
    attention.compile()
    return attention


class Own(nn.MultiheadAttention):
    """Somebody's own behaviour."""


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda: Own(E, H), TypeError, "1: got Own, wanted nn.MultiheadAttention itself"),
        (patched, ValueError, "1: got a layer that is compiled or has its forward patched"),
        (compiled, ValueError, "1: got a layer that is compiled or has its forward patched"),
        (lambda: torch.compile(nn.MultiheadAttention(E, H)), ValueError, "1._orig_mod: got a layer that is compiled"),
        (lambda: nn.MultiheadAttention(E, H, add_bias_kv=True), ValueError, "1: add_bias_kv: got True"),
        (lambda: nn.MultiheadAttention(E, H, add_zero_attn=True), ValueError, "1: add_zero_attn: got True"),
        (lambda: nn.MultiheadAttention(E, H, kdim=7), ValueError, "1: kdim: got 7"),
    ],
)
def test_replace_refuses_and_leaves_the_model_as_it_was(bad, error, message):
    model = nn.Sequential(encoder_layer(), bad())
    with pytest.raises(error, match=message):
        replace_multihead_attention(model, shared_qk=True)
    assert type(model[0].self_attn) is nn.MultiheadAttention
    replace_multihead_attention(model, shared_qk=True, filter=lambda name, module: name.startswith("0"))
    assert type(model[0].self_attn) is LSHMultiheadAttention


def test_replace_says_that_it_found_nothing():
    with pytest.raises(ValueError, match=r"model: found no nn.MultiheadAttention to swap in Linear \(there is none\)"):
        replace_multihead_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"in TransformerEncoderLayer \(filter took none of 1\)"):
        replace_multihead_attention(encoder_layer(), filter=lambda name, module: False)
    with pytest.raises(TypeError, match="config: got int"):
        replace_multihead_attention(encoder_layer(), 4)
