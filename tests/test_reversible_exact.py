"""Reversible sequences in exact mode: streams on the grid, recomputed to the bit."""

import copy

import pytest
import torch
from reversible_problems import E, Scaled, blocks, gradients, loss_of, ordinary, random_x, reversible
from torch import nn

from lsh_kernels import ReversibleBlock, ReversibleSequence


def test_reversible_exact_follows_a_hook_that_changes_a_stream_in_place():
    """Backward needs the grid alone; without it floats are gone, and that is noticed."""
    sequence, x = ReversibleSequence(blocks(3), exact=True).double().eval(), random_x()

    def doubled(module, args, out):
        return 2 * out[0], out[1]

    def doubled_in_place(module, args, out):
        out[0].mul_(2)

    with sequence.blocks[1].register_forward_hook(doubled):
        want_y, want = gradients(reversible, sequence, x)
    with sequence.blocks[1].register_forward_hook(doubled_in_place):
        y, got = gradients(reversible, sequence, x)
        assert torch.equal(y, want_y)
        assert all((a - b).abs().max() < 1e-10 * max(1, b.abs().max()) for a, b in zip(got, want, strict=True))
        with pytest.raises(RuntimeError, match="an output of a reversible block has been changed in place"):
            loss_of(ReversibleSequence(sequence.blocks)(x)).backward()


def inputs_of_layers(sequence):
    """What each layer has been given, by layer, call after call."""
    seen = {layer: [] for block in sequence.blocks for layer in (block.f, block.g)}
    for layer, calls in seen.items():
        layer.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0].detach().clone()))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("depth", [2, 12, 48])
def test_reversible_exact_recomputes_inputs_to_the_bit(depth, dtype):
    sequence, x = ReversibleSequence(blocks(depth, 0.1), exact=True).to(dtype), random_x(dtype=dtype)
    seen = inputs_of_layers(sequence)
    loss_of(sequence(x)).backward()
    assert all(len(calls) == 2 and torch.equal(*calls) for calls in seen.values())
    grads = [x.grad, *(p.grad for p in sequence.parameters())]
    # the attention of one long chain in float16 may overflow in backward; anything else has to be finite
    assert all(g.isfinite().all() for g in grads)


def test_reversible_exact_floats_drift_where_the_grid_does_not():
    sequence, x = ReversibleSequence(blocks(12)), random_x(dtype=torch.float32)
    seen = inputs_of_layers(sequence)
    loss_of(sequence(x)).backward()
    assert not all(torch.equal(*calls) for calls in seen.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reversible_exact_under_autocast(dtype):
    sequence, x = ReversibleSequence(blocks(3, 0.1), exact=True), random_x(dtype=torch.float32)
    seen = inputs_of_layers(sequence)
    with torch.autocast("cpu", dtype=dtype):
        y = sequence(x)
    loss_of(y).backward()
    assert y.dtype == torch.float32 and all(torch.equal(*calls) for calls in seen.values())
    assert all(p.grad.isfinite().all() for p in sequence.parameters())


def test_reversible_exact_inverse_gives_the_nearest_grid_point():
    sequence, x = ReversibleSequence(blocks(12), exact=True).eval(), 3 * random_x(dtype=torch.float32)
    nearest = (x.double() * 2**16).round().div(2**16).float()
    assert not torch.equal(nearest, x)
    assert torch.equal(sequence.inverse(sequence(x)), nearest)
    y = sequence(nearest)
    assert torch.equal(y, sequence(x)) and torch.equal(sequence(sequence.inverse(y)), y)


def test_reversible_exact_gradients_are_those_of_ordinary_code_on_the_grid():
    """In float64 the grid is finer than 1e-13; gradients pass the rounding as they are."""
    sequence, x = ReversibleSequence(blocks(4, 0.2), exact=True).double(), random_x()
    _, want = gradients(ordinary, copy.deepcopy(sequence), x)
    _, got = gradients(reversible, sequence, x)
    assert all((a - b).abs().max() <= 1e-9 * max(1.0, b.abs().max()) for a, b in zip(got, want, strict=True))


def test_reversible_exact_second_backward_and_tied_and_frozen_layers():
    shared, other = blocks(2, 0.2)
    shared.g.requires_grad_(False)
    sequence, x = ReversibleSequence([shared, other, shared], exact=True), random_x(dtype=torch.float32)
    y, parameters = sequence(x), [p for p in sequence.parameters() if p.requires_grad]
    first, second = (torch.autograd.grad(loss_of(y), (x, *parameters), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (alone,) = torch.autograd.grad(loss_of(y), x)
    assert torch.equal(alone, first[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 4e4, -4e4])
def test_reversible_exact_poisons_what_leaves_the_range(value):
    sequence, x = ReversibleSequence([ReversibleBlock(nn.Identity(), Scaled())], exact=True), random_x(dtype=torch.float32)
    with torch.no_grad():
        x[0, 3, 5] = value
    y = sequence(x, None, {"scale": torch.ones(E)})
    assert y[0, 3, 5].isnan() and y[1].isfinite().all()
    y.sum().backward()
    assert sequence.blocks[0].g.linear.weight.grad.isnan().all()


class Wavering(nn.Linear):
    """Returns something else when it is run again: a few grid steps in one element of each row."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + (torch.arange(E) == 3) * 5e-5 * (self.calls == 2)


def test_reversible_exact_poisons_gradients_if_a_layer_does_not_repeat_itself():
    for place in range(3):
        layers = [ReversibleBlock(nn.Linear(E, E), nn.Linear(E, E)) for _ in range(3)]
        layers[place].f = Wavering(E, E)
        x = random_x(dtype=torch.float32)
        ReversibleSequence(layers, exact=True)(x).sum().backward()
        assert x.grad.isnan().any()
        assert layers[place].f.weight.grad.isnan().any() and layers[place].g.weight.grad.isfinite().all()


def test_reversible_exact_poisons_gradients_of_layers_that_repeat_themselves_on_a_wrong_input():
    """Weights of zero return the same for any input, but their gradient does not; no NaN comes to them from other gradients."""

    class Apart(Wavering):
        def forward(self, x):
            return super().forward(x.detach())

    layers = [ReversibleBlock(nn.Linear(E, E), nn.Linear(E, E)), ReversibleBlock(Apart(E, E), nn.Linear(E, E))]
    for layer in (layers[0].f, layers[0].g):
        nn.init.zeros_(layer.weight)
    ReversibleSequence(layers, exact=True)(random_x(dtype=torch.float32)).sum().backward()
    assert all(layer.weight.grad.isnan().any() for layer in (layers[1].f, layers[0].g, layers[0].f))
    assert layers[1].g.weight.grad.isfinite().all()
