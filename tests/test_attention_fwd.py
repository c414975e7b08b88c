"""The forward kernels against the oracle in float64, given buckets: intervals, masks, dedupe, dropout, self only."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from lsh_kernels import LSHConfig, reference, torch_backend
from lsh_kernels.config import AttentionOptions
from lsh_kernels.csrc_triton.attention_fwd import attention_fwd

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
CONFIGS = {
    "window": {},
    "chunk": {"span": "chunk"},
    "chunk-ahead": {"span": "chunk", "chunks_before": 2, "chunks_after": 1},
    "bucket": {"span": "bucket"},
    "across": {"span": "chunk", "within_bucket": False},
    "wrap": {"span": "chunk", "within_bucket": False, "wrap": True, "norm_eps": 1e-6},
    "wrap-all": {"span": "chunk", "within_bucket": False, "wrap": True, "chunks_before": 1000, "chunks_after": 1},
}
FACTORS = {
    "config": list(CONFIGS),
    "keys": ["shared", "separate", "grouped", "longer", "shorter"],
    "causal": [False, True],
    "padded": [False, True],
    "dedupe": [False, True],
    "local_window": [0, 3],
    "dropout_p": [0.0, 0.3],
    "R": [1, 2, 4, 8],
    "D": [5, 16, 24, 64, 96, 128],
    "L": [1, 7, 64, 100, 257, 512],
    "dtype": [torch.float32, torch.float16],
    "strided": [False, True],
}


def is_possible(case):
    """Whether a (partial) case is a combination that the API lets through."""
    if case.get("keys") in ("longer", "shorter"):
        chunked = case.get("config") not in (None, "window", "bucket")
        if case.get("causal") or case.get("local_window") or chunked:
            return False
    if case.get("config") == "wrap-all" and (case.get("L", 1) > 100 or case.get("R", 1) > 2):
        # R * L keys per query take the interpreter minutes
        return False
    return not (str(case.get("config")).startswith("wrap") and case.get("dedupe"))


def covering_cases():
    """Cases that hold every possible pair of two factors' values, chosen greedily."""
    rng = random.Random(0)
    names = list(FACTORS)
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
        if is_possible({a: x, b: y})
    }

    def pairs(case):
        return set(itertools.combinations([(name, case[name]) for name in names], 2))

    cases = []
    while wanted:
        # one pair that is missing, the rest at random; the best of some tries
        seed = dict(min(wanted, key=str))
        tries = ({**{name: rng.choice(FACTORS[name]) for name in names}, **seed} for _ in range(300))
        best = max(filter(is_possible, tries), key=lambda case: len(wanted & pairs(case)))
        wanted -= pairs(best)
        cases.append({name: best[name] for name in names})
    return cases


def name_of(case):
    return "-".join(str(x).removeprefix("torch.") for x in case.values())


