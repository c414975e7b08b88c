"""The backward kernels against float64 autograd through the oracle, given buckets and the torch backend's forward."""

import pytest
import torch
from attention_problems import (
    CONFIGS,
    FACTORS,
    Problem,
    assert_within_budget,
    covering_cases,
    far_apart,
    local_problem,
    name_of,
)

import lsh_kernels.csrc_triton.attention_bwd as attention_bwd_module
from lsh_kernels import torch_backend
from lsh_kernels.csrc_triton.attention_bwd import attention_bwd

CASES = covering_cases({**FACTORS, "L": [1, 7, 33, 64, 100], "in_place": [False, True], "has_dlse": [False, True]})


class Call:
    """One forward call by the torch backend, and gradients of its outputs."""

    def __init__(self, problem, has_dlse=True, strided=False):
        self.problem, self.state = problem, problem.sort()
        self.out, self.lse = problem.run(self.state, torch_backend.attention_fwd)
        dout = torch.randn_like(self.out.mT if strided else self.out)
        self.dout = dout.mT.contiguous().transpose(1, 2).contiguous().transpose(1, 2) if strided else dout
        self.dlse = torch.randn_like(self.lse) if has_dlse else None

    def gradients(self, attend=attention_bwd, **kwargs):
        p = self.problem
        tensors = p.query, p.key, p.value, p.padding, p.seed, self.out, self.lse, self.state, p.options
        return [x for x in attend(self.dout, self.dlse, *tensors, **kwargs) if x is not None]

    def assert_equal_the_oracle(self, **kwargs):
        dlse = torch.zeros_like(self.lse) if self.dlse is None else self.dlse
        got = self.gradients(**kwargs)
        truth, rounded = (self.problem.true_gradients(self.dout, dlse, x) for x in (torch.float64, self.dout.dtype))
        # dq and dk come from differences dP - delta, whose terms are as large as dv: one scale for all
        scale = max(x.abs().max() for x in truth)
        # and P = exp(s - lse) can't be better than the float32 that lse is kept in
        # (shared queries that attend only themselves have an lse of -1e5, but no such P)
        reach = self.lse[self.lse > -5e4].abs()
        lse_error = torch.finfo(torch.float32).eps * (reach.max() if reach.numel() else 0)
        scale = scale * (1 + lse_error / torch.finfo(self.dout.dtype).eps)
        for x, want, other in zip(got, truth, rounded, strict=True):
            assert x.shape == want.shape and x.dtype == self.dout.dtype
            assert want.isfinite().all()
            assert_within_budget(x, want, other, scale)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_attention_bwd_equals_the_oracle(case, device):
    case = dict(case)
    in_place, has_dlse = case.pop("in_place"), case.pop("has_dlse")
    # of few rows the error in the dtype is a matter of luck
    sizes = {"n_buckets": 16} if case["L"] == 100 else {"B": 6 if case["L"] <= 7 else 1}
    problem = Problem(device, **case, **sizes, H=2 if case["keys"] == "grouped" else 1)
    Call(problem, has_dlse, case["strided"]).assert_equal_the_oracle(in_place=in_place)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("config", "keys"),
    [("window", "shared"), ("chunk-ahead", "shared"), ("across", "shared"), ("window", "separate"), ("chunk", "separate")],
)
def test_attention_bwd_counts_a_pair_once(config, keys, causal, device):
    """Few and large buckets: most pairs are seen by several rounds."""
    problem = Problem(device, config, keys, causal, padded=True, R=3, L=40, H=1, n_buckets=2, chunk_length=5)
    Call(problem).assert_equal_the_oracle()


@pytest.mark.parametrize("config", ["window", "bucket"])
def test_attention_bwd_maps_query_heads_to_key_heads(config, device):
    """Two heads of queries to each of two of keys, in several rounds, and rows that attend only themselves."""
    problem = Problem(device, config, "grouped", True, True, dropout_p=0.2, L=20, H=4, n_buckets=16, strided=True)
    Call(problem, strided=True).assert_equal_the_oracle()


@pytest.mark.parametrize(
    ("config", "causal", "chunk_length", "local_window", "dropout_p"),
    [("chunk", True, 64, 0, 0.0), ("chunk-ahead", False, 70, 3, 0.3), ("across", True, 64, 3, 0.0), ("wrap", False, 64, 0, 0.0)],
)
def test_attention_bwd_walks_long_chunks_by_more_rows(config, causal, chunk_length, local_window, dropout_p, device, monkeypatch):
    """Which take tiles of their own."""
    rest = {"R": 2, "D": 24, "Dv": 40, "L": 150, "H": 1, "n_buckets": 2, "chunk_length": chunk_length, "dtype": torch.float16}
    problem = Problem(
        device, config, "shared", causal, True, dropout_p=dropout_p, local_window=local_window, dedupe=config != "wrap", **rest
    )
    tiles, launch_config = [], attention_bwd_module._launch_config
    monkeypatch.setattr(attention_bwd_module, "_launch_config", lambda *call: tiles.append(launch_config(*call)) or tiles[-1])
    Call(problem).assert_equal_the_oracle()
    assert [(tile.M, tile.N) for tile, *_ in tiles] == [(64, 16 if local_window else 32)]


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("keys", ["shared", "separate"])
def test_attention_bwd_takes_any_scale(keys, scale, device):
    problem = Problem(device, keys=keys, causal=True, padded=True, local_window=2, scale=scale, L=40, H=1)
    Call(problem).assert_equal_the_oracle()


