"""Kernels compiled offline, for GPUs that are not there, just as their launchers launch them.

Run as a script with a target's name this file compiles all that the tests ask of it and prints what came out as JSON. That
needs a process of its own: TRITON_INTERPRET, which the other tests rely on, breaks compilation. With a seed behind the name it
compiles other covering cases instead, four times as many: python tests/test_compile.py sm_90 1
"""

import functools
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from attention_problems import CONFIGS, covering_cases, name_of

PINNED = f"triton=={triton.__version__}\n" in (Path(__file__).parents[1] / "constraints.txt").read_text()
# each takes a minute or two
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942") if PINNED else ("sm_90", "gfx942")


def combine_rounds(length, n_hashes, head_dim, dtype, n_heads=2):
    from lsh_kernels.csrc_triton.combine_rounds import combine_rounds

    lse = torch.zeros(1, n_heads, n_hashes, length)
    combine_rounds(torch.zeros(*lse.shape, head_dim, dtype=dtype), lse)


def attention_call(
    attend, length=1024, head_dim=64, dtype=torch.float16, causal=True, keys="shared", mask=False, dropout_p=0.0,
    value_dim=None, unaligned=False, hashed=True, scale=1.0, **fields,
):  # fmt: skip
    from lsh_kernels.config import AttentionOptions, LSHConfig
    from lsh_kernels.torch_backend import SortedRounds

    c = LSHConfig(**fields)
    options = AttentionOptions(
        list(c.factors(length)), hashed, c.span, c.window_length, c.chunk_length, c.chunks_before, c.chunks_after,
        c.within_bucket, c.dedupe, c.wrap, c.local_window, c.norm_eps, causal, dropout_p, scale,
    )  # fmt: skip
    n_heads = 4

    def rows(dim):
        return torch.zeros(1, n_heads, length, dim + unaligned, dtype=dtype)[..., :dim]

    query, key, value = rows(head_dim), rows(head_dim), rows(value_dim or head_dim)
    q_order, k_order = torch.zeros(2, 1, n_heads, c.n_hashes, length, dtype=torch.int32)
    padding = torch.zeros(1, length, dtype=torch.bool) if mask else None
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    k_rounds = (None, None) if keys == "shared" else (k_order, k_order)
    state = SortedRounds(q_order, q_order, *k_rounds)
    attend(query, None if keys == "shared" else key, value, padding, seed, state, options)


def attention_fwd(*args, keys="shared", **kwargs):
    from lsh_kernels.csrc_triton.attention_fwd import attention_fwd

    def attend(query, *rest):
        # as the hash kernel gives it
        norm = torch.zeros(query.shape[:3]) if keys == "shared" else None
        attention_fwd(query, *rest, norm)

    attention_call(attend, *args, keys=keys, **kwargs)


def attention_bwd(*args, in_place=None, **kwargs):
    from lsh_kernels.csrc_triton.attention_bwd import attention_bwd

    def attend(query, key, value, padding, seed, state, options):
        out, lse = query.new_zeros(*query.shape[:3], value.shape[3]), torch.zeros(query.shape[:3])
        attention_bwd(out, lse, query, key, value, padding, seed, out, lse, state, options, in_place)

    attention_call(attend, *args, **kwargs)


def attention_options(attend, config, padded, R, D, **rest):
    """A call in the words of the covering cases."""
    attend(head_dim=D, mask=padded, n_hashes=R, **{**rest, **CONFIGS[config]})


