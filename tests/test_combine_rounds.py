import pytest
import torch

from lsh_kernels.csrc_triton.combine_rounds import combine_rounds

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def truth(out, lse):
    """Float64, straight from the definition; rounds with lse = -inf are cut out before they meet their weight."""
    out, lse = out.double(), lse.double()
    total = torch.logsumexp(lse, dim=2)
    weight = torch.exp(lse - total.unsqueeze(2)).nan_to_num(0.0)
    out = torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, out)
    return (weight.unsqueeze(-1) * out).sum(dim=2), total


def assert_within_budget(got, want):
    """err(kernel) <= 2 * err(truth rounded to the dtype) + 2 * eps * max|truth|"""
    error = (got.double() - want).abs().max()
    rounding = (want.to(got.dtype).double() - want).abs().max()
    budget = 2 * rounding + 2 * torch.finfo(got.dtype).eps * want.abs().max()
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


def assert_combines(out, lse):
    combined, total = combine_rounds(out, lse)
    assert combined.dtype == out.dtype and total.dtype == torch.float32
    want, want_total = truth(out, lse)
    dead = want_total == -torch.inf
    assert (total[dead] == -torch.inf).all() and (combined[dead] == 0).all()
    alive = ~dead
    if alive.any():
        assert_within_budget(combined[alive], want[alive])
        assert_within_budget(total[alive], want_total[alive])


def random_partials(B, H, R, L, Dv, dtype, device):
    out = torch.randn(B, H, R, L, Dv, device=device).to(dtype)
    return out, 3 * torch.randn(B, H, R, L, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 3, 4, 64, 64), id="tidy"),
        pytest.param((1, 2, 5, 67, 40), id="prime"),
        pytest.param((2, 1, 3, 1, 33), id="one-token"),
        pytest.param((1, 2, 1, 19, 16), id="one-round"),
        pytest.param((1, 1, 2, 130, 1), id="Dv-1"),
        pytest.param((1, 1, 9, 5, 256), id="Dv-256"),
    ],
)
def test_combine_rounds_is_the_softmax_over_rounds(shape, dtype, device, guard_zones):
    assert_combines(*random_partials(*shape, dtype, device))
    guard_zones()


def test_combine_rounds_of_one_round_is_that_round(device):
    out, lse = random_partials(1, 2, 1, 19, 24, torch.float16, device)
    combined, total = combine_rounds(out, lse)
    assert torch.equal(combined, out[:, :, 0])
    assert torch.equal(total, lse[:, :, 0])


def test_combine_rounds_reads_any_strides(device):
    """Batch, head, round and row strides of a transposed view; what lies between the rows is NaN."""
    B, H, R, L, Dv = 2, 3, 2, 21, 24
    out = torch.full((L, R, H, B, Dv + 8), torch.nan, device=device)[..., 3 : 3 + Dv].permute(3, 2, 1, 0, 4)
    lse = torch.full((L, 2, H, R, B), torch.nan, device=device)[:, 1].permute(3, 1, 2, 0)
    for view, values in zip((out, lse), random_partials(B, H, R, L, Dv, torch.float32, device), strict=True):
        assert not view.is_contiguous()
        view.copy_(values)
    assert_combines(out, lse)


def test_combine_rounds_skips_empty_rounds(device):
    """A round with lse = -inf counts for nothing, whatever its row holds; a row without any round is 0, -inf."""
    out, lse = random_partials(2, 2, 4, 37, 20, torch.float32, device)
    empty = torch.rand_like(lse) < 0.4
    empty[0, 0, :, :5] = True
    lse[empty] = -torch.inf
    out[empty] = torch.tensor([torch.nan, torch.inf], device=device).repeat(10)
    assert_combines(out, lse)
    lse.fill_(-torch.inf)
    assert_combines(out, lse)


def test_combine_rounds_passes_nan_on(device):
    """A NaN lse of a round that counts is an error upstream and must stay visible, in its own row only."""
    out, lse = random_partials(1, 1, 3, 8, 16, torch.float32, device)
    lse[0, 0, 1, 5] = torch.nan
    combined, total = combine_rounds(out, lse)
    rows = torch.arange(8, device=device) == 5
    assert torch.equal(combined.isnan().all(-1)[0, 0], rows) and torch.equal(combined.isnan().any(-1)[0, 0], rows)
    assert torch.equal(total.isnan()[0, 0], rows)


