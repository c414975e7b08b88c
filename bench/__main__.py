"""`python -m lsh_kernels bench`: measures attention, its stages and its peers, and appends rows to bench/results/<machine>.csv.

In a suite the most important cases come first; suites take turns, eight cases each, and what is longer than 128K comes last.
Ctrl-C or a spent budget keeps what was measured. A provider that is absent or fails leaves a row that says why.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from cases import FIELDS, AbsentError, Settings
from measured import KEY, crossovers
from timing import (
    DEVICE_LOST,
    LOST,
    Budget,
    BudgetSpentError,
    DeviceLostError,
    machine_name,
    measure,
    own_peak_mib,
    provenance,
)  # fmt: skip
from tqdm import tqdm

FOLDER = Path(__file__).parent
# most important first
SUITES = ("attention", "stages", "memory", "decode", "reversible", "feedforward")
SHAPE = ("batch", "heads", "head_dim", "n_hashes", "chunk_length")
TURN, LATE = 8, 2**17


def main(argv=None) -> int:
    """Measure what the options say. Returns 0; after Ctrl-C 130, if the GPU was lost 3; rows measured so far are written."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parse(argv)
    settings = settings_of(options)
    if options.peak:
        return _print_peak(options, settings)
    suites = {suite: list(enumerate(import_module(suite).cases(settings))) for suite in options.suite}
    if options.providers:
        there = {name for cases in suites.values() for _, case in cases for name in case.builds}
        if not there.issuperset(options.providers):
            names = ", ".join(sorted(there))
            print(f"--providers: got {', '.join(options.providers)}, wanted some of {names}", file=sys.stderr)
            return 2
        suites = {suite: [(i, only(case, options.providers)) for i, case in cases] for suite, cases in suites.items()}
    facts = provenance(settings, options.commit)
    out = options.out or FOLDER / "results" / f"{machine_name(settings.device)}.csv"
    cases = in_turns([(suite, index, case) for suite, found in suites.items() for index, case in found])
    if options.resume:
        there = rows_of(out)
        cases = [(suite, index, what_is_left(suite, case, facts, there)) for suite, index, case in cases]
        cases = [found for found in cases if found[2].builds]
    budget, rows, status = Budget(options.budget), [], 0
    with open_rows(out) as file:
        writer = csv.DictWriter(file, FIELDS)
        try:
            for suite, index, case in tqdm(cases, desc=", ".join(suites)):

                def emit(provider, numbers, suite=suite, case=case):
                    rows.append(row_of(suite, case, provider, numbers, facts))
                    writer.writerow(rows[-1])
                    file.flush()
                    tqdm.write(line_of(rows[-1]), file=sys.stderr)

                child = [str(FOLDER), *argv, "--suite", suite, "--peak", str(index)]
                measure(case, settings, budget, emit, options.seconds, child)
        except BudgetSpentError:
            print(f"the budget of {options.budget} s is spent", file=sys.stderr)
        except DeviceLostError:
            print(f"{rows[-1]['reason']}; --resume goes on after it", file=sys.stderr)
            status = DEVICE_LOST
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
    for line in crossovers(rows):
        print(line)
    print(f"{len(rows)} rows appended to {out}")
    return status


def _parse(argv):
    parser = argparse.ArgumentParser(prog="python -m lsh_kernels bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--suite", nargs="+", default=["all"], choices=[*SUITES, "all"], help=f"of {', '.join(SUITES)} (default: all of them)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 1K to 16K on a CPU, 1K to 1M on a GPU")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer lengths, runs and cases")
    parser.add_argument("--out", type=Path, help="a CSV file to append to (default: bench/results/<machine>.csv)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing new after so long")
    parser.add_argument("--resume", action="store_true", help="only what --out has no row of")
    parser.add_argument(
        "--seconds", type=float, help="of the runs of one case on a CPU (default: 20, with --quick 3; 0: one run)"
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    for name in SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name), help="default: %(default)s")
    parser.add_argument("--commit", help="what the rows say of the code (default: git's answer)")
    # in the process that a CPU's peak is taken in: index of the case, provider
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.seconds is None:
        options.seconds = 3 if options.quick else 20
    if "all" in options.suite:
        options.suite = SUITES
    if any(length < 1 for length in options.lengths or ()):
        parser.error(f"--lengths: got {options.lengths}, wanted positive ones")
    for name in SHAPE:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, wanted a positive number")
    if options.seconds < 0:
        parser.error(f"--seconds: got {options.seconds}, wanted no negative number")
    return options


