"""Sums on the fixed-point grid: the torch twin against whole numbers, the kernels against the twin."""

import pytest
import torch

from lsh_kernels import fixed_point, ops
from lsh_kernels.csrc_triton import residual

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
NONE = -(2**31)


def both(device):
    return residual.residual_add, fixed_point.residual_add


def random_sum(n, dtype, device):
    """Streams of all magnitudes, some NaN; addends of all magnitudes, some no numbers, some out of range, some ties."""
    stream = (torch.randn(n, device=device) * 2.0 ** torch.randint(0, 32, (n,), device=device)).clamp(1 - 2**31, 2**31 - 200)
    stream = stream.to(torch.int32)
    addend = torch.randn(n, device=device) * 2.0 ** torch.randint(-20, 16, (n,), device=device)
    stream[::17] = NONE
    addend[::13] = torch.randint(-50, 50, addend[::13].shape, device=device) * 2.0**-17
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, 32768.0, -32768.0, 3e38)):
        addend[i * 5 :: 97] = value
    return stream, addend.to(dtype)


def whole_numbers(stream, addend, undo):
    """The sums in Python's whole numbers, one by one."""
    sums = []
    for n, a in zip(stream.tolist(), addend.double().tolist()):
        # round() is to even
        steps = None if a != a or abs(a) >= 2**15 else round(a * 2**16)
        total = None if steps is None or n == NONE else n - steps if undo else n + steps
        sums.append(NONE if total is None or abs(total) >= 2**31 else total)
    return torch.tensor(sums, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("n", [1, 1024, 3001])
def test_residual_add_is_the_sum_of_whole_numbers(n, undo, dtype, device):
    stream, addend = random_sum(n, dtype, device)
    want = whole_numbers(stream, addend, undo)
    checksums = []
    for residual_add in both(device):
        result, values, checksum = residual_add(stream, addend, dtype, undo)
        assert torch.equal(result.cpu(), want)
        assert values.dtype == dtype and checksum.dtype == torch.int64 and checksum.shape == ()
        expected = torch.where(want == NONE, torch.nan, want.double() * 2.0**-16).to(torch.float32).to(dtype)
        assert torch.equal(values.cpu().nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))
        checksums.append(checksum)
    assert torch.equal(*checksums)


@pytest.mark.parametrize("undo", [False, True])
def test_residual_add_at_the_ends_of_the_range(undo, device):
    stream = torch.tensor([2**31 - 2, 2**31 - 1, 2 - 2**31, 1 - 2**31], dtype=torch.int32, device=device)
    addend = torch.tensor([1.0, 1.0, -1.0, -1.0], device=device) * (-(2.0**-16) if undo else 2.0**-16)
    for residual_add in both(device):
        result, values, _ = residual_add(stream, addend, torch.float32, undo)
        assert result.tolist() == [2**31 - 1, NONE, 1 - 2**31, NONE]
        assert values.isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_residual_add_is_undone_to_the_bit(dtype, device):
    stream, addend = random_sum(2500, dtype, device)
    for residual_add in both(device):
        result, _, checksum = residual_add(stream, addend, dtype, False)
        back, _, checksum_back = residual_add(result, addend, dtype, True)
        assert torch.equal(back[result != NONE], stream[result != NONE]) and torch.equal(checksum, checksum_back)
        # what was poisoned stays it
        assert (back[result == NONE] == NONE).all() and (result == NONE).any()


def test_residual_add_of_float64_has_a_finer_grid():
    stream = torch.zeros(70_000, dtype=torch.int64)
    addend = torch.randn(70_000, dtype=torch.float64)
    addend[:3] = torch.tensor([torch.nan, 2.0**18, -torch.inf])
    result, values, checksum = fixed_point.residual_add(stream, addend, torch.float64, False)
    assert (values[3:] - addend[3:]).abs().max() <= 2.0**-45 and values[:3].isnan().all()
    back, _, again = fixed_point.residual_add(result, addend, torch.float64, True)
    assert (back[3:] == 0).all() and torch.equal(checksum, again)


@pytest.mark.parametrize("place", [0, 1, 1023, 1024, 2999])
def test_residual_checksum_sees_one_step_anywhere(place, device):
    stream, addend = torch.zeros(3000, dtype=torch.int32, device=device), torch.randn(3000, device=device)
    changed = addend.clone()
    changed[place] += 2.0**-16
    for residual_add in both(device):
        checksum, other = (residual_add(stream, a, torch.float32, False)[2] for a in (addend, changed))
        assert checksum != other


def test_residual_checksum_sees_steps_moved_and_exchanged(device):
    stream, addend = torch.zeros(3000, dtype=torch.int32, device=device), torch.randn(3000, device=device)
    moved, exchanged = addend.clone(), addend.clone()
    moved[7], moved[2100] = addend[7] + 2.0**-16, addend[2100] - 2.0**-16
    exchanged[5], exchanged[6] = addend[6], addend[5]
    for residual_add in both(device):
        checksum, other, third = (residual_add(stream, a, torch.float32, False)[2] for a in (addend, moved, exchanged))
        assert checksum != other and checksum != third


def test_residual_kernel_stays_in_its_buffers(device, guard_zones):
    stream, addend = random_sum(1500, torch.float32, device)
    residual.residual_add(stream, addend, torch.float32, False)
    guard_zones()


def test_residual_add_reads_any_strides_of_the_addend(device):
    stream, addend = random_sum(600, torch.float32, device)
    stream = stream.view(20, 30)
    for residual_add in both(device):
        want = residual_add(stream, addend.view(20, 30), torch.float32, False)
        got = residual_add(stream, addend.view(20, 30).mT.contiguous().mT, torch.float32, False)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True))


def test_residual_add_of_nothing_is_nothing(device):
    for residual_add in both(device):
        empty = torch.zeros(0, 8, device=device)
        result, values, checksum = residual_add(empty.int(), empty, torch.float32, False)
        assert result.shape == values.shape == (0, 8) and checksum == 0


def test_residual_kernel_refuses(device):
    stream, addend = torch.zeros(4, 6, dtype=torch.int32, device=device), torch.zeros(4, 6, device=device)
    with pytest.raises(TypeError, match="stream, addend, dtype: got torch.int64"):
        residual.residual_add(stream.long(), addend, torch.float32, False)
    with pytest.raises(ValueError, match="stream, addend: got .4, 6."):
        residual.residual_add(stream, addend[:3], torch.float32, False)
    with pytest.raises(ValueError, match="stream contiguous"):
        residual.residual_add(stream.mT, addend.mT, torch.float32, False)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_residual_op_is_a_proper_one(backend, device):
    stream, addend = random_sum(100, torch.float32, device)
    want = fixed_point.residual_add(stream, addend, torch.float16, True)
    got = ops.residual_add(stream, addend, torch.float16, True, backend)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True))
    arguments = (torch.arange(8, dtype=torch.int32, device=device), addend[:8].nan_to_num(), torch.float16, False, backend)
    torch.library.opcheck(torch.ops.lsh_kernels.residual_add, arguments, test_utils=("test_schema", "test_faketensor"))
