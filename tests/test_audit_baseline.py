"""The audit's comparison with a baseline, its command and files, and the bars that the committed rows meet. Compiles nothing."""

import functools
import itertools
from pathlib import Path

import pytest

from lsh_kernels import audit, audit_cases

GOOD = dict.fromkeys(audit.FIELDS, "0") | {
    "target": "sm_90", "case": "bf16-D64", "kernel": "k", "error": "", "tensor": "64", "tensor_path": "HGMMA",
    "slots_per_unit": "50.0", "row_load_128_share": "1.000", "registers": "128",
}  # fmt: skip


@pytest.mark.parametrize(
    "change, what",
    [
        ({"error": "ptxas gave up"}, "error"),
        ({"stack": "8"}, "stack"),
        ({"spill_stores": "1"}, "spill_stores"),
        ({"spill_loads": "1"}, "spill_loads"),
        ({"tensor_path": ""}, "tensor_path"),
        ({"tensor_path": "HMMA"}, "tensor_path"),
        ({"fma_dots": "1"}, "fma_dots"),
        ({"slots_per_unit": "55.1"}, "slots_per_unit"),
        ({"row_load_128_share": "0.500"}, "row_load_128_share"),
    ],
)
def test_audit_baseline_catches(change, what):
    (found,) = [change for change in audit.compare([GOOD], [GOOD | change]) if change.fails]
    assert (found.what, found.kernel) == (what, "k")
    # what the baseline has already is accepted, and mending it is no failure
    assert not audit.compare([GOOD | change], [GOOD | change]) or what == "error"
    assert not any(change.fails for change in audit.compare([GOOD | change], [GOOD]))


def test_audit_baseline_lets_small_changes_pass():
    small = {"slots_per_unit": "54.9", "registers": "140", "tensor": "32", "tensor_path": "HGMMA HMMA"}
    changes = audit.compare([GOOD], [GOOD | small])
    assert {change.what for change in changes} == set(small)
    assert not any(change.fails for change in changes)


def test_audit_baseline_judges_new_kernels():
    new = GOOD | {"kernel": "new"}
    assert not any(change.fails for change in audit.compare([GOOD], [GOOD, new]))
    for fault in ({"stack": "8"}, {"error": "ptxas gave up"}, {"fma_dots": "1"}):
        assert any(change.fails for change in audit.compare([GOOD], [GOOD, new | fault]))
    (gone,) = audit.compare([GOOD, new], [GOOD])
    assert gone.after == "gone" and not gone.fails


