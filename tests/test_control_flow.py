"""Loops of machine code, on programs written by hand: "labels: opcode > target"; "." after the target ends the way on."""

import pytest

from lsh_kernels.control_flow import Instruction, leads_to, loop_depths


def program(*lines):
    instructions = []
    for line in lines:
        label, _, rest = line.rpartition(": ")
        opcode, _, target = rest.partition(" > ")
        falls = not target.endswith(".") and opcode not in ("EXIT", "RET")
        instructions.append(Instruction(opcode, jump=target.rstrip("."), falls=falls, labels=tuple(label.split())))
    return instructions


NESTED = ("MOV", "outer: ADD", "inner: MUL", "BRA > inner", "BRA > outer", "EXIT"), [0, 1, 2, 2, 1, 0]
# the way back of a loop stands beyond the exit
ROTATED = ("MOV", "head: ADD", "BRA > tail", "EXIT", "tail: MUL", "BRA > head."), [0, 1, 1, 0, 1, 1]
# code out of line goes back to where it came from: in a loop it is part of it, elsewhere it makes none
OUT_OF_LINE = (
    ("BRA > slow", "back: MOV", "head: ADD", "BRA > rare", "middle: MUL", "BRA > head", "EXIT", "slow: SHL", "BRA > back.")
    + ("rare: SHL", "BRA > middle."),
    [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1],
)
SUBROUTINE = ("CALL", "EXIT", "sub: MUL", "BRA > sub", "RET", "trap: BRA > trap."), [0, 0, None, None, None, None]
TWO_WAYS_BACK = ("head: ADD", "BRA > head", "MUL", "BRA > head", "EXIT"), [1, 1, 1, 1, 0]
WAIT = ("head: ADD", "spin: SYNCS.PHASECHK", "BRA > spin", *["MUL"] * 8, "BRA > head", "EXIT"), [1] * 12 + [0]
TWO_LABELS = ("head start: ADD", "BRA > start", "BRA > head", "EXIT"), [1, 1, 1, 0]
ENDLESS = ("head: ADD", "BRA > head."), [1, 1]
NO_JUMPS = ("MOV", "EXIT"), [0, 0]


@pytest.mark.parametrize(
    "lines, depths", (NESTED, ROTATED, OUT_OF_LINE, SUBROUTINE, TWO_WAYS_BACK, WAIT, TWO_LABELS, ENDLESS, NO_JUMPS)
)
def test_loop_depths(lines, depths):
    assert loop_depths(program(*lines)) == depths


def test_leads_to_what_a_way_passes():
    instructions = program("BRA > end", "CALL", "sub: MUL", "RET", "end: ADD", "other: SHL", "EXIT")
    for label, opcode, leads in (("sub", "RET", True), ("end", "SHL", True), ("other", "ADD", False), ("end", "RET", False)):
        assert leads_to(instructions, label, opcode) == leads
    with pytest.raises(KeyError, match="lost"):
        leads_to(instructions, "lost", "RET")


def test_sass_leaves_loops_by_calls_that_do_not_return():
    """As ptxas has it for sm_80: nested loops, each left by a call of what follows it; and a subroutine, which returns."""
    pytest.importorskip("triton")
    from lsh_kernels.machine_code import sass_instructions

    lines = [
        (0x00, "", "MOV", ""), (0x10, "", "IADD3", ""), (0x20, "", "HMMA.16816.F32", ""),
        (0x30, "@!P2", "CALL.REL.NOINC", " 0x70"), (0x40, "@P4 ", "CALL.REL.NOINC", " 0x60 "), (0x50, "", "BRA", " 0x20 "),
        (0x60, "@P4 ", "CALL.REL.NOINC", " 0x80 "), (0x68, "", "BRA", " 0x10 "), (0x70, "", "RET.REL.NODEC", " R2 0x0 "),
        (0x80, "", "STG", ""), (0x90, "", "EXIT", ""),
    ]  # fmt: skip
    assert loop_depths(sass_instructions("k", lines)) == [0, 1, 2, 2, 2, 2, 1, 1, None, 0, 0]
    # what follows a loop may be left by such a call, too, which does not lead on to the subroutine behind it
    lines[-2:] = [
        (0x80, "", "CALL.REL.NOINC", " 0xa0"),
        (0x90, "", "RET.REL.NODEC", ""),
        (0xA0, "", "STG", ""),
        (0xB0, "", "EXIT", ""),
    ]
    assert loop_depths(sass_instructions("k", lines)) == [0, 1, 2, 2, 2, 2, 1, 1, None, 0, None, 0, 0]
    with pytest.raises(ValueError, match="k: calls R2, which"):
        sass_instructions("k", [(0, "", "CALL.REL.NOINC", " R2 "), *lines])
    with pytest.raises(ValueError, match="k: jumps through a table"):
        sass_instructions("k", [(0, "", "BRX", " R2 0x0"), *lines])


def test_loop_depths_refuses_a_jump_to_nowhere():
    with pytest.raises(KeyError, match="lost"):
        loop_depths(program("BRA > lost", "EXIT"))
