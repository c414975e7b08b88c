"""The one-call version for a GPU machine, rehearsed on a CPU."""

import csv
import re
import subprocess
import sys

import gpu
import pytest
from bench_folder import BENCH, bench


def rehearse(out, *options, cwd=None):
    """(status, output) of the one-call version, rehearsed in a process of its own."""
    command = [sys.executable, BENCH / "gpu.py", "--rehearse", "--out", out, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)
    return done.returncode, done.stdout


REHEARSED = ["lsh_kernels triton", "SDPA flash", "lsh_kernels BucketCache", "lsh_kernels exact", "plain MLP"]


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
