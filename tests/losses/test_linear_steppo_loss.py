"""linear_steppo_loss: against the unfused loss, its work, its memory, and its dtypes."""

from __future__ import annotations

import pytest
import torch
from batches import Error, assert_same
from grids import grid
from head_cases import head_case, new_tensors, plain_log_probs, plain_loss, products

from steppo_kernels import StepLayout, StepPOConfig, broadcast_to_tokens, linear_steppo_loss
from steppo_kernels.config import RATIOS, REDUCTIONS
from steppo_kernels.outputs import POLICY_METRICS

# The clip is as wide as the log-ratios, so that some steps are clipped and some are not.
_CONFIG = StepPOConfig(clip_low=0.05, clip_high=0.05)


def run(case, backend, head=None, *, layout=None, upstream=1.0, **options):
    """Everything that the fused loss gives, by name."""
    head = head or {}
    output = linear_steppo_loss(
        case.hidden,
        case.weight,
        case.token_ids,
        case.old_log_probs,
        case.advantages,
        case.layout if layout is None else layout,
        backend=backend,
        **head,
        **options,
    )
    return collect(case, output, head, upstream)


def plain(case, head=None, *, upstream=1.0, **options):
    """The same from plain PyTorch."""
    return collect(case, plain_loss(case, head or {}, **options), head or {}, upstream)


def collect(case, output, head, upstream):
    names = [n for n in ("hidden", "weight", "bias") if n != "bias" or head.get("bias") is not None]
    names = [n for n in names if getattr(case, n).requires_grad]
    found = case.gradients(output.loss * upstream, *names)
    found |= {"loss": output.loss.detach(), "metrics": output.metrics.values}
    if output.step_log_ratio is not None:
        found["step_log_ratio"] = output.step_log_ratio
    return found


def options_of(name, case):
    """Options of the head, of the config and of the loss."""
    head, terms, others = {}, {}, {}
    if name in ("head", "everything"):
        head = {"bias": case.bias, "temperature": 0.7, "softcap": 2.0}
    if name in ("terms", "everything"):
        terms = {"dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.05}
        others = {"is_weights": case.advantages.abs() + 0.5, "ref_log_probs": case.ref_log_probs}
    if name == "everything":
        head["temperature"], others["is_weights"] = case.temperatures, case.token_weights
    return head, terms, others


@grid(
    cover=1,
    ratio=RATIOS,
    reduction=REDUCTIONS,
    chunk=[None, 1, 3, 7],
    given=["everything", "terms", "head", "nothing"],
)
def test_equals_the_unfused_loss(target, ratio, reduction, chunk, given):
    case = head_case(REDUCTIONS.index(reduction)).to(torch.float64, target.device)
    head, terms, options = options_of(given, case)
    config = StepPOConfig(ratio=ratio, reduction=reduction, clip_low=0.1, clip_high=0.15, **terms)
    found = run(
        case, target.backend, head, config=config, chunk_tokens=chunk, upstream=3.0, **options
    )
    expected = plain(case, head, config=config, upstream=3.0, **options)
    if not config.entropy_coef:
        # Without a coefficient the fused loss forms no entropies.
        assert found["metrics"][2] == 0
    assert_same(found, expected, 1e-11)


def test_a_mask_is_a_layout(target):
    case = head_case(3).to(torch.float64, target.device)
    expected = run(case, target.backend, config=_CONFIG)
    case.advantages = broadcast_to_tokens(case.advantages, case.layout, backend="reference")
    found = run(case, target.backend, config=_CONFIG, layout=case.mask)
    assert_same(found, expected, 1e-13)


def test_steps_of_many_rows_and_other_orders(target):
    """Rows of one trajectory lie apart: its tokens are not in the order of memory."""
    case = head_case(5, rows=6).to(torch.float64, target.device)
    rows = StepLayout.from_rows(case.mask, [0, 1, 0, 1, 1, 0], [2, 0, 0, 1, 2, 1])
    for layout in (rows, rows.per_trajectory(), rows.per_token()):
        case.layout = layout
        case.advantages = torch.linspace(-1, 1, layout.num_steps, dtype=torch.float64)
        case.advantages = case.advantages.to(target.device)
        found = run(case, target.backend, config=_CONFIG, chunk_tokens=5)
        assert_same(found, plain(case, config=_CONFIG), 1e-11)


def test_gradcheck(target):
    case = head_case(2, rows=2, length=7, size=2, vocabulary=4).to(torch.float64, target.device)
    case.hidden = torch.where(case.mask[..., None], case.hidden.detach(), 0.0).requires_grad_()
    config = StepPOConfig(clip_low=0.9, clip_high=9.0, entropy_coef=0.1, kl_coef=0.1)

    def loss(hidden, weight, bias):
        return linear_steppo_loss(
            hidden,
            weight,
            case.token_ids,
            case.old_log_probs,
            case.advantages,
            case.layout,
            bias=bias,
            config=config,
            ref_log_probs=case.ref_log_probs,
            chunk_tokens=4,
            temperature=0.8,
            softcap=3.0,
            backend=target.backend,
        ).loss

    # Element by element where that is fast, else along random directions.
    fast_mode = target.interpreted
    inputs = (case.hidden, case.weight, case.bias)
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-8, fast_mode=fast_mode)


