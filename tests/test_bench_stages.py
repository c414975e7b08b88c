"""The stages of the benchmark suite, beside what plain torch does and beside their floors."""

from dataclasses import replace

import peers
import pytest
import stages
import torch
from bench_folder import SETTINGS, run, shape_of

from lsh_kernels import LSHConfig, lsh_attention, random_rotations


def stage_calls(length=64):
    """{op: {provider: call}} of the stages at a tiny size."""
    settings = replace(SETTINGS, lengths=(length,))
    return {case.row["op"]: case for case in stages.cases(settings)}


def test_bench_stages_equal_their_torch_equivalents():
    found = {}
    for op, case in stage_calls().items():
        assert case.flops.keys() == case.bytes.keys() == case.builds.keys()
        for provider, build in case.builds.items():
            torch.manual_seed(2)
            found[op, provider] = build()()
    wanted = found["hash", "lsh_kernels torch"]
    assert torch.equal(found["hash", "matmul + argmax"], wanted) and torch.equal(found["hash", "lsh_kernels triton"], wanted)
    wanted = found["sort", "lsh_kernels torch"]
    for provider in ("lsh_kernels triton", "torch.sort int16", "torch.sort int32"):
        assert torch.equal(found["sort", provider].int(), wanted), provider
    for op, providers in {
        "combine": ("lsh_kernels triton", "softmax + sum"), "attention backward": ("lsh_kernels triton",),
        "residual": ("lsh_kernels triton",),
    }.items():  # fmt: skip
        for provider in providers:
            torch.testing.assert_close(found[op, provider], found[op, "lsh_kernels torch"], rtol=1e-4, atol=1e-4)
    (out, lse), (wanted, wanted_lse) = (found["attention", f"lsh_kernels {backend}"] for backend in ("triton", "torch"))
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)
    # where a round has nothing for a query its row is not defined
    torch.testing.assert_close(out[lse > -torch.inf], wanted[lse > -torch.inf], rtol=1e-4, atol=1e-4)
    assert (
        found["attention", "gather + bmm"].shape == (1, 2, 2, 4, 16, 16) and found["attention", "gather + bmm"].isfinite().all()
    )
    gradients = found["attention backward", "gather + bmm"]
    assert [x.shape for x in gradients] == [(1, 2, 64, 16)] * 2 and all(x.isfinite().all() for x in gradients)
    for one, other in zip(found["residual", "round + add"], found["residual", "lsh_kernels torch"]):
        assert torch.equal(one, other)
    # the sum of a row and itself, on the grid
    assert torch.allclose(found["residual", "lsh_kernels torch"][1], 2 * peers.tensors("gaussian", shape_of(64))[0], atol=1e-4)


def test_bench_stages_backward_is_autograds():
    """From the same rotations as our attention of the suite's inputs."""
    torch.manual_seed(2)
    found = stage_calls()["attention backward"].builds["lsh_kernels torch"]()()
    torch.manual_seed(2)
    query, _, value = (x.requires_grad_() for x in peers.tensors("gaussian", shape_of(64)))
    config = LSHConfig(n_hashes=2, chunk_length=16)
    rotations = random_rotations(16, config.factors(64), 2, n_heads=2)
    out = lsh_attention(query, None, value, config=config, rotations=rotations, is_causal=True)
    torch.testing.assert_close(found, torch.autograd.grad(out.sum(), (query, value)))


def test_bench_stages_count_their_work():
    """By hand: L = 64, R = 2, N = 8, C = 16, D = 16, two heads."""
    cases = stage_calls()
    work = {op: (case.flops["lsh_kernels torch"], case.bytes["lsh_kernels torch"]) for op, case in cases.items()}
    assert work["hash"] == (2 * 2 * 64 * 16 * 8, 2 * 64 * (64 + 8))
    assert work["sort"] == (0, 2 * 2 * 64 * 8)
    assert work["attention"] == (2 * 64 * 2 * 16 * 4 * 16, 2 * 64 * (2 * 64 + 8 + 2 * (64 + 4)))
    assert work["combine"] == (0, 2 * 64 * 3 * 68)
    assert work["attention backward"] == (5 * 64 * 2 * 16 * 4 * 16, 2 * 64 * (6 * 64 + 8 + 4))
    assert work["residual"] == (0, 2 * 64 * 16 * 16)


def test_bench_stages_rows_have_a_roofline(tmp_path):
    options = ["--suite", "stages", "--quick", "--providers", "lsh_kernels torch", "torch.sort int16"]
    _, rows = run(tmp_path / "rows.csv", *options)
    assert [row["op"] for row in rows] == ["attention", "hash", "sort", "sort", "combine", "attention backward", "residual"]
    assert [row["mode"] for row in rows if row["mode"] != "forward"] == ["backward"]
    for row in rows:
        floor = floor_of(row)
        assert float(row["roofline"]) == pytest.approx(floor / float(row["ms_p50"]), rel=1e-2)


def floor_of(row):
    """ms, from the row's own rates."""
    case = stage_calls()[row["op"]]
    by_copy = case.bytes[row["provider"]] / float(row["copy_gbs"]) / 1e6
    return max(by_copy, case.flops[row["provider"]] / float(row["matmul_gflops"]) / 1e6)