@pytest.mark.parametrize("keys", ["shared", "separate", "grouped"])
def test_attention_bwd_counts_a_pair_of_many_rounds_once(keys, device):
    """Above 8 rounds dedupe looks at one after the other."""
    sizes = {"H": 2 if keys == "grouped" else 1, "R": 9, "L": 30, "n_buckets": 2, "chunk_length": 5}
    Call(Problem(device, keys=keys, causal=True, padded=True, local_window=2, **sizes)).assert_equal_the_oracle()


@pytest.mark.parametrize("n_hashes", [2, 9])
def test_attention_bwd_dedupes_pairs_with_a_marked_key(n_hashes, device):
    """Position 0, which has no target but itself, is marked in the last hash round, the only one that shares its pairs with
    the local round; the last bucket takes its coordinate far from the mark."""
    problem = Problem(device, causal=True, local_window=2, R=n_hashes, L=30, H=1, n_buckets=32)
    problem.q_buckets[:, :, :-1], problem.q_buckets[:, :, -1] = torch.arange(30, device=device), 31
    Call(problem).assert_equal_the_oracle()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("fields", "causal"),
    [
        ({"window": 5}, True),
        ({"window": 10**12}, False),
        ({"chunk_length": 16, "chunks_after": 1}, True),
        ({"chunk_length": 16, "wrap": True}, True),
        ({"chunk_length": 16, "wrap": True}, False),
    ],
    ids=str,
)
def test_attention_bwd_of_local_attention_equals_the_oracle(fields, causal, in_place, device):
    Call(local_problem(device, causal, **fields)).assert_equal_the_oracle(in_place=in_place)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("keys", ["shared", "separate", "grouped"])
def test_attention_bwd_of_queries_that_attend_only_themselves(keys, dropout_p, device):
    """Many buckets for few tokens: out = v_i, and lse is s_ii up to a constant."""
    problem = Problem(device, keys=keys, causal=True, padded=True, dropout_p=dropout_p, L=30, R=1, n_buckets=16)
    call = Call(problem)
    assert (call.state.q_stretched < 0).sum() > 10
    call.assert_equal_the_oracle()


@pytest.mark.parametrize("keys", ["shared", "separate"])
@pytest.mark.parametrize("config", ["window", "bucket", "across"])
def test_attention_bwd_is_finite_for_hostile_inputs(config, keys, device):
    """A sample of padding alone (NaN there), zero vectors, logits of +-1e4."""
    problem = Problem(device, config, keys, padded=True, B=2, L=40, R=2, H=1)
    problem.padding[0] = True
    problem.query[1, :, 3] = problem.query[1, :, 9] = 0
    problem.padding[1, [3, 9]] = False
    for x in (problem.query, problem.value) if keys == "shared" else (problem.key, problem.value):
        x[0] = torch.nan
        x[1].nan_to_num_()
    problem.query *= 1e4
    call = Call(problem)
    finite = call.lse[call.lse.isfinite()]
    assert (call.lse[0] == -torch.inf).all() and finite.abs().max() > 1e4
    gradients = call.gradients()
    assert all(x.isfinite().all() for x in gradients)
    for name, x in zip(problem.inputs, gradients):
        assert (x[0] == 0).all()
        if name != "query" or keys == "shared":
            assert (x.masked_select(problem.padding[:, None, :, None]) == 0).all()
    if keys == "shared":
        # of a zero vector only the gradient as a query is left, and that is scaled by no norm
        want = call.gradients(torch_backend.attention_bwd)[0]
        assert (gradients[0] - want)[1, :, [3, 9]].abs().max() <= 1e-2 * want[1, :, [3, 9]].abs().max()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("keys", ["shared", "grouped"])
def test_attention_bwd_is_bit_equal_from_run_to_run_and_stays_in_its_buffers(keys, in_place, device, guard_zones):
    call = Call(Problem(device, "window", keys, padded=True, dropout_p=0.2, local_window=3, L=20, D=24))
    for first, second in zip(call.gradients(in_place=in_place), call.gradients(in_place=in_place)):
        assert torch.equal(first, second)
    guard_zones()