@grid(
    cover=1,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    sizes=[(257, None), (257, 8), (1031, 24)],
)
def test_error_is_at_most_that_of_plain_pytorch(kernel, dtype, sizes):
    """Peaked softmax. fp32: twice the error; halves: plain PyTorch stays in the dtype."""
    vocabulary, chunk = sizes
    rows, length = (2, 20) if kernel.interpreted else (4, 60)
    exact = head_case(7, rows, length, 64, vocabulary, sharp=4.0, moved=0.02)
    config = StepPOConfig(clip_low=0.05, clip_high=0.05)
    expected = plain(exact.to(torch.float64), config=config)
    case = exact.to(dtype, kernel.device)
    # Trainers keep these in fp32.
    for name in ("old_log_probs", "ref_log_probs", "advantages"):
        setattr(case, name, getattr(exact, name).float().to(kernel.device))
    found = run(case, kernel.backend, config=config, chunk_tokens=chunk)
    unfused = plain(case, config=config)
    factor = 2.0 if dtype == torch.float32 else 1.0
    for name in ("loss", "grad_hidden", "grad_weight"):
        allowed = factor * Error.between(unfused[name], expected[name]).rms
        allowed += 8 * torch.finfo(torch.float32).eps
        assert Error.between(found[name], expected[name]).rms <= allowed, name


def test_the_weight_gradient_is_summed_in_fp32(kernel):
    """A sum in bf16 over many chunks would lose what is small against it."""
    if kernel.interpreted:
        pytest.skip("a launch for every two of 960 rows takes the interpreter minutes")
    exact = head_case(11, rows=8, length=120, size=8, vocabulary=13, moved=0.0)
    exact.advantages = exact.advantages.abs() + 1
    expected = plain(exact.to(torch.float64), config=_CONFIG)["grad_weight"]
    case = exact.to(torch.bfloat16, kernel.device)
    one = run(case, kernel.backend, config=_CONFIG, chunk_tokens=None)["grad_weight"]
    many = run(case, kernel.backend, config=_CONFIG, chunk_tokens=2)["grad_weight"]
    assert Error.between(many, expected).rms <= 1.2 * Error.between(one, expected).rms


@grid(chunk=[None, 24])
def test_fp16_keeps_gradients_until_they_are_scaled(kernel, chunk):
    """A loss scale comes after the gradients are formed: they must not underflow before."""
    rows, length = (2, 20) if kernel.interpreted else (4, 60)
    exact = head_case(7, rows, length, 64, 257, sharp=4.0, moved=0.02)
    expected = plain(exact.to(torch.float64), config=_CONFIG)
    case = exact.to(torch.float16, kernel.device)
    for name in ("old_log_probs", "advantages"):
        setattr(case, name, getattr(exact, name).float().to(kernel.device))
    total = 1e6
    found = run(
        case,
        kernel.backend,
        config=_CONFIG,
        chunk_tokens=chunk,
        normalizer=total,
        upstream=total / case.layout.num_steps,
    )
    usual = run(case, kernel.backend, config=_CONFIG, chunk_tokens=chunk)
    for name in ("grad_hidden", "grad_weight"):
        error = Error.between(found[name], expected[name]).rms
        assert error <= 1.1 * Error.between(usual[name], expected[name]).rms, name


