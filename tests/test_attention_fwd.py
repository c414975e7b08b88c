"""The forward kernels against the oracle in float64, given buckets: intervals, masks, dedupe, dropout, self only."""

import itertools
import math

import numpy as np
import pytest
import torch
from attention_problems import CONFIGS, FACTORS, Problem, assert_within_budget, covering_cases, far_apart, local_problem, name_of

from lsh_kernels import LSHConfig, torch_backend


def assert_equals_oracle(problem, result):
    out, lse = result
    assert out.dtype == problem.query.dtype and lse.dtype == torch.float32
    for got, want, rounded in zip(result, problem.oracle(), problem.oracle(problem.query.dtype), strict=True):
        assert_within_budget(got, want, rounded)


@pytest.mark.parametrize("case", covering_cases(FACTORS), ids=name_of)
def test_attention_fwd_equals_the_oracle(case, device):
    sizes = {"n_buckets": 16} if case["L"] > 100 else {"B": 1 + (case["R"] < 4)}
    problem = Problem(device, **case, **sizes, H=2 if case["keys"] == "grouped" else 1)
    state = problem.sort()
    assert_equals_oracle(problem, problem.run(state))
    theirs = problem.sort()
    problem.run(theirs, torch_backend.attention_fwd)
    assert torch.equal(state.q_stretched, theirs.q_stretched), "other queries are marked as attending only themselves"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("keys", ["shared", "separate"])
@pytest.mark.parametrize("config", ["window", "chunk", "chunk-ahead", "bucket", "across"])
def test_attention_fwd_counts_a_pair_once(config, keys, causal, device):
    """Few and large buckets: most pairs are seen by several rounds."""
    problem = Problem(device, config, keys, causal, padded=True, R=3, L=40, H=1, n_buckets=2, chunk_length=5)
    assert_equals_oracle(problem, problem.run())


@pytest.mark.parametrize("keys", ["shared", "separate", "grouped"])
def test_attention_fwd_counts_a_pair_of_many_rounds_once(keys, device):
    """Above 16 rounds, of separate keys above 8, dedupe looks at one after the other."""
    sizes = {"H": 2 if keys == "grouped" else 1, "R": 16 if keys == "shared" else 9, "L": 21, "n_buckets": 2, "chunk_length": 5}
    problem = Problem(device, keys=keys, causal=True, padded=True, local_window=2, **sizes)
    assert_equals_oracle(problem, problem.run())


@pytest.mark.parametrize("scale", [-0.7, 0.0, -1e-40, 300.0])
@pytest.mark.parametrize("keys", ["shared", "separate"])
def test_attention_fwd_takes_any_scale(keys, scale, device):
    """The softmax takes its maximum before the scale, which therefore must not be negative, or 0, in the kernel."""
    problem = Problem(device, keys=keys, causal=True, padded=True, local_window=2, scale=scale)
    assert_equals_oracle(problem, problem.run())


@pytest.mark.parametrize("keys", ["shared", "separate"])
@pytest.mark.parametrize("config", ["window", "chunk", "bucket", "wrap"])
def test_attention_fwd_of_one_full_bucket(config, keys, device, monkeypatch):
    """All tokens in one bucket, the others empty; with separate keys queries ask for buckets without keys, too, whose
    bounds must not be what the memory held before."""
    torch_empty = torch.empty

    def used_empty(*size, **kwargs):
        x = torch_empty(*size, **kwargs)
        if not x.is_floating_point():
            x.view(-1)[0::2], x.view(-1)[1::2] = 0, 50
        return x

    monkeypatch.setattr(torch, "empty", used_empty)
    problem = Problem(device, config, keys, causal=True, R=2, L=90, n_buckets=6, H=1)
    problem.q_buckets.fill_(3)
    if keys == "separate":
        problem.q_buckets[..., ::3] = 5
        problem.k_buckets.fill_(3)
    assert_equals_oracle(problem, problem.run())


@pytest.mark.parametrize("keys", ["shared", "separate"])
@pytest.mark.parametrize("config", ["window", "across"])
def test_attention_fwd_of_padding_alone(config, keys, device):
    """One sample without any key: 0, -inf and no mark; the other is as ever."""
    problem = Problem(device, config, keys, padded=True, B=2, L=40, local_window=2)
    problem.padding[0] = True
    for x in (problem.query, problem.value) if keys == "shared" else (problem.key, problem.value):
        x[0] = torch.nan
    state = problem.sort()
    out, lse = problem.run(state)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and (state.q_stretched[0] >= 0).all()
    assert_equals_oracle(problem, (out, lse))


