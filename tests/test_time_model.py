"""The time model's arithmetic: its own error against rows of bench, and which launches are forward's. Compiles nothing."""

import pytest
import torch
from bench_folder import peers, rows_csv
from cases import Settings

pytest.importorskip("triton")
from lsh_kernels import audit_cases, time_model
from lsh_kernels.time_model import Estimate, Stage

SETTINGS = Settings(torch.device("cuda"), torch.bfloat16, (4096,))
FORWARD = [Stage("_attention_fwd_kernel", {"DRAM": 1e-3}), Stage("_combine_rounds_fwd_kernel", {"DRAM": 1e-3})]
BACKWARD = [Stage("_bucket_bounds_kernel", {"DRAM": 1e-3}), Stage("_attention_bwd_kernel", {"DRAM": 5e-3})]


def measured(**fields):
    """A row as bench writes it."""
    return SETTINGS.row("attention", 4096) | {
        "provider": list(peers.OURS)[0], "mode": "forward", "ms_p50": "4", "device": "NVIDIA H100 80GB HBM3", "status": "ok",
        "regime": "batch", "input": "gaussian", "depth": 1,
    } | fields  # fmt: skip


@pytest.mark.parametrize(
    "rows, said",
    [
        ([measured()], ["4096, forward: measured 4 ms, modelled 2, -50%"]),
        ([measured(mode="forward+backward graph", ms_p50="8")], ["forward+backward graph: measured 8 ms, modelled 8.01, +0%"]),
        ([measured(), measured(mode="forward graph", ms_p50="1")], ["-50%", "forward graph: measured 1 ms, modelled 2, +100%"]),
    ],
)
def test_time_model_states_its_error(rows, said, tmp_path, capsys):
    rows_csv(tmp_path / "rows.csv", [*rows, measured(status="absent", ms_p50="", mode="forward graph", L=16384)])
    time_model.print_errors([Estimate(4096, FORWARD, BACKWARD)], tmp_path / "rows.csv", time_model.CALL)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines)), lines


@pytest.mark.parametrize(
    "other",
    [{"device": "cpu"}, {"D": 128}, {"provider": "SDPA flash"}, {"input": "equal"}, {"regime": "tokens"}, {"dtype": "float32"}]
    + [{"op": "reversible"}, {"status": "absent", "ms_p50": ""}],
    ids=str,
)
def test_time_model_knows_no_error_from_other_calls(other, tmp_path, capsys):
    rows_csv(tmp_path / "rows.csv", [measured(**other)])
    time_model.print_errors([Estimate(4096, FORWARD, BACKWARD)], tmp_path / "rows.csv", time_model.CALL)
    assert "not known" in capsys.readouterr().out


def test_time_model_books_the_launches_of_backward_as_such(monkeypatch):
    monkeypatch.setattr(time_model, "stages", lambda case, card: FORWARD + BACKWARD)
    (point,) = time_model.estimate(audit_cases.Case(), [4096])
    assert (point.forward, point.backward) == (FORWARD, BACKWARD)