@pytest.mark.parametrize("case", CASES[:6], ids=name_of)
def test_attention_bwd_writes_within_its_buffers(case, device, guard_zones):
    case = {**case, "L": min(case["L"], 64), "D": min(case["D"], 24), "R": min(case["R"], 2)}
    in_place, has_dlse = case.pop("in_place"), case.pop("has_dlse")
    Call(Problem(device, **case), has_dlse).assert_equal_the_oracle(in_place=in_place)
    guard_zones()


def test_attention_bwd_of_one_full_bucket(device):
    """All tokens in one bucket; queries that ask for buckets without keys see nothing."""
    problem = Problem(device, keys="separate", R=2, L=300, n_buckets=6, H=1, chunk_length=16)
    problem.q_buckets.fill_(3)
    problem.q_buckets[..., ::3] = 5
    problem.k_buckets.fill_(3)
    Call(problem).assert_equal_the_oracle()


def test_attention_bwd_chooses_in_place_where_that_saves_memory(device, monkeypatch):
    sizes, torch_empty = [], torch.empty

    def recorded(*size, **kwargs):
        x = torch_empty(*size, **kwargs)
        sizes.append(x.numel() * x.element_size())
        return x

    def largest(n_hashes, dtype=torch.float16, **kwargs):
        call = Call(Problem(device, R=n_hashes, L=16, D=64, H=1, dtype=dtype))
        monkeypatch.setattr(torch, "empty", recorded)
        sizes.clear()
        call.gradients(**kwargs)
        monkeypatch.undo()
        return max(sizes)

    assert largest(4) == 4 * 16 * 128 * 2 and largest(4, in_place=True) == 16 * 128 * 4
    assert largest(8, torch.float32) == 8 * 16 * 128 * 4
    assert largest(9) == largest(9, in_place=True) == 16 * 128 * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels on the CPU: the sparse tensor is a file mapping")
@pytest.mark.parametrize("name", ["query", "key", "value", "dout"])
@pytest.mark.parametrize("dim", range(3), ids=["batch", "head", "row"])
def test_attention_bwd_addresses_its_inputs_in_64_bits(name, dim, tmp_path):
    """index * stride passes 2^31 elements in one dimension; what lies in between is a hole in a sparse file."""
    keys = "shared" if name == "query" else "separate"
    sizes = {"B": 1, "H": 1, "L": 3, ("B", "H", "L")[dim]: 3}
    call = Call(Problem("cpu", keys=keys, **sizes, R=1, dtype=torch.float16, n_buckets=2))
    want = call.gradients()
    owner = call if name == "dout" else call.problem
    setattr(owner, name, far_apart(getattr(owner, name), dim, tmp_path / "x"))
    for got, near in zip(call.gradients(), want, strict=True):
        assert torch.equal(got, near)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dout": torch.zeros(1, 2, 10, 9)}, ValueError, "dout: got"),
        ({"dout": torch.zeros(1, 2, 10, 8).half()}, ValueError, "dout: got"),
        ({"dout": torch.zeros(1, 2, 8, 10).mT}, ValueError, "dout: got strides"),
        ({"dlse": torch.zeros(1, 2, 9)}, ValueError, "dlse: got"),
        ({"lse": torch.zeros(1, 2, 10).double()}, ValueError, "lse: got"),
    ],
    ids=str,
)
def test_attention_bwd_refuses(change, error, message):
    call = Call(Problem("cpu", L=10, D=8, Dv=8))
    for name, x in change.items():
        setattr(call, name, x)
    with pytest.raises(error, match=message):
        call.gradients()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("keys", ["shared", "grouped"])
@pytest.mark.parametrize("D", [64, 128])
def test_attention_bwd_bf16_equals_the_oracle(config, keys, D, device):
    problem = Problem(
        device, config, keys, causal=True, padded=True, R=4, D=D, L=1000, B=2, n_buckets=32, chunk_length=64,
        dtype=torch.bfloat16, dropout_p=0.1,
    )  # fmt: skip
    Call(problem).assert_equal_the_oracle()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_attention_bwd_of_long_sequences_equals_the_torch_backend(dtype, in_place, device):
    problem = Problem(device, causal=True, R=4, D=64, L=2**16 + 1, H=2, n_buckets=2048, chunk_length=64, dtype=dtype)
    call = Call(problem)
    got = call.gradients(in_place=in_place)
    problem.query, problem.value, call.out = problem.query.double(), problem.value.double(), call.out.double()
    call.dout, call.dlse, call.lse = call.dout.double(), call.dlse.double(), call.lse.double()
    for x, truth in zip(got, call.gradients(torch_backend.attention_bwd), strict=True):
        assert (x - truth).abs().max() <= 8 * torch.finfo(dtype).eps * truth.abs().max()
