"""The benchmark suite: its rows, what it does with failures, interruptions and budgets, and that its peers agree."""

import csv
import importlib.util
import re
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import attention as attention_suite  # noqa: E402
import feedforward  # noqa: E402
import gpu  # noqa: E402
import memory  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import reversible  # noqa: E402
import stages  # noqa: E402
import timing  # noqa: E402
from cases import FIELDS, AbsentError, Case, Settings  # noqa: E402
from timing import Budget, BudgetSpentError, DeviceLostError, measure  # noqa: E402

spec = importlib.util.spec_from_file_location("bench_main", BENCH / "__main__.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

SETTINGS = Settings(torch.device("cpu"), torch.float32, (32, 64), heads=2, head_dim=16, n_hashes=2, chunk_length=16)
TINY = "--seconds 0.1 --lengths 32 64 --heads 2 --head-dim 16 --n-hashes 2 --chunk-length 16 --device cpu --dtype float32".split()


def run(out, *options):
    status = bench.main([*TINY, "--out", str(out), *options])
    with out.open(newline="") as file:
        return status, list(csv.DictReader(file))


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


def interrupt():
    raise KeyboardInterrupt


def test_bench_rows_have_all_fields(tmp_path, capsys):
    out = tmp_path / "new" / "rows.csv"
    providers = ["lsh_kernels torch", "SDPA flash", "SDPA cuDNN", "FlexAttention window"]
    status, rows = run(out, "--suite", "attention", "--quick", "--commit", "abc", "--providers", *providers)
    assert status == 0 and list(rows[0]) == FIELDS
    assert {row["provider"] for row in rows} == set(providers)
    assert {row["regime"] for row in rows} == {"batch", "tokens"}
    assert {row["input"] for row in rows} == {"gaussian", "clustered", "equal"}
    assert {(row["B"], row["L"]) for row in rows if row["regime"] == "tokens"} == {("2", "32")}
    for row in rows:
        assert (row["commit"], row["torch"], row["H"], row["D"]) == ("abc", torch.__version__, "2", "16")
        assert float(row["copy_gbs"]) > 0 and float(row["matmul_gflops"]) > 0 and row["device"].startswith("cpu")
        if row["provider"] in providers[:2]:
            spread = [float(row[f"ms_{name}"]) for name in ("min", "p20", "p50", "p80", "max")]
            assert row["status"] == "ok" and 0 < spread[0] and spread == sorted(spread) and int(row["runs"]) >= 3
            assert float(row["gflops"]) > 0
        else:
            assert row["status"] == "absent" and "CPU" in row["reason"] and row["ms_p50"] == ""
    said = capsys.readouterr().out
    assert "forward+backward, fixed batch: lsh_kernels torch is faster than the best exact attention from L = " in said


def test_bench_appends_to_older_rows(tmp_path):
    out = tmp_path / "rows.csv"
    out.write_text("op,provider,ms_p50\nattention,lsh_kernels,1.5\n")
    _, rows = run(out, "--suite", "attention", "--quick", "--providers", "SDPA flash")
    assert (rows[0]["provider"], rows[0]["ms_p50"], rows[0]["status"]) == ("lsh_kernels", "1.5", "")
    _, again = run(out, "--suite", "attention", "--quick", "--providers", "SDPA flash")
    assert again[: len(rows)] == rows and len(again) == 2 * len(rows) - 1


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


def test_bench_takes_turns_and_leaves_the_longest_for_the_end():
    cases = [(suite, i, Case({"L": 2**i}, {})) for suite in ("attention", "stages") for i in range(20)]
    found = [(suite, i) for suite, i, _ in bench.in_turns(cases)]
    wanted = [(suite, i) for turn in (range(8), range(8, 16), range(16, 18)) for suite in ("attention", "stages") for i in turn]
    assert found == wanted + [(suite, i) for i in (18, 19) for suite in ("attention", "stages")]


def test_bench_resumes_with_what_has_no_row(tmp_path):
    out, options = tmp_path / "rows.csv", ["--suite", "attention", "--quick", "--providers", "SDPA flash", "lsh_kernels torch"]
    _, rows = run(out, *options)
    assert run(out, *options, "--resume")[1] == rows
    lost = rows[0] | {"provider": "lsh_kernels torch", "status": "failed", "reason": f"{timing.LOST}illegal access"}
    out.unlink()
    rows_csv(out, [lost, rows[1]])
    _, again = run(out, *options, "--resume")
    assert len(again) == len(rows)
    for row in again[2:]:
        if row["provider"] == "lsh_kernels torch":
            assert (row["status"], row["reason"]) == ("absent", "lost the GPU before")
        else:
            assert row["status"] == "ok"


def test_bench_command_keeps_rows_when_interrupted(tmp_path, monkeypatch):
    row = SETTINGS.row("attention", 32)
    cases = [Case(row, {"first": lambda: lambda: time.sleep(1e-3)}), Case(row, {"second": lambda: interrupt})]
    monkeypatch.setattr(attention_suite, "cases", lambda settings: cases)
    status, rows = run(tmp_path / "rows.csv", "--suite", "attention")
    assert status == 130 and [row["provider"] for row in rows] == ["first"]


def test_bench_command_stops_at_its_budget(tmp_path, capsys):
    status, rows = run(tmp_path / "rows.csv", "--suite", "attention", "--budget", "0")
    assert status == 0 and rows == [] and "budget of 0.0 s is spent" in capsys.readouterr().err


def test_bench_command_refuses_what_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--suite", "no_such_suite"])
    assert "attention" in capsys.readouterr().err
    assert bench.main([*TINY, "--out", str(tmp_path / "x.csv"), "--providers", "no such peer"]) == 2
    said = capsys.readouterr().err
    assert "no such peer" in said and "SDPA flash" in said and not (tmp_path / "x.csv").exists()


def test_bench_suites_are_modules_with_cases(capsys):
    assert bench.SUITES[0] == "attention"
    for suite in bench.SUITES:
        assert list(importlib.import_module(suite).cases(SETTINGS))
    with pytest.raises(SystemExit):
        bench.main(["--suite", "decode"])
    said = capsys.readouterr().err
    assert all(suite in said for suite in bench.SUITES)


def test_bench_memory_is_of_a_process_of_its_own(tmp_path):
    _, rows = run(tmp_path / "rows.csv", *"--suite memory --quick --lengths 1024 --providers".split(), "SDPA math")
    # two heads: scores, weights and their gradients are 8 MiB each
    assert len(rows) == 1 and 16 < float(rows[0]["peak_mib"]) < 64


def test_bench_attention_goes_by_regime_and_input():
    found = [(case.row["regime"], case.row["input"], case.row["B"], case.row["L"]) for case in attention_suite.cases(SETTINGS)]
    assert found[::2] == [
        ("batch", "gaussian", 1, 64), ("batch", "gaussian", 1, 32), ("one thread", "gaussian", 1, 64),
        ("batch", "gaussian", 1, 128), ("batch", "clustered", 1, 64), ("tokens", "gaussian", 2, 32),
    ]  # fmt: skip
    assert found[9] == ("batch", "equal", 1, 64)


def test_bench_memory_goes_by_length_and_by_depth():
    found = [(case.row["L"], case.row["depth"], case.row["mode"]) for case in memory.cases(SETTINGS)]
    assert found == [
        (64, 1, "forward"), (64, 1, "forward+backward"), (32, 1, "forward"), (32, 1, "forward+backward"),
        (32, 2, "forward+backward"), (32, 4, "forward+backward"), (32, 8, "forward+backward"),
    ]  # fmt: skip


def test_bench_reversible_providers_train_alike():
    """Same layers, same output, same gradients, but for what exact mode's grid rounds; drift is there in float mode only."""
    cases = list(reversible.cases(replace(SETTINGS, quick=True)))
    (case,) = (case for case in cases if case.measure == "time")
    gradients = {}
    for name, wrap in reversible.PROVIDERS.items():
        model, x = wrap(reversible.layers(case.row, 2)), reversible.new_input(case.row, SETTINGS)
        torch.manual_seed(5)
        model(x).square().mean().backward()
        gradients[name] = [leaf.grad for leaf in (x, *model.parameters())]
    wanted = gradients.pop("not reversible")
    for name, found in gradients.items():
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3 if name == "lsh_kernels exact" else 1e-5, msg=name)
    deepest = next(case for case in cases if case.measure == "drift")
    drift = {name: build()() for name, build in deepest.builds.items()}
    assert drift["lsh_kernels exact"] == 0 and 0 < drift["lsh_kernels float"] < 1e-4 and 0 < drift["reformer-pytorch"] < 1e-4