def in_turns(cases):
    """(suite, index, case), sorted: suites take turns, `TURN` cases each; what is longer than `LATE` comes last, by length."""

    def place(found):
        _, index, case = found
        return (case.row["L"], 0) if case.row["L"] > LATE else (0, index // TURN)

    return sorted(cases, key=place)


def what_is_left(suite, case, facts, there):
    """The case without the providers that it has a row of; one that lost the GPU is absent from then on."""

    def absent():
        raise AbsentError("lost the GPU before")

    done = {tuple(row[name] for name in KEY) for row in there}
    culprits = {row["provider"] for row in there if row["reason"].startswith(LOST)}
    builds = {
        name: absent if name in culprits else build
        for name, build in case.builds.items()
        if tuple(row_of(suite, case, name, {}, facts)[field] for field in KEY) not in done
    }
    return replace(case, builds=builds)


def only(case, providers):
    return replace(case, builds={name: build for name, build in case.builds.items() if name in providers})


def settings_of(options) -> Settings:
    on_gpu = options.device.type == "cuda"
    lengths = options.lengths or [2**n for n in range(10, 21 if on_gpu else 15, 2 if options.quick else 1)]
    if options.quick and not options.lengths and not on_gpu:
        lengths = [1024, 4096]
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    shape = {name: getattr(options, name) for name in SHAPE}
    return Settings(options.device, getattr(torch, dtype), tuple(sorted(lengths)), options.quick, **shape)


def rows_of(path) -> list[dict]:
    """The rows of a CSV with all of `FIELDS`, empty where it has fewer."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict.fromkeys(FIELDS, "") | row for row in csv.DictReader(file)]


def open_rows(path):
    """Open a CSV for appending rows of `FIELDS`; a file with fewer fields gets the new ones, empty, in its old rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = rows_of(path)
    if path.exists():
        with path.open(newline="") as file:
            if next(csv.reader(file), None) == FIELDS:
                return path.open("a", newline="")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(old)
    return path.open("a", newline="")


def row_of(suite, case, provider, numbers, facts) -> dict:
    """The numbers of a provider as a row of strings."""
    row = dict.fromkeys(FIELDS, "") | case.row | facts | numbers
    row |= {"suite": suite, "provider": provider, "measure": case.measure, "threads": case.threads or torch.get_num_threads()}
    if "ms_p50" in numbers:
        seconds, matmul = numbers["ms_p50"] / 1e3, facts["matmul_gflops"]
        flops, floor = case.flops.get(provider), 0.0
        if flops:
            row |= {"gflops": flops / seconds / 1e9, "share_of_matmul": flops / seconds / 1e9 / matmul}
            floor = flops / matmul / 1e9
        if provider in case.bytes:
            row["roofline"] = max(floor, case.bytes[provider] / facts["copy_gbs"] / 1e9) / seconds
    return {name: _text(value) for name, value in row.items()}


def _text(value) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line_of(row) -> str:
    if row["status"] != "ok":
        result = f"{row['status']}: {row['reason']}"
    elif row["drift"]:
        result = f"{row['drift']:>9} largest difference"
    elif row["peak_mib"]:
        result = f"{row['peak_mib']:>9} MiB"
    else:
        result = f"{row['ms_p50']:>9} ms  ({row['ms_p20']} to {row['ms_p80']})"
    what = f"{row['op']:19}{row['provider']:26} {row['mode']:22} {row['B']:>4} x {row['L']:<7} {row['input']:10}{row['depth']:>3}"
    return f"{what} {result}"


def _print_peak(options, settings) -> int:
    (suite,), (index, provider) = options.suite, options.peak
    short = replace(settings, lengths=tuple(min(length, 2 * settings.chunk_length) for length in settings.lengths))
    case, warm_case = (list(import_module(suite).cases(s))[int(index)] for s in (settings, short))
    print(own_peak_mib(case, warm_case, provider))
    return 0


if __name__ == "__main__":
    sys.exit(main())
