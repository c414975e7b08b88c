"""chunked_cross_entropy against F.cross_entropy of all logits: loss, gradients, ignored targets, memory."""

import pytest
import torch
from test_feedforward import assert_within_budget, peak_bytes
from torch.nn import functional as F

from lsh_kernels import chunked_cross_entropy

E, V = 8, 30


def plain(hidden, weight, target, bias=None, **options):
    logits = F.linear(hidden, weight, bias)
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)
    return losses.view(target.shape) if losses.dim() else losses


def inputs(shape=(3, 11), dtype=torch.float32, ignored=-100):
    hidden, weight, bias = torch.randn(*shape, E), torch.randn(V, E), torch.randn(V)
    target = torch.randint(V, shape)
    target[..., ::4] = ignored
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], target


def loss_and_grads(function, tensors, target, autocast=False, **options):
    hidden, weight, bias = tensors
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(hidden, weight, target, bias=bias, **options)
    torch.manual_seed(5)
    return [loss, *torch.autograd.grad(loss, tensors, torch.rand(loss.shape).to(loss.dtype) + 0.5)]


@pytest.mark.parametrize("chunk", [1, 7, 33, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_cross_entropy_is_torchs_in_float64(reduction, chunk, ignore_index):
    tensors, target = inputs(dtype=torch.float64, ignored=ignore_index)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    got = loss_and_grads(chunked_cross_entropy, tensors, target, chunk=chunk, **options)
    expected = loss_and_grads(plain, tensors, target, **options)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_keeps_the_error_budget(dtype, autocast):
    tensors, target = inputs((5, 40), dtype)
    got = loss_and_grads(chunked_cross_entropy, tensors, target, autocast, chunk=7)
    reference = loss_and_grads(plain, tensors, target, autocast)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    truth = loss_and_grads(plain, doubles, target)
    assert_within_budget(got, reference, truth, torch.bfloat16 if autocast else dtype)
    assert got[0].dtype == torch.float32 and [g.dtype for g in got[1:]] == [dtype] * 3


def test_cross_entropy_has_its_softmax_in_float32_under_autocast():
    (hidden, weight, bias), target = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            chunked_cross_entropy(hidden, weight, target, bias=bias), plain(hidden, weight, target, bias), rtol=1e-6, atol=0
        )


def test_cross_entropy_sums_weight_gradients_in_float32():
    hidden, weight = torch.rand(3000, E).bfloat16(), torch.zeros(V, E).bfloat16().requires_grad_()
    target = torch.zeros(3000, dtype=torch.int64)
    (got,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, target, chunk=1, reduction="sum"), weight)
    truth = torch.full((V, 1), 1 / V, dtype=torch.float64)
    truth[0] -= 1
    truth = truth * hidden.double().sum(0)
    torch.testing.assert_close(got.double(), truth, rtol=2**-7, atol=0)


def test_cross_entropy_of_nothing():
    (hidden, weight, _), target = inputs()
    nothing = torch.full_like(target, -100)
    assert chunked_cross_entropy(hidden, weight, nothing).isnan()
    loss = chunked_cross_entropy(hidden, weight, nothing, reduction="sum")
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert loss == 0 and all((grad == 0).all() for grad in grads)
    assert chunked_cross_entropy(hidden[:0], weight, target[:0], reduction="none").shape == (0, 11)


def test_cross_entropy_survives_large_logits():
    hidden, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.0]])
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0, 1]), reduction="none")
    assert loss.tolist() == [0, 2e4]
    loss.sum().backward()
    assert hidden.grad.tolist() == [[0], [2]]


def test_cross_entropy_with_a_tied_weight():
    embed = torch.randn(V, E, dtype=torch.float64, requires_grad=True)
    tokens, target = torch.randint(V, (2, 3, 11))
    grads = []
    for function in (chunked_cross_entropy, plain):
        loss = function(F.embedding(tokens, embed).tanh(), embed, target)
        grads += torch.autograd.grad(loss, embed)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_cross_entropy_computes_only_the_gradients_asked_for():
    tensors, target = inputs()
    full = loss_and_grads(chunked_cross_entropy, tensors, target)[1:]
    for wanted in ([0], [1], [2], [0, 2]):
        for i, x in enumerate(tensors):
            x.requires_grad_(i in wanted)
        chosen = [tensors[i] for i in wanted]
        loss = chunked_cross_entropy(tensors[0], tensors[1], target, bias=tensors[2])
        torch.manual_seed(5)
        grads = torch.autograd.grad(loss, chosen, torch.rand(()) + 0.5)
        for i, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, full[i])


def test_cross_entropy_compiles_whole():
    (hidden, weight, _), target = inputs()
    compiled = torch.compile(chunked_cross_entropy, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, chunked_cross_entropy):
        loss = function(hidden, weight, target, chunk=16)
        results.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    torch.testing.assert_close(*results)


def test_cross_entropy_memory_is_that_of_a_chunk():
    T, vocab, chunk = 2048, 1000, 64
    hidden, weight = torch.randn(T, E, requires_grad=True), torch.randn(vocab, E, requires_grad=True)
    target = torch.randint(vocab, (T,))

    def step(function, **options):
        loss = function(hidden, weight, target, **options)
        return torch.autograd.grad(loss, [hidden, weight])

    for function, options in ((chunked_cross_entropy, {"chunk": chunk}), (plain, {})):
        step(function, **options)
    ours = peak_bytes(lambda: step(chunked_cross_entropy, chunk=chunk))
    # the gradients, the logits of a chunk twice, a few numbers per token
    assert ours <= 4 * (T * E + vocab * E) + 2.5 * 4 * chunk * vocab + 64 * T
    assert ours <= peak_bytes(lambda: step(plain)) / 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk": 0}, ValueError, "chunk: got 0"),
        ({"chunk": 2.0}, TypeError, "chunk: got 2.0, wanted an int"),
        ({"reduction": "max"}, ValueError, "reduction: got 'max', wanted one of 'mean', 'sum', 'none'"),
        ({"target": torch.zeros(3, 10, dtype=torch.int64)}, ValueError, r"target: got shape \(3, 10\), wanted \(3, 11\)"),
        ({"target": torch.zeros(3, 11)}, TypeError, "target: got torch.float32, wanted torch.int64"),
        ({"weight": torch.zeros(V, E + 1)}, ValueError, r"weight: got shape \(30, 9\), wanted \[V, 8\]"),
        ({"weight": torch.zeros(V, E).half()}, TypeError, "hidden: got torch.float32, wanted torch.float16"),
        ({"bias": torch.zeros(V + 1)}, ValueError, r"bias: got shape \(31,\), wanted \(30,\)"),
    ],
)
def test_cross_entropy_says_what_is_wrong(options, error, message):
    (hidden, weight, _), target = inputs()
    with pytest.raises(error, match=message):
        chunked_cross_entropy(**{"hidden": hidden, "weight": weight, "target": target, **options})
