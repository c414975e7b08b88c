import math

import pytest
import torch

from lsh_kernels import reference
from lsh_kernels.csrc_triton.hashing import hash_rows, lsh_hash

# the interpreter computes with NumPy, which remarks on NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.float16, BF16]
# how exactly x meets the rotations: fp32 sums, and 22 or 16 bits of a rotation, with a factor of 4 to spare
PRECISION = {torch.float32: 2**-20, torch.float16: 2**-19, torch.bfloat16: 2**-14}

# B, H, rotation heads, L, D, R, factors
SHAPES = [
    pytest.param(2, 2, 1, 64, 64, 4, (32,), id="tidy"),
    pytest.param(1, 4, 2, 257, 24, 2, (16, 32), id="grouped"),
    pytest.param(1, 2, 2, 100, 96, 3, (10, 6, 4), id="rotation-per-head"),
    pytest.param(1, 1, 1, 512, 128, 2, (128,), id="D-128"),
    pytest.param(1, 2, 1, 7, 5, 8, (2,), id="D-5-two-buckets"),
    pytest.param(2, 1, 1, 1, 16, 1, (6,), id="one-token"),
    pytest.param(1, 1, 1, 70, 256, 1, (32, 64), id="D-256"),
    pytest.param(1, 1, 1, 40, 33, 2, (1002,), id="many-columns"),
    pytest.param(1, 1, 1, 9, 1, 2, (256, 128), id="D-1"),
]


def integers(*size, low=-3, high=3):
    """Small integers: their products and sums are exact in every dtype, and ties are plenty."""
    return torch.randint(low, high + 1, size).float()


def near_ties(x, rotations, factors):
    """Which rows [B, H, R, L] could get another bucket by rounding; float64."""
    precision = PRECISION[x.dtype]
    rotations = rotations.double().repeat_interleave(x.shape[1] // rotations.shape[0], dim=0)
    y = torch.einsum("bhld,hdrw->bhrlw", x.double(), rotations)
    reach = torch.einsum("bhld,hdrw->bhrlw", x.double().abs(), rotations.abs()).amax(-1)
    near, column = torch.zeros(reach.shape, dtype=torch.bool, device=x.device), 0
    for n in factors:
        part = y[..., column : column + n // 2]
        top = torch.cat([part, -part], -1).topk(2, -1).values
        near |= top[..., 0] - top[..., 1] <= 2 * precision * reach
        column += n // 2
    return near


def with_padding(buckets, n_buckets, mask):
    return buckets if mask is None else buckets.masked_fill(mask[:, None, None, :], n_buckets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "Hr", "L", "D", "R", "factors"), SHAPES)
def test_hashing_is_the_first_argmax_where_arithmetic_is_exact(B, H, Hr, L, D, R, factors, dtype, device, guard_zones):
    x = integers(B, H, L, D).to(device, dtype)
    rotations = integers(Hr, D, R, sum(factors) // 2).to(device)
    buckets = lsh_hash(x, rotations, factors)
    assert buckets.dtype == torch.int32
    assert torch.equal(buckets, reference.lsh_hash(x, rotations, factors))
    guard_zones()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "Hr", "L", "D", "R", "factors"), SHAPES[:5])
