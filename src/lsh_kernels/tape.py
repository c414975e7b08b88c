"""How a reversible sequence runs its layers forward, and what it remembers to run them once more in backward."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lsh_kernels import ops, recompute
from lsh_kernels.fixed_point import integers_for, read
from lsh_kernels.functional import choose_backend


class Recorder:
    """Runs a sequence forward, step by step, and writes what backward needs on a tape."""

    def __init__(self, exact: bool = False):
        self.exact = exact
        self.tape = None
        self.streams = None  # that the last step left, the next one to be moved first
        self.versions = None
        self.grid = None  # the same as integers, in exact mode

    def add(self, name: str, module: nn.Module, moved: Tensor, still: Tensor, kwargs: dict) -> tuple[Tensor, Tensor]:
        """(still, moved + module(still)), both as the recorder has them: contiguous and in exact mode on the grid."""
        # hooks between the blocks may have put other streams in the place of ours: these then start a tape of their own
        if self.streams is None or not all(map(_is_same, self.streams, self.versions, (moved, still))):
            # operators choose their way by strides as well, so all streams have the same
            still = still.contiguous()
            if self.exact:
                self.grid = []
                moved, still = (OntoGrid.apply(x, self.grid) for x in (moved, still))
            self.tape = (_ExactTape(moved.dtype, still.dtype) if self.exact else _Tape()) if torch.is_grad_enabled() else None
        version = _version(still)
        out = module(still, **kwargs) if self.tape is None else self.tape.run(module, still, kwargs)
        _check_output(name, out, moved)
        if _version(still) != version:
            raise ValueError(f"{name}: {type(module).__name__} changed its input in place, which backward needs")
        if self.exact:
            grid, hooks = [], nullcontext() if self.tape is None else self.tape.fault_hooks()
            with hooks:
                result = _AddOnGrid.apply(moved, out, self.grid[0], grid)
            self.grid = self.grid[1], grid[0]
        else:
            result = (moved + out.to(moved.dtype)).contiguous()
        self.streams, self.versions = (still, result), (_version(still), _version(result))
        if self.tape is not None and self.exact:
            self.tape.checksums.append(grid[1])
            self.tape.set(*self.grid, len(self.tape.steps))
        elif self.tape is not None:
            self.tape.set(still.detach(), result.detach(), len(self.tape.steps))
        return self.streams


class OntoGrid(torch.autograd.Function):
    """The grid points nearest x; gradients pass as they are. The integers are added to `grid`."""

    @staticmethod
    def forward(ctx, x, grid):
        stream, values, _ = residual_add(torch.zeros(x.shape, dtype=integers_for(x.dtype), device=x.device), x, x.dtype, False)
        grid.append(stream)
        return values

    @staticmethod
    def backward(ctx, dvalues):
        return dvalues, None


class _AddOnGrid(torch.autograd.Function):
    """moved + out on the grid, where moved stands for `stream`. The new integers and the checksum are added to `grid`.

    What backward finds saved comes from the tape: 0, or NaN if the layer did not return the same when it was run again.
    """

    @staticmethod
    def forward(ctx, moved, out, stream, grid):
        result, values, checksum = residual_add(stream, out, moved.dtype, False)
        grid += result, checksum
        ctx.save_for_backward(checksum)
        ctx.out_dtype = out.dtype
        return values

    @staticmethod
    def backward(ctx, dvalues):
        dout = None
        if ctx.needs_input_grad[1]:
            (fault,) = ctx.saved_tensors
            dout = (dvalues + fault.to(dvalues.dtype)).to(ctx.out_dtype)
        return dvalues, dout, None, None


def residual_add(stream, addend, dtype, undo):
    return ops.residual_add(stream, addend, dtype, undo, choose_backend("auto", addend))


def _check_output(name, out, moved):
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: got {type(out).__name__} from it, wanted a tensor")
    if out.shape != moved.shape:
        raise ValueError(f"{name}: got shape {tuple(out.shape)} from it, wanted {tuple(moved.shape)}, that of its half of x")


def _is_same(a, version, b):
    """Whether b is a or a view of all of it, as it was at that version."""
    return (
        a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype, version) == (b.shape, b.stride(), b.dtype, _version(b))
    )  # fmt: skip


def _version(tensor):
    """How often the tensor has been changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _is_plain(tensor):
    return type(tensor) in (Tensor, nn.Parameter)


