"""Loops of machine code: basic blocks, their dominators, and the natural loops of jumps back.

Source: Aho, Lam, Sethi, Ullman 2006, "Compilers", section 9.6.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple


class Instruction(NamedTuple):
    opcode: str
    jump: str = ""  # label it may jump to
    falls: bool = True  # whether the next one may follow
    labels: tuple = ()  # those before it


def loop_depths(instructions: list[Instruction]) -> list[int | None]:
    """How many loops each instruction is inside of, wherever the compiler has put it. None: no jump leads there from the
    first one (subroutines that are called in rare cases, padding). Waits are no loops: a program spins for a barrier, as a rule
    once. Raises KeyError for a jump to a label that is nowhere."""
    blocks, followers, _ = _flow(instructions)
    order = _reached(followers, 0)
    leaders = [[] for _ in blocks]
    for b in order:
        for follower in followers[b]:
            leaders[follower].append(b)
    dominators = _dominators(order, leaders)

    loops = {}
    for b in order:
        for head in followers[b]:
            if head in dominators[b]:
                loops.setdefault(head, {head}).update(_leading_to(b, head, leaders))
    inside = Counter(b for loop in loops.values() if not _is_wait(instructions, [blocks[b] for b in loop]) for b in loop)
    depths = [None] * len(instructions)
    for b in order:
        for i in blocks[b]:
            depths[i] = inside[b]
    return depths


def leads_to(instructions: list[Instruction], label: str, opcode: str) -> bool:
    """Whether a way from a label passes an opcode that begins so. KeyError: no such label."""
    blocks, followers, block_at = _flow(instructions, label)
    return any(instructions[i].opcode.startswith(opcode) for b in _reached(followers, block_at[label]) for i in blocks[b])


def _flow(instructions, *entries):
    """Basic blocks, the ones that may follow each, and the one behind each label that is an entry or that a jump leads to."""
    blocks = _blocks(instructions, entries)
    block_at = {label: b for b, block in enumerate(blocks) for label in instructions[block.start].labels}
    followers = []
    for b, block in enumerate(blocks):
        last = instructions[block[-1]]
        jumps = [block_at[last.jump]] if last.jump else []
        followers.append(jumps + [b + 1] * (last.falls and b + 1 < len(blocks)))
    return blocks, followers, block_at


def _blocks(instructions, entries):
    starts, targets = {0}, {*entries, *(instruction.jump for instruction in instructions)}
    for i, instruction in enumerate(instructions):
        if not targets.isdisjoint(instruction.labels):
            starts.add(i)
        if instruction.jump or not instruction.falls:
            starts.add(i + 1)
    starts = sorted(starts - {len(instructions)})
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(instructions)])]


def _reached(followers, first):
    """Blocks that a block leads to, depth first."""
    found, waiting = {}, [first]
    while waiting:
        if (b := waiting.pop()) not in found:
            found[b] = None
            waiting += followers[b]
    return list(found)


def _dominators(order, leaders):
    """Of each block those that every way from the first one to it passes."""
    dominators = {b: set(order) for b in order} | {order[0]: {order[0]}}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = {b}.union(set.intersection(*(dominators[leader] for leader in leaders[b])))
            changed |= new != dominators[b]
            dominators[b] = new
    return dominators


def _leading_to(block, head, leaders):
    """The blocks with a way to `block` that does not pass `head`."""
    found, waiting = set(), [block]
    while waiting:
        b = waiting.pop()
        if b != head and b not in found:
            found.add(b)
            waiting += leaders[b]
    return found


def _is_wait(instructions, blocks):
    inside = [instructions[i].opcode for block in blocks for i in block]
    return len(inside) <= 10 and any(opcode.startswith(("SYNCS", "UTCATOMSWS")) for opcode in inside)
