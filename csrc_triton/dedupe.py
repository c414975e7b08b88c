"""A pair that several rounds see counts in the first of them."""

import triton
import triton.language as tl

from ._tile import is_within, unmarked


@triton.jit
def dedupe_reach(S, MODE: tl.constexpr):
    """(before, width): in a round of shared QK i sees j if coord_i - before <= coord_j < coord_i - before + width."""
    if MODE.SPAN == "window":
        before = tl.minimum(MODE.WINDOW, S)
        width = before + 1 if MODE.CAUSAL else 2 * before + 1
    else:
        before = tl.minimum(MODE.BEFORE, tl.cdiv(S, MODE.CHUNK))
        width = before + tl.minimum(MODE.AFTER, tl.cdiv(S, MODE.CHUNK)) + 1
    return before, width


@triton.jit
def earlier_intervals(q_pos, r, pid_bh, limits_ptr, L, MODE: tl.constexpr):
    """What queries of separate keys see in the rounds before r, in coordinates of keys: negated starts, and widths
    (tuples). Rounds that are not before r get an interval that holds nothing."""
    negated_los, widths = (), ()
    for e in tl.static_range(MODE.ROUNDS - 1):
        limits_ptrs = limits_ptr + ((pid_bh * MODE.R + e) * L + q_pos) * 2
        negated_los += (-tl.load(limits_ptrs),)
        widths += (tl.where(r > e, tl.load(limits_ptrs + 1), 0),)
    return negated_los, widths


@triton.jit
def earlier_coords(pos, pid_bh, coords_ptr, L, MODE: tl.constexpr):
    """Coordinates of rows in all rounds that may come before another (a tuple)."""
    coords = ()
    for e in tl.static_range(MODE.ROUNDS - 1):
        coord = tl.load(coords_ptr + (pid_bh * MODE.R + e) * L + pos)
        # marks are in the last hash round alone
        coords += (unmarked(coord) if e == MODE.R - 1 else coord,)
    return coords


@triton.jit
def negated_coords(pos, r, reach, pid_bh, coords_ptr, L, MODE: tl.constexpr):
    """`reach` less the coordinates of rows of shared QK in the rounds before r (a tuple); for other rounds so little that
    no coordinate, added to it, makes 0."""
    coords, negated = earlier_coords(pos, pid_bh, coords_ptr, L, MODE), ()
    for e in tl.static_range(MODE.ROUNDS - 1):
        # coordinates stay below 2^30
        negated += (tl.where(r > e, reach - coords[e], -1073741824),)
    return negated


@triton.jit
def is_first_round(own, walked, widths, S, MODE: tl.constexpr, OWN_WIDTHS: tl.constexpr = True):
    """Mask [own rows, walked rows] of the pairs that no round before has: coordinates of the ones, negated coordinates or
    starts of intervals of the others. The sum of both is one instruction with the minimum that takes it. widths: with
    separate keys, of the queries, which own the tile (OWN_WIDTHS) or are walked."""
    if MODE.SHARED:
        _, width = dedupe_reach(S, MODE)
        near = tl.full([1, 1], 4294967295, tl.uint32)
        for e in tl.static_range(MODE.ROUNDS - 1):
            near = tl.minimum(near, (walked[e][None, :] + own[e][:, None]).to(tl.uint32))
        first_mask = near >= width.to(tl.uint32)
    else:
        seen_mask = tl.full([1, 1], 0, tl.int1)
        for e in tl.static_range(MODE.ROUNDS - 1):
            width = tl.expand_dims(widths[e], 1 if OWN_WIDTHS else 0)
            seen_mask |= (walked[e][None, :] + own[e][:, None]).to(tl.uint32) < width.to(tl.uint32)
        first_mask = ~seen_mask
    return first_mask


@triton.jit
def is_first_of_many(mask, q_pos, k_pos, r, pid_bh, pid_kv, coords_ptr, limits_ptr, L, S, MODE: tl.constexpr):
    """`mask` and `is_first_round` of pairs [queries, keys] or, as the positions broadcast, [keys, queries], one round after
    the other: no matter how many there are, registers hold one."""
    # move with the rounds: a product or a sum with the positions per round would spill a register on sm_80 or sm_90
    if not MODE.SHARED:
        limits_ptrs = limits_ptr + (pid_bh * MODE.R * L + q_pos) * 2
    for e in range(0, r):
        coord = tl.load(coords_ptr + (pid_kv * MODE.R + e) * S + k_pos)
        # marks are in the last hash round alone, which is before the local one
        if MODE.ROUNDS > MODE.R:
            coord = unmarked(coord)
        if MODE.SHARED:
            before, width = dedupe_reach(S, MODE)
            mask &= ~is_within(coord, unmarked(tl.load(coords_ptr + (pid_bh * MODE.R + e) * L + q_pos)) - before, width)
        else:
            mask &= ~is_within(coord, tl.load(limits_ptrs), tl.load(limits_ptrs + 1))
            limits_ptrs += L * 2
    return mask