@grid(clipped=[0, 3, "all"])
def test_work_is_2_plus_4f_on_action_tokens(kernel, clipped):
    case = head_case(1, rows=2, length=16, moved=0.0).to(torch.float32, kernel.device)
    num_steps, num_tokens = case.layout.num_steps, case.layout.num_tokens
    dead = num_steps if clipped == "all" else clipped
    case.advantages = (torch.arange(num_steps, device=kernel.device) >= dead).float()
    live = int(case.layout.step_lengths[dead:].sum())
    with products() as counter:
        found = run(case, kernel.backend, config=_CONFIG, chunk_tokens=20)
    assert counter.operations == (2 * num_tokens + 4 * live) * case.weight.numel()
    dead_fraction = float(found["metrics"][POLICY_METRICS.index("dead_token_fraction")])
    assert dead_fraction == pytest.approx(1 - live / num_tokens)
    if clipped == "all":
        assert not found["grad_hidden"].any()
        assert not found["grad_weight"].any()


def test_work_of_what_needs_no_gradient(kernel):
    case = head_case(1, moved=0.0).to(torch.float32, kernel.device)
    case.advantages = case.advantages.abs() + 1
    unit = case.layout.num_tokens * case.weight.numel()

    def work(enabled=True):
        with products() as counter, torch.set_grad_enabled(enabled):
            loss = linear_steppo_loss(
                case.hidden,
                case.weight,
                case.token_ids,
                case.old_log_probs,
                case.advantages,
                case.layout,
                config=_CONFIG,
                backend=kernel.backend,
            ).loss
        return counter.operations / unit, loss

    full = run(case, kernel.backend, config=_CONFIG)
    assert work()[0] == 6
    assert work(enabled=False)[0] == 2
    case.weight.requires_grad_(False)
    assert work()[0] == 4
    assert torch.equal(case.gradients(work()[1], "hidden")["grad_hidden"], full["grad_hidden"])
    case.weight.requires_grad_(True)
    case.hidden.requires_grad_(False)
    assert work()[0] == 4
    assert torch.equal(case.gradients(work()[1], "weight")["grad_weight"], full["grad_weight"])
    case.weight.requires_grad_(False)
    share, loss = work()
    assert share == 2
    assert not loss.requires_grad


def test_no_tensor_of_all_logits(kernel):
    case = head_case(9, rows=4, length=32, size=4, vocabulary=301).to(torch.float32, kernel.device)
    for hidden in (case.hidden, case.hidden.detach()):
        case.hidden = hidden
        with new_tensors() as sizes:
            run(case, kernel.backend, config=_CONFIG, chunk_tokens=9)
        # On a GPU rows of logits are multiples of 8 numbers.
        assert max(sizes) <= 9 * 304
    assert case.layout.num_tokens > 5 * 9


def test_a_step_longer_than_a_chunk_takes_two_passes(kernel):
    case = head_case(4, rows=1, length=23, moved=0.01).to(torch.float64, kernel.device)
    case.layout = StepLayout.from_mask(case.mask).per_trajectory()
    case.advantages = case.advantages.new_ones(1)
    with products() as counter:
        found = run(case, kernel.backend, config=_CONFIG, chunk_tokens=4)
    assert case.layout.num_tokens > 8
    assert counter.operations == 8 * case.layout.num_tokens * case.weight.numel()
    assert_same(found, plain(case, config=_CONFIG), 1e-11)


def test_centered_ratio_with_a_center_takes_one_pass(kernel):
    case = head_case(6, moved=0.01).to(torch.float64, kernel.device)
    config = StepPOConfig(ratio="centered", clip_low=0.5, clip_high=0.5)
    unit = case.layout.num_tokens * case.weight.numel()
    for center, share in ((0.01, 6), (None, 8)):
        with products() as counter:
            found = run(case, kernel.backend, config=config, ratio_center=center, chunk_tokens=16)
        assert counter.operations == share * unit
        assert_same(found, plain(case, config=config, ratio_center=center), 1e-11)