def test_bench_feedforward_rows_have_numbers(tmp_path):
    """1,024 tokens of width 64 in chunks of 32: the plain MLP keeps 1 MiB before and 1 MiB after its activation."""
    options = "--suite feedforward --quick --lengths 1024 --heads 2 --head-dim 64 --providers".split()
    _, rows = run(tmp_path / "rows.csv", *options, "plain MLP", "lsh_kernels")
    found = {(row["measure"], row["provider"]): row for row in rows}
    assert all((row["status"], row["L"], row["C"], row["embed_dim"]) == ("ok", "1024", "32", "64") for row in rows)
    assert 2 < float(found["memory", "plain MLP"]["peak_mib"]) < 8
    assert float(found["memory", "lsh_kernels"]["peak_mib"]) < 1
    assert float(found["time", "lsh_kernels"]["ms_p50"]) > 0 and float(found["time", "plain MLP"]["gflops"]) > 0


def test_bench_feedforward_results_do_not_count():
    """By hand, and what a call of each provider leaves."""
    tokens, E, ff = 64, 16, 64
    assert feedforward.result_bytes(tokens, E, "forward", 4) == 4 * tokens * E
    assert feedforward.result_bytes(tokens, E, "forward+backward", 4) == 4 * (2 * tokens * E + 2 * E * ff + E + ff)
    for make in feedforward.PROVIDERS.values():
        assert sum(p.numel() for p in make(E, 2).parameters()) == 2 * E * ff + E + ff


