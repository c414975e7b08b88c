"""LSHSelfAttention and LocalSelfAttention; what they share with the drop-in: randomness, gradients, autocast."""

from functools import partial

import pytest
import torch
from torch import nn

from lsh_kernels import LocalSelfAttention, LSHConfig, LSHMultiheadAttention, LSHSelfAttention
from lsh_kernels.functional import local_attention, lsh_attention

E, H, L = 32, 4, 40
CONFIG = LSHConfig(n_hashes=2, chunk_length=8)
PADDING = torch.arange(L) >= torch.tensor((L, 17, 5))[:, None]  # [3, L]


def float_mask(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


# the layer of the paper


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [None, 12])
def test_modules_self_attention_is_the_functional_call(causal, head_dim):
    layer = LSHSelfAttention(E, H, config=CONFIG, causal=causal, head_dim=head_dim, bias=True).eval()
    x = torch.randn(3, L, E)
    heads = (3, L, H, head_dim or E // H)
    qk, v = (proj(x).view(heads).transpose(1, 2) for proj in (layer.qk_proj, layer.v_proj))
    out = lsh_attention(
        qk, None, v, config=CONFIG, is_causal=causal, key_padding_mask=PADDING,
        rotations=layer.rotations[..., : sum(CONFIG.factors(L)) // 2],
    )  # fmt: skip
    expected = layer.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, PADDING), expected)
    torch.testing.assert_close(layer(x, float_mask(PADDING)), expected)


def test_modules_self_attention_names_its_parameters():
    assert set(LSHSelfAttention(E, H).state_dict()) == {"qk_proj.weight", "v_proj.weight", "out_proj.weight"}
    assert LSHSelfAttention(E, H, head_dim=3).qk_proj.weight.shape == (3 * H, E)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "embed_dim: got 32, wanted a multiple of num_heads = 5"),
        ({"num_heads": 2.0}, TypeError, "num_heads: got 2.0, wanted an int"),
        ({"head_dim": 2.5}, TypeError, "head_dim: got 2.5, wanted an int"),
        ({"num_heads": 0}, ValueError, "num_heads: got 0, wanted >= 1"),
        ({"head_dim": 0}, ValueError, "head_dim: got 0"),
        ({"config": {"n_hashes": 2}}, TypeError, "config: got dict, wanted an LSHConfig"),
        ({"dropout": 1.5}, ValueError, "dropout: got 1.5"),
    ],
)
def test_modules_self_attention_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        LSHSelfAttention(E, **{"num_heads": H, **options})


def test_modules_self_attention_checks_its_input():
    layer = LSHSelfAttention(E, H, config=CONFIG)
    with pytest.raises(ValueError, match=r"x: got shape \(40, 32\), wanted \[B, L, 32\]"):
        layer(torch.randn(L, E))
    with pytest.raises(ValueError, match=r"key_padding_mask: got shape \(40, 3\), wanted \(3, 40\)"):
        layer(torch.randn(3, L, E), PADDING.T)
    with pytest.raises(TypeError, match=r"key_padding_mask: got torch.int64, wanted torch.bool"):
        layer(torch.randn(3, L, E), PADDING.long())


# local attention, rotary positions


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_modules_local_attention_is_the_functional_call(causal, rotary):
    layer = LocalSelfAttention(E, H, window=6, causal=causal, rotary=rotary, bias=True, dropout=0.2).eval()
    x = torch.randn(3, L, E)
    q, k, v = (proj(x).view(3, L, H, E // H).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    if rotary:
        q, k = turned(q), turned(k)
    out = local_attention(q, k, v, window=6, is_causal=causal, key_padding_mask=PADDING)
    expected = layer.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, PADDING), expected)
    torch.testing.assert_close(layer(x, float_mask(PADDING)), expected)
    layer.train()
    assert not torch.allclose(layer(x, PADDING), expected)