def local_cases():
    fields = [{"window": 5}, {"window": 10**12}, {"chunk_length": 16, "chunks_after": 1}]
    fields += [{"chunk_length": 16, "wrap": True}, {"chunk_length": 10**12, "chunks_before": 10**12}]
    return list(itertools.product(fields, [False, True]))


@pytest.mark.parametrize(("fields", "causal"), local_cases(), ids=str)
def test_attention_fwd_local_equals_the_oracle(fields, causal, device):
    problem = local_problem(device, causal, **fields)
    assert_equals_oracle(problem, problem.run())


@pytest.mark.parametrize(
    "fields",
    [{"window": 10**12}, {"span": "chunk", "chunk_length": 10**12}, {"span": "chunk", "chunks_before": 10**12}],
    ids=str,
)
def test_attention_fwd_reach_beyond_all_slots(fields, device):
    """A window, a chunk or a number of chunks beyond any int32 is as good as the whole bucket."""
    problem = Problem(device, R=2, L=70, H=1)
    problem.config = LSHConfig(**{"n_hashes": 2, "n_buckets": 4, "chunk_length": 8, **fields})
    c = problem.config
    problem.options = problem.options._replace(
        span=c.span, window=c.window_length, chunk_length=c.chunk_length, chunks_before=c.chunks_before
    )
    assert_equals_oracle(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.5, 0.9, 1.0])
def test_attention_fwd_drops_what_the_oracle_drops(dropout_p, device):
    """Thresholds of 2^31 and more, and the last one, which keeps nothing: of self-only rows neither."""
    problem = Problem(device, dropout_p=dropout_p, causal=True, B=2, L=33, n_buckets=16)
    out, lse = problem.run()
    assert_equals_oracle(problem, (out, lse))
    assert dropout_p < 1 or (out == 0).all()


@pytest.mark.parametrize("config", ["window", "bucket"])
def test_attention_fwd_maps_query_heads_to_key_heads(config, device):
    """Two heads of queries to each of two of keys, in several rounds, a local one, and rows that attend only themselves."""
    problem = Problem(device, config, "grouped", True, True, local_window=2, dropout_p=0.2, L=30, H=4, n_buckets=16, strided=True)
    assert_equals_oracle(problem, problem.run())


@pytest.mark.parametrize("case", covering_cases(FACTORS)[:10], ids=name_of)
def test_attention_fwd_writes_within_its_buffers(case, device, guard_zones):
    problem = Problem(device, **{**case, "L": min(case["L"], 100), "D": min(case["D"], 24), "R": min(case["R"], 2)}, H=2)
    assert_equals_oracle(problem, problem.run())
    guard_zones()


def test_attention_fwd_takes_the_inverse_norm_of_the_hash(device):
    problem = Problem(device, L=70, padded=True)
    rows = problem.query.masked_fill(problem.padding[:, None, :, None], 0)
    rows[:, :, 5] = problem.query[:, :, 5] = 0
    problem.padding[:, 5] = False
    inverse_norm = 1 / rows.norm(dim=-1)
    inverse_norm[inverse_norm == torch.inf] = 0
    result = problem.run(inverse_norm=inverse_norm)
    assert_equals_oracle(problem, result)
    for got, want in zip(problem.run(inverse_norm=2 * inverse_norm), result, strict=True):
        assert not torch.equal(got, want)


