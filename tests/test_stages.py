"""The stages of `lsh_attention` one by one, by their public names."""

import pytest
import torch

from lsh_kernels import LSHConfig, lsh_attention, random_rotations
from lsh_kernels.stages import attention_rounds, bucket_sort, combine_rounds, lsh_hash, sort_rounds

BACKENDS = ["torch", "triton"]
CONFIGS = {
    "window": LSHConfig(n_hashes=3, n_buckets=4, window=7, local_window=3),
    "factored": LSHConfig(n_hashes=2, n_buckets=(4, 6), span="bucket", dedupe=False),
    "paper": LSHConfig.paper(n_hashes=2, chunk_length=16),
    "trax": LSHConfig.trax(n_hashes=2, n_buckets=4, chunk_length=16),
}


def staged(query, key, value, rotations, config, mask, is_causal, backend):
    """hash, sort, attend, combine, and what the rounds held."""
    n_buckets = config.factors(value.shape[2])
    buckets = lsh_hash(query, rotations, n_buckets, backend=backend)
    order = bucket_sort(buckets, n_buckets, mask if key is None else None, backend=backend)
    if key is not None:
        buckets = buckets, lsh_hash(key, rotations, n_buckets, backend=backend)
        order = order, bucket_sort(buckets[1], n_buckets, mask, backend=backend)
    rounds = sort_rounds(order, buckets, config=config, key_padding_mask=mask)
    parts = attention_rounds(
        query, key, value, rounds, config=config, is_causal=is_causal, key_padding_mask=mask, backend=backend
    )
    return *combine_rounds(*parts, backend=backend), parts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", ["shared", "separate", "grouped"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_stages_compose_to_the_attention(name, padded, keys, backend, device):
    """But for queries without a candidate, which the whole has attend themselves."""
    B, H, L, D, config = 1, 2, 50, 16, CONFIGS[name]
    query = torch.randn(B, L, H, D, device=device).transpose(1, 2)
    value = torch.randn(B, 1 if keys == "grouped" else H, L, 24, device=device)
    key = None if keys == "shared" else torch.randn(*value.shape[:3], D, device=device)
    mask = torch.rand(B, L, device=device) < 0.3 if padded else None
    rotations = random_rotations(D, config.factors(L), config.n_hashes, n_heads=value.shape[1], device=device)
    is_causal = name != "trax"
    out, lse, (part_out, part_lse) = staged(query, key, value, rotations, config, mask, is_causal, backend)
    n_rounds = config.n_hashes + (config.local_window > 0)
    assert part_out.shape == (B, H, n_rounds, L, 24) and part_lse.shape == (B, H, n_rounds, L)
    want, want_lse = lsh_attention(
        query, key, value, config=config, is_causal=is_causal, key_padding_mask=mask, rotations=rotations, return_lse=True,
        backend=backend,
    )  # fmt: skip
    found = lse > -torch.inf
    assert 0.4 < found.double().mean()
    torch.testing.assert_close(out[found], want[found], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[found], want_lse[found], rtol=1e-5, atol=1e-5)
    assert not out[~found].any()
    if keys == "shared":
        assert torch.equal(found, want_lse > -1e4)