@pytest.mark.parametrize("offset", [-1e5, 1e5])
def test_combine_rounds_keeps_its_digits_where_lse_is_large(offset, device):
    """Weights exp(lse_r - lse) would be off by up to 1/256 there: the grid of float32 is 1/128 at 1e5."""
    out, lse = random_partials(1, 2, 4, 50, 32, torch.float32, device)
    assert_combines(out, lse + offset)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels on the CPU: the sparse tensor is a file mapping")
@pytest.mark.parametrize("dim", range(4), ids=["batch", "head", "round", "row"])
def test_combine_rounds_addresses_its_input_in_64_bits(dim, tmp_path):
    """index * stride passes 2^31 elements in one dimension; what lies in between is a hole in a sparse file."""
    out, lse = random_partials(3, 3, 3, 3, 16, torch.float16, "cpu")
    far_out = far_apart(out, dim, tmp_path / "out")
    for got, want in zip(combine_rounds(far_out, lse), combine_rounds(out, lse), strict=True):
        assert torch.equal(got, want)


def far_apart(x, dim, path):
    """A copy of x whose slices along `dim` lie just over 2^30 elements apart."""
    strides = list(x.stride())
    strides[dim] = 2**30 + 16
    n_elements = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    return torch.from_file(str(path), shared=True, size=n_elements, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_combine_rounds_addresses_its_outputs_in_64_bits(device):
    B, H, R, L, Dv = 1, 33, 2, 2**20, 64
    out = torch.randn(B, H, R, 1, Dv, device=device).half().expand(B, H, R, L, Dv)
    lse = torch.randn(B, H, R, 1, device=device).expand(B, H, R, L)
    combined, total = combine_rounds(out, lse)
    assert combined.numel() > 2**31
    want, want_total = combine_rounds(out[..., :1, :], lse[..., :1])
    assert (combined == want).all() and (total == want_total).all()


def test_combine_rounds_of_an_empty_batch_is_empty(device):
    combined, total = combine_rounds(*random_partials(0, 2, 3, 5, 8, torch.float16, device))
    assert combined.shape == (0, 2, 5, 8) and combined.dtype == torch.float16
    assert total.shape == (0, 2, 5) and total.dtype == torch.float32


def test_combine_rounds_is_bit_equal_from_run_to_run_and_in_a_batch(device):
    out, lse = random_partials(3, 2, 4, 45, 24, torch.float16, device)
    first = combine_rounds(out, lse)
    for again, alone, batched in zip(combine_rounds(out, lse), combine_rounds(out[1:2], lse[1:2]), first, strict=True):
        assert torch.equal(again, batched) and torch.equal(alone[0], batched[1])


@pytest.mark.parametrize(
    ("out", "lse", "error", "message"),
    [
        (torch.zeros(1, 2, 3, 4, 8), torch.zeros(1, 2, 3, 5), ValueError, "out, lse: got .*wanted .B, H, R, L, Dv."),
        (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4), ValueError, "out, lse: got .*wanted .B, H, R, L, Dv."),
        (torch.zeros(1, 2, 3, 4, 8).double(), torch.zeros(1, 2, 3, 4), TypeError, "got torch.float64, torch.float32"),
        (torch.zeros(1, 2, 3, 4, 8), torch.zeros(1, 2, 3, 4).half(), TypeError, "got torch.float32, torch.float16"),
        (torch.zeros(1, 2, 3, 4, 8), torch.zeros(1, 2, 3, 4, device="meta"), ValueError, "lse: got .* meta"),
        (torch.zeros(1, 2, 0, 4, 8), torch.zeros(1, 2, 0, 4), ValueError, "out: got .*R >= 1"),
        (torch.zeros(1, 2, 3, 4, 257), torch.zeros(1, 2, 3, 4), ValueError, "out: got .*Dv <= 256"),
        (torch.zeros(1, 2, 3, 8, 4).mT, torch.zeros(1, 2, 3, 4), ValueError, "out: got strides .*contiguous"),
    ],
)
def test_combine_rounds_refuses(out, lse, error, message):
    with pytest.raises(error, match=message):
        combine_rounds(out, lse)
