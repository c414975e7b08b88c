"""ChunkedFeedForward against the plain MLP: output, gradients, dropout, autocast, and the memory that it is for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lsh_kernels import ChunkedFeedForward

E, FF = 16, 24
KINDS = [("gelu", None), ("relu", False), ("gelu", True), ("relu", True), ("swiglu", None)]
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swiglu": F.silu}


def plain(layer, x):
    """The same MLP in one piece, by ordinary autograd."""
    h = layer.in_proj(x)
    act = ACTIVATIONS[layer.activation]
    if layer.glu:
        gate, up = h.chunk(2, dim=-1)
        return layer.out_proj(act(gate) * up)
    return layer.out_proj(act(h))


def out_and_grads(function, layer, x, dout, autocast=False):
    """Output and the gradients of x and of each parameter."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(x)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], dout.to(out.dtype))]


def assert_within_budget(got, reference, truth, dtype):
    """The error budget: err(ours) <= 2 err(plain MLP in that dtype) + 2 eps max|truth|."""
    for ours, theirs, true in zip(got, reference, truth, strict=True):
        error, allowed = (ours.double() - true).abs().max(), (theirs.double() - true).abs().max()
        assert error <= 2 * allowed + 2 * torch.finfo(dtype).eps * true.abs().max()


def peak_bytes(function):
    """Most bytes that a call holds at once, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


@pytest.mark.parametrize("chunk", [1, 7, 33, 1000])
@pytest.mark.parametrize(("activation", "glu"), KINDS)
def test_feedforward_is_the_plain_mlp_in_float64(activation, glu, chunk):
    layer = ChunkedFeedForward(E, FF, chunk, activation, glu, bias=chunk != 7).double()
    x, dout = torch.randn(2, 3, 11, E, dtype=torch.float64)
    got = out_and_grads(layer, layer, x, dout)
    expected = out_and_grads(lambda x: plain(layer, x), layer, x, dout)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("activation", "glu"), KINDS)
def test_feedforward_keeps_the_error_budget(activation, glu, autocast):
    layer = ChunkedFeedForward(E, FF, 5, activation, glu)
    x, dout = torch.randn(2, 3, 37, E)
    got = out_and_grads(layer, layer, x, dout, autocast)
    reference = out_and_grads(lambda x: plain(layer, x), layer, x, dout, autocast)
    assert [t.dtype for t in got] == [t.dtype for t in reference]
    layer.double()
    truth = out_and_grads(lambda x: plain(layer, x), layer, x.double(), dout.double())
    assert_within_budget(got, reference, truth, torch.bfloat16 if autocast else torch.float32)


def test_feedforward_sums_weight_gradients_in_float32():
    # one token at a time: a sum of 3,000 terms of one sign stops growing in bfloat16
    layer = ChunkedFeedForward(E, FF, 1, "relu").bfloat16()
    x, dout = torch.rand(2, 3000, E).bfloat16()
    got = out_and_grads(layer, layer, x, dout)
    reference = out_and_grads(lambda x: plain(layer, x), layer, x, dout)
    truth = out_and_grads(lambda x: plain(layer.double(), x), layer.double(), x.double(), dout.double())
    assert_within_budget(got, reference, truth, torch.bfloat16)


def test_feedforward_leaves_float64_alone_under_autocast():
    layer, x = ChunkedFeedForward(E, FF, 5).double(), torch.randn(9, E, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), plain(layer, x))


def test_feedforward_takes_any_strides():
    layer = ChunkedFeedForward(E, FF, 4)
    x = torch.randn(3, 7, 2 * E).chunk(2, dim=-1)[1]  # a residual stream of a reversible block
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
    assert layer(x[:0]).shape == (0, 7, E) and layer(x[0, 0]).shape == (E,)


# dropout


@pytest.mark.parametrize(("activation", "glu"), KINDS)
def test_feedforward_dropout_gradients_are_those_of_one_draw(activation, glu):
    layer = ChunkedFeedForward(3, 8, 4, activation, glu, dropout=0.4).double()
    names = dict(layer.named_parameters())

    def seeded(x, *weights):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(names, weights)), (x,))

    # away from the kink of relu
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, (x, *names.values()))


def test_feedforward_dropout_rate_and_scale():
    layer = ChunkedFeedForward(E, 4000, 64, "relu", dropout=0.3, bias=False)
    with torch.no_grad():
        # every hidden activation is 1, and the output is their mean
        layer.in_proj.weight.fill_(1 / E)
        layer.out_proj.weight.fill_(1 / 4000)
    out = layer(torch.ones(100, E)).detach()
    assert 0 < out.std() < 0.02 and out.mean() == pytest.approx(1, abs=0.01)
    assert len(out[:, 0].unique()) > 50  # another draw for each token, and in each chunk
    torch.testing.assert_close(layer.eval()(torch.ones(100, E)), torch.ones(100, E))


def test_feedforward_dropout_and_the_users_generator():
    layer, x = ChunkedFeedForward(E, FF, 4, dropout=0.5), torch.randn(10, E, requires_grad=True)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    first.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    # nothing is drawn where nothing is dropped
    state = torch.get_rng_state()
    layer.eval()(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_feedforward_dropout_under_checkpoint():
    layer, x = ChunkedFeedForward(E, FF, 4, dropout=0.5), torch.randn(10, E)
    torch.manual_seed(1)
    expected = out_and_grads(layer, layer, x, torch.ones(10, E))
    torch.manual_seed(1)
    checkpointed = lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)  # noqa: E731
    for ours, theirs in zip(out_and_grads(checkpointed, layer, x, torch.ones(10, E)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# autograd


def test_feedforward_computes_only_the_gradients_asked_for():
    layer, x = ChunkedFeedForward(E, FF, 4, "swiglu"), torch.randn(10, E)
    full = out_and_grads(layer, layer, x, torch.ones(10, E))[1:]
    parameters = list(layer.parameters())
    for trained in ([], [0], [1], [2], [3], [0, 3]):
        for needs_x in (False, True):
            for i, parameter in enumerate(parameters):
                parameter.requires_grad_(i in trained)
                parameter.grad = None
            x = x.detach().requires_grad_(needs_x)
            out = layer(x)
            assert out.requires_grad == bool(trained or needs_x)
            if out.requires_grad:
                out.sum().backward()
            for i, (tensor, grad) in enumerate(zip([x, *parameters], full, strict=True)):
                wanted = needs_x if i == 0 else i - 1 in trained
                assert (tensor.grad is not None) == wanted
                if wanted:
                    torch.testing.assert_close(tensor.grad, grad)


def test_feedforward_gradients_come_by_ordinary_edges():
    layer, x = ChunkedFeedForward(E, FF, 4), torch.randn(10, E)
    seen = []
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    (layer(x[:5]).sum() + layer(x[5:]).sum()).backward()  # one layer, used twice
    assert sorted(seen) == ["in_proj.bias", "in_proj.weight", "out_proj.bias", "out_proj.weight"]
    twice = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).sum().backward()
    for a, b in zip(layer.parameters(), twice):
        torch.testing.assert_close(a.grad, b)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_feedforward_compiles_whole():
    layer, x = ChunkedFeedForward(E, FF, 4, "swiglu"), torch.randn(2, 9, E)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = out_and_grads(layer, layer, x, torch.ones_like(x))
    for ours, theirs in zip(out_and_grads(compiled, layer, x, torch.ones_like(x)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# memory


@pytest.mark.parametrize(("activation", "glu"), [("gelu", None), ("swiglu", None)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_feedforward_memory_is_that_of_a_chunk(activation, glu, dropout):
    T, chunk, width = 4096, 128, 256
    layer = ChunkedFeedForward(64, width, chunk, activation, glu, dropout)
    x = torch.randn(T, 64, requires_grad=True)

    def step(forward):
        def run():
            out = forward(x)
            return out, torch.autograd.grad(out, [x, *layer.parameters()], torch.ones_like(out))

        return run

    # output, its gradient, the input's, those of the weights
    given = 4 * (3 * T * 64 + sum(p.numel() for p in layer.parameters()))
    one = 4 * chunk * width
    for run in (step(layer), step(lambda x: plain(layer, x))):
        run()
    ours, theirs = peak_bytes(step(layer)) - given, peak_bytes(step(lambda x: plain(layer, x))) - given
    assert ours <= (9 if layer.glu else 5) * one
    assert ours <= theirs / 8


def test_feedforward_keeps_the_input_and_the_weights_alone():
    layer, x = ChunkedFeedForward(E, FF, 4, dropout=0.1), torch.randn(50, E, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == sorted(t.data_ptr() for t in (x, *layer.parameters()))


# arguments


def test_feedforward_names_its_parameters():
    shapes = {name: tuple(p.shape) for name, p in ChunkedFeedForward(E, FF, 4, "swiglu").named_parameters()}
    assert shapes == {
        "in_proj.weight": (2 * FF, E), "in_proj.bias": (2 * FF,), "out_proj.weight": (E, FF), "out_proj.bias": (E,),
    }  # fmt: skip
    assert [type(m) for m in ChunkedFeedForward(E, FF, 4).children()] == [nn.Linear, nn.Linear]
    assert ChunkedFeedForward(E, FF, 4).in_proj.weight.shape == (FF, E)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim: got 0"),
        ({"ff_dim": 1.5}, TypeError, "ff_dim: got 1.5, wanted an int"),
        ({"chunk": 0}, ValueError, "chunk: got 0, wanted >= 1"),
        ({"activation": "silu"}, ValueError, "activation: got 'silu', wanted one of 'gelu', 'relu', 'swiglu'"),
        ({"activation": "swiglu", "glu": False}, ValueError, 'glu: got False with activation="swiglu"'),
        ({"glu": 1}, TypeError, "glu: got 1, wanted a bool or None"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
    ],
)
def test_feedforward_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        ChunkedFeedForward(**{"embed_dim": E, "ff_dim": FF, **options})


def test_feedforward_checks_its_input():
    layer = ChunkedFeedForward(E, FF)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 17\), wanted \[.., 16\]"):
        layer(torch.randn(2, 17))
    with pytest.raises(TypeError, match="x: got torch.float16, wanted torch.float32"):
        layer(torch.randn(2, E).half())