def test_hashing_of_gaussians_is_the_references_but_for_near_ties(B, H, Hr, L, D, R, factors, dtype, device):
    x = torch.randn(B, H, L, D, device=device).to(dtype)
    rotations = torch.randn(Hr, D, R, sum(factors) // 2, device=device)
    near = near_ties(x, rotations, factors)
    assert near.double().mean() < (0.05 if dtype == torch.bfloat16 else 0.01)
    differs = lsh_hash(x, rotations, factors) != reference.lsh_hash(x, rotations, factors)
    assert not (differs & ~near).any()


def test_hashing_is_scale_free(device):
    x = torch.randn(1, 2, 100, 16, device=device)
    rotations = torch.randn(1, 16, 2, 16, device=device)
    assert torch.equal(lsh_hash(x, rotations, (32,)), lsh_hash(x * 2**-60, rotations, (32,)))


def test_hashing_breaks_ties_towards_the_lowest_index(device):
    """[y ; -y] has its maximum at y_1, at y_3 and, negated, at y_0; then only at the negated y_2; then everywhere."""
    y = torch.tensor([[-2.0, 2.0, 1.0, 2.0], [0.0, 1.0, -3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 1.0, -1.0, 1.0]])
    buckets = lsh_hash(y[None, None].to(device), torch.eye(4, device=device)[None, :, None, :], (8,))
    assert buckets.flatten().tolist() == [1, 6, 0, 1]


@pytest.mark.parametrize("factors", [(6,), (1002,), (4, 16)])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_hashing_keeps_non_finite_rows_in_range_and_to_themselves(poison, factors, device):
    x = torch.randn(1, 2, 50, 20, device=device)
    rotations = torch.randn(1, 20, 3, sum(factors) // 2, device=device)
    clean = lsh_hash(x, rotations, factors)
    x[:, :, 7] = poison
    x[:, :, 20, 3] = poison
    buckets = lsh_hash(x, rotations, factors)
    assert 0 <= buckets.min() and buckets.max() < math.prod(factors)
    rows = [i for i in range(50) if i not in (7, 20)]
    assert torch.equal(buckets[..., rows], clean[..., rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_hashing_reads_any_strides(dtype, device):
    """Heads of a projection [B, L, H, D], as a view; what lies between the rows is NaN."""
    B, H, L, D = 2, 3, 70, 24
    x = torch.full((B, L, H, D + 8), torch.nan, dtype=dtype, device=device)[..., 4 : 4 + D].transpose(1, 2)
    x.copy_(integers(B, H, L, D))
    rotations = integers(1, D, 2, 8).to(device)
    assert torch.equal(lsh_hash(x, rotations, (16,)), lsh_hash(x.contiguous(), rotations, (16,)))
    rotations = rotations.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(lsh_hash(x, rotations, (16,)), reference.lsh_hash(x, rotations, (16,)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels on the CPU: the sparse tensor is a file mapping")
@pytest.mark.parametrize("dim", range(3), ids=["batch", "head", "row"])
def test_hashing_addresses_its_input_in_64_bits(dim, tmp_path):
    """index * stride passes 2^31 elements in one dimension; what lies in between is a hole in a sparse file."""
    x = integers(3, 3, 3, 16).half()
    strides = list(x.stride())
    strides[dim] = 2**30 + 16
    n_elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    far = torch.from_file(str(tmp_path / "x"), shared=True, size=n_elements, dtype=x.dtype).as_strided(x.shape, strides)
    rotations = integers(1, 16, 2, 8)
    assert torch.equal(lsh_hash(far.copy_(x), rotations, (16,)), lsh_hash(x, rotations, (16,)))


@pytest.mark.parametrize("norm_eps", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hashing_gives_inverse_norms(dtype, norm_eps, device):
    x = 3 * torch.randn(2, 2, 130, 40, device=device).to(dtype)
    x[0, 1, 5] = 0.0
    _, inverse_norm, _ = hash_rows(x, torch.randn(1, 40, 1, 4, device=device), (8,), None, norm_eps)
    assert inverse_norm.dtype == torch.float32 and inverse_norm.shape == x.shape[:3]
    square = x.double().square().sum(-1)
    want = torch.where(square == 0, 0.0, (square + 40 * norm_eps).rsqrt())
    assert torch.allclose(inverse_norm.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factors", [(16,), (32, 64)])
def test_hashing_of_padded_rows_ignores_what_they_hold(factors, device, guard_zones):
    n_buckets = math.prod(factors)
    x, mask = torch.randn(2, 2, 90, 16, device=device), torch.rand(2, 90, device=device) < 0.4
    mask[1] = True
    rotations = torch.randn(1, 16, 2, sum(factors) // 2, device=device)
    want = with_padding(lsh_hash(x, rotations, factors), n_buckets, mask)
    norm = hash_rows(x, rotations, factors, None, 0.0)[1].masked_fill(mask[:, None, :], 0.0)
    for poison in (torch.nan, torch.inf):
        x = torch.where(mask[:, None, :, None], poison, x)
        buckets, inverse_norm, _ = hash_rows(x, rotations, factors, mask, 0.0)
        assert torch.equal(buckets, want) and torch.equal(inverse_norm, norm)
    guard_zones()


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [(2,), (64,), (256,), (32, 64), (128, 256)])
def test_hashing_counts_the_first_digit_per_tile(factors, dtype, has_padding, device):
    n_buckets = math.prod(factors)
    x = integers(1, 2, 300, 16).to(device, dtype)
    mask = torch.rand(1, 300, device=device) < 0.3 if has_padding else None
    buckets, _, (counts, block_m) = hash_rows(x, integers(1, 16, 3, sum(factors) // 2).to(device), factors, mask, None)
    n_bins = counts.shape[-1]
    assert counts.dtype == torch.int32 and counts.shape[:4] == (1, 2, 3, math.ceil(300 / block_m))
    # up to 256 buckets the digit is the bucket, above it is its low half
    bits = (n_buckets + has_padding - 1).bit_length()
    digits = buckets if n_buckets <= 256 else buckets % 2 ** (bits // 2)
    for tile, got in enumerate(counts.unbind(3)):
        one_hot = digits[..., tile * block_m : (tile + 1) * block_m, None] == torch.arange(n_bins, device=device)
        assert torch.equal(got, one_hot.sum(-2).int())


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("factors", [(6,), (32, 64)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hashing_counts_buckets_that_are_given(dtype, factors, has_padding, device, guard_zones):
    """With norms and counts as if it had hashed them itself; ids out of range count as they are clamped."""
    x, rotations = torch.randn(2, 2, 300, 16, device=device), torch.randn(1, 16, 3, sum(factors) // 2, device=device)
    mask = torch.rand(2, 300, device=device) < 0.3 if has_padding else None
    _, norm, (counts, _) = hash_rows(x, rotations, factors, mask, 1e-2)
    given = lsh_hash(x, rotations, factors).to(dtype)
    given = torch.where(given == 0, torch.iinfo(dtype).min, torch.where(given == math.prod(factors) - 1, 2**30, given))
    given = given.transpose(1, 2).contiguous().transpose(1, 2)
    got, got_norm, (got_counts, _) = hash_rows(x, None, factors, mask, 1e-2, buckets=given)
    assert torch.equal(got, given) and torch.equal(got_norm, norm) and torch.equal(got_counts, counts)
    guard_zones()


def test_hashing_is_bit_equal_from_run_to_run_and_in_a_batch(device):
    x = torch.randn(3, 2, 45, 24, device=device)
    rotations, mask = torch.randn(2, 24, 2, 16, device=device), torch.rand(3, 45, device=device) < 0.3
    first = hash_rows(x, rotations, (32,), mask, 0.0)
    again, alone = hash_rows(x, rotations, (32,), mask, 0.0), hash_rows(x[1:2], rotations, (32,), mask[1:2], 0.0)
    for i in range(2):
        assert torch.equal(first[i], again[i]) and torch.equal(first[i][1], alone[i][0])
    assert torch.equal(first[2].counts, again[2].counts) and torch.equal(first[2].counts[1], alone[2].counts[0])


def test_hashing_of_an_empty_batch_is_empty(device):
    buckets, inverse_norm, counts = hash_rows(
        torch.zeros(0, 2, 9, 8, device=device), torch.zeros(1, 8, 3, 4, device=device), (8,), None, 0.0
    )
    assert buckets.shape == (0, 2, 3, 9) and inverse_norm.shape == (0, 2, 9) and counts.counts.shape[:3] == (0, 2, 3)


X, ROTATIONS = torch.zeros(1, 4, 9, 8), torch.zeros(2, 8, 3, 4)


@pytest.mark.parametrize(
    ("x", "rotations", "factors", "error", "message"),
    [
        (X[0], ROTATIONS, (8,), ValueError, "x: got .*wanted .B, H, L, D."),
        (torch.zeros(1, 4, 9, 257), ROTATIONS, (8,), ValueError, "x: got .*D <= 256"),
        (X.double(), ROTATIONS, (8,), TypeError, "got torch.float64"),
        (X.mT.contiguous().mT, ROTATIONS, (8,), ValueError, "x: got strides .*contiguous"),
        (X, ROTATIONS.int(), (8,), TypeError, "got torch.float32, torch.int32"),
        (X, ROTATIONS, (4, 6), ValueError, "rotations: got .*3, 4.*wanted .Hr, 8, R, 5"),
        (X, ROTATIONS[:, :7], (8,), ValueError, "rotations: got"),
        (X, torch.zeros(3, 8, 3, 4), (8,), ValueError, "rotations: got .*divisor of 4"),
        (X, ROTATIONS.to("meta"), (8,), ValueError, "rotations: got a tensor on meta"),
        (X, ROTATIONS, (7,), ValueError, "factors: got .*even"),
        (X, ROTATIONS, (256, 256), ValueError, "factors: got .*32768"),
    ],
)
def test_hashing_refuses(x, rotations, factors, error, message):
    with pytest.raises(error, match=message):
        lsh_hash(x, rotations, factors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("factors", [(64,), (32, 64), (128, 256), (2048,)])
def test_hashing_of_long_sequences(factors, D, dtype, device):
    """Counts too: tl.histogram has been wrong on GPUs when fed from a reduction of a dot (triton issue 6987)."""
    x = torch.randn(1, 2, 5000, D, device=device).to(dtype)
    rotations = torch.randn(1, D, 4, sum(factors) // 2, device=device)
    mask = torch.rand(1, 5000, device=device) < 0.1
    buckets, _, (counts, block_m) = hash_rows(x, rotations, factors, mask, 0.0)
    want = with_padding(reference.lsh_hash(x, rotations, factors), math.prod(factors), mask)
    assert not ((buckets != want) & ~near_ties(x, rotations, factors) & ~mask[:, None, None]).any()
    assert torch.equal(buckets[mask[:, None, None].expand_as(buckets)], want[mask[:, None, None].expand_as(buckets)])
    n_bins = counts.shape[-1]
    bits = math.prod(factors).bit_length()
    digits = buckets if math.prod(factors) <= 256 else buckets % 2 ** (bits // 2)
    for tile, got in enumerate(counts.unbind(3)):
        one_hot = digits[..., tile * block_m : (tile + 1) * block_m, None] == torch.arange(n_bins, device=device)
        assert torch.equal(got, one_hot.sum(-2).int())