def turned(x):
    """x [B, H, L, D] turned by position, as complex numbers."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([y.real, y.imag], dim=-1)


def test_modules_rotary_turns_shared_queries_before_they_are_hashed():
    plain, rotary = (LSHSelfAttention(E, H, config=CONFIG, rotary=on).eval() for on in (False, True))
    rotary.load_state_dict(plain.state_dict())
    x = torch.randn(2, L, E)
    (qk, _, v), (turned_qk, none, same_v) = plain.project_heads(x), rotary.project_heads(x)
    torch.testing.assert_close(turned_qk, turned(qk))
    assert none is None and torch.equal(v, same_v)
    out = lsh_attention(turned_qk, None, v, config=CONFIG, rotations=rotary.rotations[..., : sum(CONFIG.factors(L)) // 2])
    torch.testing.assert_close(rotary(x), rotary.out_proj(out.transpose(1, 2).flatten(2)))
    assert rotary.bfloat16().project_heads(x.bfloat16())[0].dtype == torch.bfloat16


def test_modules_local_attention_checks_its_arguments():
    assert set(LocalSelfAttention(E, H).state_dict()) == {f"{name}_proj.weight" for name in ("q", "k", "v", "out")}
    for options, error, message in (
        ({"window": 0}, ValueError, "window: got 0"),
        ({"window": 1.0}, TypeError, "window: got 1.0, wanted an int"),
        ({"num_heads": 5}, ValueError, "embed_dim: got 32, wanted a multiple of num_heads = 5"),
        ({"num_heads": 2.0}, TypeError, "num_heads: got 2.0, wanted an int"),
        ({"head_dim": 2.5}, TypeError, "head_dim: got 2.5, wanted an int"),
        ({"dropout": 2}, ValueError, "dropout: got 2"),
        ({"head_dim": 3, "rotary": True}, ValueError, "head_dim: got 3 with rotary=True, wanted an even number"),
    ):
        with pytest.raises(error, match=message):
            LocalSelfAttention(E, **{"num_heads": H, **options})
    with pytest.raises(ValueError, match=r"x: got shape \(40, 32\), wanted \[B, L, 32\]"):
        LocalSelfAttention(E, H)(torch.randn(L, E))


# the drop-in as well, where the layers are alike


def multihead(**options):
    return LSHMultiheadAttention(E, H, batch_first=True, config=CONFIG, **options)


LAYERS = {
    "self-attention": partial(LSHSelfAttention, E, H, config=CONFIG),
    "multihead, shared QK": partial(multihead, shared_qk=True),
    "multihead": multihead,
}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def run(layer, x):
    return layer(x) if isinstance(layer, LSHSelfAttention) else layer(x, x, x, need_weights=False)[0]


@every_layer
def test_modules_train_draws_anew_and_manual_seed_reproduces(build):
    layer, x = build(dropout=0.2).train(), torch.randn(2, 200, E)
    torch.manual_seed(1)
    first, second = run(layer, x), run(layer, x)
    torch.manual_seed(1)
    assert torch.equal(run(layer, x), first) and torch.equal(run(layer, x), second)
    assert not torch.allclose(first, second)
    layer.dropout = 0.0
    torch.manual_seed(1)
    first, second = run(layer, x), run(layer, x)
    assert not torch.allclose(first, second)  # rotations, not only dropout


@every_layer
def test_modules_eval_is_fixed_and_leaves_the_global_generator_alone(build):
    x = torch.randn(2, 200, E)
    layer = build(dropout=0.2)
    state = torch.get_rng_state()
    layer.eval()
    first = run(layer, x)
    run(layer, x[:, :60])
    layer.train().eval()
    assert torch.equal(run(layer, x), first)
    assert torch.equal(torch.get_rng_state(), state)
    other = build().eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(other, x), first)  # in another module, another process: a fixed seed


@every_layer
def test_modules_rotations_stay_out_of_the_state_dict_and_survive_moves(build):
    layer = build()
    assert layer.rotations is None  # training has no use for them
    layer.eval()
    rotations = layer.rotations.clone()
    assert rotations.dtype == torch.float32 and 0.9 < rotations.std() < 1.1
    assert not any("rotations" in key for key in layer.state_dict())
    layer.to(torch.bfloat16).to("cpu")
    assert torch.equal(layer.rotations, rotations)
    assert run(layer, torch.randn(2, L, E, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.to("meta").to_empty(device="cpu")
    assert torch.equal(layer.rotations, rotations)
    layer.train().to(torch.float16).float().eval()
    assert torch.equal(layer.rotations, rotations)
    # weights assigned to a module that was built without memory
    weights = layer.state_dict()
    layer = build(device="meta").eval()
    layer.load_state_dict(weights, assign=True)
    run(layer, torch.randn(2, L, E))
    assert torch.equal(layer.rotations, rotations)
    # whoever sets the flag by hand
    layer = build()
    layer.training = False
    run(layer, torch.randn(2, L, E))
    assert torch.equal(layer.rotations, rotations)


def test_modules_rotations_suffice_for_every_length():
    for config in (CONFIG, LSHConfig(n_buckets=6), LSHConfig(n_buckets=(4, 8))):
        layer = LSHSelfAttention(E, H, config=config).eval()
        for length in (1, 100, 5_000, 10**6, 10**9):
            rotations = layer._rotations_for(length)
            assert rotations.shape == (H, E // H, config.n_hashes, sum(config.factors(length)) // 2)


@pytest.mark.parametrize("build", [*LAYERS.values(), partial(multihead, exact_below=1000)])
def test_modules_gradient_reaches_everything(build):
    layer, x = build(), torch.randn(3, L, E, requires_grad=True)
    run(layer, x).square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0


@every_layer
def test_modules_autocast(build):
    layer, x = build().eval(), torch.randn(2, L, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(layer, x)
        reference = nn.MultiheadAttention(E, H, batch_first=True)(x, x, x, need_weights=False)[0]
    assert out.dtype == reference.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.out_proj.weight.grad.dtype == torch.float32
