"""The audit: every kernel compiled for GPUs that are not there, and what its machine code says, as a table.

    python -m lsh_kernels audit --baseline bench/results/audit.csv

Kernels come from their launchers, called with meta tensors on the cases of `audit_cases`, so that what is compiled is what
Triton's JIT would compile.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import multiprocessing
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .audit_cases import cases, launch, work_of

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

_WIDTHS = [f"{kind}_{width}" for kind in ("load", "store") for width in (128, 64, 32, 16, 8)]
FIELDS = (
    *"triton target case kernel error warps registers stack spill_stores spill_loads shared ctas resident_warps limit".split(),
    *"tensor tensor_path fma_dots mufu".split(), *_WIDTHS, "row_load_128_share",
    *"sass_in_loops sass_outside unit slots_per_unit".split(),
)  # fmt: skip


def measure(launched, target: str) -> dict:
    """The row of one launch. Counts are static and per program; slots_per_unit are lanes x instructions issued."""
    from . import machine_code, offline

    row = dict.fromkeys(FIELDS, "") | {"kernel": launched.name, "target": target, "error": launched.error}
    if launched.error:
        return row
    code, work = machine_code.inspect(launched.kernel), work_of(launched)
    ctas, limit = offline.occupancy(code, target)
    n_lanes = launched.kernel.metadata.target.warp_size
    static = {what: code.static(what) for what in ("tensor", "mufu", "row_load", "row_load_128", "issue", *_WIDTHS)}
    row |= {what: static[what] for what in ("tensor", "mufu", *_WIDTHS)}
    slots = code.total("issue", work.trips) * n_lanes / work.units
    return row | {
        "warps": code.warps, "registers": code.registers, "stack": code.stack, "spill_stores": code.spill_stores,
        "spill_loads": code.spill_loads, "shared": code.shared, "ctas": ctas, "resident_warps": ctas * code.warps,
        "limit": limit, "tensor_path": code.tensor_path, "fma_dots": code.fma_dots, "unit": work.unit,
        "slots_per_unit": f"{slots:.1f}",
        "row_load_128_share": f"{static['row_load_128'] / static['row_load']:.3f}" if static["row_load"] else "",
        "sass_in_loops": (static["issue"] - code.counts[0]["issue"]) // code.warps,
        "sass_outside": code.counts[0]["issue"] // code.warps,
    }  # fmt: skip


def audit_case(target: str, name: str) -> list[tuple[dict, object]]:
    """Rows of one case for one target, each with a hash of the kernel."""
    import triton

    from . import machine_code, offline

    with offline.compile_only(target) as launches:
        launch(cases(full=True)[name])
    # all at once, which is faster
    machine_code.inspect_all([launched.kernel for launched in launches if not launched.error])
    labels = {"triton": triton.__version__, "case": name}
    return [(measure(launched, target) | labels, launched.kernel and launched.kernel.hash) for launched in launches]


def audit(targets, names) -> list[dict]:
    """Rows of `FIELDS` of all cases for all targets; a kernel that several cases share is in the first one's."""
    # neighbours share no kernel, which two workers would compile at the same time
    tasks = [(target, name) for name in names for target in targets]
    with workers() as pool:
        found = dict(zip(tasks, tqdm(pool.map(audit_case, *zip(*tasks)), "audit", len(tasks))))
    rows, seen = [], set()
    for target in targets:
        for name in names:
            for row, kernel_hash in found[target, name]:
                if kernel_hash is None or (target, kernel_hash) not in seen:
                    seen.add((target, kernel_hash))
                    like = [_key(other) for other in rows if _key(other)[:2] == (target, name)]
                    n = sum(kernel.partition(" ")[0] == row["kernel"] for _, _, kernel in like)
                    rows.append(row | {"kernel": row["kernel"] + f" {n + 1}" * (n > 0)})
    return rows


def workers():
    """Processes to compile in, one per core."""
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker():
    # compilers make many objects and no garbage to speak of
    gc.disable()
    # a kernel gone wrong can have LLVM fill the machine
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))


class Change(NamedTuple):
    target: str
    case: str
    kernel: str
    what: str
    before: str
    after: str
    fails: bool


def compare(baseline: list[dict], rows: list[dict]) -> list[Change]:
    """What is different. Fails: a target that does not compile any more, a new spill, a tensor-core path that is lost, more
    than 10% more instructions per unit."""
    before = {_key(row): row for row in baseline}
    after = {_key(row): row for row in rows}
    changes = [Change(*key, "kernel", "there", "gone", False) for key in before if key not in after]
    for key, row in after.items():
        for what, fails in _differences(before.get(key), row):
            was = before[key][what] if key in before else ""
            changes.append(Change(*key, what, str(was), str(row[what]), fails))
    return changes


def _differences(old, row):
    """(field, whether that is a failure) of the fields that tell a row from the one before (None: it is new)."""
    if old is None:
        yield "kernel", False
        old = dict.fromkeys(FIELDS, "")
    fails = {
        "error": bool(row["error"]),
        "tensor": False,
        "tensor_path": _lost_path(old["tensor_path"].split(), row["tensor_path"].split()),
        "registers": False,
        "slots_per_unit": _number(row, "slots_per_unit") > 1.1 * _number(old, "slots_per_unit") > 0,
        # a hundredth is noise of code that the compiler has doubled
        "row_load_128_share": _number(row, "row_load_128_share") < _number(old, "row_load_128_share") - 0.01,
    } | {what: _number(row, what) > _number(old, what) for what in ("stack", "spill_stores", "spill_loads", "fma_dots")}
    is_new = not old["kernel"]
    for what, worse in fails.items():
        # an error leaves no numbers to compare
        if what == "error" or not row["error"]:
            if str(old[what]) != str(row[what]) and (worse or not is_new):
                yield what, worse