def shape_of(length, **changes):
    shape = peers.Shape(1, 2, length, 16, 2, 16, torch.float32, torch.device("cpu"), False)
    return shape._replace(**changes)


def test_bench_our_backends_agree():
    found = {}
    for name in ("lsh_kernels torch", "lsh_kernels triton"):
        torch.manual_seed(1)
        found[name] = peers.build_call(peers.PEERS[name], shape_of(48))()()
    torch.testing.assert_close(*found.values(), rtol=1e-5, atol=1e-5)


def test_bench_exact_peers_agree():
    shape = shape_of(48, backward=True)
    torch.manual_seed(1)
    flash = peers.build_call(peers.PEERS["SDPA flash"], shape)()()
    torch.manual_seed(1)
    math = peers.build_call(peers.PEERS["SDPA math"], shape)()()
    torch.testing.assert_close(flash, math, rtol=1e-4, atol=1e-5)


def test_bench_flex_sees_as_many_keys_as_rounds_of_chunks():
    shape = shape_of(320, R=3, C=50)
    mask = peers.sliding_window(shape)
    i, j = torch.arange(320)[:, None], torch.arange(320)[None, :]
    wanted = (j <= i) & (j >= i - 150)
    blocks = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)[:320, :320]
    assert torch.equal(mask.mask_mod(0, 0, i, j) & blocks, wanted)
    assert mask.seq_lengths == (320, 320) and wanted.sum(1).max() == 3 * 50 + 1


@pytest.mark.parametrize("name", ["reformer-pytorch", "Hugging Face"])
def test_bench_hashing_peers_take_the_same_tensors(name):
    """Each row of the output is a mean of values of its own head at positions up to its own. Both round off about 0.3% where a
    row has no key but its own."""
    shape = shape_of(64)
    query, key, value = peers.tensors("gaussian", shape)
    attend = peers.PEERS[name](shape)
    value = torch.arange(64.0)[None, None, :, None] + 64 * torch.arange(2.0)[None, :, None, None] + 0 * value
    with torch.no_grad():
        out = attend(query, key, value)
    assert out.shape == value.shape
    assert ((out <= value + 1) & (out >= value[:, :, :1] - 1)).all()
    assert (out[:, :, -1] < value[:, :, -1] - 4).all()


