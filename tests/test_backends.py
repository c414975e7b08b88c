"""backend="triton" through the public API: the whole forward and backward interpreted."""

import pytest
import torch
from attention_problems import Problem, assert_within_budget, covering_cases, name_of

from lsh_kernels import LSHConfig, bucket_sort, local_attention, lsh_attention, lsh_hash, random_rotations, reference

B, H, L, D = 1, 2, 70, 16
CONFIGS = {
    "window": LSHConfig(n_hashes=2, n_buckets=4, local_window=3),
    "factored buckets": LSHConfig(n_hashes=2, n_buckets=(4, 6), span="bucket"),
    "paper": LSHConfig.paper(n_hashes=2, n_buckets=4, chunk_length=16),
    "trax": LSHConfig.trax(n_hashes=2, n_buckets=4, chunk_length=16),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shared, padded", [(True, False), (True, True), (False, True)])
def test_backends_agree_on_outputs_and_gradients(name, shared, padded, device):
    config, kv_heads = CONFIGS[name], H if shared else 1
    query, value = torch.randn(B, L, H, D, device=device).transpose(1, 2), torch.randn(B, kv_heads, L, 24, device=device)
    key = None if shared else torch.randn(B, kv_heads, L, D, device=device)
    mask = torch.rand(B, L, device=device) < 0.2 if padded else None
    rotations = random_rotations(D, config.n_buckets, 2, n_heads=kv_heads, device=device)
    inputs = [x.requires_grad_() for x in (query, key, value) if x is not None]
    dout = torch.randn(B, H, L, 24, device=device)

    def run(backend):
        arguments = {"config": config, "is_causal": True, "key_padding_mask": mask, "rotations": rotations}
        out, lse = lsh_attention(query, key, value, **arguments, return_lse=True, backend=backend)
        return out, lse.nan_to_num(neginf=0), *torch.autograd.grad((out * dout).sum(), inputs)

    for triton, twin in zip(run("triton"), run("torch")):
        torch.testing.assert_close(triton, twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_triton_gradients_pass_gradcheck(shared, device):
    """In float32, the widest that the kernels take: with steps of 0.01 differences are good to about 1e-4."""
    config, kv_heads = LSHConfig(n_hashes=2, n_buckets=2, window=5), 2 if shared else 1
    query, key = torch.randn(1, 2, 8, 4, device=device), torch.randn(1, kv_heads, 8, 4, device=device)
    value = torch.randn(1, kv_heads, 8, 3, device=device)
    inputs = [x.requires_grad_() for x in ((query, value) if shared else (query, key, value))]
    buckets = torch.randint(2, (1, 2, 2, 8), device=device)

    def attend(query, *others):
        key, given = (None, buckets) if shared else (others[0], (buckets, buckets[:, :1]))
        arguments = {"config": config, "is_causal": True, "buckets": given, "return_lse": True, "backend": "triton"}
        out, lse = lsh_attention(query, key, others[-1], **arguments)
        # self-only rows have a constant of -1e5 in lse, rows that see nothing -inf
        return out, torch.where(lse < -5e4, 0.0, lse)

    # all that is differentiated and compared is float32, which gradcheck warns of
    with pytest.warns(UserWarning, match="double precision"):
        torch.autograd.gradcheck(attend, inputs, eps=1e-2, atol=1e-5, rtol=1e-4, fast_mode=True)


WHOLE = {
    "config": ["window", "chunk", "bucket", "wrap"],
    "keys": ["shared", "separate", "grouped"],
    "causal": [False, True],
    "padded": [False, True],
    "R": [1, 4, 8],
    "D": [5, 24, 64],
    "L": [1, 7, 64, 100],
    "dtype": [torch.float32, torch.float16],
}


def assert_whole_call_equals_the_oracle(problem):
    """Hashed, sorted and attended by kernels; the oracle is given their buckets, nothing else."""
    p, Hkv = problem, problem.value.shape[1]
    rotations = random_rotations(p.query.shape[3], 4, p.config.n_hashes, n_heads=Hkv, device=p.query.device)
    result = lsh_attention(
        p.query, p.key, p.value, config=p.config, is_causal=p.causal, key_padding_mask=p.padding, scale=p.scale,
        rotations=rotations, return_lse=True, backend="triton",
    )  # fmt: skip
    p.q_buckets = lsh_hash(p.query, rotations, 4, backend="triton")
    p.k_buckets = None if p.shared else lsh_hash(p.key, rotations, 4, backend="triton")
    for got, want, rounded in zip(result, p.oracle(), p.oracle(p.query.dtype), strict=True):
        assert_within_budget(got, want, rounded)


@pytest.mark.parametrize("case", covering_cases(WHOLE), ids=name_of)
def test_triton_whole_call_equals_the_oracle(case, device):
    assert_whole_call_equals_the_oracle(Problem(device, **case, H=4 if case["keys"] == "grouped" else 1))


@pytest.mark.gpu
@pytest.mark.parametrize("keys", ["shared", "grouped"])
def test_triton_whole_call_in_bf16_equals_the_oracle(keys, device):
    assert_whole_call_equals_the_oracle(Problem(device, keys=keys, causal=True, R=4, D=64, L=512, H=4, dtype=torch.bfloat16))


@pytest.mark.parametrize("shared", [True, False])
def test_triton_whole_call_clamps_hostile_buckets(shared, device, guard_zones):
    """Ids beyond the buckets, as far as int64 goes: every access is checked, and no row is lost."""
    qk, v = torch.randn(2, B, H, L, D, device=device)
    given = [torch.randint(-(2**63), 2**63 - 1, (B, H, 2, L), device=device) for _ in range(2)]
    arguments = {"config": CONFIGS["window"], "buckets": given[0] if shared else tuple(given), "backend": "triton"}
    out = lsh_attention(qk, None if shared else qk, v, **arguments)
    guard_zones()
    assert out.isfinite().all() and (out != 0).any(-1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
def test_triton_is_captured_by_a_cuda_graph(shared, device):
    """Forward and backward, replayed on other inputs."""
    inputs = torch.randn(2 if shared else 3, B, H, 512, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    rotations, config = random_rotations(64, 16, 2, device=device), LSHConfig(n_hashes=2, n_buckets=16)

    def call():
        query, *key, value = inputs
        arguments = {"config": config, "is_causal": True, "rotations": rotations, "backend": "triton"}
        out = lsh_attention(query, key[0] if key else None, value, **arguments)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        inputs.copy_(torch.randn_like(inputs))
    graph.replay()
    for got, want in zip(captured, call(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("padded", [True, False])
def test_triton_adds_norm_eps_to_the_mean_square(padded, device):
    """As much of it as changes every logit; 1/norm comes from the hash kernel."""
    config = LSHConfig(n_hashes=2, n_buckets=4, norm_eps=0.5)
    qk, v = (torch.randn(B, H, L, D, device=device, requires_grad=True) for _ in range(2))
    mask = torch.rand(B, L, device=device) < 0.2 if padded else None
    rotations = random_rotations(D, 4, 2, device=device)
    out, lse = lsh_attention(
        qk, None, v, config=config, key_padding_mask=mask, rotations=rotations, return_lse=True, backend="triton"
    )
    buckets = lsh_hash(qk, rotations, 4)
    true_out, true_lse = reference.lsh_attention(qk, None, v, config=config, key_padding_mask=mask, buckets=buckets)
    torch.testing.assert_close(out.double(), true_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    gradients, true_gradients = (torch.autograd.grad(x.square().sum(), (qk, v)) for x in (out, true_out))
    torch.testing.assert_close(gradients, true_gradients, rtol=1e-4, atol=1e-4)


def test_triton_local_attention_agrees_with_the_oracle(device):
    query, key, value = torch.randn(3, B, H, L, D, device=device)
    out, lse = local_attention(query, key, value, window=5, return_lse=True, backend="triton")
    true_out, true_lse = reference.local_attention(query, key, value, window=5)
    torch.testing.assert_close(out.double(), true_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


def test_triton_draws_the_same_dropout(device):
    qk, v = torch.randn(2, B, H, L, D, device=device)
    buckets = torch.randint(0, 4, (B, H, 2, L), device=device)
    outs = []
    for backend in ("triton", "torch"):
        generator = torch.Generator(device).manual_seed(1)
        arguments = {"config": CONFIGS["window"], "buckets": buckets, "dropout_p": 0.4, "generator": generator}
        outs.append(lsh_attention(qk, None, v, **arguments, backend=backend))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_triton_takes_an_empty_batch_and_refuses_float64(device):
    qk = torch.randn(0, H, L, D, device=device)
    assert lsh_attention(qk, None, qk, backend="triton").shape == qk.shape
    double = torch.randn(B, H, L, D, device=device, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        lsh_attention(double, None, double, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_stages_agree_with_the_oracle(backend, device):
    x, rotations = torch.randn(B, H, L, D, device=device), random_rotations(D, (4, 6), 3, n_heads=2, device=device)
    buckets = lsh_hash(x, rotations, (4, 6), backend=backend)
    assert torch.equal(buckets, reference.lsh_hash(x, rotations, (4, 6)))
    mask = torch.rand(B, L, device=device) < 0.3
    order = bucket_sort(buckets, (4, 6), mask, backend=backend)
    assert torch.equal(order, reference.bucket_sort(buckets, 24, mask))


def test_stages_refuse_a_backend_that_is_not_there():
    x, rotations = torch.randn(B, H, L, D), random_rotations(D, 4, 2)
    with pytest.raises(ValueError, match="backend: got 'cuda', wanted one of 'auto', 'torch', 'triton'"):
        lsh_hash(x, rotations, 4, backend="cuda")
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        bucket_sort(torch.zeros(B, H, 2, L, dtype=torch.int32), 4, backend="cuda")