def _lost_path(old, new):
    """No tensor cores any more, or not by the instructions of a later generation."""
    return bool(old and not new or set(old) - {"HMMA"} - set(new))


def _number(row, what):
    return float(row[what] or 0)


def _key(row):
    return row["target"], row["case"], row["kernel"]


def print_table(rows):
    columns = (
        ("case", 20), ("kernel", 30), ("registers", 4), ("spills", 6), ("shared", 6), ("ctas", 4), ("resident_warps", 5),
        ("limit", 13), ("tensor", 6), ("mufu", 5), ("row_load_128_share", 6), ("sass_in_loops", 6), ("sass_outside", 7),
        ("slots_per_unit", 7), ("unit", 13),
    )  # fmt: skip
    heads = "case kernel reg spills shared CTAs warps limit tensor mufu wide loops outside slots per".split()
    target = None
    for row in rows:
        if row["target"] != target:
            target = row["target"]
            print(f"\n{target}")
            print(" ".join(f"{head:{'<' if width > 8 else '>'}{width}}" for head, (_, width) in zip(heads, columns)))
        if row["error"]:
            print(f"{row['case']:20} {row['kernel']:30} {row['error']}")
            continue
        cells = row | {"spills": sum(int(row[what]) for what in ("stack", "spill_stores", "spill_loads"))}
        print(" ".join(f"{cells[name]!s:{'<' if width > 8 else '>'}{width}}" for name, width in columns))


def print_changes(changes):
    for change in changes:
        verdict = "FAILS" if change.fails else ""
        print(
            f"{change.target:7} {change.case:20} {change.kernel:30} {change.what:18} {change.before} -> {change.after} {verdict}"
        )


def read_csv(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, rows, fields=FIELDS):
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lsh_kernels audit", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS, metavar="TARGET")
    parser.add_argument("--cases", nargs="+", choices=list(cases(full=True)), metavar="CASE")
    parser.add_argument("--full", action="store_true", help="fp16 and fp32 in all variants, too; twice as long")
    parser.add_argument("--out", type=Path, help="write rows to this CSV file in place of those of the same targets and cases")
    parser.add_argument("--baseline", type=Path, help="compare with this CSV file; exit status 1 if something got worse")
    parser.add_argument("--model", action="store_true", help="print modelled times, their bounds and assumptions")
    parser.add_argument("--measured", type=Path, help="with --model: a CSV file of bench, for the model's error")
    parser.add_argument("--picture", type=Path, help="draw rows and modelled times into this file")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="KERNEL",
        help="instead: rank tiles, warps, stages of these kernels (all, attention_fwd, ..)",
    )
    options = parser.parse_args(argv)
    from triton import knobs

    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    if options.cases and (options.baseline or options.out) and not options.sweep:
        parser.error("--cases: got some, wanted all of them for a file: a kernel that several share is in the first one's rows")
    options.cases = options.cases or list(cases(options.full))
    if options.sweep:
        return _sweep(parser, options)
    baseline = read_csv(options.baseline) if options.baseline else []
    rows = audit(options.targets, options.cases)
    print_table(rows)
    if options.out:
        there = read_csv(options.out) if options.out.exists() else []
        order = list(itertools.product(TARGETS, cases(full=True)))
        kept = [row for row in there if not _covers(options, row) and _key(row)[:2] in order]
        write_csv(options.out, sorted(rows + kept, key=lambda row: order.index(_key(row)[:2])))
    if options.model or options.picture:
        _model(options, rows)
    if not options.baseline:
        return 0
    covered = [row for row in baseline if _covers(options, row)]
    changes = compare(covered, rows)
    print(f"\nagainst {options.baseline}: {len(changes)} changes")
    print_changes(changes)
    versions = {row["triton"] for row in covered} - {row["triton"] for row in rows}
    if versions:
        print(f"the baseline is of triton {', '.join(versions)}")
    return int(any(change.fails for change in changes))


def _covers(options, row):
    return row["target"] in options.targets and row["case"] in options.cases


def _model(options, rows):
    from . import time_model

    estimates = time_model.estimate()
    if options.model:
        print()
        time_model.print_model(estimates, measured=options.measured)
    if options.picture:
        from . import audit_picture

        audit_picture.draw(rows, estimates).savefig(options.picture, dpi=150)


def _sweep(parser, options):
    from . import sweep

    if "all" in options.sweep:
        # kernels that share a configuration once
        options.sweep = list({space[:2]: name for name, space in sweep.SPACES.items()}.values())
    if unknown := set(options.sweep) - set(sweep.SPACES):
        parser.error(f"--sweep: got {' '.join(sorted(unknown))}, wanted all or some of {' '.join(sweep.SPACES)}")
    rows = []
    with workers() as pool:
        for target, name, kernel in itertools.product(options.targets, options.cases, options.sweep):
            for trials in sweep.sweep(kernel, cases(full=True)[name], target, pool):
                print(f"\n{kernel}, {name}, {target}, modelled with the rates of an H100", flush=True)
                sweep.print_trials(trials, target)
                rows.append(sweep.summary(trials, kernel) | {"target": target, "case": name})
    if options.out:
        write_csv(options.out, rows, sweep.FIELDS)
    return 0