class Problem:
    """Inputs, buckets and options of a call; padded rows hold NaN."""

    def __init__(
        self, device, config="window", keys="shared", causal=False, padded=False, dedupe=True, local_window=0,
        dropout_p=0.0, R=2, D=16, L=100, dtype=torch.float32, strided=False, B=1, H=2, Dv=None, n_buckets=4,
        chunk_length=8,
    ):  # fmt: skip
        fields = {"dedupe": dedupe and not config.startswith("wrap"), **CONFIGS[config]}
        self.config = LSHConfig(n_hashes=R, n_buckets=n_buckets, chunk_length=chunk_length, local_window=local_window, **fields)
        self.shared, self.causal, self.dropout_p = keys == "shared", causal, dropout_p
        Hkv = H // 2 if keys == "grouped" else H
        S = {"longer": L + 37, "shorter": max(1, L // 2)}.get(keys, L)
        Dv = Dv or {5: 16, 16: 24, 24: 5}.get(D, D)

        def rows(n_heads, length, width):
            x = torch.randn(B, length, n_heads, width, device=device).to(dtype).transpose(1, 2)
            return x if strided else x.contiguous()

        self.query, self.value = rows(H, L, D), rows(Hkv, S, Dv)
        self.key = None if self.shared else rows(Hkv, S, D)
        self.padding = None
        if padded:
            self.padding = torch.rand(B, S, device=device) < 0.3
            for x in (self.query, self.value) if self.shared else (self.key, self.value):
                x.masked_fill_(self.padding[:, None, :, None], torch.nan)
        self.q_buckets = torch.randint(n_buckets, (B, H, R, L), device=device)
        self.k_buckets = None if self.shared else torch.randint(n_buckets, (B, Hkv, R, S), device=device)
        self.seed = torch.tensor([-(2**62) - 12345], device=device) if dropout_p else None
        self.scale = 1.0 if self.shared else D**-0.5
        c = self.config
        self.options = AttentionOptions(
            factors=list(c.factors(S)), hashed=True, span=c.span, window=c.window_length, chunk_length=c.chunk_length,
            chunks_before=c.chunks_before, chunks_after=c.chunks_after, within_bucket=c.within_bucket, dedupe=c.dedupe,
            wrap=c.wrap, local_window=c.local_window, norm_eps=c.norm_eps, is_causal=causal, dropout_p=dropout_p,
            scale=self.scale,
        )  # fmt: skip

    def sort(self):
        return torch_backend.sort_rounds(self.q_buckets, self.k_buckets, self.padding, self.options, self.value.shape[2])

    def run(self, state=None, attend=attention_fwd, **kwargs):
        tensors = self.query, self.key, self.value, self.padding, self.seed
        return attend(*tensors, self.sort() if state is None else state, self.options, **kwargs)

    def oracle(self, dtype=torch.float64):
        return reference.lsh_attention(
            self.query, self.key, self.value, config=self.config, is_causal=self.causal, key_padding_mask=self.padding,
            dropout_p=self.dropout_p, scale=self.scale, seed=self.seed, dtype=dtype,
            buckets=self.q_buckets if self.shared else (self.q_buckets, self.k_buckets),
        )  # fmt: skip


def assert_within_budget(got, want, rounded):
    """err(kernel) <= 2 * err(reference in the dtype of the inputs) + 2 * eps * max|truth|"""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite) and torch.equal(got[~finite].double(), want[~finite])
    if finite.any():
        got, want, rounded = got[finite], want[finite], rounded[finite].double()
        error, allowed = (got.double() - want).abs().max(), 2 * (rounded - want).abs().max()
        budget = allowed + 2 * torch.finfo(got.dtype).eps * want.abs().max()
        assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


def assert_equals_oracle(problem, result):
    out, lse = result
    assert out.dtype == problem.query.dtype and lse.dtype == torch.float32
    for got, want, rounded in zip(result, problem.oracle(), problem.oracle(problem.query.dtype), strict=True):
        assert_within_budget(got, want, rounded)


@pytest.mark.parametrize("case", covering_cases(), ids=name_of)
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
    problem = Problem(device, keys="grouped", padded=True, dropout_p=0.2, L=70, R=1)
    none = torch.empty(1, 2, 0, 70, dtype=torch.int32, device=device)
    problem.options = problem.options._replace(
        factors=[1], hashed=False, span="window" if "window" in fields else "chunk", window=fields.get("window", 1),
        chunk_length=fields.get("chunk_length", 1), chunks_before=fields.get("chunks_before", 1),
        chunks_after=fields.get("chunks_after", 0), within_bucket=False, dedupe=False, wrap=fields.get("wrap", False),
        is_causal=causal,
    )  # fmt: skip
    problem.oracle = lambda dtype=torch.float64: reference.local_attention(
        problem.query, problem.key, problem.value, is_causal=causal, key_padding_mask=problem.padding, dropout_p=0.2,
        seed=problem.seed, dtype=dtype, **fields,
    )  # fmt: skip
    assert_equals_oracle(problem, problem.run(torch_backend.SortedRounds(none, none, None, None)))


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


@pytest.mark.parametrize("case", covering_cases()[:10], ids=name_of)
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


def far_apart(x, dim, path):
    """A copy of x whose slices along `dim` lie just over 2^30 elements apart."""
    strides = list(x.stride())
    strides[dim] = 2**30 + 16
    n_elements = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    return torch.from_file(str(path), shared=True, size=n_elements, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


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
def test_attention_fwd_addresses_its_own_buffers_in_64_bits(device):
    """Partial results of more than 2^31 elements: the last head is what it is alone."""
    problem = Problem(device, causal=True, R=4, D=64, L=2**17, H=66, n_buckets=4096, chunk_length=64, dtype=torch.float16)
    out, lse = problem.run()
    assert math.prod((66, 4, 2**17, 64)) > 2**31
    problem.query, problem.value = problem.query[:, -1:], problem.value[:, -1:]
    problem.q_buckets = problem.q_buckets[:, -1:].contiguous()
    for got, alone in zip((out, lse), problem.run(), strict=True):
        assert torch.equal(got[:, -1:], alone)
