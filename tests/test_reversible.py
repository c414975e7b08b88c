"""Reversible blocks against the same blocks as ordinary code."""

import copy
import gc
import weakref

import pytest
import torch
from reversible_problems import (
    CONFIG,
    Attention,
    E,
    L,
    Scaled,
    blocks,
    feed_forward,
    gradients,
    loss_of,
    ordinary,
    random_x,
    reversible,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsh_kernels import ChunkedFeedForward, LSHConfig, ReversibleBlock, ReversibleSequence, lsh_attention


def assert_same_gradients(sequence, x, *kwargs, tolerance=1e-10):
    want_y, want = gradients(ordinary, copy.deepcopy(sequence), x, *kwargs)
    y, got = gradients(reversible, sequence, x, *kwargs)
    assert (y - want_y).abs().max() < 1e-12
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max())


@pytest.mark.parametrize("depth", [1, 2, 12])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_reversible_gradients_are_those_of_ordinary_code(depth, dropout):
    assert_same_gradients(ReversibleSequence(blocks(depth, dropout)).double(), random_x())


def test_reversible_block_alone():
    block = blocks(1, 0.2)[0].double()
    block.blocks = [block]
    x = random_x()
    assert_same_gradients(block, x)
    pair = block.eval()(x.chunk(2, -1))
    assert isinstance(pair, tuple) and torch.equal(torch.cat(pair, -1), block(x))


def test_reversible_inverse_undoes_forward():
    sequence = ReversibleSequence(blocks(3)).double().eval()
    x = random_x()
    assert (sequence.inverse(sequence(x)) - x).abs().max() < 1e-12
    assert (sequence.blocks[0].inverse(sequence.blocks[0](x)) - x).abs().max() < 1e-12


def test_reversible_passes_keyword_arguments():
    sequence = ReversibleSequence([ReversibleBlock(Attention(), Scaled()) for _ in range(2)]).double()
    mask = torch.arange(L).expand(2, L) >= 30
    scale = torch.rand(E, dtype=torch.float64, requires_grad=True)
    x = random_x()
    assert_same_gradients(sequence, x, {"key_padding_mask": mask}, {"scale": scale})
    (got,), (want,) = (
        torch.autograd.grad(loss_of(run(sequence.eval(), x, {"key_padding_mask": mask}, {"scale": scale})), scale)
        for run in (reversible, ordinary)
    )
    assert (got - want).abs().max() < 1e-10


def test_reversible_leaves_the_random_state_where_ordinary_code_does():
    sequence, x = ReversibleSequence(blocks(2, 0.3)), random_x(dtype=torch.float32)
    states = []
    for run in (ordinary, reversible):
        torch.manual_seed(3)
        loss = loss_of(run(sequence, x))
        states.append(torch.get_rng_state())
        # other draws may lie between
        torch.rand(5)
        between = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), between)
    assert torch.equal(*states)


