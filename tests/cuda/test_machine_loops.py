"""How loops are found in machine code, and that what is asked of them can be missed."""

from __future__ import annotations

import pytest
from cuda_fp64 import complaints
from cuda_machine_code import FP64, FP64_CONVERSION, Kernel
from cuda_moves import Moves, find_moves
from machine_loops import flow_of

_LOAD, _STORE = "LDG.E.EF.128 R4, desc[UR6][R2.64]", "@!P1 STG.E.EF.128 desc[UR6][R2.64], R4"
_NARROW = "LDG.E R4, desc[UR6][R2.64]"


def code(*instructions: str) -> str:
    """Return instructions as they are printed, 16 bytes each from address 0 on."""
    lines = (f"        /*{16 * at:04x}*/    {text} ;" for at, text in enumerate(instructions))
    # The second half of an instruction stands in a line of its own.
    return "\n".join(f"{line}   /* 0x000e220000002100 */\n   /* 0x0008 */" for line in lines)


def kernel(name: str, *instructions: str) -> Kernel:
    return Kernel(name, 32, 0, 0, code(*instructions))


def test_a_loop_is_what_leads_back():
    flow = flow_of(code("MOV R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x10", "EXIT", "BRA 0x40"))
    (loop,) = flow.loops
    assert loop.code == loop.own == ("FADD R1, R1, R2", "@P0 BRA 0x10")
    assert loop.is_innermost
    # The compiler ends code with a branch to itself, which nothing comes to.
    assert flow.once == ("MOV R1, R2", "EXIT")


def test_an_instruction_is_of_the_innermost_loop():
    inner = ("FMUL R1, R1, R1", "@P0 BRA 0x10")
    flow = flow_of(code("FADD R1, R1, R1", *inner, "@P1 BRA 0x0", "EXIT"))
    outer_loop, inner_loop = flow.loops
    assert inner_loop.code == inner
    assert outer_loop.own == ("FADD R1, R1, R1", "@P1 BRA 0x0")
    assert outer_loop.code == ("FADD R1, R1, R1", *inner, "@P1 BRA 0x0")
    assert not outer_loop.is_innermost


def test_what_is_rarely_done_stands_behind_its_loop():
    """The branch that leads back from there is no loop around what lies between."""
    rare = ("DADD R2, R2, R4", "BRA 0x20")
    body = ("@P2 BRA 0x60", "FADD R1, R1, R2", "@P0 BRA 0x10")
    flow = flow_of(code("MOV R1, R2", *body, "STG.E desc[UR6][R2.64], R4", "EXIT", *rare))
    (loop,) = flow.loops
    assert loop.code == (*body, *rare)
    assert flow.once == ("MOV R1, R2", "STG.E desc[UR6][R2.64], R4", "EXIT")