class _Tape:
    """The steps `(a, b) -> (b, a + h(b))` of a forward pass, and the streams (a, b) at one place between them.

    Autograd gets a number for every tensor that a step would save. Asked for one, the tape moves its streams to that
    step, by taking back the sums on the way, and gives out the tensors that the step saves when it is run again.
    """

    def __init__(self):
        self.steps: list[_Step] = []
        self.streams = None
        self.versions = None
        self.place = 0  # steps before the streams
        self.repeated = None  # number of the step whose tensors are here
        self.saved = []

    def run(self, module, x, kwargs):
        step = _Step(module, kwargs, x.requires_grad, x.stride())
        with torch.autograd.graph.saved_tensors_hooks(step.describe, partial(self.saved_tensor, len(self.steps))):
            out = step.first_run(x)
        self.steps.append(step)
        return out

    def set(self, a, b, place):
        """Sets the streams that `place` steps lead to."""
        self.streams, self.versions, self.place = (a, b), (_version(a), _version(b)), place

    @torch.compiler.disable
    def saved_tensor(self, number, i):
        self.look_up(number)
        tensor, version = self.saved[i]
        if _version(tensor) != version:
            raise RuntimeError("a tensor that backward needs has been changed in place since the layer saved it")
        return tensor

    def look_up(self, number):
        """Makes the tensors that step `number` saves the ones in `saved`, running it again if they are not."""
        if torch.is_grad_enabled():
            raise RuntimeError("a reversible sequence can't be differentiated twice (create_graph=True)")
        if number == len(self.steps):
            raise RuntimeError("a layer ran backward in its own forward, which a reversible block can't repeat")
        if self.repeated == number:
            return
        # makes room for the tensors of this step
        self.repeated, self.saved = None, []
        while self.place <= number:
            self._move_on()
        while self.place > number + 1:
            self._move_back(None)
        saved = []
        self._move_back(saved)
        step = self.steps[number]
        if [(tensor.shape, tensor.dtype) for tensor, _ in saved] != step.saved_as:
            raise RuntimeError(
                f"{type(step.module).__name__} saved other tensors when it was recomputed than in forward "
                f"({len(saved)} and {len(step.saved_as)}): it is no function of its input"
            )
        self.repeated, self.saved = number, saved

    def _move_back(self, saved):
        if self.versions != tuple(_version(stream) for stream in self.streams):
            raise RuntimeError("an output of a reversible block has been changed in place: backward needs it")
        b, result = self.streams
        out = self.steps[self.place - 1].run_again(self.value_of(b, self.place), saved)
        self.set(self.minus(result, out), b, self.place - 1)

    def _move_on(self):
        a, b = self.streams
        out = self.steps[self.place].run_again(self.value_of(b, self.place + 1), None)
        self.set(b, self.plus(a, out), self.place + 1)

    def value_of(self, stream, number):
        """What step `number`, from 1, reads of a stream."""
        return stream

    def plus(self, stream, out):
        return (stream + out.to(stream.dtype)).contiguous()

    def minus(self, stream, out):
        return (stream - out.to(stream.dtype)).contiguous()


class _ExactTape(_Tape):
    """A tape with streams on the grid, which are taken back to the bit if every layer returns what it had returned."""

    def __init__(self, *dtypes):
        super().__init__()
        self.dtypes = dtypes  # of the stream that even steps move, of the other
        self.checksums = []
        self.fault = None  # 0, or NaN once a layer has returned something else
        self.values = None, None  # the stream that was restored last, and what it stands for

    def fault_hooks(self):
        """Hooks for the sum of the step that ran last."""
        number = len(self.steps) - 1
        return torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: self.fault_at(number))

    @torch.compiler.disable
    def fault_at(self, number):
        self.look_up(number)
        return self.fault

    def value_of(self, stream, number):
        if self.values[0] is stream:
            return self.values[1]
        return read(stream, self.dtypes[number % 2])

    def plus(self, stream, out):
        return self._sum(stream, out, self.place, False)

    def minus(self, stream, out):
        return self._sum(stream, out, self.place - 1, True)

    def _sum(self, stream, out, number, undo):
        result, values, checksum = residual_add(stream, out, self.dtypes[number % 2], undo)
        fault = torch.where(checksum == self.checksums[number], 0.0, torch.nan)
        self.fault = fault if self.fault is None else self.fault + fault
        self.values = result, values
        return result


