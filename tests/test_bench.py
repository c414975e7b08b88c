"""The benchmark suite: its rows, its command, and the cases of its suites."""

import importlib.util
import time
from dataclasses import replace

import attention as attention_suite
import decode
import feedforward
import memory
import peers
import pytest
import reversible
import timing
import torch
from bench_folder import SETTINGS, TINY, bench, interrupt, rows_csv, run
from cases import FIELDS, AbsentError, Case

from lsh_kernels import LSHConfig, lsh_attention, random_rotations


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
