"""The wheel is complete, and its import needs neither Triton nor a GPU."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# run before anything else: as if Triton were not installed
WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder
class NoTriton(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = NoTriton
"""


def run(*command, status=0, **kwargs):
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert done.returncode == status, f"{command}\n{done.stdout}"
    return done.stdout


def run_installed(target, code):
    """Run code where only the installed copy is found, outside the repository, without a GPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(target), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return run("-c", code, cwd=target, env=env)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git would clone, so that building leaves nothing behind in the work tree."""
    source = tmp_path_factory.mktemp("source") / "lsh_kernels"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "gpu-wheels", "bench", "tests")
    return shutil.copytree(ROOT, source, ignore=ignore)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def build_wheel(source, folder):
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def assert_complete(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {f"lsh_kernels/{path.relative_to(ROOT / 'src/lsh_kernels')}" for path in (ROOT / "src").rglob("*.py")}
    kernels = {f"lsh_kernels/{path.relative_to(ROOT)}" for path in (ROOT / "csrc_triton").rglob("*.py")}
    assert "lsh_kernels/csrc_triton/combine_rounds.py" in names
    assert names == sources | kernels | {"lsh_kernels/py.typed"}


def test_packaging_wheel_is_complete(wheel):
    assert_complete(wheel)


def test_packaging_wheel_from_sdist_is_complete(source, tmp_path):
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert_complete(build_wheel(sdist, tmp_path))


def test_packaging_import_needs_nothing_heavy(installed):
    """`import lsh_kernels` alone loads neither torch nor Triton; every public name loads without Triton and a GPU."""
    code = f"""{WITHOUT_TRITON}
import lsh_kernels
assert lsh_kernels.__file__.startswith({str(installed)!r}), lsh_kernels.__file__
assert not {{"torch", "triton"}} & sys.modules.keys()
assert set(lsh_kernels.__all__) <= set(dir(lsh_kernels))
for name in lsh_kernels.__all__:
    assert getattr(lsh_kernels, name).__name__.rpartition(".")[2] == name
assert lsh_kernels.reference.lsh_attention is not lsh_kernels.lsh_attention
try:
    lsh_kernels.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("an unknown name gave something")
"""
    run_installed(installed, code)


def test_packaging_runs_without_triton(installed):
    code = f"""{WITHOUT_TRITON}
import torch, lsh_kernels
x = torch.randn(1, 2, 33, 16, requires_grad=True)
lsh_kernels.lsh_attention(x, None, x, is_causal=True).sum().backward()
assert x.grad.isfinite().all()
try:
    lsh_kernels.combine_rounds(torch.ones(1, 1, 2, 8, 16), torch.zeros(1, 1, 2, 8), backend="triton")
except RuntimeError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("Triton ran without Triton")
"""
    run_installed(installed, code)


def test_packaging_doctor_says_what_is_there(installed):
    doctor = "import runpy; sys.argv[1:] = ['doctor']; runpy.run_module('lsh_kernels', run_name='__main__')"
    said = run_installed(installed, f"import sys\n{doctor}")
    for package in ("torch", "triton", "numpy"):
        assert re.search(rf"^{package} +{re.escape(version(package))}", said, re.MULTILINE), said
    assert re.search(r"^cpu .*\n  auto +torch\n  triton .*under its interpreter", said, re.MULTILINE), said
    said = run_installed(installed, f"{WITHOUT_TRITON}\n{doctor}")
    assert re.search(r"^  triton .*triton is not installed", said, re.MULTILINE), said


def test_packaging_command_line_explains_itself(installed):
    assert "doctor" in run("-m", "lsh_kernels", "--help") and "demo" in run("-m", "lsh_kernels", "--help")
    assert "--steps" in run("-m", "lsh_kernels", "demo", "--help")
    assert "--rounds" in run("-m", "lsh_kernels", "diagnose", "--help")
    assert "usage" in run("-m", "lsh_kernels", status=2)
    # no bench/ stands beside an installed copy
    bench = "import runpy, sys; sys.argv[1:] = ['bench', '--quick']; runpy.run_module('lsh_kernels', run_name='__main__')"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    assert "comes with a checkout" in run("-c", bench, status=2, cwd=installed, env=env)
    assert "no_such_command" in run("-m", "lsh_kernels", "no_such_command", status=2)
    assert "--no-such-option" in run("-m", "lsh_kernels", "doctor", "--no-such-option", status=2)
