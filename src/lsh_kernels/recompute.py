"""What a run of a layer that will be repeated keeps, so that the repetition takes it instead of drawing or hashing again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class _Run(threading.local):
    """The run that this thread is in: a first one keeps values, a repetition takes them, any other has neither list."""

    kept: list | None = None
    to_take: Iterator | None = None


_run = _Run()


@contextmanager
def first_run(kept: list):
    """Inside, `keep` appends to `kept`."""
    with _in_run(kept, None):
        yield


@contextmanager
def repetition(kept: list):
    """Inside, `keep` takes the values of `kept` in turn."""
    with _in_run(None, iter(kept)):
        yield


@contextmanager
def _in_run(kept, to_take):
    outer = _run.kept, _run.to_take
    _run.kept, _run.to_take = kept, to_take
    try:
        yield
    finally:
        _run.kept, _run.to_take = outer


def is_active() -> bool:
    return _run.kept is not None or _run.to_take is not None


def keep(make: Callable):
    """`make()`; in a repetition what it was in the first run.

    Raises:
        RuntimeError: the repetition asks for more than the first run kept.
    """
    if _run.to_take is not None:
        try:
            return next(_run.to_take)
        except StopIteration:
            raise RuntimeError("a layer drew or hashed more often when it was recomputed than in forward") from None
    value = make()
    if _run.kept is not None:
        _run.kept.append(value)
    return value


def generator_to_draw_from(generator: torch.Generator | None) -> torch.Generator | None:
    """`generator`, in a repetition a copy of it: draws that are not needed again must not move the caller's."""
    return generator if generator is None or _run.to_take is None else generator.clone_state()