@pytest.mark.parametrize(
    ("config", "keys"),
    [("window", "shared"), ("chunk", "shared"), ("across", "shared"), ("window", "separate"), ("bucket", "separate")],
)
def test_attention_fwd_is_bit_equal_from_run_to_run_and_in_a_padded_batch(config, keys, device, monkeypatch):
    """A second run over the same state finds its marks there; a sample alone is what it is in a longer batch. (Not so
    chunks of separate keys: queries at padded positions are sorted with the others, which moves them to other chunks.)
    """
    # the rounding of BLAS, which the interpreter multiplies with, depends on where in a tile a row stands
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b).astype(dtype))
    problem = Problem(device, config, keys, padded=True, B=2, L=100, local_window=3, dropout_p=0.1, H=1, R=1)
    problem.padding[:] = torch.arange(100, device=device) >= torch.tensor([[71], [100]], device=device)
    for x in (problem.query, problem.value) if keys == "shared" else (problem.key, problem.value):
        x.copy_(torch.randn_like(x).masked_fill(problem.padding[:, None, :, None], torch.nan))
    state = problem.sort()
    batched = problem.run(state)
    marked = state.q_stretched.clone()
    again = problem.run(state)
    assert torch.equal(state.q_stretched, marked)

    for name in ("query", "key", "value"):
        x = getattr(problem, name)
        setattr(problem, name, None if x is None else x[:1, :, :71])
    problem.q_buckets = problem.q_buckets[:1, ..., :71]
    problem.k_buckets = None if keys == "shared" else problem.k_buckets[:1, ..., :71]
    problem.padding = None
    for first, second, alone in zip(batched, again, problem.run(), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(alone[0], first[0, :, :71])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels on the CPU: the sparse tensor is a file mapping")
@pytest.mark.parametrize("dim", range(3), ids=["batch", "head", "row"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_attention_fwd_addresses_its_inputs_in_64_bits(name, dim, tmp_path):
    """index * stride passes 2^31 elements in one dimension; what lies in between is a hole in a sparse file."""
    keys = "shared" if name == "query" else "separate"
    sizes = {("B", "H", "L")[dim]: 3}
    problem = Problem("cpu", keys=keys, **{"B": 1, "H": 1, "L": 3, **sizes}, R=1, dtype=torch.float16, n_buckets=2)
    want = problem.run()
    setattr(problem, name, far_apart(getattr(problem, name), dim, tmp_path / "x"))
    for got, near in zip(problem.run(), want, strict=True):
        assert torch.equal(got, near)


def test_attention_fwd_of_an_empty_batch_is_empty(device):
    out, lse = Problem(device, B=0).run()
    assert out.shape == (0, 2, 100, 24) and lse.shape == (0, 2, 100)


@pytest.mark.parametrize("Dv", [1, 256])
def test_attention_fwd_of_the_smallest_and_the_largest_heads(Dv, device):
    problem = Problem(device, D=257 - Dv, Dv=Dv, L=20)
    assert_equals_oracle(problem, problem.run())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": torch.zeros(1, 2, 9, 8)}, ValueError, "query, key, value: got"),
        ({"value": torch.zeros(1, 2, 10, 257)}, ValueError, "query, value: got"),
        ({"value": torch.zeros(1, 2, 10, 8).half()}, TypeError, "got torch.float32, torch.float32, torch.float16"),
        ({"value": torch.zeros(1, 2, 8, 10).mT}, ValueError, "value: got strides"),
        ({"padding": torch.zeros(1, 9, dtype=torch.bool)}, ValueError, "key_padding_mask: got"),
        ({"dropout_p": 0.1}, ValueError, "seed: wanted"),
    ],
    ids=str,
)
def test_attention_fwd_refuses(change, error, message):
    problem = Problem("cpu", L=10, D=8, Dv=8)
    state = problem.sort()
    for name, x in change.items():
        setattr(problem, name, x)
    problem.options = problem.options._replace(dropout_p=problem.dropout_p)
    with pytest.raises(error, match=message):
        problem.run(state)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("keys", ["shared", "grouped"])
@pytest.mark.parametrize("D", [64, 128])
def test_attention_fwd_bf16_equals_the_oracle(config, keys, D, device):
    problem = Problem(
        device, config, keys, causal=True, padded=True, R=4, D=D, L=1000, B=2, n_buckets=32, chunk_length=64,
        dtype=torch.bfloat16, dropout_p=0.1,
    )  # fmt: skip
    assert_equals_oracle(problem, problem.run())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_fwd_of_long_sequences_equals_the_torch_backend(dtype, device):
    problem = Problem(device, causal=True, R=4, D=64, L=2**16 + 1, H=2, n_buckets=2048, chunk_length=64, dtype=dtype)
    want = [problem.query.double(), problem.value.double()]
    out, lse = problem.run()
    problem.query, problem.value = want
    for got, truth in zip((out, lse), problem.run(attend=torch_backend.attention_fwd), strict=True):
        assert (got - truth).abs().max() <= 4 * torch.finfo(got.dtype).eps * truth.abs().max()


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_attention_fwd_addresses_its_own_buffers_in_64_bits(device):
    """Partial results of more than 2^31 elements: the last head is what it is alone."""
    problem = Problem(device, causal=True, R=4, D=64, L=2**17, H=66, n_buckets=4096, chunk_length=64, dtype=torch.float16)
    out, lse = problem.run()
    assert math.prod((66, 4, 2**17, 64)) > 2**31
    problem.query, problem.value = problem.query[:, -1:], problem.value[:, -1:]
    problem.q_buckets = problem.q_buckets[:, -1:].contiguous()
    for got, alone in zip((out, lse), problem.run(), strict=True):
        assert torch.equal(got[:, -1:], alone)