def test_any_upstream_gradient_and_a_second_backward(target):
    case = head_case(8).to(torch.float64, target.device)
    loss = linear_steppo_loss(
        case.hidden,
        case.weight,
        case.token_ids,
        case.old_log_probs,
        case.advantages,
        case.layout,
        config=_CONFIG,
        backend=target.backend,
    ).loss
    inputs = (case.hidden, case.weight)
    first = torch.autograd.grad(loss / 7, inputs, retain_graph=True)
    second = torch.autograd.grad(loss * 65536, inputs, retain_graph=True)
    last = torch.autograd.grad(loss, inputs)
    expected = plain(case, config=_CONFIG)
    for factor, found in ((1 / 7, first), (65536, second), (1, last)):
        for name, grad in zip(("grad_hidden", "grad_weight"), found, strict=True):
            assert Error.between(grad, factor * expected[name]).largest <= 1e-11


def test_gradients_add_up_once(target):
    """A weight that is used twice, or tied to the embedding, gets each gradient once."""
    case = head_case(10).to(torch.float64, target.device)
    ids = case.token_ids.where(case.mask, 0)
    results = []
    for fused in (True, False):
        case.weight.grad = None
        case.hidden = torch.nn.functional.embedding(ids, case.weight) ** 2
        output = (
            linear_steppo_loss(
                case.hidden,
                case.weight,
                case.token_ids,
                case.old_log_probs,
                case.advantages,
                case.layout,
                config=_CONFIG,
                backend=target.backend,
            )
            if fused
            else plain_loss(case, {}, config=_CONFIG)
        )
        output.loss.backward()
        results.append(case.weight.grad)
    assert Error.between(*results).largest <= 1e-11


def test_masked_positions_may_hold_anything(target):
    case = head_case(12).to(torch.float64, target.device)
    expected = run(case, target.backend, config=_CONFIG)
    assert case.hidden.isnan().any()
    assert not expected["grad_hidden"][~case.mask].any()
    case.hidden = torch.where(case.mask[..., None], case.hidden.detach(), torch.inf)
    case.hidden.requires_grad_()
    case.token_ids = case.token_ids.where(case.mask, -7)
    assert_same(run(case, target.backend, config=_CONFIG), expected, 0.0)


def test_no_action_tokens(target):
    case = head_case(13).to(torch.float32, target.device)
    case.layout = StepLayout.from_mask(torch.zeros_like(case.mask))
    case.advantages = case.advantages[:0]
    found = run(case, target.backend, config=_CONFIG)
    assert found["loss"] == 0
    assert found["metrics"].isfinite().all()
    assert not found["grad_hidden"].any()
    assert not found["grad_weight"].any()


@pytest.mark.parametrize("chunk", [None, 6])
def test_bitwise_repeatable(target, chunk):
    case = head_case(14).to(torch.float32, target.device)
    first, second = (run(case, target.backend, config=_CONFIG, chunk_tokens=chunk) for _ in "12")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_inputs(target):
    case = head_case(15, rows=4).to(torch.float64, target.device)
    expected = run(case, target.backend, config=_CONFIG)
    case.weight = case.weight.detach().t().contiguous().t().requires_grad_()
    case.hidden = case.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not case.weight.is_contiguous()
    assert not case.hidden.is_contiguous()
    assert_same(run(case, target.backend, config=_CONFIG), expected, 1e-13)


def test_autocast(kernel):
    """Under autocast the products run in its dtype, and gradients come back in the inputs'."""
    case = head_case(16).to(torch.float32, kernel.device)
    with torch.autocast(kernel.device, torch.bfloat16):
        found = run(case, kernel.backend, config=_CONFIG)
    rounded = head_case(16).to(torch.bfloat16, kernel.device)
    for name in ("old_log_probs", "advantages"):
        setattr(rounded, name, getattr(case, name))
    expected = run(rounded, kernel.backend, config=_CONFIG)
    assert found["grad_weight"].dtype == torch.float32
    assert_same(found, expected, 0.0)


def test_more_rows_than_a_grid_dimension(kernel):
    if kernel.emulated:
        pytest.skip(
            "a block a row takes the CPU minutes; test_known_bugs reads the grids of Triton"
        )
    case = head_case(17, rows=2, length=70_001, size=2, vocabulary=3, mean_step=90.0)
    case = case.to(torch.float64, kernel.device)
    found = run(case, kernel.backend, config=_CONFIG, chunk_tokens=66_000)
    assert case.layout.num_tokens > 66_000
    assert_same(found, plain(case, config=_CONFIG), 1e-10)


