"""Where numbers come from, and how memory is measured."""

import subprocess
import sys

from lsh_kernels import measure

PEAK = """
import torch
from lsh_kernels import measure
resting = measure.start_of_peak()
torch.ones(2**24)
print(measure.peak() - resting)
"""


def test_measure_peak_sees_a_tensor():
    """In a process of its own: of a large one the system may take back as much meanwhile as the tensor has."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 60 * 2**20 < int(done.stdout) < 128 * 2**20


def test_measure_commit_is_this_files_or_none(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure._commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure._commit() is None
