"""Inputs, covering cases and the error budget that the tests of attention forward and backward share."""

import itertools
import random

import torch

from lsh_kernels import LSHConfig, reference, torch_backend
from lsh_kernels.config import AttentionOptions
from lsh_kernels.csrc_triton.attention_fwd import attention_fwd

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


def covering_cases(factors, seed=0):
    """Cases that hold every possible pair of two factors' values, chosen greedily; the rest of them follows the seed."""
    rng = random.Random(seed)
    names = list(factors)
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if is_possible({a: x, b: y})
    }

    def pairs(case):
        return set(itertools.combinations([(name, case[name]) for name in names], 2))

    cases = []
    while wanted:
        # one pair that is missing, the rest at random; the best of some tries
        missing = dict(min(wanted, key=str))
        tries = ({**{name: rng.choice(factors[name]) for name in names}, **missing} for _ in range(300))
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
        chunk_length=8, scale=None,
    ):  # fmt: skip
        fields = {"dedupe": dedupe and not config.startswith("wrap"), **CONFIGS[config]}
        self.config = LSHConfig(n_hashes=R, n_buckets=n_buckets, chunk_length=chunk_length, local_window=local_window, **fields)
        self.shared, self.causal, self.dropout_p = keys == "shared", causal, dropout_p
        Hkv = H // 2 if keys == "grouped" else H
        S = {"longer": L + 37, "shorter": max(1, L // 2)}.get(keys, L)
        Dv = Dv or {5: 16, 16: 24, 24: 5}.get(D, D)

        def rows(n_heads, length, width):
            # as of a projection that has other rows between
            x = torch.randn(B, length, n_heads + strided, width, device=device).to(dtype)[:, :, :n_heads].transpose(1, 2)
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
        self.scale = scale if scale is not None else 1.0 if self.shared else D**-0.5
        c = self.config
        self.options = AttentionOptions(
            factors=list(c.factors(S)), hashed=True, span=c.span, window=c.window_length, chunk_length=c.chunk_length,
            chunks_before=c.chunks_before, chunks_after=c.chunks_after, within_bucket=c.within_bucket, dedupe=c.dedupe,
            wrap=c.wrap, local_window=c.local_window, norm_eps=c.norm_eps, is_causal=causal, dropout_p=dropout_p,
            scale=self.scale,
        )  # fmt: skip

    def sort(self):
        return torch_backend.sort_rounds(self.q_buckets, self.k_buckets, self.padding, self.options)

    def run(self, state=None, attend=attention_fwd, **kwargs):
        tensors = self.query, self.key, self.value, self.padding, self.seed
        return attend(*tensors, self.sort() if state is None else state, self.options, **kwargs)

    @property
    def inputs(self):
        """Names of the tensors that have gradients."""
        return ("query", "value") if self.shared else ("query", "key", "value")

    def true_gradients(self, dout, dlse, dtype=torch.float64):
        """Gradients of the oracle in `dtype`, as float64."""
        kept = [getattr(self, name) for name in self.inputs]
        leaves = [x.double().requires_grad_() for x in kept]
        for name, x in zip(self.inputs, leaves):
            setattr(self, name, x)
        try:
            out, lse = self.oracle(dtype)
            outputs, douts = (out, lse), (dout.to(dtype), dlse.to(lse.dtype))
            return torch.autograd.grad(outputs, leaves, douts)
        finally:
            for name, x in zip(self.inputs, kept):
                setattr(self, name, x)

    def oracle(self, dtype=torch.float64):
        return reference.lsh_attention(
            self.query, self.key, self.value, config=self.config, is_causal=self.causal, key_padding_mask=self.padding,
            dropout_p=self.dropout_p, scale=self.scale, seed=self.seed, dtype=dtype,
            buckets=self.q_buckets if self.shared else (self.q_buckets, self.k_buckets),
        )  # fmt: skip


def assert_within_budget(got, want, rounded, scale=None):
    """err(kernel) <= 2 * err(reference in the dtype of the inputs) + 2 * eps * scale, by default max|truth|"""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite) and torch.equal(got[~finite].double(), want[~finite])
    if finite.any():
        got, want, rounded = got[finite], want[finite], rounded[finite].double()
        error, allowed = (got.double() - want).abs().max(), 2 * (rounded - want).abs().max()
        budget = allowed + 2 * torch.finfo(got.dtype).eps * (want.abs().max() if scale is None else scale)
        assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


def far_apart(x, dim, path):
    """A copy of x whose slices along `dim` lie just over 2^30 elements apart."""
    strides = list(x.stride())
    strides[dim] = 2**30 + 16
    n_elements = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    return torch.from_file(str(path), shared=True, size=n_elements, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def local_problem(device, causal, **fields):
    """A call of local attention."""
    problem = Problem(device, keys="grouped", padded=True, dropout_p=0.2, L=70, R=1)
    none = torch.empty(1, 2, 0, 70, dtype=torch.int32, device=device)
    problem.options = problem.options._replace(
        factors=[1], hashed=False, span="window" if "window" in fields else "chunk", window=fields.get("window", 1),
        chunk_length=fields.get("chunk_length", 1), chunks_before=fields.get("chunks_before", 1),
        chunks_after=fields.get("chunks_after", 0), within_bucket=False, dedupe=False, wrap=fields.get("wrap", False),
        is_causal=causal,
    )  # fmt: skip
    problem.sort = lambda: torch_backend.SortedRounds(none, none, None, None)
    problem.oracle = lambda dtype=torch.float64: reference.local_attention(
        problem.query, problem.key, problem.value, is_causal=causal, key_padding_mask=problem.padding, dropout_p=0.2,
        seed=problem.seed, dtype=dtype, **fields,
    )  # fmt: skip
    return problem