def test_bench_inputs_are_what_they_say():
    shape = shape_of(256, D=64)
    for kind, least, most in (("gaussian", -0.2, 0.2), ("clustered", 0.05, 0.7), ("equal", 0.999, 1.001)):
        query, key, value = peers.tensors(kind, shape)
        unit = torch.nn.functional.normalize(query[0, 0], dim=-1)
        similar = (unit @ unit.T).mean().item()
        assert least < similar < most, (kind, similar)
        assert value.std() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="uniform"):
        peers.tensors("uniform", shape)


@pytest.mark.parametrize(
    "ours, exact, wanted",
    [
        ({1024: 2, 2048: 4, 4096: 8}, {1024: 1, 2048: 4, 4096: 16}, (2048, "2,048")),
        ({1024: 2, 4096: 8}, {1024: 1, 4096: 16}, (2048, "2,048")),
        # faster once, but not from there on
        ({1024: 1, 2048: 4, 4096: 8}, {1024: 2, 2048: 2, 4096: 32}, (2580, "2,580")),
        ({1024: 1, 2048: 1}, {1024: 2, 2048: 2}, (None, "at or below 1,024")),
        ({1024: 1, 2048: 3}, {1024: 2, 2048: 2}, (None, "none up to 2,048")),
        ({1024: 1}, {2048: 2}, (None, "not measured")),
    ],
)
def test_bench_crossover(ours, exact, wanted):
    assert report.crossover(ours, exact) == wanted


def stage_calls(length=64):
    """{op: {provider: call}} of the stages at a tiny size."""
    settings = replace(SETTINGS, lengths=(length,))
    return {case.row["op"]: case for case in stages.cases(settings)}


def test_bench_stages_equal_their_torch_equivalents():
    found = {}
    for op, case in stage_calls().items():
        assert case.flops.keys() == case.bytes.keys() == case.builds.keys()
        for provider, build in case.builds.items():
            torch.manual_seed(2)
            found[op, provider] = build()()
    wanted = found["hash", "lsh_kernels torch"]
    assert torch.equal(found["hash", "matmul + argmax"], wanted) and torch.equal(found["hash", "lsh_kernels triton"], wanted)
    wanted = found["sort", "lsh_kernels torch"]
    for provider in ("lsh_kernels triton", "torch.sort int16", "torch.sort int32"):
        assert torch.equal(found["sort", provider].int(), wanted), provider
    for provider in ("lsh_kernels triton", "softmax + sum"):
        torch.testing.assert_close(found["combine", provider], found["combine", "lsh_kernels torch"], rtol=1e-4, atol=1e-4)
    (out, lse), (wanted, wanted_lse) = (found["attention", f"lsh_kernels {backend}"] for backend in ("triton", "torch"))
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)
    # where a round has nothing for a query its row is not defined
    torch.testing.assert_close(out[lse > -torch.inf], wanted[lse > -torch.inf], rtol=1e-4, atol=1e-4)
    assert (
        found["attention", "gather + bmm"].shape == (1, 2, 2, 4, 16, 16) and found["attention", "gather + bmm"].isfinite().all()
    )


def test_bench_stages_count_their_work():
    """By hand: L = 64, R = 2, N = 8, C = 16, D = 16, two heads."""
    cases = stage_calls()
    work = {op: (case.flops["lsh_kernels torch"], case.bytes["lsh_kernels torch"]) for op, case in cases.items()}
    assert work["hash"] == (2 * 2 * 64 * 16 * 8, 2 * 64 * (64 + 8))
    assert work["sort"] == (0, 2 * 2 * 64 * 8)
    assert work["attention"] == (2 * 64 * 2 * 16 * 4 * 16, 2 * 64 * (2 * 64 + 8 + 2 * (64 + 4)))
    assert work["combine"] == (0, 2 * 64 * 3 * 68)


