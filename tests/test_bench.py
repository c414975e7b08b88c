"""The benchmark suite: its rows, what it does with failures, interruptions and budgets, and that its peers agree."""

import importlib.util
import os
import shutil
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import attention as attention_suite
import decode
import feedforward
import memory
import peers
import pytest
import reversible
import stages
import timing
import torch
from bench_folder import SETTINGS, TINY, bench, rows_csv, run
from cases import FIELDS, AbsentError, Case
from timing import Budget, BudgetSpentError, DeviceLostError, measure

from lsh_kernels import LSHConfig, lsh_attention, random_rotations


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
    providers = ["lsh_kernels torch", "SDPA flash", "SDPA cuDNN"]
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
    assert bench.main([*TINY, "--out", str(tmp_path / "x.csv"), "--providers", "no such peer"]) == 2
    said = capsys.readouterr().err
    assert "no such peer" in said and "SDPA flash" in said and not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("option", ["--lengths", "--heads", "--batch", "--head-dim", "--n-hashes", "--chunk-length", "--seconds"])
def test_bench_command_refuses_sizes_of_nothing(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main([*TINY, "--out", str(tmp_path / "x.csv"), option, "-1" if option == "--seconds" else "0"])
    assert f"{option}: got" in capsys.readouterr().err and not (tmp_path / "x.csv").exists()


def test_bench_suites_are_modules_with_cases(capsys):
    assert bench.SUITES[0] == "attention"
    for suite in bench.SUITES:
        assert list(importlib.import_module(suite).cases(SETTINGS))
    with pytest.raises(SystemExit):
        bench.main(["--suite", "no_such_suite"])
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


def test_bench_memory_takes_flex_on_a_gpu_only():
    for device in ("cpu", "cuda"):
        found = {name for case in memory.cases(replace(SETTINGS, device=torch.device(device))) for name in case.builds}
        assert found >= {"SDPA flash", "lsh_kernels trax"} and ("FlexAttention window" in found) == (device == "cuda")


def test_bench_decode_goes_to_longer_lengths_on_a_cpu():
    def lengths(**changes):
        return [case.row["L"] for case in decode.cases(replace(SETTINGS, **changes))]

    assert lengths() == [256, 128, 64, 32]
    assert lengths(quick=True) == [64, 32]
    assert lengths(device=torch.device("cuda"), lengths=(2**20, 2**17, 2**16)) == [2**16, 2**17]


def test_bench_decode_providers_append_and_attend():
    """Ours are the last row of LSH attention over all tokens, one more per call; SDPA's that of exact attention. Hugging Face's
    queries, keys and values are projections of its own."""
    (case,) = decode.cases(replace(SETTINGS, lengths=(64,), quick=True))
    shape = peers.Shape(1, 2, 64, 16, 2, 16, torch.float32, torch.device("cpu"), False)
    config = LSHConfig(n_hashes=2, chunk_length=16, n_buckets=8)
    query, key, value = peers.tensors("gaussian", shape._replace(L=64 + decode.NEW))
    for name in ("lsh_kernels BucketCache", "lsh_kernels separate keys"):
        torch.manual_seed(3)
        call = case.builds[name]()
        torch.manual_seed(3)
        rotations = random_rotations(16, 8, 2, n_heads=2)
        for length in (65, 66):
            q, k, v = (x[:, :, :length] for x in (query, key, value))
            wanted = lsh_attention(q, k if "keys" in name else None, v, config=config, rotations=rotations, is_causal=True)
            torch.testing.assert_close(call(), wanted[:, :, -1:])
    query, key, value = peers.tensors("gaussian", shape._replace(L=65))
    wanted = ((query[:, :, -1:] @ key.mT) / 4).softmax(-1) @ value
    for name in ("SDPA flash", "SDPA math"):
        call = case.builds[name]()
        for _ in range(2):
            torch.testing.assert_close(call(), wanted)
    call = case.builds["Hugging Face"]()
    first = call()
    assert first.shape == wanted.shape and first.isfinite().all() and torch.equal(call(), first)
    with pytest.raises(AbsentError, match="has no cache"):
        case.builds["reformer-pytorch"]()


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


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_bench_flex_on_a_cpu_equals_sdpa_with_a_window():
    shape = shape_of(160, R=2, C=20)
    query, key, value = peers.tensors("gaussian", shape)
    i, j = torch.arange(160)[:, None], torch.arange(160)[None, :]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=(j <= i) & (j >= i - 40))
    with torch.no_grad():
        found = peers.PEERS["FlexAttention window"](shape)(query, key, value)
    torch.testing.assert_close(found, wanted)