@dataclass
class _Step:
    """One run of a layer, with all that a second run needs to be the same but for the input."""

    module: nn.Module
    kwargs: dict
    input_has_grad: bool
    strides: tuple[int, ...]
    saved_as: list = field(default_factory=list)  # shape and dtype of each tensor that it saved for backward
    kept: list = field(default_factory=list)  # see recompute
    buffers: list = field(default_factory=list)  # those that it updates: (module, name, value before)
    constants: list = field(default_factory=list)  # its parameters and arguments, each with its version
    modes: list = field(default_factory=list)  # (module, whether it was in training mode)
    autocast: list = field(default_factory=list)
    rng: list = field(default_factory=list)  # (get, set, state before), of the generators that it drew from

    def first_run(self, x: Tensor) -> Tensor:
        self.constants = [(tensor, _version(tensor)) for tensor in self._constants()]
        self.modes = [(module, module.training) for module in self.module.modules()]
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in {"cpu", x.device.type} - {"meta"}
        ]
        rng = [(get, put, get()) for get, put in _generators(x.device)]
        buffers = [(*place, value, _version(value), value.detach().clone()) for place, value in self._buffers()]
        with recompute.first_run(self.kept):
            out = self.module(x, **self.kwargs)
        self.rng = [(get, put, state) for get, put, state in rng if not torch.equal(state, get())]
        updated = {
            owner
            for owner, name, value, version, _ in buffers
            if owner._buffers[name] is not value
            or _version(value) != version
            # the running statistics of norms change without a new version
            or (isinstance(owner, nn.modules.batchnorm._NormBase) and owner.training)
        }
        self.buffers = [(owner, name, before) for owner, name, _, _, before in buffers if owner in updated]
        return out

    @torch.compiler.disable
    def describe(self, tensor: Tensor) -> int:
        """The number that autograd gets for a tensor."""
        self.saved_as.append((tensor.shape, tensor.dtype))
        return len(self.saved_as) - 1

    def run_again(self, x: Tensor, saved: list | None) -> Tensor:
        """What the layer returned; the tensors that it saves for backward, with their versions, are added to `saved`."""
        constants = list(self._constants())
        if len(constants) != len(self.constants) or any(
            # fully_shard has a sharded parameter, a DTensor, in the place of the whole one
            _is_plain(now) and _is_plain(tensor) and (now is not tensor or _version(now) != version)
            for now, (tensor, version) in zip(constants, self.constants)
        ):
            raise RuntimeError(f"a parameter or argument of {type(self.module).__name__} has been changed since forward")

        # strides of dimensions of size 1 may differ
        x = x.detach().as_strided(x.shape, self.strides).requires_grad_(self.input_has_grad)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(partial(_save, saved), _no_unpack))
            for kind, dtype, enabled, cached in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            stack.enter_context(_in_modes(self.modes))
            stack.enter_context(_restored(self.rng))
            stack.enter_context(_with_buffers(self.buffers))
            stack.enter_context(recompute.repetition(self.kept))
            return self.module(x, **self.kwargs).detach()

    def _constants(self):
        yield from self.module.parameters()
        yield from (leaf for leaf in tree_leaves(self.kwargs) if isinstance(leaf, Tensor))

    def _buffers(self):
        for owner in self.module.modules():
            for name, value in owner._buffers.items():
                if value is not None:
                    yield (owner, name), value


@torch.compiler.disable
def _save(saved, tensor):
    if saved is not None:
        saved.append((tensor.detach(), _version(tensor)))


@torch.compiler.disable
def _no_unpack(_):
    raise RuntimeError("a layer ran backward in its own forward, which a reversible block can't repeat")


def _generators(device):
    """(get state, set state) of torch's default generators that a layer on `device` may draw from."""
    yield torch.get_rng_state, torch.set_rng_state
    if device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        yield lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)


@contextmanager
def _in_modes(modes):
    """Modules in training or eval mode as in the first run; afterwards as they are now."""
    changed = [(module, mode) for module, mode in modes if module.training != mode]
    try:
        for module, mode in changed:
            module.training = mode
        yield
    finally:
        for module, mode in changed:
            module.training = not mode


@contextmanager
def _restored(rng):
    """Generators as they were before the first run; afterwards as they are now."""
    now = [get() for get, _, _ in rng]
    try:
        for _, put, state in rng:
            put(state)
        yield
    finally:
        for (_, put, _), state in zip(rng, now):
            put(state)


@contextmanager
def _with_buffers(buffers):
    """Buffers as they were before the first run; afterwards as they are now."""
    now = [owner._buffers[name] for owner, name, _ in buffers]
    try:
        for owner, name, before in buffers:
            owner._buffers[name] = before.clone()
        yield
    finally:
        for (owner, name, _), value in zip(buffers, now):
            owner._buffers[name] = value