def test_bench_stages_rows_have_a_roofline(tmp_path):
    options = ["--suite", "stages", "--quick", "--providers", "lsh_kernels torch", "torch.sort int16"]
    _, rows = run(tmp_path / "rows.csv", *options)
    assert [row["op"] for row in rows] == ["attention", "hash", "sort", "sort", "combine"]
    for row in rows:
        floor = floor_of(row)
        assert float(row["roofline"]) == pytest.approx(floor / float(row["ms_p50"]), rel=1e-2)


def floor_of(row):
    """ms, from the row's own rates."""
    case = stage_calls()[row["op"]]
    by_copy = case.bytes[row["provider"]] / float(row["copy_gbs"]) / 1e6
    return max(by_copy, case.flops[row["provider"]] / float(row["matmul_gflops"]) / 1e6)


def rows_csv(path, rows):
    with bench.open_rows(path) as file:
        csv.DictWriter(file, FIELDS, restval="").writerows(rows)


def sample_rows(**fields):
    """Two lengths of ours and of SDPA, crossing at 2,048, a failure, memory, a stage, reversible and feed-forward layers."""
    common = dict.fromkeys(FIELDS, "") | {
        "suite": "attention", "op": "attention", "mode": "forward", "device": "cpu", "cpu": "Some CPU", "cores": "2",
        "regime": "batch", "input": "gaussian", "depth": "1", "status": "ok", "torch": "2", "triton": "3", "commit": "abc",
    } | fields  # fmt: skip
    rows = [
        {**common, "provider": provider, "L": length, "ms_p50": ms}
        for provider, times in (("lsh_kernels torch", (2, 8)), ("SDPA math", (1, 16)))
        for length, ms in zip((1024, 4096), times)
    ]
    return rows + [
        {**common, "provider": "SDPA cuDNN", "L": 1024, "status": "absent", "reason": "not a backend of the CPU"},
        {**common, "provider": "SDPA math", "L": 1024, "suite": "memory", "peak_mib": 77.5},
        {**common, "provider": "torch.sort int16", "op": "sort", "suite": "stages", "L": 1024, "ms_p50": 3, "roofline": 0.25},
        *(
            {**common, "op": suite, "suite": suite, "mode": "forward+backward", "L": 1024, "C": 32, "embed_dim": 64} | row
            for suite, row in (
                ("reversible", {"provider": "lsh_kernels exact", "measure": "memory", "depth": 2, "peak_mib": 10}),
                ("reversible", {"provider": "lsh_kernels exact", "measure": "memory", "depth": 24, "peak_mib": 12}),
                ("reversible", {"provider": "lsh_kernels exact", "measure": "time", "depth": 24, "ms_p50": 13}),
                ("reversible", {"provider": "lsh_kernels exact", "measure": "drift", "depth": 24, "drift": 0}),
                ("reversible", {"provider": "not reversible", "measure": "time", "depth": 24, "ms_p50": 10}),
                ("feedforward", {"provider": "plain MLP", "measure": "memory", "peak_mib": 100}),
                ("feedforward", {"provider": "lsh_kernels", "measure": "memory", "peak_mib": 5}),
                ("feedforward", {"provider": "plain MLP", "measure": "time", "ms_p50": 2}),
                ("feedforward", {"provider": "lsh_kernels", "measure": "time", "ms_p50": 3}),
            )
        ),
    ]


def written_report(folder):
    status = report.main(
        ["--results", str(folder / "results"), "--readme", str(folder / "README.md"), "--pictures", str(folder / "docs")]
    )
    assert status == 0
    return (folder / "README.md").read_text()


