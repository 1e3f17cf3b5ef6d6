"""The CUDA kernels as nvcc compiles them, without a GPU: what the machine code needs and moves."""

from __future__ import annotations

import re

import cuda_machine_code
import pytest
from cuda_fp64 import IN_FP32, complaints
from cuda_machine_code import ARCHITECTURES, FORBIDDEN, Kernel, wide_moves
from cuda_moves import PIECES, STREAMS, Moves, find_moves

# What a kernel may need, four blocks of 256 threads of which fill an SM; and those of which fewer
# do: kernels that work in fp64 on steps, three of them for a plain policy loss, that keep many
# loads under way, or whose logits or numbers are fp64.
MOST_REGISTERS = {
    r"policy_loss(_masked)?_kernel<double": 168,
    r"policy_loss(_masked)?_kernel<float, (\d+, )?0>": 85,
    r"(policy_loss(_masked)?|gae|gae_rows)_kernel<": 128,
    r"rewards_kernel<": 86,
    r"token_log_probs_kernel<double": 68,
    r"token_log_probs_backward_kernel<steppo::(Half|BFloat16), .*, true, true>": 72,
    r"kept_weight_gradient_kernel<steppo::(Half|BFloat16), true>": 64,
    r"kept_(hidden|weight)_gradient_kernel<": 80,
    r"kept_head_kernel<[\w:]+, 256, 4, false": 255,
    r"kept_head_kernel<": 128,
}
MOST_SHARED = 48 << 10
# How long a plain policy loss is, as a part of the one that takes everything. On a mask advantages
# may differ within a step all the same.
MOST_OF_GENERAL = {
    r"policy_loss_masked_kernel<float": 0.62,
    r"policy_loss_masked_kernel<double": 0.68,
    r"policy_loss_kernel<float, 1,": 0.63,
    r"policy_loss_kernel<float": 0.55,
    r"policy_loss_kernel<double": 0.58,
}
# Instructions that a thread takes for a logit, at most: forward and backward, plain, with an
# entropy, with a softcap and with both. While an H100 moves its bytes at 85% of its rate there is
# time for 22 of them forward and 43 backward, in halves.
MOST_A_LOGIT = {
    ("forward", 2): (6.6, 8.7, 26.0, 28.0),
    ("forward", 4): (7.1, 9.2, 26.5, 29.0),
    ("backward", 2): (6.5, 8.6, 29.6, 32.0),
    ("backward", 4): (6.1, 8.1, 29.5, 32.0),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    """Every kernel for an architecture."""
    try:
        return cuda_machine_code.kernels(request.param)
    except cuda_machine_code.CannotRead as why:
        pytest.skip(str(why))


def test_kernels_keep_to_their_registers(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.stack == 0, kernel.name
        limits = (most for name, most in MOST_REGISTERS.items() if re.match(name, kernel.name))
        most = next(limits, 64)
        assert kernel.registers <= most, kernel.name
        assert kernel.shared <= MOST_SHARED, kernel.name
        assert FORBIDDEN.search(kernel.code) is None, kernel.name


def test_three_blocks_of_a_plain_policy_loss_fit_into_a_processor(
    kernels: list[Kernel], request: pytest.FixtureRequest
) -> None:
    """Of sm_80, which has 164 KiB, and on a layout into any: the least has 100 KiB.

    A block takes 1 KiB more, counted from sm_90 on. On a mask, two blocks fit into 100 KiB.
    """
    counted = int(request.node.callspec.params["kernels"]) >= 90
    plain = [one for one in kernels if re.match(r"policy_loss\w*_kernel<float.* 0>", one.name)]
    assert len(plain) == 6
    for kernel in plain:
        of_block = kernel.shared + (0 if counted else 1 << 10)
        is_masked = kernel.name.startswith("policy_loss_masked")
        assert 3 * of_block <= (164 if is_masked else 100) << 10, kernel.name
        assert 2 * of_block <= 100 << 10, kernel.name


def test_a_plain_policy_loss_is_short(kernels: list[Kernel]) -> None:
    """What it leaves out is what it has a kernel of its own for."""
    size = {kernel.name: len(re.findall(r"/\*[0-9a-f]{4,}\*/", kernel.code)) for kernel in kernels}
    plain = [name for name in size if re.match(r"policy_loss(_masked)?_kernel<.*, 0>", name)]
    assert len(plain) == 12
    for name in plain:
        most = next(most for kernels, most in MOST_OF_GENERAL.items() if re.match(kernels, name))
        assert size[name] <= most * size[name.replace(", 0>", ", 1>")], name


def test_streams_move_16_bytes_at_once(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        least = find_moves(kernel.name)
        assert least.are_in(kernel.flow), kernel.name
        # One that begins to move 16 bytes at once belongs among the others.
        if least == Moves():
            assert kernel.wide_loads + kernel.wide_stores == 0, kernel.name


def test_lists_of_moves_name_kernels(kernels: list[Kernel]) -> None:
    for names in (*STREAMS, *PIECES):
        assert any(re.fullmatch(names, kernel.name) for kernel in kernels), names


def test_the_account_has_them(kernels: list[Kernel], request: pytest.FixtureRequest) -> None:
    """`python -m benchmarks.cuda_account --write` writes the page anew."""
    page = (cuda_machine_code.ROOT / "benchmarks/cuda_account.md").read_text()
    if f"nvcc {cuda_machine_code.nvcc_version()};" not in page:
        pytest.skip("the account is of another compiler")
    place = ARCHITECTURES.index(request.node.callspec.params["kernels"])
    code = page.partition("<!-- code -->")[2].partition("<!-- end of code -->")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", code, re.MULTILINE)
    registers = {name: int(numbers.split(" / ")[place]) for name, numbers in rows}
    assert registers == {
        kernel.name.replace("steppo::", ""): kernel.registers for kernel in kernels
    }


def logits_kernels(kernels: list[Kernel]) -> list[Kernel]:
    """Return those that read rows of logits in fp32 or in halves."""
    found = [
        kernel
        for kernel in kernels
        if kernel.name.startswith("token_log_probs") and "double" not in kernel.name
    ]
    assert len(found) == 32
    return found


def test_loops_over_logits_compute_in_fp32(kernels: list[Kernel]) -> None:
    """Few GPUs have as many units for fp64."""
    of_fp32 = [kernel for kernel in kernels if re.match(IN_FP32, kernel.name)]
    assert {kernel.name for kernel in logits_kernels(kernels)} < {one.name for one in of_fp32}
    for kernel in of_fp32:
        assert complaints(kernel) == [], kernel.name


def test_a_logit_takes_few_instructions(kernels: list[Kernel]) -> None:
    """Where single packs are asked about, it takes up to twice as many."""
    for kernel in logits_kernels(kernels):
        width = 4 if "<float" in kernel.name else 2
        logits = 16 // width * wide_moves(kernel.stream)[0]
        kind = "backward" if "backward" in kernel.name else "forward"
        is_capped, has_entropy = re.findall("true|false", kernel.name)
        most = MOST_A_LOGIT[kind, width][2 * (is_capped == "true") + (has_entropy == "true")]
        assert len(kernel.stream) / logits <= most, kernel.name
        # It is the loop that does the work.
        powers = sum("MUFU.EX2" in instruction for instruction in kernel.stream)
        assert powers >= logits, kernel.name


def test_the_test_reads_what_it_is_about(kernels: list[Kernel]) -> None:
    """A kernel that moves number by number has no wide load, and code has stores at all."""
    (narrow,) = [kernel for kernel in kernels if kernel.name == "broadcast_kernel<float, false>"]
    assert narrow.wide_loads == 0
    assert narrow.count(r"STG\.E[\w.]*") > 0
    assert FORBIDDEN.search("        RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R5 ;")
    assert FORBIDDEN.search("  STL [R1], R0 ;")