def test_on_policy(target):
    """Without old log-probs every ratio is 1 and no step is clipped."""
    case = head_case(18).to(torch.float64, target.device)
    case.old_log_probs = None
    found = run(case, target.backend)
    assert found["metrics"][3] == 1.0
    assert_same(found, plain(case), 1e-11)


def test_micro_batches_with_a_global_normalizer_add_up(target):
    case = head_case(19, rows=4).to(torch.float64, target.device)
    whole = run(case, target.backend, config=_CONFIG)
    total = int((case.layout.step_lengths > 0).sum())
    weight, loss = torch.zeros_like(case.weight), 0.0
    for part in (slice(0, 1), slice(1, 4)):
        layout = StepLayout.from_mask(case.mask[part])
        first = 0 if part.start == 0 else StepLayout.from_mask(case.mask[:1]).num_steps
        output = linear_steppo_loss(
            case.hidden[part],
            case.weight,
            case.token_ids[part],
            case.old_log_probs[part],
            case.advantages[first : first + layout.num_steps],
            layout,
            config=_CONFIG,
            normalizer=total,
            backend=target.backend,
        )
        loss += output.loss.item()
        weight += torch.autograd.grad(output.loss, case.weight)[0]
    assert loss == pytest.approx(float(whole["loss"]), abs=1e-12)
    assert Error.between(weight, whole["grad_weight"]).largest <= 1e-11


@pytest.mark.unpoisoned
def test_inside_a_compiled_function(kernel):
    """The loss itself is not traced: the graph breaks there, and the result is the same."""
    case = head_case(20, rows=1).to(torch.float32, kernel.device)
    hidden = case.hidden.detach().nan_to_num(0.0)

    def loss(weight):
        return linear_steppo_loss(
            hidden.tanh(),
            weight * 2,
            case.token_ids,
            case.old_log_probs,
            case.advantages,
            case.layout,
            config=_CONFIG,
            backend=kernel.backend,
        ).loss

    expected = torch.autograd.grad(loss(case.weight), case.weight)[0]
    compiled = torch.compile(loss, backend="eager")
    found = torch.autograd.grad(compiled(case.weight), case.weight)[0]
    assert Error.between(found, expected).largest <= 1e-5


@pytest.mark.parametrize("outlier", [1024.0, 2400.0])
def test_half_precision_sums_over_rows_that_leave_its_range(kernel, outlier):
    """A dimension that is large in all rows, as final norms have them, and one word in all."""
    generator = torch.Generator().manual_seed(1)
    hidden = 0.1 * torch.randn((4, 16, 6), generator=generator)
    hidden[..., 0] = outlier
    hidden, weight = hidden.half(), (0.002 * torch.randn((9, 6), generator=generator)).half()
    layout = StepLayout.from_mask(torch.ones(4, 16, dtype=torch.bool), backend="reference")
    ids = torch.zeros((4, 16), dtype=torch.int64)

    def gradient(dtype, device, backend):
        leaf = weight.to(device, dtype).requires_grad_()
        loss = linear_steppo_loss(
            hidden.to(device, dtype),
            leaf,
            ids.to(device),
            None,
            torch.ones(4, device=device),
            layout.to(device),
            backend=backend,
        ).loss
        return torch.autograd.grad(loss, leaf)[0]

    expected = gradient(torch.float64, "cpu", "reference")
    found = gradient(torch.float16, kernel.device, kernel.backend)
    assert Error.between(found, expected).largest <= 4e-3


@grid(log_ratio=[-80.0, -89.0, -95.0, -104.0])
def test_half_precision_coefficients_without_a_reciprocal(kernel, log_ratio):
    """A ratio so small that 1 / gradient is no fp32 number; nothing of it is left in fp16."""
    case = head_case(5, rows=1, length=20).to(torch.float16, kernel.device)
    layout = StepLayout.from_mask(case.mask).per_trajectory()
    with torch.no_grad():
        log_probs = plain_log_probs(case)[0]
    case.old_log_probs = log_probs.float() - log_ratio / layout.num_tokens
    case.advantages = torch.ones(1, device=kernel.device)
    config = StepPOConfig(ratio="product", clip_low=0.2, clip_high=0.2)
    found = run(case, kernel.backend, layout=layout.to(kernel.device), config=config)
    assert found["step_log_ratio"].item() == pytest.approx(log_ratio, abs=0.5)
    assert not found["grad_hidden"].any()
    assert not found["grad_weight"].any()
