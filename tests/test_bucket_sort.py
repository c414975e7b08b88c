import math

import pytest
import torch
import triton
import triton.language as tl

from lsh_kernels import reference, torch_backend
from lsh_kernels.config import AttentionOptions
from lsh_kernels.csrc_triton.bucket_sort import bucket_sort, sort_buckets
from lsh_kernels.csrc_triton.hashing import hash_rows

library_sort = tl.sort


def assert_sorts(buckets, n_buckets, mask=None, stretch=65):
    """`order` and `stretched`, exactly: the oracle's stable sort, and slot + bucket * stretch from its inverse."""
    order, stretched = sort_buckets(buckets, n_buckets, stretch, mask)
    want = reference.bucket_sort(buckets, n_buckets, mask)
    assert order.dtype == stretched.dtype == torch.int32
    assert torch.equal(order, want)
    bucket = buckets.long().clamp(0, n_buckets - 1)
    bucket = bucket if mask is None else bucket.masked_fill(mask[:, None, None, :], n_buckets)
    assert torch.equal(stretched, (want.argsort(-1) + bucket * stretch).int())
    return order


def random_mask(B, L, device):
    return torch.rand(B, L, device=device) < 0.3


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("n_buckets", [2, 64, 256, 258, 512, 2048, 32_768])
@pytest.mark.parametrize("L", [1, 7, 64, 100, 257, 512])
def test_bucket_sort_is_the_references(L, n_buckets, has_padding, device, guard_zones):
    mask = random_mask(1, L, device) if has_padding else None
    assert_sorts(torch.randint(n_buckets, (1, 1, 2, L), device=device), n_buckets, mask)
    guard_zones()


@pytest.mark.parametrize("n_buckets", [256, 32_768])
def test_bucket_sort_carries_offsets_over_many_tiles(n_buckets, device):
    """More tiles than the scan takes at once."""
    assert_sorts(torch.randint(n_buckets, (1, 1, 1, 2500), device=device), n_buckets, random_mask(1, 2500, device))


@pytest.mark.parametrize("n_buckets", [64, 4096])
def test_bucket_sort_keeps_batch_heads_and_rounds_apart(n_buckets, device, guard_zones):
    buckets = torch.randint(n_buckets, (2, 3, 2, 300), device=device, dtype=torch.int32)
    assert_sorts(buckets, n_buckets, random_mask(2, 300, device))
    guard_zones()


@pytest.mark.parametrize("n_buckets", [128, 32_768])
def test_bucket_sort_with_the_librarys_own_sort(n_buckets, device, monkeypatch):
    monkeypatch.setattr(tl, "sort", library_sort)
    assert_sorts(torch.randint(n_buckets, (1, 1, 1, 300), device=device), n_buckets, random_mask(1, 300, device))


@pytest.mark.parametrize("n_buckets", [8, 1024])
def test_bucket_sort_is_stable(n_buckets, device):
    """Three values over many tiles: inside a bucket positions ascend."""
    buckets = (torch.randint(3, (1, 1, 1, 1500), device=device) * n_buckets) // 3
    order = assert_sorts(buckets, n_buckets).long()
    sorted_buckets = buckets.gather(-1, order)
    same = sorted_buckets[..., 1:] == sorted_buckets[..., :-1]
    assert (sorted_buckets.diff() >= 0).all() and (order.diff()[same] > 0).all()


@pytest.mark.parametrize("n_buckets", [2, 256, 1000, 32_768])
@pytest.mark.parametrize("bucket", [0, 1, -1])
def test_bucket_sort_of_one_bucket_is_the_identity(bucket, n_buckets, device):
    buckets = torch.full((1, 1, 1, 600), bucket % n_buckets, device=device)
    order = assert_sorts(buckets, n_buckets)
    assert torch.equal(order.flatten(), torch.arange(600, dtype=torch.int32, device=device))
    assert_sorts(buckets, n_buckets, random_mask(1, 600, device))


@pytest.mark.parametrize("n_buckets", [64, 512])
def test_bucket_sort_puts_padding_last_and_in_order(n_buckets, device):
    mask = torch.zeros(2, 300, dtype=torch.bool, device=device)
    mask[0, ::3] = True
    mask[1] = True
    order = assert_sorts(torch.randint(n_buckets, (2, 1, 1, 300), device=device), n_buckets, mask)
    assert torch.equal(order[0, 0, 0, -100:], torch.arange(0, 300, 3, dtype=torch.int32, device=device))
    assert torch.equal(order[1, 0, 0], torch.arange(300, dtype=torch.int32, device=device))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n_buckets", [6, 256, 32_768])
def test_bucket_sort_clamps_hostile_ids(n_buckets, dtype, device, guard_zones):
    info = torch.iinfo(dtype)
    hostile = torch.tensor([info.min, -1, 0, n_buckets - 1, n_buckets, n_buckets + 1, 2**24, 2**31 - 1, info.max])
    buckets = hostile[torch.randint(len(hostile), (1, 2, 2, 300))].to(device, dtype)
    assert_sorts(buckets, n_buckets)
    assert_sorts(buckets, n_buckets, random_mask(1, 300, device))
    guard_zones()


