"""Device, interpreter switch, seeds, NaN-filled `torch.empty`, guard zones, the gpu marker."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # has to be set before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402

# tiny tensors: a second thread costs more than it brings
torch.set_num_threads(1)
# fills torch.empty with NaN: a place that nobody wrote shows
torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture
def device():
    """Where kernels run: the GPU, or CPU tensors under Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def numpy_sort(monkeypatch):
    """Under the interpreter tl.sort takes 0.1 s per tile. NumPy sorts as well; one test goes without."""
    if HAS_GPU:
        return
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def sort(keys):
        return tl.tensor(TensorHandle(np.sort(keys.handle.data), keys.dtype), keys.type)

    monkeypatch.setattr(tl, "sort", sort)


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch):
    """The interpreter patches triton.language at each call of a function of triton.jit, which takes longer than most of them.
    Once per launch and kind of function will do."""
    if HAS_GPU:
        return
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    launch, call, patched = GridExecutor.__call__, InterpretedFunction.__call__, set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def call_patched(self, *args, **kwargs):
        names = self.fn.__globals__.values()
        modules = tuple(any(x is module for x in names) for module in (tl, tl.core))
        if modules in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(modules)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch_anew)
    monkeypatch.setattr(InterpretedFunction, "__call__", call_patched)


@pytest.fixture(autouse=True)
def strict_memory(monkeypatch):
    """Every access of an interpreted kernel is checked; the `StrictMemory` that does it."""
    if HAS_GPU:
        return None
    from strict_memory import StrictMemory

    return StrictMemory.install(monkeypatch)


@pytest.fixture
def guard_zones(monkeypatch):
    """Puts guard elements around every `torch.empty` of the test; call the fixture's value to check them."""
    width, buffers = 64, []
    torch_empty = torch.empty

    def guarded_empty(*size, **kwargs):
        shape = torch_empty(*size, device="meta").shape
        buffer = torch_empty(shape.numel() + 2 * width, **kwargs).fill_(7)
        buffers.append(buffer)
        inner = buffer[width : width + shape.numel()]
        return inner.fill_(float("nan") if inner.is_floating_point() else -1).view(shape)

    def check():
        assert buffers, "nothing was allocated"
        for buffer in buffers:
            assert (buffer[:width] == 7).all() and (buffer[-width:] == 7).all(), "a write left its buffer"

    monkeypatch.setattr(torch, "empty", guarded_empty)
    return check
