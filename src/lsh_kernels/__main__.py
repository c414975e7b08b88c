"""Command line: `python -m lsh_kernels` with `doctor`, `demo`, `diagnose`, `audit` or `bench`."""

import argparse
import platform
import runpy
import sys
from importlib import import_module
from pathlib import Path

from lsh_kernels import __version__


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m lsh_kernels", description="LSH attention in fused Triton kernels")
    parser.add_argument("--version", action="version", version=f"lsh_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="versions, devices, and which backend runs on each")
    # these read their own options, --help included
    commands.add_parser("demo", help="train a small language model, exact attention beside LSH", add_help=False)
    commands.add_parser("diagnose", help="how much of exact attention LSH attention keeps, by rounds and span", add_help=False)
    commands.add_parser("audit", help="what the compiled kernels' machine code says, without a GPU", add_help=False)
    commands.add_parser("bench", help="time attention, its stages and its peers (needs a checkout)", add_help=False)
    options, rest = parser.parse_known_args(argv)
    if options.command in ("demo", "diagnose", "audit"):
        return import_module(f"lsh_kernels.{options.command}").main(rest)
    if options.command == "bench":
        folder = Path(__file__).parents[2] / "bench"
        if not (folder / "__main__.py").exists():
            parser.error(
                f"bench: {folder} is not there; it comes with a checkout (git clone, pip install -e .), not with a wheel"
            )
        sys.argv[1:] = rest
        runpy.run_path(str(folder), run_name="__main__")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return doctor()


def doctor():
    """Print versions, devices, what "auto" picks on each, and whether Triton's kernels run there."""
    print(f"{'lsh_kernels':11} {__version__}")
    print(f"{'python':11} {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "numpy"):
        print(f"{package:11} {_version_of(package)}")

    import torch

    for i in range(torch.cuda.device_count()):
        _diagnose(torch.device("cuda", i), torch.cuda.get_device_name(i))
    _diagnose(torch.device("cpu"), f"{torch.get_num_threads()} threads")
    return 0


def _diagnose(device, name):
    import torch

    from lsh_kernels import functional

    out, lse = torch.ones(1, 1, 2, 8, 16, device=device), torch.zeros(1, 1, 2, 8, device=device)
    pick = functional.choose_backend("auto", out)
    try:
        functional.combine_rounds(out, lse, backend="triton")
        answer = "runs"
    except Exception as error:
        answer = str(error) or repr(error)
    print(f"\n{device} ({name})\n  auto      {pick}\n  triton    {answer}")


def _version_of(package):
    try:
        return import_module(package).__version__
    except ImportError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
