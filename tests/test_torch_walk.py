"""The torch backend's integer masks against comparisons of plain slots, where 16 bits are read as unsigned numbers."""

import pytest
import torch

from lsh_kernels.config import AttentionOptions
from lsh_kernels.torch_walk import Buffers, Entries, Exclusions, Reach, Walk

WINDOW = 64


def a_walk(length, reach, by_slot, n_earlier):
    """Random positions, and intervals near the query's slot in this round, anywhere and of any width in earlier ones."""
    torch.manual_seed(0)
    slot = torch.arange(length, dtype=torch.int32)[None]
    order = torch.randperm(length)[None]
    lo = (slot - torch.randint(0, WINDOW + 1, slot.shape, dtype=torch.int32)).clamp(min=0)
    hi = torch.minimum(lo + torch.randint(0, WINDOW + 1, slot.shape, dtype=torch.int32), slot + 1)
    ends = torch.randint(0, length + 1, (2, n_earlier, 1, length), dtype=torch.int32).sort(0).values
    k_slot = torch.stack([torch.randperm(length)[None] for _ in range(n_earlier)]).to(torch.int32)
    return Walk(order, order, lo, torch.maximum(hi, lo), reach, by_slot, False, [], [], (k_slot, *ends))


@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("length, dtype", [(16_500, torch.int16), (65_535, torch.int16), (65_536, torch.int32)])
def test_masks_exclude_what_comparisons_exclude(length, dtype, static, by_slot):
    walk = a_walk(length, Reach(WINDOW, 0, 32) if static else None, by_slot, 2)
    entries = Entries(walk, Buffers(torch.device("cpu")))
    assert entries.int_dtype == dtype
    options = AttentionOptions([2], True, "window", WINDOW, WINDOW, 1, 0, True, True, False, 0, 0.0, True, 0.0, 1.0)
    exclusions = Exclusions(entries, True, None, options)
    k_slot, earlier_lo, earlier_hi = (x[:, 0] for x in walk.earlier)
    n_pairs = 0
    for block in entries.blocks():
        mask = exclusions.of(block)
        assert ((mask == 0) | (mask == 1)).all()
        # some tiles of every block
        for entry in range(0, len(block.starts), 37):
            tile = torch.arange(entries.n_tiles)[block.tiles][entry]
            i = (tile * entries.tile + torch.arange(entries.tile))[:, None]
            j = block.starts[entry] + torch.arange(entries.width)[None]
            real = (i < length) & (j >= 0) & (j < length)
            i, j = i.clamp(max=length - 1), j.clamp(0, length - 1)
            wanted = (walk.lo[0, i] <= j) & (j < walk.hi[0, i])
            for r in range(2):
                wanted &= ~((earlier_lo[r, i] <= k_slot[r, j]) & (k_slot[r, j] < earlier_hi[r, i]))
            if not by_slot:
                wanted &= walk.k_pos[0, j] < walk.q_pos[0, i]
            assert torch.equal(mask[entry][real] == 0, wanted[real])
            n_pairs += int(wanted[real].sum())
    assert n_pairs > 1000