def hash_sort(length=1024, head_dim=64, dtype=torch.bfloat16, factors=(32, 64), mask=False):
    from lsh_kernels.csrc_triton.bucket_sort import sort_buckets
    from lsh_kernels.csrc_triton.hashing import hash_rows

    x, rotations = torch.zeros(1, 4, length, head_dim, dtype=dtype), torch.zeros(1, head_dim, 4, sum(factors) // 2)
    padding = torch.zeros(1, length, dtype=torch.bool) if mask else None
    buckets, _, tile_counts = hash_rows(x, rotations, factors, padding, 0.0)
    sort_buckets(buckets, math.prod(factors), 65, padding, tile_counts)
    sort_buckets(buckets.long(), 64, 65, padding)


def given_buckets(head_dim, dtype, mask=False):
    from lsh_kernels.csrc_triton.hashing import hash_rows

    x, buckets = torch.zeros(1, 4, 1024, head_dim, dtype=dtype), torch.zeros(1, 4, 4, 1024, dtype=torch.int32)
    hash_rows(x, None, (128, 256), torch.zeros(1, 1024, dtype=torch.bool) if mask else None, 0.0, buckets=buckets)


def inverse_norms(head_dim, dtype, mask=False):
    from lsh_kernels.csrc_triton.attention_fwd import inverse_norms

    padding = torch.zeros(1, 1024, dtype=torch.bool) if mask else None
    inverse_norms(torch.zeros(1, 4, 1024, head_dim, dtype=dtype), padding)


def sort_following_length(length):
    """As many buckets as n_buckets=None has at this length."""
    from lsh_kernels.config import default_factors
    from lsh_kernels.csrc_triton.bucket_sort import sort_buckets

    sort_buckets(torch.zeros(1, 4, 4, length, dtype=torch.int32), math.prod(default_factors(length, 64)), 65)


def residual(length=4096, dtype=torch.float32, undo=False):
    from lsh_kernels.csrc_triton.residual import residual_add

    residual_add(torch.zeros(length, dtype=torch.int32), torch.zeros(length, dtype=dtype), dtype, undo)


# what to call, on CPU tensors, and how many bytes one program has to fetch by 128-bit loads
LAUNCHES = {
    "combine_rounds-bf16-D64": (lambda: combine_rounds(4096, 4, 64, torch.bfloat16), 4 * 4096),
    "combine_rounds-bf16-D64-odd-length": (lambda: combine_rounds(1021, 4, 64, torch.bfloat16), 4 * 4096),
    "combine_rounds-fp32-D128": (lambda: combine_rounds(512, 4, 128, torch.float32), 4 * 4096),
    "combine_rounds-fp16-D256-17-rounds": (lambda: combine_rounds(128, 17, 256, torch.float16), 17 * 4096),
    "combine_rounds-fp32-D33": (lambda: combine_rounds(7, 3, 33, torch.float32), 0),
    "combine_rounds-fp16-all-sizes-1": (lambda: combine_rounds(1, 1, 1, torch.float16, n_heads=1), 0),
    "hash_sort-bf16-D64": (lambda: hash_sort(), 256 * 128),
    "hash_sort-fp16-D64-one-pass-masked": (lambda: hash_sort(dtype=torch.float16, factors=(128,), mask=True), 256 * 128),
    "hash_sort-fp16-D128-many-columns": (lambda: hash_sort(4096, 128, torch.float16, (128, 256)), 128 * 256),
    "hash_sort-bf16-D96-masked": (lambda: hash_sort(100, 96, mask=True), 128 * 192),
    "hash_sort-fp32-D64-masked": (lambda: hash_sort(dtype=torch.float32, mask=True), 64 * 256),
    "given_buckets-bf16-D64": (lambda: given_buckets(64, torch.bfloat16), 256 * 128),
    "given_buckets-fp16-D128-masked": (lambda: given_buckets(128, torch.float16, mask=True), 128 * 256),
    "inverse_norms-bf16-D64-masked": (lambda: inverse_norms(64, torch.bfloat16, mask=True), 64 * 128),
    "inverse_norms-fp16-D128": (lambda: inverse_norms(128, torch.float16), 32 * 256),
    "residual-fp32": (lambda: residual(), 2 * 4096),
    "residual-bf16-undo": (lambda: residual(dtype=torch.bfloat16, undo=True), 4096),
}

EVERYTHING = {"mask": True, "dropout_p": 0.1, "local_window": 8}
LOCAL = {"hashed": False, "span": "chunk", "within_bucket": False, "wrap": True, "dedupe": False, "n_hashes": 1}

# beside the covering cases: float32, many rounds, head dims far apart
ATTENTION = {
    "attention_fwd-fp16-D33-values-of-100-unaligned": lambda: attention_fwd(
        1021, 33, causal=False, keys="separate", value_dim=100, n_hashes=8, unaligned=True
    ),
    "attention_fwd-bf16-D64-17-rounds": lambda: attention_fwd(dtype=torch.bfloat16, n_hashes=17),
    "attention_fwd-fp32-D64-masked": lambda: attention_fwd(dtype=torch.float32, mask=True, local_window=8),
    "attention_fwd-fp32-D16-separate": lambda: attention_fwd(head_dim=16, dtype=torch.float32, keys="separate"),
    "attention_fwd-bf16-D64-local-chunks-wrapped": lambda: attention_fwd(dtype=torch.bfloat16, keys="separate", **LOCAL),
    "attention_bwd-bf16-D64-local-chunks-wrapped": lambda: attention_bwd(dtype=torch.bfloat16, keys="separate", **LOCAL),
    "attention_fwd-fp16-D128-negative-scale": lambda: attention_fwd(head_dim=128, scale=-1.0),
    "attention_bwd-fp32-D64": lambda: attention_bwd(dtype=torch.float32),
    "attention_bwd-fp32-D128-separate": lambda: attention_bwd(head_dim=128, dtype=torch.float32, keys="separate", n_hashes=8),
    "attention_bwd-fp32-D16-all": lambda: attention_bwd(head_dim=16, dtype=torch.float32, in_place=True, **EVERYTHING),
    "attention_bwd-fp16-D8-values-of-128-all": lambda: attention_bwd(
        head_dim=8, value_dim=128, n_hashes=8, in_place=True, **EVERYTHING
    ),
    "attention_bwd-bf16-D33-values-of-40-local-chunk-unaligned": lambda: attention_bwd(
        head_dim=33, value_dim=40, dtype=torch.bfloat16, local_window=8, dropout_p=0.1, span="chunk", causal=False, unaligned=True
    ),
    "attention_bwd-fp16-D50-unaligned": lambda: attention_bwd(head_dim=50, span="chunk", unaligned=True),
    "attention_fwd-bf16-D65-unaligned": lambda: attention_fwd(head_dim=65, dtype=torch.bfloat16),
    "attention_bwd-bf16-D65-separate-unaligned": lambda: attention_bwd(head_dim=65, dtype=torch.bfloat16, keys="separate"),
    "attention_bwd-bf16-D65-all-unaligned": lambda: attention_bwd(head_dim=65, dtype=torch.bfloat16, dedupe=False, **EVERYTHING),
    "attention_bwd-bf16-D64-separate-in-place": lambda: attention_bwd(
        dtype=torch.bfloat16, keys="separate", dedupe=False, in_place=True
    ),
    # ptxas, left to itself, spills on sm_90: with triton 3.6.0 in each, with 3.7.1 in the second
    "attention_fwd-bf16-D128-separate-local-chunk": lambda: attention_fwd(
        head_dim=128, dtype=torch.bfloat16, keys="separate", causal=False, n_hashes=8, local_window=8, span="chunk"
    ),
    "attention_bwd-bf16-D64-separate-masked-local-chunk": lambda: attention_bwd(
        dtype=torch.bfloat16, keys="separate", mask=True, n_hashes=1, local_window=8, span="chunk"
    ),
    "attention_bwd-bf16-D64-separate-masked-local-chunk-unaligned": lambda: attention_bwd(
        dtype=torch.bfloat16, keys="separate", mask=True, n_hashes=1, local_window=8, span="chunk", unaligned=True
    ),
}

# every pair of options, and each on every target: their combinations are thousands
COVERING = {
    "config": ["window", "chunk", "chunk-ahead", "bucket", "across", "wrap"],
    "keys": ["shared", "separate"],
    "causal": [False, True],
    "padded": [False, True],
    "dropout_p": [0.0, 0.1],
    "R": [1, 8, 12],
    "local_window": [0, 8],
    "dedupe": [False, True],
    "D": [8, 24, 64, 128],
    "value_dim": [None, 24, 128],
    "dtype": [torch.float16, torch.bfloat16],
    "unaligned": [False, True],
}


def covering_launches(target, targets=TARGETS, seed=0):
    """Like ATTENTION; of cases spread over `targets` those of one."""
    launches = {}
    for attend, factors in ((attention_fwd, COVERING), (attention_bwd, {**COVERING, "in_place": [False, True]})):
        for case in covering_cases({**factors, "target": targets}, seed):
            if case.pop("target") == target:
                name = f"{attend.__name__}-{name_of(case)}" + "-unaligned" * case["unaligned"]
                launches[name] = functools.partial(attention_options, attend, **case)
    return launches


@functools.cache
def attention_on(target):
    """What one target is asked to compile: beside its covering cases all of ATTENTION on sm_90, on others what is fp32."""
    own = {name: launch for name, launch in ATTENTION.items() if target == "sm_90" or "fp32-D64" in name}
    return own | covering_launches(target)


TENSOR_KERNELS = ("_attention_fwd_kernel", "_attention_bwd_kernel", "_hashing_fwd_kernel")

LENGTHS = (1, 2, 16, 28, 33, 100, 256, 500, 1000, 2048, 4096)

# the same call at any length
AT_LENGTH = {
    "combine_rounds": lambda length: combine_rounds(length, 4, 64, torch.bfloat16),
    "attention_fwd": attention_fwd,
    "attention_bwd": attention_bwd,
    "hash_sort": hash_sort,
    "sort_following_length": sort_following_length,
    "residual": residual,
}


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("target", TARGETS)
def test_compile_without_spills_and_with_wide_loads(target, launch):
    kernels = compiled(target)[launch]
    assert_no_spills(kernels)
    fetched = sum(kernel["bytes_by_wide_loads"] for kernel in kernels)
    assert fetched >= LAUNCHES[launch][1], f"{fetched} bytes by 128-bit loads: {kernels}"


@pytest.mark.parametrize(("target", "launch"), [(target, launch) for target in TARGETS for launch in attention_on(target)])
def test_compile_attention_without_spills_and_with_wide_gathers(target, launch):
    kernels = compiled(target)[launch]
    assert_no_spills(kernels)
    for kernel in kernels:
        assert kernel["row_bytes"] >= kernel["tile_bytes"], f"gathers have not been found: {kernel}"
        # in the backward of 8 and 16 dims tiles may have less than 16 bytes for each of 64 lanes
        few = target == "gfx942" and 0 < kernel["tile_bytes"] < 64 * 16
        if not launch.endswith("unaligned") and not few:
            assert kernel["wide_row_bytes"] >= 0.95 * kernel["row_bytes"], kernel


def assert_no_spills(kernels):
    assert kernels, "the launcher launched nothing"
    for kernel in kernels:
        assert not any(kernel["spills"].values()), kernel


@pytest.mark.parametrize("target", TARGETS)
def test_compile_multiplies_16_bit_tiles_on_tensor_cores(target):
    for launch, kernels in compiled(target).items():
        for kernel in kernels:
            if "fp32" not in launch and "given" not in launch and kernel["name"] in TENSOR_KERNELS:
                assert kernel["tensor_ops"] > 0 and not kernel["fma_dots"], f"{launch}: {kernel}"


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_compile_keeps_fp32_out_of_tf32(target):
    """Where the mask of a load comes from bytes, Triton 3.7 has overruled input_precision="ieee" on sm_100."""
    fp32 = [kernel for launch, kernels in compiled(target).items() if "fp32" in launch for kernel in kernels]
    assert fp32 and not any(kernel["tensor_ops"] for kernel in fp32)


@pytest.mark.parametrize("launcher", AT_LENGTH)
def test_compile_makes_few_variants_over_lengths(launcher):
    """Two beside that of length 1, or users wait for the compiler again and again (at head dims divisible by 16)."""
    kernels = compiled("sm_90")[launcher]
    assert len({kernel["hash"] for kernel in kernels}) <= 3 * len({kernel["name"] for kernel in kernels})


@functools.cache
def compiled(target):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, target], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compile_all(target, calls, at_length):
    """{name of the launch: [what each of its kernels came to]}; the launchers run, their kernels are only compiled."""
    from lsh_kernels import machine_code, offline

    def launches_of(launch, *args):
        with offline.compile_only(target) as launches:
            launch(*args)
        assert not any(launched.error for launched in launches), launches
        return launches

    def tile_bytes(arguments):
        """Of the rows that a program of attention owns, at least."""
        tile = arguments.get("TILE")
        return tile.M * min(tile.BLOCK_D, tile.BLOCK_DV) * arguments["q_ptr"].element_size() if tile else 0

    def describe(launched):
        code = codes[launched.kernel]
        return {
            "name": launched.name,
            "hash": launched.kernel.hash,
            "spills": {"stack": code.stack, "stores": code.spill_stores, "loads": code.spill_loads},
            "tensor_ops": code.static("tensor"),
            "fma_dots": code.fma_dots,
            "bytes_by_wide_loads": code.static("load_128"),
            "row_bytes": code.static("row_load"),
            "wide_row_bytes": code.static("row_load_128"),
            "tile_bytes": tile_bytes(launched.arguments),
        }

    made = {name: launches_of(launch) for name, launch in calls.items()}
    for name, launch in at_length.items():
        made[name] = [launched for length in LENGTHS for launched in launches_of(launch, length)]
    kernels = list({launched.kernel for launches in made.values() for launched in launches})
    codes = dict(zip(kernels, machine_code.inspect_all(kernels)))
    return {name: [describe(launched) for launched in launches] for name, launches in made.items()}


if __name__ == "__main__":
    # a kernel gone wrong can have LLVM fill the machine
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    target, *seeds = sys.argv[1:]
    calls = {name: launch for name, (launch, _) in LAUNCHES.items()} | attention_on(target)
    if seeds:
        calls = covering_launches(target, [target], int(seeds[0]))
    at_length = AT_LENGTH if target == "sm_90" and not seeds else {}
    print(json.dumps(compile_all(target, calls, at_length), indent=1))
