"""Reversible sequences over two gloo processes: what DistributedDataParallel and fully_shard do with their gradients.

Run as a script with a rank, a file to meet at and a folder this is one of the processes, which saves its gradients there.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lsh_kernels import LSHConfig, LSHSelfAttention, ReversibleBlock, ReversibleSequence

E, L, DEPTH = 16, 24, 3
CASES = ("ddp", "ddp exact", "per block", "per block exact", "per layer", "whole", "per block and checkpointed layer")


class Checkpointed(nn.Module):
    """A layer whose activations its own checkpoint recomputes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


def model(case):
    torch.manual_seed(0)
    layers = []
    for _ in range(DEPTH):
        # eval mode fixes rotations: every process has the same buckets
        f = nn.Sequential(nn.LayerNorm(E), LSHSelfAttention(E, 2, config=LSHConfig(chunk_length=8)).eval())
        g = nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))
        layers.append(ReversibleBlock(f, Checkpointed(g) if "checkpointed" in case else g))
    return ReversibleSequence(layers, exact="exact" in case).double()


def batches():
    torch.manual_seed(1)
    return torch.randn(2, 4, L, 2 * E, dtype=torch.float64)


def train_step(sequence, batches):
    """Two micro-batches, so that gradients accumulate."""
    for x in batches:
        sequence(x).square().mean().backward()


def shard(sequence, case):
    from torch.distributed.fsdp import fully_shard

    if case.startswith("per block"):
        for block in sequence.blocks:
            fully_shard(block)
    elif case == "per layer":
        for block in sequence.blocks:
            fully_shard(block.f)
            fully_shard(block.g)
    return fully_shard(sequence)


def work(rank, meeting, folder):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    own = batches()[:, 2 * rank : 2 * rank + 2]
    for case in CASES:
        sequence = model(case)
        if case.startswith("ddp"):
            sequence = nn.parallel.DistributedDataParallel(sequence)
        else:
            shard(sequence, case)
        train_step(sequence, own)
        grads = [p.grad for p in sequence.parameters()]
        grads = [g if g is None or case.startswith("ddp") else g.full_tensor() for g in grads]
        torch.save(grads, os.path.join(folder, f"{case} {rank}.pt"))
    # neither may leave while the other still talks to it
    dist.barrier()
    dist.destroy_process_group()
    # threads of gloo that outlive the interpreter now and then abort it (github.com/pytorch/pytorch/pull/179291)
    os._exit(0)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """{case: [gradients] of both processes}"""
    folder = tmp_path_factory.mktemp("gradients")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder / "meeting"), str(folder)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, error = process.communicate(timeout=240)
            # at once: the other process may be waiting for this one
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {case: [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_reversible_gradients_over_two_processes(case, gradients):
    """Every gradient is there and equals that of one process with the whole batch, without reversibility."""
    sequence = model(case)
    for x in batches():
        x1, x2 = x.chunk(2, -1)
        for block in sequence.blocks:
            x1 = x1 + block.f(x2)
            x2 = x2 + block.g(x1)
        torch.cat((x1, x2), -1).square().mean().backward()
    for got in gradients[case]:
        assert len(got) == len(list(sequence.parameters()))
        for grad, p in zip(got, sequence.parameters(), strict=True):
            assert grad is not None and p.grad.abs().max() > 0
            assert (grad - p.grad).abs().max() <= 1e-10 * max(1.0, p.grad.abs().max())


if __name__ == "__main__":
    work(int(sys.argv[1]), *sys.argv[2:])
