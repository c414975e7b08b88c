"""`make bench-gpu`: all that a GPU machine is asked for in one call, into one flat folder of at most eight files.

The GPU tests first; if one fails, nothing is timed. Then the suites, most important cases first, within a time budget, and the
report. `--rehearse` does the same on a CPU: interpreted kernels, tiny sizes, a few tests in place of the GPU tests.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from timing import DEVICE_LOST

from lsh_kernels.measure import machine

ROOT = Path(__file__).parent.parent
TESTS = {False: ["-m", "gpu"], True: ["tests/test_combine_rounds.py", "-k", "not gpu"]}
# most of a GPU test is compilation
PARALLEL = ["-n", "auto", "--dist", "loadgroup"]
REPORT_SECONDS, GRACE_SECONDS = 25, 5
# what the interpreter takes seconds for
TINY = (
    "--device cpu --dtype float32 --quick --seconds 0 --lengths 32 64 --heads 1 --head-dim 16 --n-hashes 2 --chunk-length 16"
).split()


def main(argv=None) -> int:
    """Test, time, report. Returns 0, or 1 if a test failed or a step broke; the summary says which."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="a new or empty folder (default: out/gpu)")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="of the suites (default: %(default)s)")
    parser.add_argument(
        "--test-budget", type=float, default=180, metavar="SECONDS", help="of the tests; if none failed by then, suites go on "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--total", type=float, default=570, metavar="SECONDS", help="of everything (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with interpreted kernels and tiny sizes")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="pytest's arguments, the last option (default: -m gpu)")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--lengths", nargs="+", metavar="L", help="default: those of the suites")
    parser.add_argument("--commit", help="what the rows say of the code (default: git's answer, else a digest of the sources)")
    options, start = parser.parse_args(argv), time.monotonic()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"--out: {out} is not empty")

    def left():
        return options.total - (time.monotonic() - start)

    def step(log, seconds, *command):
        """Run a Python command, its output into a log and its end on the screen. Returns its exit status; None if it was
        interrupted after so many seconds, upon which pytest and the suites sum up what they have."""
        env = {**os.environ, "PYTHONUNBUFFERED": "1"} | ({"TRITON_INTERPRET": "1"} if options.rehearse else {})
        path, status = out / log, None
        before = path.read_bytes() if path.exists() else b""
        with path.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                status = process.wait(max(seconds, 0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        # of a progress bar only its last state
        output = re.sub(r"[^\n]*\r", "", path.read_bytes()[len(before) :].decode(errors="replace"))
        if status is None:
            output += f"\ninterrupted after {seconds:.0f} s\n"
        path.write_bytes(before + output.encode())
        print("\n".join(output.splitlines()[-25:]), flush=True)
        return status

    def say(text):
        print(text, flush=True)
        with (out / "bench.log").open("a") as file:
            file.write(f"{text}\n")

    where = "the rehearsal on a CPU, interpreted: no number here is one of a GPU" if options.rehearse else "a GPU"
    commit = options.commit or _commit()
    say(f"run on {where}; commit {commit}")
    if not options.rehearse and not _has_gpu():
        return _end("torch sees no GPU; --rehearse runs on a CPU")
    tests = options.tests or TESTS[options.rehearse]
    if not options.tests and not options.rehearse and importlib.util.find_spec("xdist"):
        tests = tests + PARALLEL
    pytest = ["-m", "pytest", "-v", "--tb=short", "-o", "addopts=--strict-markers --strict-config"]
    passed = step("tests.log", min(options.test_budget, left()), *pytest, *tests)
    if passed != 0:
        log = (out / "tests.log").read_text()
        failed = re.findall(r"^(?:FAILED|ERROR).*", log, re.MULTILINE) or re.findall(r".*\b(?:FAILED|ERROR)\b.*", log)
        if failed or passed is not None:
            return _end("the tests failed, nothing was timed:\n" + "\n".join(failed or ["see tests.log"]))
        say("the tests did not end in time; none of those that ran failed")
    some = ["--providers", *options.providers] if options.providers else []
    some += ["--lengths", *options.lengths] if options.lengths else []
    tiny = TINY if options.rehearse else []
    rows = out / ("rehearsal.csv" if options.rehearse else "gpu.csv")
    end = time.monotonic() + max(min(options.budget, left() - 2 * REPORT_SECONDS), 0)
    resume = []
    while True:
        budget = max(end - time.monotonic(), 0)
        # the last call that started may outlast the budget; its rows are in the CSV whatever becomes of it
        timed = step(
            "bench.log", left() - REPORT_SECONDS - GRACE_SECONDS, ROOT / "bench", "--out", rows, "--budget", budget,
            "--commit", commit, *resume, *tiny, *some,
        )  # fmt: skip
        if timed != DEVICE_LOST or time.monotonic() >= end:
            break
        resume = ["--resume"]
    reported = step(
        "bench.log", left() - GRACE_SECONDS, ROOT / "bench" / "report.py", "--results", rows, "--readme", out / "report.md",
        "--pictures", out,
    )  # fmt: skip
    print("\n".join(sorted(path.name for path in out.iterdir())))
    if timed is None:
        say("the suites were interrupted in the middle of a case; what was measured is reported")
    if timed or reported != 0:
        return _end("a step broke: see bench.log")
    return 0


def _commit() -> str:
    """Git's answer, or where there is none a digest of the sources."""
    sources = sorted(path for folder in ("src", "csrc_triton", "bench") for path in (ROOT / folder).rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return machine()["commit"] or f"unknown, sources {digest[:12]}"


def _has_gpu() -> bool:
    import torch

    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def _end(why) -> int:
    print(f"stopped: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