@pytest.mark.parametrize("keys", ["shared", "separate"])
def test_stages_agree_round_by_round(keys, device):
    qk, k, v = torch.randn(3, 1, 2, 60, 16, device=device)
    key, config = None if keys == "shared" else k, CONFIGS["window"]
    rotations = random_rotations(16, 4, 3, device=device)
    mask = torch.rand(1, 60, device=device) < 0.3
    (_, _, (out, lse)), (_, _, (true_out, true_lse)) = (
        staged(qk, key, v, rotations, config, mask, True, backend) for backend in BACKENDS[::-1]
    )
    assert torch.equal(lse > -torch.inf, true_lse > -torch.inf)
    torch.testing.assert_close(lse, true_lse, rtol=1e-5, atol=1e-5)
    found = lse > -torch.inf
    torch.testing.assert_close(out[found], true_out[found], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_pass_opcheck_and_have_no_gradient(backend, device):
    qk, v = torch.randn(2, 1, 2, 12, 8, device=device)
    config = LSHConfig(n_hashes=2, n_buckets=4, local_window=2)
    buckets = torch.randint(4, (1, 2, 2, 12), device=device)
    rounds = sort_rounds(bucket_sort(buckets, 4), buckets, config=config)
    options = config.options((4,), is_causal=True, dropout_p=0.0, scale=1.0)
    state = rounds.q_order, rounds.q_stretched, None, None
    if backend == "torch":
        # rows that nobody reads are left unwritten, and differ between runs
        torch.library.opcheck(torch.ops.lsh_kernels.attention_rounds.default, (qk, None, v, None, *state, *options, backend))
    out, _ = attention_rounds(qk.requires_grad_(), None, v, rounds, config=config, backend=backend)
    with pytest.raises(NotImplementedError, match="train with lsh_attention"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_of_an_empty_batch_are_empty(backend, device):
    qk, v = torch.randn(2, 0, 2, 12, 8, device=device)
    buckets = torch.zeros(0, 2, 3, 12, dtype=torch.int32, device=device)
    rounds = sort_rounds(bucket_sort(buckets, 4, backend=backend), buckets, config=LSHConfig(n_buckets=4))
    out, lse = attention_rounds(qk, None, v, rounds, config=LSHConfig(n_buckets=4), backend=backend)
    assert out.shape == (0, 2, 3, 12, 8) and lse.shape == (0, 2, 3, 12)


IDS, ORDER = torch.zeros(1, 2, 3, 12, dtype=torch.int32), torch.arange(12, dtype=torch.int32).expand(1, 2, 3, 12)


@pytest.mark.parametrize(
    ("order", "buckets", "mask", "error", "message"),
    [
        (ORDER, [[0]], None, TypeError, "buckets: got list, wanted a pair of tensors"),
        (ORDER, (IDS, IDS), None, TypeError, "order: got Tensor, wanted a pair"),
        (None, IDS, None, TypeError, "order: got NoneType, wanted a tensor"),
        (ORDER, IDS.short(), None, TypeError, "buckets: got torch.int16"),
        (ORDER, IDS[0], None, ValueError, "buckets: got shape .2, 3, 12."),
        (ORDER.long(), IDS, None, ValueError, "order: got torch.int64"),
        (ORDER[..., :9], IDS, None, ValueError, "order: got .*9. on cpu, wanted torch.int32 .1, 2, 3, 12."),
        (ORDER, IDS, torch.zeros(1, 9).bool(), ValueError, "key_padding_mask: got shape .1, 9., wanted .1, 12."),
    ],
)
def test_stages_refuse_to_sort(order, buckets, mask, error, message):
    with pytest.raises(error, match=message):
        sort_rounds(order, buckets, key_padding_mask=mask)


def test_stages_refuse_rounds_that_do_not_fit():
    x, rounds = torch.randn(1, 2, 12, 8), sort_rounds(ORDER, IDS)
    for call, error, message in (
        (lambda: attention_rounds(x, None, x, ORDER), TypeError, "rounds: got Tensor, wanted the SortedRounds"),
        (lambda: attention_rounds(x, x, x, rounds), ValueError, "rounds: got those of shared QK, wanted those of separate keys"),
        (lambda: attention_rounds(x[:, :1], None, x[:, :1], rounds), ValueError, "rounds.q_order: got .1, 2, 3, 12."),
        (lambda: attention_rounds(x, x[:, :, :9], x[:, :, :9], rounds, is_causal=True), ValueError, "is_causal=True: got query"),
        (lambda: attention_rounds(x, None, x, rounds, scale="1"), TypeError, "scale: got '1'"),
    ):
        with pytest.raises(error, match=message):
            call()