class OwnGenerator(nn.Module):
    """Attention that draws rotations and dropout from a generator of its own."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        qk = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return lsh_attention(qk, None, qk, config=CONFIG, dropout_p=0.3, generator=self.generator).transpose(1, 2).flatten(2)


def test_reversible_keeps_what_attention_draws_from_an_own_generator():
    generator, x = torch.Generator(), random_x()
    sequence = ReversibleSequence([ReversibleBlock(OwnGenerator(generator), feed_forward()) for _ in range(2)]).double()
    grads, states = [], []
    for run in (ordinary, reversible):
        generator.manual_seed(5)
        y = run(sequence, x)
        states.append(generator.get_state())
        grads.append(torch.autograd.grad(loss_of(y), x)[0])
        assert torch.equal(generator.get_state(), states[-1])
    assert torch.equal(*states) and (grads[0] - grads[1]).abs().max() < 1e-10


def test_reversible_keeps_bucket_ids(monkeypatch):
    """Were they hashed again, inputs that are off by a rounding could fall into other buckets."""
    from lsh_kernels import torch_backend

    sequence, x = ReversibleSequence(blocks(3, 0.1)), random_x(dtype=torch.float32)
    calls = []
    hash_rows = torch_backend.lsh_hash
    monkeypatch.setattr(torch_backend, "lsh_hash", lambda *args: calls.append(1) or hash_rows(*args))
    loss = loss_of(sequence(x))
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 3


def test_reversible_keeps_bucket_ids_that_take_two_bytes():
    sequence = ReversibleSequence(blocks(2)).double()
    for block in sequence.blocks:
        block.f.attention.config = LSHConfig(chunk_length=8, n_hashes=2, n_buckets=(20, 20))
    assert_same_gradients(sequence, random_x())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reversible_under_autocast(dtype):
    sequence, x = ReversibleSequence(blocks(3, 0.1)), random_x(dtype=torch.float32)
    grads = []
    for run in (ordinary, reversible):
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=dtype):
            y = run(sequence, x)
        assert y.dtype == torch.float32
        # outside of it, as is usual
        grads.append(torch.autograd.grad(loss_of(y), (x, *sequence.parameters())))
    for got, want in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        # half a unit of the 16-bit format at places, from inputs that differ by a rounding of float32
        assert (got - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()


def test_reversible_with_a_gradient_scaler():
    sequence, x = ReversibleSequence(blocks(2)), random_x(dtype=torch.float32)
    weights = []
    for run in (ordinary, reversible):
        model = copy.deepcopy(sequence)
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(2):
            torch.manual_seed(seed)
            scaler.scale(loss_of(run(model, x))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-4 * weights[0].abs().max()


def test_reversible_accumulates_gradients():
    sequence, x = ReversibleSequence(blocks(2)).double().eval(), random_x(batch=4)
    loss_of(sequence(x)).backward()
    want = [p.grad.clone() for p in sequence.parameters()]
    sequence.zero_grad()
    # the mean over the batch of one, the sum of the other
    y = [sequence(part) for part in x.split(1)]
    for part in y:
        (part.square().sum() / x.numel() + (part * part.roll(1, -1)).sum()).backward()
    for p, expected in zip(sequence.parameters(), want, strict=True):
        assert (p.grad - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max())


def test_reversible_calls_hooks():
    sequence, x = ReversibleSequence(blocks(2)).double(), random_x()
    weight, seen = sequence.blocks[1].g[1].weight, []
    weight.register_hook(lambda grad: seen.append(("gradient", grad.clone())))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", p.grad.clone())))
    sequence.blocks[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append(("module", outputs[0])))
    loss_of(sequence(x)).backward()
    assert [name for name, _ in seen] == ["gradient", "accumulated", "module"]
    assert torch.equal(seen[0][1], weight.grad) and torch.equal(seen[1][1], weight.grad)


def test_reversible_follows_a_hook_that_changes_what_goes_between_blocks():
    sequence, x = ReversibleSequence(blocks(3)).double().eval(), random_x()
    sequence.blocks[1].register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))

    def doubled(sequence, x):
        for i, block in enumerate(sequence.blocks):
            x1, x2 = x.chunk(2, -1)
            x1 = x1 + block.f(x2)
            x2 = x2 + block.g(x1)
            x = torch.cat((2 * x1 if i == 1 else x1, x2), -1)
        return x

    (want_y, want), (y, got) = gradients(doubled, sequence, x), gradients(reversible, sequence, x)
    assert torch.equal(y, want_y)
    assert all((a - b).abs().max() < 1e-10 * max(1, b.abs().max()) for a, b in zip(got, want, strict=True))


def test_reversible_tied_block():
    shared, other = blocks(2, 0.2)
    assert_same_gradients(ReversibleSequence([shared, other, shared]).double(), random_x())


@pytest.mark.parametrize("frozen", ["f", "g", "first block", "all"])
def test_reversible_with_frozen_parameters(frozen):
    sequence = ReversibleSequence(blocks(3, 0.1)).double()
    parts = {
        "f": [block.f for block in sequence.blocks],
        "g": [block.g for block in sequence.blocks],
        "first block": sequence.blocks[:1],
        "all": [sequence],
    }
    for part in parts[frozen]:
        part.requires_grad_(False)
    assert_same_gradients(sequence, random_x())
    if frozen == "all":
        assert not sequence(random_x(requires_grad=False)).requires_grad
    else:
        assert_same_gradients(sequence, random_x(requires_grad=False))


def test_reversible_saves_the_same_of_an_input_without_gradient():
    """A linear layer saves its weight only if its input wants a gradient."""
    sequence = ReversibleSequence([ReversibleBlock(nn.Linear(E, E), nn.Linear(E, E)) for _ in range(2)]).double()
    assert_same_gradients(sequence, random_x(requires_grad=False))


@pytest.mark.parametrize("which", ["first", "last"])
def test_reversible_gradient_of_a_few_parameters(which):
    """Steps that autograd does not come by are undone on the way."""
    sequence, x = ReversibleSequence(blocks(4, 0.1)).double(), random_x()
    weight = sequence.blocks[0 if which == "first" else 3].g[1].weight
    torch.manual_seed(1)
    want = torch.autograd.grad(loss_of(ordinary(sequence, x)), weight)[0]
    torch.manual_seed(1)
    got = torch.autograd.grad(loss_of(sequence(x)), weight)[0]
    assert (got - want).abs().max() < 1e-10


class Constant(nn.Module):
    """Adds what does not depend on its input, so that autograd saves nothing of it."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.randn(E))

    def forward(self, x):
        return self.value.expand_as(x)


