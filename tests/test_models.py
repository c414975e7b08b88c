"""ReformerLM: config, gradients with and without reversibility, padding, causality, generation, files, two processes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from test_feedforward import peak_bytes
from torch import nn
from torch.nn import functional as F

from lsh_kernels import LocalSelfAttention, LSHConfig, LSHSelfAttention, ReformerConfig, ReformerLM
from lsh_kernels.diagnostics import capture_attention

V, E, L = 40, 16, 37
LSH = LSHConfig(n_hashes=2, chunk_length=8)
CONFIG = ReformerConfig(
    vocab_size=V, max_length=64, embed_dim=E, num_heads=2, n_layers=3, window=5, lsh=LSH, ff_dim=24, ff_chunk=11, loss_chunk=13
)
EVERYTHING = ReformerConfig(
    vocab_size=V, max_length=60, embed_dim=E, num_heads=3, head_dim=4, n_layers=5, pattern=("lsh", "local", "lsh"), window=7,
    lsh=LSHConfig.paper(n_buckets=(4, 6), local_window=3), ff_dim=20, ff_chunk=9, activation="gelu", glu=True, dropout=0.1,
    attention_dropout=0.2, ff_dropout=0.3, axial_shape=(6, 11), axial_dims=(10, 6), causal=False, tied=True, loss_chunk=3,
    reversible=False,
)  # fmt: skip


def build(config=CONFIG, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    model = ReformerLM(replace(config, **fields), dtype=dtype)
    # nothing at its initial value, and logits that differ
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def texts(B=3, length=L):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(1))


def loss_and_grads(model, *inputs):
    torch.manual_seed(2)
    loss = model(*inputs)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


# the config


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING, replace(CONFIG, positions="rotary")])
def test_models_config_survives_json(config):
    text = config.to_json()
    assert ReformerConfig.from_json(text) == config
    assert set(json.loads(text)) == set(asdict(config))
    assert ReformerConfig.from_json('{"vocab_size": 5, "max_length": 9}') == ReformerConfig(5, 9)
    with pytest.raises(TypeError, match="depth"):
        ReformerConfig.from_json('{"vocab_size": 5, "max_length": 9, "depth": 3}')


def test_models_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        CONFIG.n_layers = 4
    assert hash(CONFIG) == hash(replace(CONFIG))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size: got 0, wanted >= 1"),
        ({"n_layers": 2.0}, TypeError, "n_layers: got 2.0, wanted an int"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"head_dim": 0}, ValueError, "head_dim: got 0"),
        ({"embed_dim": 15}, ValueError, "embed_dim: got 15, wanted a multiple of num_heads = 2, or head_dim"),
        ({"pattern": "lsh"}, TypeError, "pattern: got 'lsh', wanted a tuple of names"),
        ({"pattern": 2}, TypeError, "pattern: got 2, wanted a tuple of names"),
        ({"pattern": ()}, ValueError, r"pattern: got \(\)"),
        ({"pattern": ("lsh", "full")}, ValueError, "pattern: got .*'full'"),
        ({"lsh": {"n_hashes": 2}}, TypeError, "lsh: got dict, wanted an LSHConfig"),
        ({"positions": "sinus"}, ValueError, "positions: got 'sinus', wanted one of 'axial', 'rotary'"),
        ({"positions": "rotary", "head_dim": 5}, ValueError, 'head_dim: got 5 with positions="rotary"'),
        ({"positions": "rotary", "axial_shape": (8, 8)}, ValueError, r'axial_shape: got \(8, 8\) with positions="rotary"'),
        ({"positions": "rotary", "axial_dims": (8, 8)}, ValueError, r'axial_dims: got \(8, 8\) with positions="rotary"'),
        ({"axial_shape": (7, 9)}, ValueError, r"axial_shape: got \(7, 9\), wanted a product >= max_length = 64"),
        ({"axial_shape": (64,)}, ValueError, r"axial_shape: got \(64,\), wanted a pair"),
        ({"axial_dims": (8, 9)}, ValueError, "axial_dims: .* wanted a sum of embed_dim = 16"),
        ({"axial_dims": (16, 0)}, ValueError, "axial_dims: got 0"),
        ({"embed_dim": 1, "num_heads": 1}, ValueError, "axial_dims: got 0"),
        ({"activation": "swiglu", "glu": False}, ValueError, "glu: got False"),
        ({"ff_chunk": 0}, ValueError, "ff_chunk: got 0"),
        ({"ff_dropout": 1.0}, ValueError, "ff_dropout: got 1.0"),
        ({"axial_shape": 64}, TypeError, "axial_shape: got 64, wanted a tuple of ints"),
        ({"axial_dims": 16}, TypeError, "axial_dims: got 16, wanted a tuple of ints"),
        ({"dropout": 1.5}, ValueError, "dropout: got 1.5"),
        ({"attention_dropout": -1}, ValueError, "attention_dropout: got -1"),
        ({"exact": True, "reversible": False}, ValueError, "exact: got True with reversible=False"),
        ({"causal": 1}, TypeError, "causal: got 1, wanted a bool"),
    ],
)
def test_models_config_says_what_is_wrong(fields, error, message):
    with pytest.raises(error, match=message):
        replace(CONFIG, **fields)


def test_models_has_the_layers_of_its_pattern():
    model = build(EVERYTHING)
    attentions = [block.f.attention for block in model.layers.blocks]
    assert [type(a) for a in attentions] == [
        LSHSelfAttention, LocalSelfAttention, LSHSelfAttention, LSHSelfAttention, LocalSelfAttention,
    ]  # fmt: skip
    assert all((a.num_heads, a.head_dim, a.dropout, a.causal, a.rotary) == (3, 4, 0.2, False, False) for a in attentions)
    assert attentions[0].config == EVERYTHING.lsh and attentions[1].window == 7
    feed_forward = model.layers.blocks[0].g.feed_forward
    assert (feed_forward.ff_dim, feed_forward.chunk, feed_forward.glu, feed_forward.dropout) == (20, 9, True, 0.3)
    assert model.head is None and build().head.weight.shape == (V, E)
    with pytest.raises(TypeError, match="config: got dict, wanted a ReformerConfig"):
        ReformerLM({})


def test_models_fixes_the_number_of_buckets():
    # the default of max_length = 64 at chunk length 8
    assert all(
        block.f.attention.config.n_buckets == 16
        for block in build(pattern=("lsh",)).layers.blocks
    )  # fmt: skip


# what it computes


def by_hand(model, tokens):
    """Two streams, each layer reading one and adding to the other."""
    x1 = x2 = model.embed(tokens) + model.positions(tokens.shape[1])
    for block in model.layers.blocks:
        x1 = x1 + block.f.attention(block.f.norm(x2))
        x2 = x2 + block.g.feed_forward(block.g.norm(x1))
    return model.norm(x1 + x2) @ (model.embed if model.head is None else model.head).weight.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reversible", [True, False])
def test_models_logits_are_those_of_two_streams(tied, reversible):
    model, tokens = build(tied=tied, reversible=reversible).eval(), texts()
    torch.testing.assert_close(model(tokens), by_hand(model, tokens), rtol=1e-12, atol=1e-12)
    assert ("head.weight" in model.state_dict()) is not tied


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout": 0.1, "attention_dropout": 0.2, "ff_dropout": 0.3},
        {"positions": "rotary", "tied": True, "activation": "swiglu", "ff_dropout": 0.2},
        {"causal": False, "pattern": ("lsh",), "attention_dropout": 0.1},
        {"lsh": LSHConfig.trax(n_hashes=2, chunk_length=8), "pattern": ("lsh", "lsh", "local"), "dropout": 0.2},
    ],
)
def test_models_gradients_are_those_without_reversibility(fields):
    text, padding = texts(), torch.arange(L - 1) >= torch.tensor([[L - 1], [20], [5]])
    inputs = (text[:, :-1], text[:, 1:], padding)
    got, expected = (loss_and_grads(build(reversible=reversible, **fields), *inputs) for reversible in (True, False))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert theirs.abs().max() > 1e-4


@pytest.mark.parametrize("pattern", [("local",), ("local", "lsh")])
def test_models_exact_mode(pattern):
    fields = {"pattern": pattern, "dtype": torch.float32, "dropout": 0.1, "attention_dropout": 0.2, "ff_dropout": 0.3}
    text, model = texts(), build(exact=True, n_layers=6, **fields)
    assert model.layers.exact and not build().layers.exact
    # NaN if what is recomputed differed by a bit
    got = loss_and_grads(model, text[:, :-1], text[:, 1:])
    assert all(x.isfinite().all() for x in got)
    if "lsh" not in pattern:  # where the rounding of the streams moves no row to another bucket
        expected = loss_and_grads(build(n_layers=6, **fields), text[:, :-1], text[:, 1:])
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_models_loss_is_the_cross_entropy_of_the_logits(tied):
    model, text = build(tied=tied).eval(), texts()
    tokens, targets = text[:, :-1], text[:, 1:].clone()
    targets[0, :9] = -100
    padding = torch.arange(L - 1) >= torch.tensor([[L - 1], [20], [5]])
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected, rtol=1e-12, atol=0)
    counted = targets.masked_fill(padding, -100).flatten()
    expected = F.cross_entropy(model(tokens, key_padding_mask=padding).flatten(0, 1), counted)
    torch.testing.assert_close(model(tokens, targets, padding), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", ["axial", "rotary"])
def test_models_a_row_alone_equals_the_row_in_a_padded_batch(causal, positions):
    model, tokens = build(causal=causal, positions=positions).eval(), texts()
    lengths = (L, 21, 1)
    padding = torch.arange(L) >= torch.tensor(lengths)[:, None]
    hidden = model.encode(tokens, padding)
    for row, length in enumerate(lengths):
        alone = model.encode(tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(hidden[row, :length], alone, rtol=1e-10, atol=1e-10)
    other = torch.where(padding, (tokens + 1) % V, tokens)
    torch.testing.assert_close(model.encode(other, padding)[~padding], hidden[~padding], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", ["axial", "rotary"])
@pytest.mark.parametrize("span", ["window", "bucket"])
def test_models_decoder_does_not_see_what_comes(positions, span):
    model = build(positions=positions, lsh=replace(LSH, span=span)).eval()
    tokens = texts()
    logits = model(tokens)
    for t in (1, 8, 30):
        changed = torch.cat([tokens[:, :t], (tokens[:, t:] + 1) % V], dim=1)
        torch.testing.assert_close(model(changed)[:, :t], logits[:, :t], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(tokens[:, :t]), logits[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(model(changed)[:, t:], logits[:, t:], atol=1e-3)


def test_models_encoder_sees_what_comes():
    model, tokens = build(causal=False).eval(), texts()
    changed = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % V], dim=1)
    assert not torch.allclose(model.encode(changed)[:, :20], model.encode(tokens)[:, :20], atol=1e-3)


def test_models_tells_positions_apart():
    for positions in ("axial", "rotary"):
        # in a window that sees everything, order is all that differs
        model = build(positions=positions, pattern=("local",), window=L, causal=False).eval()
        tokens = texts(1)
        a, b = model.encode(tokens)[0], model.encode(tokens.flip(1))[0].flip(0)
        assert not torch.allclose(a, b, atol=1e-3)
    assert build(positions="rotary").positions is None


def test_models_axial_positions():
    model = build(EVERYTHING)
    positions, (rows, columns) = model.positions, (model.positions.rows, model.positions.columns)
    assert rows.shape == (6, 10) and columns.shape == (11, 6)
    for length in (1, 11, 12, 60):
        got = positions(length)
        assert got.shape == (length, E)
        for p in range(length):
            assert torch.equal(got[p], torch.cat([rows[p // 11], columns[p % 11]]))
    # the default is about a square
    for length in (1, 2, 5, 64, 1000, 16384):
        (n_1, n_2), dims = ReformerConfig(V, length, embed_dim=9, num_heads=3).axial_factors()
        assert n_1 * n_2 >= length and n_1 * n_2 < length + n_2 and n_1 <= n_2 <= n_1 + 2 and dims == (4, 5)


def test_models_checks_its_input():
    model = build()
    with pytest.raises(ValueError, match=r"tokens: got shape \(1, 65\), wanted \[B, 1 <= L <= 64\]"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens: got shape \(5,\)"):
        model(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="tokens: got torch.float32"):
        model(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"target: got shape \(3, 36\), wanted \(3, 37\)"):
        model(texts(), texts()[:, 1:])
    with pytest.raises(TypeError, match="key_padding_mask: got torch.int64, wanted torch.bool"):
        model(texts(), key_padding_mask=texts())
    with pytest.raises(ValueError, match=r"key_padding_mask: got shape \(3, 36\), wanted \(3, 37\)"):
        model(texts(), key_padding_mask=texts()[:, 1:] > 3)


# training


def test_models_accumulate_gradients_of_micro_batches():
    # in eval mode all calls have the same rotations
    model, text = build().eval(), texts(8)
    expected = loss_and_grads(model, text[:, :-1], text[:, 1:])[1:]
    for rows in text.split(2):
        (model(rows[:, :-1], rows[:, 1:]) / 4).backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)


def test_models_under_autocast():
    model, text = build(dtype=torch.float32, dropout=0.1, ff_dropout=0.1), texts()
    exact = loss_and_grads(model, text[:, :-1], text[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        loss = model(text[:, :-1], text[:, 1:])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in grads)
    # rows near a border between buckets change sides
    torch.testing.assert_close(loss, exact[0], rtol=0.1, atol=0)
    cosines = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in zip(grads, exact[1:], strict=True)]
    assert min(cosines) > 0.5 and sum(cosines) / len(cosines) > 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_models_learn(tied):
    torch.manual_seed(0)
    model = ReformerLM(replace(CONFIG, tied=tied))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = (torch.arange(L) * 7 % V).expand(2, L)
    losses = []
    for _ in range(30):
        loss = model(text[:, :-1], text[:, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(V), abs=0.3) and losses[-1] < 0.5 * losses[0]


def training_peak(**fields):
    config = replace(CONFIG, max_length=512, embed_dim=32, ff_dim=None, ff_chunk=64, loss_chunk=32, **fields)
    model, text = build(config, torch.float32), texts(2, 513) % config.vocab_size

    def step():
        loss = model(text[:, :-1], text[:, 1:])
        return torch.autograd.grad(loss, list(model.parameters()))

    step()
    return peak_bytes(step) - 4 * sum(p.numel() for p in model.parameters())


def test_models_memory_does_not_grow_with_depth():
    assert training_peak(n_layers=8) <= 1.1 * training_peak(n_layers=2)
    assert training_peak(n_layers=8, reversible=False) > 2 * training_peak(n_layers=2, reversible=False)


def test_models_never_hold_all_logits():
    V = 4000
    few, many = (training_peak(n_layers=2, vocab_size=vocab_size) for vocab_size in (V // 2, V))
    # of one chunk, three times, and the gradient of the weights before it is added to
    assert many - few <= 4 * (V // 2) * (3 * 32 + 2 * 32) < 4 * (V // 2) * 2 * 512 / 6


def test_models_show_their_attention():
    model, tokens = build().eval(), texts()
    with torch.no_grad(), capture_attention(model) as layers:
        model(tokens)
    (inputs,) = layers.values()
    assert inputs.query.shape == (3, 2, L, E // 2) and inputs.key is None and inputs.is_causal


# generation


def test_models_generate_takes_the_most_likely_token():
    model, prompt = build(), texts(2, 5)
    text = model.generate(prompt, 12, temperature=0)
    assert text.shape == (2, 17) and torch.equal(text[:, :5], prompt)
    # teacher forcing gives the same answers: prefixes of any length agree
    assert torch.equal(model.eval()(text[:, :-1]).argmax(2)[:, 4:], text[:, 5:])
    assert torch.equal(model.generate(prompt, 12, top_k=1), text)
    assert torch.equal(model.generate(prompt, 12, temperature=1e-40), text)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_models_generate_draws_from_the_generator():
    model, prompt = build(), texts(2, 5)
    state = torch.get_rng_state()
    first = model.generate(prompt, 20, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(prompt, 20, generator=torch.Generator().manual_seed(3)), first)
    assert not torch.equal(model.generate(prompt, 20, generator=torch.Generator().manual_seed(4)), first)
    torch.manual_seed(3)
    assert torch.equal(model.generate(prompt, 20), first)


def test_models_generate_draws_by_temperature_among_the_top_k():
    model, n = build(), 500
    prompt = texts(1, 5)
    logits = model.eval()(prompt)[0, -1]
    drawn = model.generate(prompt.expand(n, -1), 1, temperature=2.0, top_k=3, generator=torch.Generator().manual_seed(5))[:, -1]
    best = logits.topk(3)
    wanted = torch.zeros(V, dtype=torch.float64).index_put((best.indices,), (best.values / 2).softmax(0))
    assert (drawn.bincount(minlength=V) / n - wanted).abs().max() < 4 * (0.25 / n) ** 0.5
    assert set(drawn.tolist()) <= set(best.indices.tolist())


def test_models_generate_leaves_the_modes_as_they_were():
    model = build().train()
    model.layers.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    model.generate(texts(1, 5), 2)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        model.generate(texts(1, 5) + V, 2)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_tokens": 60}, ValueError, "n_tokens: got 60 after 5 tokens, wanted at most 64 in all"),
        ({"n_tokens": -1}, ValueError, "n_tokens: got -1, wanted >= 0"),
        ({"n_tokens": 2.0}, TypeError, "n_tokens: got 2.0, wanted an int"),
        ({"temperature": -0.1}, ValueError, "temperature: got -0.1"),
        ({"top_k": 0}, ValueError, "top_k: got 0, wanted >= 1"),
    ],
)
def test_models_generate_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        build().generate(texts(1, 5), **{"n_tokens": 1, **options})


def test_models_generate_needs_a_decoder():
    with pytest.raises(ValueError, match="causal=False, wanted a decoder"):
        build(causal=False).generate(texts(1, 5), 1)


# files


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_models_save_and_load(tmp_path, tied, dtype):
    model, path = build(tied=tied, dtype=dtype).eval(), tmp_path / "model.pt"
    model.save(path)
    loaded = ReformerLM.load(path)
    assert loaded.training and loaded.config == model.config
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(loaded.eval()(texts()), model(texts()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    saved = torch.load(path, weights_only=True)
    assert ReformerConfig.from_json(saved["config"]) == model.config
    # as any module's
    other = ReformerLM(model.config, dtype=dtype)
    other.load_state_dict(saved["state_dict"])
    assert torch.equal(other.eval()(texts()), model(texts()))


def test_models_reversibility_does_not_change_the_weights():
    assert list(build().state_dict()) == list(build(reversible=False).state_dict())


# two processes

TWO_PROCESSES = """
import os
import sys
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_models import build, texts
rank = int(sys.argv[2])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[3] + "/store", rank=rank, world_size=2)
model = build().eval()
rows = texts(4)[2 * rank : 2 * rank + 2]
parallel = DistributedDataParallel(model)
parallel(rows[:, :-1], rows[:, 1:]).backward()
sharded = build(tied=True).eval()
for block in sharded.layers.blocks:
    fully_shard(block)
fully_shard(sharded)
sharded(rows[:, :-1], rows[:, 1:]).backward()
grads = [[p.grad for p in model.parameters()], [p.grad.full_tensor() for p in sharded.parameters()]]
torch.save(grads, sys.argv[3] + f"/{rank}.pt")
# neither may leave while the other still talks to it
distributed.barrier()
distributed.destroy_process_group()
# threads of gloo that outlive the interpreter now and then abort it (github.com/pytorch/pytorch/pull/179291)
os._exit(0)
"""


def test_models_under_ddp_and_fully_shard(tmp_path):
    command = [sys.executable, "-c", TWO_PROCESSES, os.path.dirname(__file__)]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in range(2)]
    try:
        for process in processes:
            _, error = process.communicate(timeout=240)
            assert process.returncode == 0, error.decode()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = texts(4)
    expected = [loss_and_grads(build(tied=tied).eval(), text[:, :-1], text[:, 1:])[1:] for tied in (False, True)]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-10, atol=1e-12)
