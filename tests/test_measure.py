"""Where numbers come from, and how memory is measured."""

import torch

from lsh_kernels import measure


def test_measure_peak_sees_a_tensor():
    resting = measure.start_of_peak()
    # larger than what malloc may have kept of tensors before
    torch.ones(2**24)
    assert 60 * 2**20 < measure.peak() - resting < 128 * 2**20


def test_measure_commit_is_this_files_or_none(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure._commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure._commit() is None