def test_bench_flex_on_a_cpu_says_what_it_lacks(monkeypatch):
    with pytest.raises(AbsentError, match="no backward"):
        peers.flex(shape_of(32, backward=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(AbsentError, match="needs a C"):
        peers.flex(shape_of(32))


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
    for op, providers in {
        "combine": ("lsh_kernels triton", "softmax + sum"), "attention backward": ("lsh_kernels triton",),
        "residual": ("lsh_kernels triton",),
    }.items():  # fmt: skip
        for provider in providers:
            torch.testing.assert_close(found[op, provider], found[op, "lsh_kernels torch"], rtol=1e-4, atol=1e-4)
    (out, lse), (wanted, wanted_lse) = (found["attention", f"lsh_kernels {backend}"] for backend in ("triton", "torch"))
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)
    # where a round has nothing for a query its row is not defined
    torch.testing.assert_close(out[lse > -torch.inf], wanted[lse > -torch.inf], rtol=1e-4, atol=1e-4)
    assert (
        found["attention", "gather + bmm"].shape == (1, 2, 2, 4, 16, 16) and found["attention", "gather + bmm"].isfinite().all()
    )
    gradients = found["attention backward", "gather + bmm"]
    assert [x.shape for x in gradients] == [(1, 2, 64, 16)] * 2 and all(x.isfinite().all() for x in gradients)
    for one, other in zip(found["residual", "round + add"], found["residual", "lsh_kernels torch"]):
        assert torch.equal(one, other)
    # the sum of a row and itself, on the grid
    assert torch.allclose(found["residual", "lsh_kernels torch"][1], 2 * peers.tensors("gaussian", shape_of(64))[0], atol=1e-4)


def test_bench_stages_backward_is_autograds():
    """From the same rotations as our attention of the suite's inputs."""
    torch.manual_seed(2)
    found = stage_calls()["attention backward"].builds["lsh_kernels torch"]()()
    torch.manual_seed(2)
    query, _, value = (x.requires_grad_() for x in peers.tensors("gaussian", shape_of(64)))
    config = LSHConfig(n_hashes=2, chunk_length=16)
    rotations = random_rotations(16, config.factors(64), 2, n_heads=2)
    out = lsh_attention(query, None, value, config=config, rotations=rotations, is_causal=True)
    torch.testing.assert_close(found, torch.autograd.grad(out.sum(), (query, value)))


def test_bench_stages_count_their_work():
    """By hand: L = 64, R = 2, N = 8, C = 16, D = 16, two heads."""
    cases = stage_calls()
    work = {op: (case.flops["lsh_kernels torch"], case.bytes["lsh_kernels torch"]) for op, case in cases.items()}
    assert work["hash"] == (2 * 2 * 64 * 16 * 8, 2 * 64 * (64 + 8))
    assert work["sort"] == (0, 2 * 2 * 64 * 8)
    assert work["attention"] == (2 * 64 * 2 * 16 * 4 * 16, 2 * 64 * (2 * 64 + 8 + 2 * (64 + 4)))
    assert work["combine"] == (0, 2 * 64 * 3 * 68)
    assert work["attention backward"] == (5 * 64 * 2 * 16 * 4 * 16, 2 * 64 * (6 * 64 + 8 + 4))
    assert work["residual"] == (0, 2 * 64 * 16 * 16)


def test_bench_stages_rows_have_a_roofline(tmp_path):
    options = ["--suite", "stages", "--quick", "--providers", "lsh_kernels torch", "torch.sort int16"]
    _, rows = run(tmp_path / "rows.csv", *options)
    assert [row["op"] for row in rows] == ["attention", "hash", "sort", "sort", "combine", "attention backward", "residual"]
    assert [row["mode"] for row in rows if row["mode"] != "forward"] == ["backward"]
    for row in rows:
        floor = floor_of(row)
        assert float(row["roofline"]) == pytest.approx(floor / float(row["ms_p50"]), rel=1e-2)


def floor_of(row):
    """ms, from the row's own rates."""
    case = stage_calls()[row["op"]]
    by_copy = case.bytes[row["provider"]] / float(row["copy_gbs"]) / 1e6
    return max(by_copy, case.flops[row["provider"]] / float(row["matmul_gflops"]) / 1e6)
