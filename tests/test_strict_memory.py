"""The checks of conftest's interpreter find what they are there for."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels on a GPU are not interpreted")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, SHIFT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = x[i + SHIFT] for i < n; a program owns BLOCK elements from STEP times its number on."""
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + SHIFT, mask=offs < n), mask=offs < n)


@triton.jit
def _count_kernel(y_ptr):
    tl.atomic_add(y_ptr, 1.0)


def copy(x, y, n=16, shift=0, step=8):
    _copy_kernel[(2,)](x, y, n, SHIFT=shift, STEP=step, BLOCK=8)


def test_strict_memory_lets_a_copy_pass():
    x, y = torch.randn(16), torch.zeros(16)
    copy(x, y)
    assert torch.equal(x, y)
    # in place, and every second element of a row
    copy(y, y)
    both = torch.zeros(2, 16)
    copy(both[0], both[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 1}, "reads outside every buffer"),
        ({"shift": -1}, "reads outside every buffer"),
        ({"x": torch.zeros(32), "n": 17, "step": 9}, "writes outside every buffer"),
        ({"step": 4}, "a program writes what another one writes"),
    ],
    ids=str,
)
def test_strict_memory_finds_strays_and_races(change, message):
    arguments = {"x": torch.zeros(16), "y": torch.zeros(16), **change}
    with pytest.raises(Exception, match=message):
        copy(**arguments)


def test_strict_memory_finds_programs_that_talk():
    row = torch.zeros(17)
    with pytest.raises(Exception, match="a program writes what another one reads"):
        copy(row[1:], row[:16])
    row = torch.zeros(17)
    with pytest.raises(Exception, match="a program reads what another one writes"):
        copy(row[:16], row[1:])
    with pytest.raises(Exception, match="atomic"):
        _count_kernel[(1,)](torch.zeros(1))


def test_strict_memory_finds_what_nothing_has_written(monkeypatch):
    monkeypatch.setitem(globals(), "__name__", "lsh_kernels.csrc_triton.here")
    x, y = torch.empty(16), torch.empty(16)
    with pytest.raises(Exception, match="a program reads what nothing has written"):
        copy(x, y)
    copy(torch.zeros(16), x, n=15)
    with pytest.raises(Exception, match="a program reads what nothing has written"):
        copy(x, y)
    copy(torch.zeros(16), x)
    copy(x, y)
