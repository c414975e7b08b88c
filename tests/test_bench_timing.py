"""How the benchmark suite measures: in turns, through failures, interruptions and budgets, and under CUDA graphs."""

import time
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import peers
import pytest
import timing
import torch
from bench_folder import SETTINGS, interrupt
from cases import AbsentError, Case
from timing import Budget, BudgetSpentError, DeviceLostError, measure


def measured(case, budget=None):
    """(rows, what was raised)."""
    rows, raised = {}, None
    try:
        measure(case, SETTINGS, budget or Budget(), rows.__setitem__, 0.01, [])
    except BaseException as error:
        raised = type(error)
    return rows, raised


def counting(stop_at, stop):
    """A build whose call does `stop()` at its n-th run."""
    runs = []

    def call():
        runs.append(1)
        if len(runs) == stop_at:
            stop()

    return lambda: call


def test_bench_failures_are_rows():
    def raising(error, at=0):
        def stop():
            raise error

        if at:
            return counting(at, stop)
        return stop

    builds = {
        "absent": raising(AbsentError("no such thing")),
        "memory": raising(torch.OutOfMemoryError("tried to allocate")),
        "later": raising(RuntimeError("second\nrun"), at=2),
        "fine": lambda: lambda: None,
    }
    rows, raised = measured(Case({}, builds))
    assert raised is None
    assert rows["absent"] == {"status": "absent", "reason": "no such thing"}
    assert rows["memory"] == {"status": "failed", "reason": "out of memory: tried to allocate"}
    assert rows["later"] == {"status": "failed", "reason": "second run"}
    assert rows["fine"]["status"] == "ok" and rows["fine"]["runs"] >= 3


def test_bench_exact_scores_too_large_are_a_row():
    shape = peers.Shape(64, 64, 2**20, 64, 4, 64, torch.float32, torch.device("cpu"), False)
    with pytest.raises(AbsentError, match="out of memory: needs"):
        peers.PEERS["SDPA math"](shape)


def test_bench_rounds_do_not_pay_for_what_sets_them_up():
    def build():
        time.sleep(0.05)
        return lambda: None

    rows, _ = measured(Case({}, {"compiled": build}))
    assert rows["compiled"]["runs"] == timing.MAX_ROUNDS


@pytest.mark.parametrize("name", ["budget", "interrupt"])
def test_bench_keeps_what_was_measured(name):
    budget = Budget(1000)
    stop = interrupt if name == "interrupt" else lambda: setattr(budget, "end", 0)
    # the first of the runs warms up
    rows, raised = measured(Case({}, {"whole": lambda: lambda: None, "half": counting(3, stop)}), budget)
    assert raised is (KeyboardInterrupt if name == "interrupt" else BudgetSpentError)
    assert rows["whole"]["runs"] == 2 and rows["half"]["runs"] == (1 if name == "interrupt" else 2)


def test_bench_goes_on_after_a_capture_that_failed(monkeypatch):
    """Fakes in place of CUDA. After such a failure torch's stream is the capture's, and its generator refuses to draw."""

    class Capture:
        def __init__(self, graph):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *raised):
            raise RuntimeError("the end of the capture")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    streams, states = [], []
    generator = SimpleNamespace(device="cpu", graphsafe_set_state=states.append)
    for name, fake in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda other: nullcontext(),
        "CUDAGraph": object, "graph": Capture, "set_stream": streams.append, "current_device": lambda: 0,
        "default_generators": [generator],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)

    def stop():
        raise RuntimeError("a sync within the capture")

    with pytest.raises(RuntimeError, match="a sync within the capture"):
        timing._captured(counting(2, stop)())
    assert streams == [stream] and isinstance(states[0], torch.Generator)


def test_bench_stops_where_the_device_is_lost(monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    rows, raised = measured(Case({}, {"culprit": lambda: lost, "next": lambda: lambda: 1}, measure="drift"))
    assert raised is DeviceLostError
    assert rows == {"culprit": {"status": "failed", "reason": f"{timing.LOST}an illegal memory access was encountered"}}


def test_bench_spends_no_more_than_three_calls_on_a_long_one(monkeypatch):
    """Times in ms; the first of the runs warms up."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for ms, wanted in ((40, 3), (2000, 1)):
        runs = []

        def events(call, n, ms=ms):
            call()
            return [ms]

        monkeypatch.setattr(timing, "_events", events)
        case = Case({}, {"it": lambda runs=runs: lambda: runs.append(1)})
        assert timing._time_on_gpu(case, "it", Budget())["runs"] == wanted and len(runs) == 1 + wanted


def test_bench_graph_keeps_the_inputs_that_it_reads(monkeypatch):
    class Inputs:
        pass

    def build():
        inputs = Inputs()
        alive.append(weakref.ref(inputs))
        return lambda: inputs and None

    def events(run, n):
        assert alive[-1]() is not None
        return [2000]

    alive = []
    for name, fake in {"_captured": lambda call: lambda: None, "_events": events}.items():
        monkeypatch.setattr(timing, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timing._time_on_gpu(Case({}, {"it": build}, measure="graph"), "it", Budget())
    assert len(alive) == 1
