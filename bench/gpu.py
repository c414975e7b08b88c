"""`make bench-gpu`: all that a GPU machine is asked for in one call, into one flat folder of at most eight files.

The GPU tests first; if one fails, nothing is timed. Then the suites in order of importance within a time budget, and the report.
`--rehearse` does the same on a CPU: interpreted kernels, tiny sizes, a few tests in place of the GPU tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {False: ["-m", "gpu"], True: ["tests/test_combine_rounds.py", "-k", "not gpu"]}
REPORT_SECONDS = 25
# what the interpreter takes seconds for
TINY = (
    "--device cpu --dtype float32 --quick --seconds 0 --lengths 32 64 --heads 1 --head-dim 16 --n-hashes 2 --chunk-length 16"
).split()


def main(argv=None) -> int:
    """Test, time, report. Returns 0, or 1 if a test failed or a step broke; the summary says which."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="a new or empty folder (default: out/gpu)")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="of the suites (default: %(default)s)")
    parser.add_argument("--total", type=float, default=570, metavar="SECONDS", help="of everything (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with interpreted kernels and tiny sizes")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="pytest's arguments, the last option (default: -m gpu)")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--lengths", nargs="+", metavar="L", help="default: those of the suites")
    parser.add_argument("--commit", help="what the rows say of the code (default: git's answer)")
    options, start = parser.parse_args(argv), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        parser.error(f"--out: {options.out} is not empty")

    def left():
        return options.total - (time.monotonic() - start)

    def step(log, seconds, *command):
        """Run a Python command, its output into a log and its end on the screen; True if it succeeded in time."""
        env = {**os.environ, "TRITON_INTERPRET": "1"} if options.rehearse else os.environ
        command, ending = [sys.executable, *map(str, command)], ""
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            output, ok = done.stdout, done.returncode == 0
        except subprocess.TimeoutExpired as error:
            output, ok, ending = error.stdout or b"", False, f"\nended after {seconds:.0f} s\n"
        # of a progress bar only its last state
        output = re.sub(r"[^\n]*\r", "", output.decode(errors="replace")) + ending
        with (options.out / log).open("a") as file:
            file.write(output)
        print("\n".join(output.splitlines()[-25:]), flush=True)
        return ok

    where = "the rehearsal on a CPU, interpreted: no number here is one of a GPU" if options.rehearse else "a GPU"
    print(f"run on {where}", flush=True)
    (options.out / "bench.log").write_text(f"run on {where}\n")
    tests = options.tests or TESTS[options.rehearse]
    if not options.rehearse and not _has_gpu():
        return _end("torch sees no GPU; --rehearse runs on a CPU")
    if not step(
        "tests.log", left(), "-m", "pytest", "-q", "--tb=short", "-o", "addopts=--strict-markers --strict-config", *tests
    ):
        failed = re.findall(r"^(?:FAILED|ERROR).*", (options.out / "tests.log").read_text(), re.MULTILINE)
        return _end("the tests failed, nothing was timed:\n" + "\n".join(failed or ["see tests.log"]))
    budget = max(min(options.budget, left() - 2 * REPORT_SECONDS), 0)
    commit = ["--commit", options.commit] if options.commit else []
    some = ["--providers", *options.providers] if options.providers else []
    some += ["--lengths", *options.lengths] if options.lengths else []
    tiny = TINY if options.rehearse else []
    rows = options.out / ("rehearsal.csv" if options.rehearse else "gpu.csv")
    # the last call that started may outlast the budget; its rows are in the CSV whatever becomes of it
    timed = step("bench.log", left() - REPORT_SECONDS, ROOT / "bench", "--out", rows, "--budget", budget, *commit, *tiny, *some)
    reported = step(
        "bench.log", REPORT_SECONDS, ROOT / "bench" / "report.py", "--results", rows, "--readme", options.out / "report.md",
        "--pictures", options.out,
    )  # fmt: skip
    print("\n".join(sorted(path.name for path in options.out.iterdir())))
    if not timed or not reported:
        return _end("a step broke: see bench.log")
    return 0


def _has_gpu() -> bool:
    import torch

    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def _end(why) -> int:
    print(f"stopped: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
