"""The peers of the benchmark suite: set up alike, they agree where they compute the same."""

import os
import shutil

import peers
import pytest
import torch
from bench_folder import shape_of
from cases import AbsentError


def test_bench_our_backends_agree():
    found = {}
    for name in ("lsh_kernels torch", "lsh_kernels triton"):
        torch.manual_seed(1)
        found[name] = peers.build_call(peers.PEERS[name], shape_of(48))()()
    torch.testing.assert_close(*found.values(), rtol=1e-5, atol=1e-5)


def test_bench_exact_peers_agree():
    shape = shape_of(48, backward=True)
    torch.manual_seed(1)
    flash = peers.build_call(peers.PEERS["SDPA flash"], shape)()()
    torch.manual_seed(1)
    math = peers.build_call(peers.PEERS["SDPA math"], shape)()()
    torch.testing.assert_close(flash, math, rtol=1e-4, atol=1e-5)


def test_bench_flex_sees_as_many_keys_as_rounds_of_chunks():
    shape = shape_of(320, R=3, C=50)
    mask = peers.sliding_window(shape)
    i, j = torch.arange(320)[:, None], torch.arange(320)[None, :]
    wanted = (j <= i) & (j >= i - 150)
    blocks = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)[:320, :320]
    assert torch.equal(mask.mask_mod(0, 0, i, j) & blocks, wanted)
    assert mask.seq_lengths == (320, 320) and wanted.sum(1).max() == 3 * 50 + 1


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_bench_flex_on_a_cpu_equals_sdpa_with_a_window():
    shape = shape_of(160, R=2, C=20)
    query, key, value = peers.tensors("gaussian", shape)
    i, j = torch.arange(160)[:, None], torch.arange(160)[None, :]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=(j <= i) & (j >= i - 40))
    with torch.no_grad():
        found = peers.PEERS["FlexAttention window"](shape)(query, key, value)
    torch.testing.assert_close(found, wanted)


def test_bench_flex_on_a_cpu_says_what_it_lacks(monkeypatch):
    with pytest.raises(AbsentError, match="no backward"):
        peers.flex(shape_of(32, backward=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(AbsentError, match="needs a C"):
        peers.flex(shape_of(32))


@pytest.mark.parametrize("name", ["reformer-pytorch", "Hugging Face"])
def test_bench_hashing_peers_take_the_same_tensors(name):
    """Each row of the output is a mean of values of its own head at positions up to its own. Both round off about 0.3% where a
    row has no key but its own."""
    shape = shape_of(64)
    query, key, value = peers.tensors("gaussian", shape)
    attend = peers.PEERS[name](shape)
    value = torch.arange(64.0)[None, None, :, None] + 64 * torch.arange(2.0)[None, :, None, None] + 0 * value
    with torch.no_grad():
        out = attend(query, key, value)
    assert out.shape == value.shape
    assert ((out <= value + 1) & (out >= value[:, :, :1] - 1)).all()
    assert (out[:, :, -1] < value[:, :, -1] - 4).all()


def test_bench_inputs_are_what_they_say():
    shape = shape_of(256, D=64)
    for kind, least, most in (("gaussian", -0.2, 0.2), ("clustered", 0.05, 0.7), ("equal", 0.999, 1.001)):
        query, key, value = peers.tensors(kind, shape)
        unit = torch.nn.functional.normalize(query[0, 0], dim=-1)
        similar = (unit @ unit.T).mean().item()
        assert least < similar < most, (kind, similar)
        assert value.std() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="uniform"):
        peers.tensors("uniform", shape)
