"""Triton's interpreter with every access checked: bounds, races and memory that nobody has written."""

import bisect
import sys

import numpy as np
import torch

NOBODY, SEVERAL = 0, -1


class Region:
    """Elements that the arguments of a launch reach, and who touched them in it."""

    def __init__(self, start, stop, itemsize):
        self.start, self.stop, self.itemsize = start, stop, itemsize
        # memory that nobody touches costs nothing, so elements may lie gigabytes apart
        self.writer, self.reader = np.zeros((2, -(-(stop - start) // itemsize)), np.int32)


class StrictMemory:
    """Stands between the interpreter and memory. A launch fails if a program

    - reads or writes an element that no tensor among the arguments has,
    - reads an element of a `torch.empty` that nothing has written,
    - reads or writes an element that another program of the launch writes, or writes one that another program reads,
    - uses an atomic.
    """

    def __init__(self, interpreter):
        self.interpreter = interpreter
        self.regions, self.program = [], 0
        # kept, so that no address is given out twice: [buffer, which of its bytes are written]
        self.buffers = []

    def __getattr__(self, name):
        if name.startswith("atomic"):
            raise AssertionError("a kernel uses an atomic")
        return getattr(self.interpreter, name)

    def begin(self, args):
        """A launch with these arguments follows."""
        spans = []
        for x in args:
            if isinstance(x, torch.Tensor) and x.numel():
                reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
                spans.append([x.data_ptr(), x.data_ptr() + reach * x.itemsize, x.itemsize])
        self.regions, self.program = [], 0
        for start, stop, itemsize in sorted(spans):
            # views of one tensor overlap
            if self.regions and start < self.regions[-1].stop:
                last = self.regions[-1]
                self.regions[-1] = Region(last.start, max(last.stop, stop), min(last.itemsize, itemsize))
            else:
                self.regions.append(Region(start, stop, itemsize))
        self.starts = [region.start for region in self.regions]

    def find(self, addresses, what):
        """Pairs (region, indices) for the addresses, all of them in some region."""
        addresses = np.unique(addresses.astype(np.int64).ravel())
        while addresses.size:
            region = self.regions[max(bisect.bisect_right(self.starts, int(addresses[0])) - 1, 0)]
            inside = (addresses >= region.start) & (addresses < region.stop)
            assert inside[0], f"program {self.program} {what} outside every buffer"
            yield region, (addresses[inside] - region.start) // region.itemsize, addresses[inside]
            addresses = addresses[~inside]

    def written_bytes(self, address):
        for buffer, written in self.buffers:
            start = buffer.data_ptr()
            if start <= address < start + len(written):
                return start, written
        return None

    def load(self, ptrs, mask, other, dtype):
        for region, indices, addresses in self.find(ptrs[mask], "reads"):
            writers = region.writer[indices]
            assert ((writers == NOBODY) | (writers == self.program)).all(), "a program reads what another one writes"
            readers = region.reader[indices]
            region.reader[indices] = np.where((readers == NOBODY) | (readers == self.program), self.program, SEVERAL)
            known = self.written_bytes(addresses[0])
            if known:
                assert known[1][addresses - known[0]].all(), "a program reads what nothing has written"
        return self.interpreter.load(ptrs, mask, other, dtype)

    def store(self, ptrs, value, mask):
        for region, indices, addresses in self.find(ptrs[mask], "writes"):
            for others, what in ((region.writer[indices], "writes"), (region.reader[indices], "reads")):
                assert ((others == NOBODY) | (others == self.program)).all(), f"a program writes what another one {what}"
            region.writer[indices] = self.program
            known = self.written_bytes(addresses[0])
            if known:
                known[1][addresses - known[0]] = True
        return self.interpreter.store(ptrs, value, mask)

    @classmethod
    def install(cls, monkeypatch):
        """Check every launch from now on."""
        from triton.runtime import interpreter

        strict = cls(interpreter._interpreter)
        host_arguments, torch_empty = interpreter.GridExecutor._init_args_hst, torch.empty
        set_grid_idx = interpreter.interpreter_builder.set_grid_idx

        def begin_launch(executor, args, kwargs):
            args, kwargs = host_arguments(executor, args, kwargs)
            strict.begin([*args, *kwargs.values()])
            return args, kwargs

        def begin_program(*index):
            strict.program += 1
            set_grid_idx(*index)

        def empty(*size, **kwargs):
            buffer = torch_empty(*size, **kwargs)
            # what torch code writes is not seen here
            if sys._getframe(1).f_globals["__name__"].startswith("lsh_kernels.csrc_triton"):
                strict.buffers.append((buffer, np.zeros(buffer.nbytes, bool)))
            return buffer

        monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", begin_launch)
        monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", begin_program)
        monkeypatch.setattr(interpreter, "_interpreter", strict)
        monkeypatch.setattr(torch, "empty", empty)