def test_bench_report_writes_between_its_markers(tmp_path):
    rows_csv(tmp_path / "results" / "box.csv", sample_rows())
    rows_csv(tmp_path / "results" / "gpu.csv", sample_rows(device="Some GPU", cores="16")[:1])
    (tmp_path / "results" / "other.csv").write_text("layer,head\n0,0\n")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    text = written_report(tmp_path)
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n") and "\nold\n" not in text
    assert "Rows run on a CPU: 15 on 2 cores of Some CPU. Rows run on a GPU: 1 on Some GPU. Rows modelled: none." in text
    assert text.index("### Some GPU") < text.index("### 2 cores of Some CPU")
    assert "| lsh_kernels torch | 8 |" in text and "| SDPA math | 77.5 |" in text
    assert "| sort, torch.sort int16 | 3 | 25.0% |" in text
    assert "memory at depth 24 is 1.200 times (bar: 1.100) that at depth 2" in text
    assert "a step takes 1.300 times (bar: 1.400) its time not reversible" in text
    assert "| lsh_kernels exact | 10 | 12 | 13 | 0 |" in text and "| not reversible | – | – | 10 | – |" in text
    assert "memory is 0.050 times (bar: 0.125) the plain MLP's" in text
    assert "time is 1.500 times (bar: 1.350) the plain MLP's" in text
    assert "the best exact attention from L = 2,048" in text
    assert "- SDPA cuDNN (absent at 1,024): not a backend of the CPU" in text
    kinds = {f"box_{kind}.png" for kind in ("time", "memory", "roofline", "reversible")} | {"gpu_time.png"}
    assert {path.name for path in (tmp_path / "docs").iterdir()} == kinds
    assert all(f"](docs/{name})" in text for name in kinds)


def test_bench_report_twice_is_the_same(tmp_path):
    rows_csv(tmp_path / "results" / "box.csv", sample_rows())
    first = written_report(tmp_path)
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert written_report(tmp_path) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()} == pictures


def test_bench_report_takes_the_last_row_of_each_kind(tmp_path):
    again = [row | {"ms_p50": 5} for row in sample_rows()[:1]]
    rows_csv(tmp_path / "box.csv", sample_rows() + again)
    times = report.select(report.load(tmp_path), "ms_p50", suite="attention")
    assert times["lsh_kernels torch"] == {1024: 5, 4096: 8}