@pytest.mark.parametrize("slots, status", [("54.9", 0), ("55.1", 1)])
def test_audit_command_fails_where_a_kernel_got_worse(slots, status, tmp_path, monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(audit, "audit", lambda targets, names: [GOOD | {"slots_per_unit": slots}])
    audit.write_csv(tmp_path / "baseline.csv", [GOOD])
    assert audit.main(["--baseline", str(tmp_path / "baseline.csv")]) == status
    assert f"50.0 -> {slots}" in capsys.readouterr().out


def test_audit_accepts_what_it_audited_and_leaves_the_rest(tmp_path, monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    others = [GOOD | {"case": "fp32-D64-trax"}, GOOD | {"target": "gfx942"}]
    found, path = [GOOD | {"registers": "140"}, GOOD | {"kernel": "new"}], tmp_path / "rows.csv"
    monkeypatch.setattr(audit, "audit", lambda targets, names: found)
    audit.write_csv(path, [GOOD | {"case": "dropped"}, *others[::-1], GOOD, GOOD | {"kernel": "gone"}])
    assert audit.main(["--targets", "sm_90", "--out", str(path)]) == 0
    assert audit.read_csv(path) == found + others
    # nor does it compare with what it has not audited
    capsys.readouterr()
    assert audit.main(["--targets", "sm_90", "--baseline", str(path)]) == 0
    assert "0 changes" in capsys.readouterr().out


def test_audit_refuses_some_cases_where_a_file_has_all(tmp_path, monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for option in ("--out", "--baseline"):
        with pytest.raises(SystemExit):
            audit.main(["--cases", "bf16-D64-plain", option, str(tmp_path / "rows.csv")])
        assert "--cases: got some, wanted all" in capsys.readouterr().err


def test_audit_command_sweeps(tmp_path, monkeypatch, capsys):
    """One kernel or all, some cases or all; a file gets what is shipped beside what is best."""
    triton = pytest.importorskip("triton")
    from lsh_kernels import sweep

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    calls, code = [], functools.partial(sweep.machine_code.Code, 128, 0, 0, 0, 0, 4, 0, "", {})
    trials = [
        sweep.Trial((64, 1), False, 1e-3, 2e6, "issue", False, code(), ""),
        sweep.Trial((32, 4), True, 2e-3, 1e6, "DRAM", False, code(), ""),
    ]
    monkeypatch.setattr(sweep, "sweep", lambda kernel, case, target, pool: calls.append((kernel, target)) or [trials])
    arguments = ["--targets", "sm_90", "--out", str(tmp_path / "rows.csv")]
    assert audit.main(["--sweep", "residual_fwd", *arguments]) == 0
    assert calls == [("residual_fwd", "sm_90")] * len(audit_cases.cases())
    calls.clear()
    assert audit.main(["--sweep", "all", "--cases", "bf16-D64", *arguments]) == 0
    assert {sweep.SPACES[kernel][:2] for kernel, _ in calls} == {space[:2] for space in sweep.SPACES.values()}
    assert len(calls) == len({sweep.SPACES[kernel][:2] for kernel, _ in calls})
    rows = audit.read_csv(tmp_path / "rows.csv")
    assert (rows[0]["shipped_rank"], rows[0]["shipped"], rows[0]["best"], rows[0]["fewest"]) == (
        "2",
        "(32, 4)",
        "(64, 1)",
        "(32, 4)",
    )
    with pytest.raises(SystemExit):
        audit.main(["--sweep", "attention", *arguments])
    assert "--sweep: got attention, wanted all or some of" in capsys.readouterr().err


def test_audit_full_has_every_variant_in_every_dtype():
    everyday, full = audit_cases.cases(), audit_cases.cases(full=True)
    # first, so that a kernel is in the same row with the others and without
    assert list(full)[: len(everyday)] == list(everyday)
    for dtype, head_dim, variant in itertools.product(audit_cases.DTYPES, (64, 128), audit_cases.VARIANTS):
        assert full[f"{dtype}-D{head_dim}{variant}"][1:3] == (dtype, head_dim)


def committed(name):
    return audit.read_csv(Path(__file__).parents[1] / "bench" / "results" / name)


def test_audit_committed_rows_meet_the_bars():
    rows = committed("audit.csv")
    assert not any(row["error"] for row in rows) and {row["target"] for row in rows} == set(audit.TARGETS)
    for row in rows:
        if row["target"] in ("sm_80", "sm_90", "sm_100") and "D256" not in row["case"]:
            assert row["stack"] == row["spill_stores"] == row["spill_loads"] == "0", row
        if row["case"].startswith(("bf16", "fp16")):
            assert row["fma_dots"] == "0", row
        assert float(row["row_load_128_share"] or 1) >= 0.95, row


def test_audit_committed_instructions_per_pair_meet_the_bars():
    slots = {tuple(row[name] for name in ("target", "case", "kernel")): row["slots_per_unit"] for row in committed("audit.csv")}
    for case, most in (("bf16-D64-plain", 60.3), ("bf16-D64", 74.5)):
        assert float(slots["sm_90", case, "_attention_fwd_kernel"]) < most
    for variant in audit_cases.VARIANTS:
        parts = (slots.get(("sm_90", f"bf16-D64{variant}", f"_attention_bwd_kernel{part}"), 0) for part in ("", " 2"))
        assert sum(map(float, parts)) <= 2.2 * float(slots["sm_90", f"bf16-D64{variant}", "_attention_fwd_kernel"]), variant
    for row in committed("dense.csv"):
        if row["kernel"].startswith("_attention_fwd_kernel") and row["D"] == "64":
            assert float(row["ratio"]) <= (2 if row["kernel"].endswith("dedupe") else 1.5), row


def test_audit_csv_round_trips(tmp_path):
    audit.write_csv(tmp_path / "rows.csv", [GOOD])
    assert audit.read_csv(tmp_path / "rows.csv") == [GOOD]
