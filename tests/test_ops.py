"""The custom ops under torch's machinery, on both backends: opcheck, torch.compile, autocast, checkpoints, torch.func."""

import functools

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from lsh_kernels import LSHConfig, LSHSelfAttention, local_attention, lsh_attention, random_rotations

BACKENDS = ["torch", "triton"]
CONFIG = LSHConfig(n_hashes=2, n_buckets=2, window=5)


@pytest.fixture(params=BACKENDS)
def attend(request, device):
    if request.param == "triton":
        pytest.importorskip("triton")
    return functools.partial(lsh_attention, config=CONFIG, is_causal=True, backend=request.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", ["shared", "separate"])
def test_ops_pass_opcheck(backend, keys, device):
    query, value = (torch.randn(1, 2, 6, 8, requires_grad=True, device=device) for _ in range(2))
    key = torch.randn(1, 1, 6, 8, requires_grad=True, device=device) if keys == "separate" else None
    value = value[:, :1].detach().requires_grad_() if keys == "separate" else value
    rotations = random_rotations(8, 4, 1, device=device)
    options = ([4], True, "window", 9, 16, 1, 0, True, True, False, 0, 0.0, True, 0.0, 1.0, backend)
    inputs = query, key, value, None, None
    torch.library.opcheck(torch.ops.lsh_kernels.attention_forward.default, (*inputs, rotations, None, None, *options))
    inputs = [None if x is None else x.detach() for x in inputs]
    out, lse, *rounds = torch.ops.lsh_kernels.attention_forward(*inputs, rotations, None, None, *options)
    arguments = (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, *rounds, *options)
    torch.library.opcheck(torch.ops.lsh_kernels.attention_backward.default, arguments)


# the number of buckets follows the length where it is not given: 8 from 46 to 90
@pytest.mark.parametrize(
    "config, lengths", [(CONFIG, (20, 33, 50)), (LSHConfig(n_hashes=1, window=5, chunk_length=16), (50, 60, 80))]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_compile_a_layer_once_for_all_lengths(backend, config, lengths, device, monkeypatch):
    """One graph, forward and backward, where the length is marked dynamic; draws of rotations included."""
    monkeypatch.setattr("lsh_kernels.modules.lsh_attention", functools.partial(lsh_attention, backend=backend))
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    layer = LSHSelfAttention(16, 2, config=config, causal=True).to(device)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    for length in lengths:
        x = torch.randn(1, length, 16, device=device, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 1)
        results = []
        for call in (compiled, layer):
            torch.manual_seed(length)
            out = call(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)
    assert len(graphs) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_under_autocast_do_what_sdpa_does(backend, dtype, device):
    """fp32 inputs, mixed inputs: out in autocast's dtype, gradients in that of the inputs; float64 is left alone."""
    if backend == "triton":
        pytest.importorskip("triton")
    x, half = torch.randn(1, 2, 20, 8, device=device), torch.randn(1, 2, 20, 8, device=device).to(dtype)
    ours = functools.partial(lsh_attention, rotations=random_rotations(8, 2, 2, device=device), config=CONFIG)
    for attend in (F.scaled_dot_product_attention, ours, functools.partial(local_attention, window=5)):
        if attend is not F.scaled_dot_product_attention:
            attend = functools.partial(attend, backend=backend)
        query, key, value = x.clone().requires_grad_(), half.clone().requires_grad_(), x.clone().requires_grad_()
        with torch.autocast(device.type, dtype=dtype):
            out = attend(query, key, value)
            if backend == "torch":
                assert attend(x.double(), x.double(), x.double()).dtype == torch.float64
        torch.testing.assert_close(out, attend(*(t.detach().to(dtype) for t in (query, key, value))), rtol=0, atol=0)
        gradients = torch.autograd.grad(out.float().sum(), (query, key, value))
        assert [g.dtype for g in gradients] == [torch.float32, dtype, torch.float32]


def test_ops_refuse_derivatives_that_they_do_not_have(attend, device):
    x = torch.randn(1, 2, 20, 8, device=device, requires_grad=True)

    def loss(y):
        return attend(y, None, y).square().sum()

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        gradient.sum().backward()
    x = x.detach()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(loss, (x,), (x,))
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match="torch.func"):
            transform(loss)(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ops_map_over_a_batch_like_a_loop(attend, device):
    """torch.func.vmap has nothing of ours to vectorise, and falls back; gradients inside are refused like grad itself."""
    x, buckets = torch.randn(3, 1, 2, 20, 8, device=device), torch.randint(2, (1, 2, 2, 20), device=device)

    def call(y):
        return attend(y, None, y, buckets=buckets)

    torch.testing.assert_close(torch.func.vmap(call)(x), torch.stack([call(y) for y in x]), rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.vmap(torch.func.grad(lambda y: call(y).sum()))(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_ops_work_under_checkpoint(attend, use_reentrant, device):
    """Rotations and dropout are drawn again, and alike, from torch's default generator."""
    results = []
    for call in (lambda f, x: f(x), functools.partial(checkpoint, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 320, device=device).sin().view(1, 2, 20, 8).requires_grad_()
        out = call(lambda y: attend(y, None, y, dropout_p=0.2), x)
        out.square().sum().backward()
        results.append((out, x.grad))
    for got, want in zip(*results):
        assert torch.equal(got, want)