def test_bench_report_takes_all_batches_of_a_fixed_number_of_tokens(tmp_path):
    rows = [row | {"regime": "tokens", "B": 4096 // row["L"]} for row in sample_rows()[:2]]
    rows_csv(tmp_path / "box.csv", rows)
    times = report.select(report.load(tmp_path), "ms_p50", suite="attention", regime="tokens")
    assert times == {"lsh_kernels torch": {1024: 2, 4096: 8}}


def test_bench_report_has_a_line_of_its_own_for_every_peer():
    assert len({(line["linestyle"], line["marker"]) for line in report.LINES}) >= len(peers.PEERS | peers.VARIANTS)


def test_bench_report_does_not_mix_shapes(tmp_path):
    """Of two head dims in one CSV the tables show the one measured last, at all its lengths."""
    other = [row | {"D": 128, "ms_p50": 7} for row in sample_rows()[:4:2]]
    rows_csv(tmp_path / "box.csv", other + [row | {"D": 64} for row in sample_rows()[:4]])
    times = report.select(report.load(tmp_path), "ms_p50", suite="attention")
    assert times == {"lsh_kernels torch": {1024: 2, 4096: 8}, "SDPA math": {1024: 1, 4096: 16}}
    rows_csv(tmp_path / "box.csv", other[:1])
    times = report.select(report.load(tmp_path), "ms_p50", suite="attention")
    assert times == {"lsh_kernels torch": {1024: 7}, "SDPA math": {1024: 7}}


def test_bench_report_reads_the_rows_that_are_committed():
    rows = report.load(BENCH / "results")
    assert {"lsh_kernels torch", "SDPA flash"} <= {row["provider"] for row in rows}
    assert all(row["regime"] and row["status"] in ("ok", "absent", "failed") for row in rows)


def test_bench_report_refuses_a_text_without_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.END}\n{report.BEGIN}\n")
    with pytest.raises(ValueError, match=r"README\.md: wanted one"):
        report.write(readme, "text")


def rehearse(out, *options, cwd=None):
    """(status, output) of the one-call version, rehearsed in a process of its own."""
    command = [sys.executable, BENCH / "gpu.py", "--rehearse", "--out", out, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)
    return done.returncode, done.stdout


REHEARSED = ["lsh_kernels triton", "SDPA flash", "lsh_kernels exact", "plain MLP"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(folder, what was said, rows) of a rehearsal of all suites, with a few providers at one length."""
    out = tmp_path_factory.mktemp("rehearsal")
    tests = ["--tests", "tests/test_readme.py", "-k", "has_snippets"]
    status, said = rehearse(out, "--providers", *REHEARSED, "--lengths", "64", *tests)
    assert status == 0, said
    with (out / "rehearsal.csv").open(newline="") as file:
        return out, said, list(csv.DictReader(file))


def test_bench_gpu_rehearsal_leaves_every_file(rehearsal):
    out, said, rows = rehearsal
    assert sorted(path.name for path in out.iterdir()) == [
        "bench.log", "rehearsal.csv", "rehearsal_memory.png", "rehearsal_reversible.png", "rehearsal_roofline.png",
        "rehearsal_time.png", "report.md", "tests.log",
    ]  # fmt: skip
    assert {row["suite"] for row in rows} == set(bench.SUITES)
    assert {row["device"] for row in rows} == {"cpu, interpreted Triton"}
    assert {row["provider"] for row in rows if row["status"] == "ok"} == set(REHEARSED)
    text = (out / "report.md").read_text()
    assert "Rows run on a GPU: none" in text and "](rehearsal_time.png)" in text
    assert "no number here is one of a GPU" in (out / "bench.log").read_text() and "\r" not in said
    status, said = rehearse(out)
    assert status == 2 and "is not empty" in said


def test_bench_reversible_rows_have_numbers(rehearsal):
    rows = [row for row in rehearsal[2] if row["suite"] == "reversible"]
    assert [(row["measure"], row["depth"]) for row in rows] == [
        ("memory", "12"), ("memory", "2"), ("time", "2"), ("drift", "12"), ("drift", "2"),
    ]  # fmt: skip
    assert all((row["status"], row["op"], row["embed_dim"]) == ("ok", "reversible", "16") for row in rows)
    assert float(rows[0]["peak_mib"]) > 0 and float(rows[1]["peak_mib"]) > 0 and float(rows[2]["ms_p50"]) > 0
    assert [row["drift"] for row in rows[3:]] == ["0", "0"]


def test_bench_gpu_stops_when_a_test_fails(tmp_path):
    (tmp_path / "test_broken.py").write_text("def test_broken():\n    assert 1 == 2\n")
    status, said = rehearse(tmp_path / "out", "--tests", str(tmp_path / "test_broken.py"))
    assert (
        status == 1
        and "the tests failed, nothing was timed" in said
        and "FAILED" in said
        and "test_broken.py::test_broken" in said
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.log", "tests.log"]


@pytest.mark.parametrize("fails", [False, True])
def test_bench_gpu_goes_on_if_the_tests_take_too_long_and_none_failed(fails, tmp_path):
    (tmp_path / "test_slow.py").write_text(
        f"import time\n\ndef test_first():\n    assert {not fails}\n\ndef test_slow():\n    time.sleep(60)\n"
    )
    options = ["--test-budget", "10", "--budget", "0", "--tests", str(tmp_path / "test_slow.py"), "-p", "no:cacheprovider"]
    status, said = rehearse("out", *options, cwd=tmp_path)
    assert status == (1 if fails else 0), said
    assert ("the tests failed, nothing was timed" in said) == fails
    assert ("the tests did not end in time; none of those that ran failed" in said) == (not fails)
    assert (tmp_path / "out" / "report.md").exists() == (not fails)


def test_bench_gpu_says_what_it_ran_without_git(monkeypatch):
    monkeypatch.setattr(gpu, "machine", lambda: {"commit": None})
    assert re.fullmatch(r"unknown, sources [0-9a-f]{12}", gpu._commit())
    monkeypatch.setattr(gpu, "machine", lambda: {"commit": "abc"})
    assert gpu._commit() == "abc"