def test_a_call_may_lead_out_of_a_loop():
    """So it is for sm_80, where what follows a loop is called, and calls may be predicated."""
    calls = ("FADD R1, R1, R2", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0")
    flow = flow_of(code(*calls, "@!P1 BRA 0x0", "EXIT"))
    (loop,) = flow.loops
    assert loop.code == (*calls, "@!P1 BRA 0x0")
    assert flow.once == ("EXIT",)


def test_branches_that_may_go_on():
    """Threads that part, and predicates behind the name, leave two ways."""
    for branch in ("BRA.DIV UR4, 0x20", "BRA.U UP0, 0x20", "BRA P0, 0x20", "@!P0 EXIT"):
        assert len(flow_of(code(branch, "NOP", "@P0 BRA 0x0", "EXIT")).once) == 1, branch
    assert flow_of(code("BRA 0x20", "NOP", "@P0 BRA 0x0", "EXIT")).once == ("EXIT",)
    assert flow_of(code("BRX R4 -0x10", "@P0 BRA 0x0", "EXIT")).once == ("BRX R4 -0x10",)


def test_a_loop_with_two_entries_is_an_error():
    with pytest.raises(ValueError, match="0x20 has several entries"):
        flow_of(code("@P1 BRA 0x20", "NOP", "FADD R1, R1, R2", "@P0 BRA 0x10", "EXIT"))


def test_moves_are_asked_of_a_loop():
    """A load outside of it is none, nor is one of a loop inside."""
    loads = Moves(((1, 0),))
    assert loads.are_in(flow_of(code(_LOAD, _STORE, "@P0 BRA 0x0", "EXIT")))
    assert not loads.are_in(flow_of(code(_LOAD, _NARROW, "@P0 BRA 0x10", "EXIT")))
    both = Moves(((1, 0), (0, 1)))
    assert both.are_in(flow_of(code(_LOAD, _STORE, "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT")))
    together = Moves(((1, 1),))
    assert not together.are_in(flow_of(code(_LOAD, _STORE, "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT")))
    once = Moves(once=(1, 1))
    assert once.are_in(flow_of(code(_LOAD, _STORE, "EXIT")))
    assert not once.are_in(flow_of(code(_LOAD, _STORE, "@P0 BRA 0x0", "EXIT")))


def test_every_kernel_is_in_a_list():
    assert find_moves("token_log_probs_kernel<double, true, false>") == Moves(((1, 0),))
    assert find_moves("scale_gradient_kernel<float, float, true>").once == (1, 1)
    assert find_moves("scale_gradient_kernel<float, float, false>") == Moves()
    for name in ("new_kernel<float>", "scale_gradient_kernel<float, float, true, 2>"):
        with pytest.raises(AssertionError, match="expected in STREAMS or in PIECES"):
            find_moves(name)


_FAST = (_LOAD, "MUFU.EX2 R5, R4")
_SLOW = (_NARROW, "DFMA R4, R4, R6, R8")
_CONVERSION = "F2F.F64.F32 R4, R6"
_ROWS, _SETS = "token_log_probs_kernel<float, false, true>", "kept_log_probs_backward_kernel<float"
_HEAD = "kept_head_kernel<float, 256, 4, true"


@pytest.mark.parametrize(
    ("name", "loops", "expected"),
    [
        (_ROWS, [_FAST, _SLOW], None),
        (_ROWS, [_FAST, _FAST, _SLOW], None),
        (_ROWS, [_FAST], "0 loops in fp64, expected 1"),
        (_ROWS, [_SLOW], "no loop in fp32 has a power"),
        (_ROWS, [_FAST, _SLOW, _SLOW], "2 loops in fp64, expected 1"),
        (_ROWS, [_FAST, (*_FAST, *_SLOW)], "a loop in fp64 moves 16 bytes at once"),
        (_ROWS, [(*_FAST, _CONVERSION), _SLOW], "1 conversions in a loop, expected at most 0"),
        (f"{_SETS}, true>", [(*_FAST, *[_CONVERSION] * 8), _SLOW], None),
        (f"{_SETS}, true>", [(*_FAST, *[_CONVERSION] * 9), _SLOW], "9 conversions in a loop"),
        ("scale_directions_kernel<float, true>", [_FAST], None),
        ("scale_directions_kernel<float, true>", [_SLOW], "1 loops in fp64, expected 0"),
        ("scale_directions_kernel<float, true>", [_FAST, ("BRX R4 -0x10",)], "a branch by a table"),
        (f"{_HEAD}, true>", [_SLOW[1:] * 7], None),
        (f"{_HEAD}, true>", [_SLOW[1:] * 8], "1 loops in fp64, expected 0"),
        (f"{_HEAD}, false>", [_SLOW], "1 loops in fp64, expected 0"),
    ],
)
def test_fp64_in_a_loop_is_noticed(name, loops, expected):
    instructions: list[str] = []
    for loop in loops:
        begin = 16 * len(instructions)
        instructions += [*loop, f"@P0 BRA {begin:#x}"]
    found = complaints(kernel(name, *instructions, "EXIT"))
    assert len(found) == (expected is not None), found
    assert expected is None or expected in found[0]


def test_a_part_of_a_set_may_take_fp64():
    """What is outside of the innermost loop of `kept_head_kernel` is done once a part."""
    around = ("FADD R1, R1, R1", "@P0 BRA 0x10", *_SLOW[1:] * 20, "@P1 BRA 0x0", "EXIT")
    assert complaints(kernel(f"{_HEAD}, true>", "NOP", *around)) == []
    assert complaints(kernel(f"{_HEAD}, false>", "NOP", *around)) != []


def test_instructions_of_fp64():
    for text in ("DADD R2, R2, R4", "@P0 DSETP.MAX.AND P1, P2, R2, R4, PT", "MUFU.RCP64H R3, R5"):
        assert FP64.search(text), text
    for text in ("DEPBAR.LE SB0, 0x0", "FADD R2, R2, R4", "MUFU.RCP R3, R5", "LDG.E.64 R2, [R4]"):
        assert not FP64.search(text), text
    for text in ("F2F.F32.F64 R4, R6", "I2F.F64.S64 R4, R6", "F2I.S64.F64.TRUNC R4, R6"):
        assert FP64_CONVERSION.search(text), text
    assert not FP64_CONVERSION.search("F2F.F16.F32 R4, R6")