def test_reversible_steps_that_save_nothing_are_undone_too():
    sequence = [ReversibleBlock(feed_forward(), Constant()), ReversibleBlock(Constant(), nn.Identity()), *blocks(1)]
    assert_same_gradients(ReversibleSequence(sequence[::-1]).double(), random_x())
    assert_same_gradients(ReversibleSequence(sequence).double(), random_x())


def test_reversible_second_backward_through_a_retained_graph():
    sequence, x = ReversibleSequence(blocks(3, 0.2)).double(), random_x()
    y, got = reversible(sequence, x), []
    for _ in range(3):
        got.append(torch.autograd.grad(loss_of(y), (x, *sequence.parameters()), retain_graph=True))
    for again in got[1:]:
        assert all((a - b).abs().max() < 1e-10 * max(1, b.abs().max()) for a, b in zip(again, got[0], strict=True))


def test_reversible_refuses_second_derivatives():
    sequence, x = ReversibleSequence([ReversibleBlock(feed_forward(), feed_forward())]), random_x(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        torch.autograd.grad(loss_of(sequence(x)), x, create_graph=True)


def test_reversible_no_grad_mode():
    sequence, x = ReversibleSequence(blocks(2)).double().eval(), random_x()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = sequence(x)
        assert not y.requires_grad and torch.equal(y, ordinary(sequence, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("exact", [False, True])
def test_reversible_recomputes_in_the_mode_of_forward(exact, training):
    """Ordinary code may be switched to eval or training mode between forward and backward; dropout of each kind."""
    layers = [ReversibleBlock(Attention(0.2), ChunkedFeedForward(E, 2 * E, chunk=8, dropout=0.3)) for _ in range(2)]
    sequence, x = ReversibleSequence(layers, exact).double(), random_x()
    grads = []
    for switch in (False, True):
        sequence.train(training)
        torch.manual_seed(1)
        loss = loss_of(sequence(x))
        if switch:
            sequence.train(not training)
        grads.append(torch.autograd.grad(loss, (x, *sequence.parameters())))
        assert all(module.training == (training != switch) for module in sequence.modules())
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_reversible_batch_norm_counts_a_batch_once():
    def layer():
        return nn.Sequential(Channels(E), nn.Linear(E, E), nn.Tanh())

    sequence, x = ReversibleSequence([ReversibleBlock(layer(), layer()) for _ in range(2)]).double(), random_x()
    other = copy.deepcopy(sequence)
    _, want = gradients(ordinary, other, x)
    _, got = gradients(reversible, sequence, x)
    assert all((a - b).abs().max() < 1e-10 * max(1, b.abs().max()) for a, b in zip(got, want, strict=True))
    for (name, a), b in zip(sequence.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert sequence.blocks[0].f[0].num_batches_tracked == 1


class Channels(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Counting(nn.Module):
    """Its output depends on a buffer that every call changes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(E, E)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return torch.tanh(self.linear(x)) * self.calls


def test_reversible_recomputes_with_buffers_as_forward_found_them():
    block = ReversibleBlock(Counting(), Counting())
    sequence, x = ReversibleSequence([block, *blocks(1), block]).double(), random_x()
    assert_same_gradients(sequence, x)
    assert block.f.calls == 2 and block.g.calls == 2


class Failing(nn.Module):
    fail = False

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(E, E), nn.Dropout(0.3))

    def forward(self, x):
        x = self.inner(x)
        if self.fail:
            raise KeyError("from inside")
        return x


def test_reversible_error_leaves_no_half_state():
    failing = Failing()
    sequence, x = ReversibleSequence([*blocks(1), ReversibleBlock(Attention(0.1), failing), *blocks(1)]).double(), random_x()
    torch.manual_seed(1)
    loss = loss_of(sequence(x))
    failing.fail = True
    with pytest.raises(KeyError, match="from inside"):
        sequence(x)
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="from inside"):
        torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.get_rng_state(), state)
    failing.fail = False
    # both the pass that was under way and a new one come out as if nothing had happened
    got = torch.autograd.grad(loss, x)[0]
    want = gradients(ordinary, sequence, x)[1][0]
    assert (got - want).abs().max() < 1e-10
    assert_same_gradients(sequence, x)


def test_reversible_refuses_what_it_cannot_undo():
    x = random_x(dtype=torch.float32)
    with pytest.raises(TypeError, match="f: got function, wanted an nn.Module"):
        ReversibleBlock(lambda x: x, nn.Identity())
    with pytest.raises(TypeError, match=r"blocks\[0\]: got Identity, wanted a ReversibleBlock"):
        ReversibleSequence([nn.Identity()])
    with pytest.raises(ValueError, match=r"x: got shape .*wanted \[.., 2E\]"):
        ReversibleSequence(blocks(1))(x[..., :-1])
    with pytest.raises(ValueError, match="g: got shape .* from it, wanted"):
        ReversibleSequence([ReversibleBlock(nn.Identity(), nn.Linear(E, 1))])(x)
    with pytest.raises(TypeError, match="f: got tuple from it"):
        kwargs = dict.fromkeys(("key", "value"), x[..., :E])
        ReversibleSequence([ReversibleBlock(nn.MultiheadAttention(E, 2), nn.Identity())])(x, kwargs)
    with pytest.raises(ValueError, match="f: Sequential changed its input in place"):
        ReversibleSequence([ReversibleBlock(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(E, E)), nn.Identity())])(x.detach())


def test_reversible_notices_what_has_changed_since_forward():
    x, layers = random_x(dtype=torch.float32), [ReversibleBlock(feed_forward(), feed_forward()) for _ in range(2)]
    sequence = ReversibleSequence(layers)
    loss = loss_of(sequence(x))
    with torch.no_grad():
        layers[0].f[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="a parameter or argument of Sequential has been changed since forward"):
        loss.backward()
    pair = layers[0](x.chunk(2, -1))
    with torch.no_grad():
        pair[0].add_(1)
    with pytest.raises(RuntimeError, match="an output of a reversible block has been changed in place"):
        pair[1].sum().backward()
    weights = {name: 2 * p.detach().requires_grad_() for name, p in sequence.named_parameters()}
    loss = loss_of(torch.func.functional_call(sequence, weights, (x,)))
    with pytest.raises(RuntimeError, match="a parameter or argument of Sequential has been changed since forward"):
        loss.backward()
    fickle = Fickle()
    loss = loss_of(ReversibleSequence([ReversibleBlock(fickle, nn.Identity())])(x))
    fickle.layers = 2
    with pytest.raises(RuntimeError, match="Fickle saved other tensors when it was recomputed than in forward"):
        loss.backward()


class Fickle(nn.Module):
    layers = 1

    def forward(self, x):
        for _ in range(self.layers):
            x = torch.tanh(x)
        return x


def test_reversible_notices_a_saved_tensor_changed_in_place():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.sigmoid().mul_(2)

    x = random_x(dtype=torch.float32)
    for run in (ordinary, reversible):
        with pytest.raises(RuntimeError, match="in ?place"):
            loss_of(run(ReversibleSequence([ReversibleBlock(InPlace(), nn.Identity())]), x)).backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_reversible_under_torch_compile(backend):
    """A block on its own is traced whole; in a sequence f and g are; a sequence stays as it is. Compiling is right."""
    torch.compiler.reset()
    sequence, x = ReversibleSequence(blocks(2)).double().eval(), random_x()
    want = gradients(ordinary, sequence, x)[1]
    first = ReversibleSequence(sequence.blocks[:1])
    want_first = gradients(ordinary, first, x)[1]
    block = torch.compile(sequence.blocks[0], backend=backend, fullgraph=True)
    cases = {
        "block": (block, gradients(reversible, block, x)[1], want_first),
        "sequence": (sequence, gradients(torch.compile(reversible, backend=backend), sequence, x)[1], want),
    }
    compiled = ReversibleSequence([torch.compile(b, backend=backend) for b in sequence.blocks])
    cases["blocks"] = (compiled, gradients(reversible, compiled, x)[1], want)
    for b in sequence.blocks:
        b.f.compile(backend=backend)
        b.g.compile(backend=backend)
    cases["f and g"] = (sequence, gradients(reversible, sequence, x)[1], want)
    for name, (_, got, expected) in cases.items():
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max()), name


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that operators make: held now, and at most."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, key, n_bytes):
        self.seen.discard(key)
        self.now -= n_bytes


@pytest.mark.parametrize("exact", [False, True])
def test_reversible_memory_does_not_grow_with_depth(exact):
    """After forward 5 kB of random state per layer with dropout are all that a layer adds."""

    def bytes_at(depth, run):
        sequence = ReversibleSequence([ReversibleBlock(feed_forward(0.1), feed_forward(0.1)) for _ in range(depth)], exact)
        x = random_x(batch=128, dtype=torch.float32)
        for p in sequence.parameters():
            p.grad = torch.zeros_like(p)
        with Held() as held:
            y = run(sequence, x)
            after_forward = held.now
            y.sum().backward()
        return after_forward, held.most

    shallow, deep = bytes_at(2, reversible), bytes_at(12, reversible)
    assert deep[0] - shallow[0] <= 20 * 5100
    assert deep[1] <= 1.05 * shallow[1]
    assert bytes_at(12, ordinary)[1] > 5 * deep[1]


def test_reversible_recomputes_from_the_same_strides():
    """Operators may choose their way by those of dimensions of size 1, too, where contiguous tensors differ."""
    for exact in (False, True):
        layers = [layer for block in blocks(2) for layer in (block.f, block.g)]
        sequence, seen = ReversibleSequence(map(ReversibleBlock, layers[::2], layers[1::2]), exact), [[] for _ in layers]
        for layer, strides in zip(layers, seen):
            layer.register_forward_pre_hook(lambda _, args, strides=strides: strides.append(args[0].stride()))
        loss_of(sequence(torch.randn(L, 1, 2 * E).transpose(0, 1).requires_grad_())).backward()
        assert all(len(strides) == 2 and strides[0] == strides[1] for strides in seen)


def test_reversible_frees_everything_without_the_garbage_collector():
    sequence = ReversibleSequence(blocks(2, 0.1))
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False):
            mask = torch.zeros(2, L, dtype=torch.bool)
            y = sequence(random_x(dtype=torch.float32), {"key_padding_mask": mask})
            kept = weakref.ref(mask)
            del mask
            assert kept() is not None
            if backward:
                y.sum().backward()
                assert kept() is None
            del y
            assert kept() is None
    finally:
        gc.enable()