@pytest.mark.parametrize("n_buckets", [64, 2048])
def test_bucket_sort_reads_any_strides(n_buckets, device):
    buckets = torch.randint(n_buckets, (70, 2, 3, 2), device=device).permute(3, 2, 1, 0)
    assert_sorts(buckets, n_buckets, random_mask(70, 2, device).T)


@pytest.mark.parametrize("factors", [[64], [256], [32, 64], [128, 256]])
@pytest.mark.parametrize("has_padding", [False, True])
def test_bucket_sort_with_the_counts_of_the_hash_is_the_torch_backends(factors, has_padding, device, guard_zones):
    x, rotations = torch.randn(2, 2, 300, 16, device=device), torch.randn(1, 16, 2, sum(factors) // 2, device=device)
    mask = random_mask(2, 300, device) if has_padding else None
    buckets, _, tile_counts = hash_rows(x, rotations, factors, mask, None)
    order, stretched = sort_buckets(buckets, math.prod(factors), 65, mask, tile_counts)
    fields = dict.fromkeys(AttentionOptions._fields) | {"factors": factors, "window": 64}
    want = torch_backend.sort_rounds(buckets, None, mask, AttentionOptions(**fields))
    assert torch.equal(order, want.q_order) and torch.equal(stretched, want.q_stretched)
    guard_zones()


@pytest.mark.parametrize(("n_buckets", "n_launches"), [(256, 3), (512, 6), (32_768, 6)])
def test_bucket_sort_and_hash_take_few_launches(n_buckets, n_launches, device, monkeypatch):
    """Of the 6 and 9 that a whole forward may take."""
    launched = []
    launch = triton.runtime.jit.KernelInterface.__getitem__
    monkeypatch.setattr(
        triton.runtime.jit.KernelInterface, "__getitem__", lambda self, grid: launched.append(self) or launch(self, grid)
    )
    x, rotations = torch.randn(1, 1, 50, 16, device=device), torch.randn(1, 16, 1, n_buckets // 2, device=device)
    buckets, _, tile_counts = hash_rows(x, rotations, (n_buckets,), None, 0.0)
    sort_buckets(buckets, n_buckets, 65, None, tile_counts)
    assert len(launched) == n_launches


def test_bucket_sort_is_equal_from_run_to_run_and_in_a_batch(device):
    buckets, mask = torch.randint(700, (3, 2, 2, 270), device=device), random_mask(3, 270, device)
    order = bucket_sort(buckets, 700, mask)
    assert torch.equal(order, bucket_sort(buckets, 700, mask))
    assert torch.equal(order[1:2], bucket_sort(buckets[1:2], 700, mask[1:2]))


def test_bucket_sort_of_an_empty_batch_is_empty(device):
    order = bucket_sort(torch.zeros(0, 2, 3, 5, dtype=torch.int32, device=device), 512)
    assert order.shape == (0, 2, 3, 5) and order.dtype == torch.int32


IDS = torch.zeros(1, 2, 3, 9, dtype=torch.int32)


@pytest.mark.parametrize(
    ("buckets", "n_buckets", "mask", "error", "message"),
    [
        (IDS[0], 8, None, ValueError, "buckets: got .*wanted .B, H, R, L."),
        (IDS[..., :0], 8, None, ValueError, "buckets: got .*1 <= L"),
        (IDS.short(), 8, None, TypeError, "buckets: got torch.int16"),
        (IDS, 0, None, ValueError, "n_buckets: got 0"),
        (IDS, 2**15 + 2, None, ValueError, "n_buckets: got 32770"),
        (IDS, 8, torch.zeros(1, 9), ValueError, "key_padding_mask: got torch.float32 .*wanted bool .1, 9."),
        (IDS, 8, torch.zeros(2, 9).bool(), ValueError, "key_padding_mask: got .*wanted bool .1, 9."),
        (IDS, 8, torch.zeros(1, 9, device="meta").bool(), ValueError, "key_padding_mask: got a tensor on meta"),
    ],
)
def test_bucket_sort_refuses(buckets, n_buckets, mask, error, message):
    with pytest.raises(error, match=message):
        bucket_sort(buckets, n_buckets, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("n_buckets", [2, 256, 2048, 32_768])
@pytest.mark.parametrize("L", [4096, 65_537, 2**20])
def test_bucket_sort_of_long_sequences(L, n_buckets, device):
    buckets = torch.randint(n_buckets, (1, 2, 4, L), device=device, dtype=torch.int32)
    assert_sorts(buckets, n_buckets)
    assert_sorts(buckets, n_buckets, random_mask(1, L, device))


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("n_buckets", [64, 32_768])
def test_bucket_sort_addresses_in_64_bits_and_takes_the_longest_length(n_buckets, device):
    buckets = torch.randint(n_buckets, (1, 3, 43, 2**24), device=device, dtype=torch.int32)
    assert buckets.numel() > 2**31
    order, stretched = sort_buckets(buckets, n_buckets, 65)
    for h, r in ((0, 0), (1, 42), (2, 42)):
        want = buckets[0, h, r].sort(stable=True).indices
        assert torch.equal(order[0, h, r], want.int())
        assert torch.equal(stretched[0, h, r], (want.argsort() + buckets[0, h, r].long() * 65).int())
