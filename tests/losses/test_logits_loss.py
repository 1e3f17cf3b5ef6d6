"""steppo_loss_from_logits: the same as its parts, with masks and layouts, in place, compiled."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from batches import Error, ragged_mask
from graphs import in_one_graph
from grids import grid
from head_cases import launches
from logit_cases import assert_same_rows
from methods import METHODS

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    steppo_loss,
    steppo_loss_from_logits,
    token_log_probs,
)
from steppo_kernels.outputs import POLICY_METRICS

_VOCABULARY = 19
_CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.05)
_CONFIGS = {
    "plain": StepPOConfig(clip_low=0.2, clip_high=0.3),
    "everything": dataclasses.replace(_CONFIG, ratio="product", dual_clip=3.0),
    "centered": dataclasses.replace(_CONFIG, ratio="centered", reduction="trajectory_mean"),
    "entropy": StepPOConfig(entropy_coef=0.2, reduction="token_mean"),
}


@dataclasses.dataclass
class Case:
    """Inputs of the loss; masked positions hold NaN and ids out of range."""

    mask: torch.Tensor
    layout: StepLayout
    logits: torch.Tensor
    token_ids: torch.Tensor
    old_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    advantages: torch.Tensor
    is_weights: torch.Tensor
    temperature: torch.Tensor

    def to(self, dtype, device):
        moved = {
            name: value.to(device, dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value.to(device)
            for name, value in vars(self).items()
        }
        return Case(**moved)

    def arguments(self, masked):
        """The positional arguments after the logits, by layout or by mask."""
        if not masked:
            return self.token_ids, self.old_log_probs, self.advantages, self.layout
        spread = broadcast_to_tokens(self.advantages, self.layout, backend="reference")
        return self.token_ids, self.old_log_probs, spread, self.mask

    def options(self, config):
        extra = {"ref_log_probs": self.ref_log_probs} if config.kl_coef else {}
        return {**extra, "config": config, "is_weights": self.is_weights}


def draw(target, seed, rows=4, length=23, *, dtype=torch.float32, moved=0.3):
    if target.interpreted:
        # Each row of logits takes its kernels 50 ms.
        rows, length = 2, 12
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = ragged_mask(rows, length, mean_step=4.0, generator=generator)
    layout = StepLayout.from_mask(mask, backend="reference")
    logits = 2 * normal(rows, length, _VOCABULARY)
    temperature = 0.5 + torch.rand((rows, length), generator=generator, dtype=torch.float64)
    policy = (logits / temperature[..., None]).softmax(-1)
    ids = torch.multinomial(policy.view(-1, _VOCABULARY), 1, generator=generator)
    log_probs = policy.log().view(-1, _VOCABULARY).gather(-1, ids).view(rows, length)
    ids = ids.view(rows, length)
    garbage = torch.where(torch.arange(length) % 2 == 0, -100, 2**40)
    return Case(
        mask=mask,
        layout=layout,
        logits=torch.where(mask[..., None], logits, math.nan),
        token_ids=torch.where(mask, ids, garbage),
        old_log_probs=torch.where(mask, log_probs + moved * normal(rows, length), math.nan),
        ref_log_probs=torch.where(mask, log_probs + moved * normal(rows, length), math.nan),
        advantages=normal(layout.num_steps),
        is_weights=torch.where(mask, 0.5 + normal(rows, length).abs(), math.nan),
        temperature=temperature,
    ).to(dtype, target.device)


def run(case, backend, config=_CONFIG, *, masked=False, temperature=None, **options):
    """Return every result of the fused loss, by name."""
    logits = case.logits.detach().clone().requires_grad_()
    output = steppo_loss_from_logits(
        logits,
        *case.arguments(masked),
        backend=backend,
        temperature=case.temperature if temperature is None else temperature,
        **{**case.options(config), **options},
    )
    return everything(output, logits)


def everything(output, logits):
    (grad,) = torch.autograd.grad(output.loss * 0.5, logits)
    # The last entry is the scale of the gradients, which a backend chooses.
    metrics = output.metrics.values
    found = {"loss": output.loss.detach(), "metrics": metrics, "grad": grad}
    if output.step_log_ratio is not None:
        found["step_log_ratio"] = output.step_log_ratio
    return found


@grid(cover=1, name=list(_CONFIGS), dtype=[torch.float32, torch.bfloat16, torch.float64])
def test_is_the_loss_of_the_log_probs(target, masked, name, dtype):
    """It has the bits of `token_log_probs` and `steppo_loss` one after the other."""
    config = _CONFIGS[name]
    case = draw(target, 1)
    case.logits = case.logits.to(dtype)
    found = run(case, target.backend, config, masked=masked)

    logits = case.logits.clone().requires_grad_()
    ids, *others = case.arguments(masked)
    log_probs, entropy = token_log_probs(
        logits,
        ids,
        temperature=case.temperature,
        return_entropy=True,
        mask=case.mask,
        backend=target.backend,
    )
    expected = everything(
        steppo_loss(
            log_probs,
            *others,
            **case.options(config),
            backend=target.backend,
            entropy=entropy if config.entropy_coef else None,
        ),
        logits,
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@grid(cover=1, name=list(_CONFIGS))
def test_reference_in_fp64(kernel, masked, name):
    config = _CONFIGS[name]
    case = draw(kernel, 2, dtype=torch.float64)
    expected = run(case, "reference", config, masked=masked)
    found = run(case, kernel.backend, config, masked=masked)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(target, dtype):
    """Logits are exact, the gradient is rounded once."""
    case = draw(target, 3)
    case.logits = case.logits.to(dtype)
    wide = dataclasses.replace(case, logits=case.logits.float())
    found = run(case, target.backend, normalizer=0.1)
    expected = run(wide, target.backend, normalizer=0.1)
    for name in ("loss", "metrics"):
        assert_same_rows(target, found[name], expected[name], name)
    rtol = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(found["grad"].float(), expected["grad"], rtol=rtol, atol=1e-7)


@grid(cover=1, garbage=[math.inf, -math.inf, 0.0])
def test_nothing_of_a_masked_position_counts(target, masked, garbage):
    case = draw(target, 4)
    expected = run(case, target.backend, masked=masked)
    filled = {
        name: torch.where(case.mask, getattr(case, name), garbage)
        for name in ("old_log_probs", "ref_log_probs", "is_weights")
    }
    logits = torch.where(case.mask[..., None], case.logits, garbage)
    ids = torch.where(case.mask, case.token_ids, -1)
    changed = dataclasses.replace(case, logits=logits, token_ids=ids, **filled)
    found = run(changed, target.backend, masked=masked)
    for key, value in expected.items():
        assert value.isfinite().all()
        assert torch.equal(found[key], value), key
    assert found["grad"][~case.mask].count_nonzero() == 0


def test_no_action_token(target, masked):
    case = draw(target, 1)
    mask = torch.zeros_like(case.mask)
    logits = torch.full_like(case.logits, math.nan, requires_grad=True)
    layout = mask if masked else StepLayout.from_mask(mask, backend="reference")
    advantages = torch.zeros(case.mask.shape if masked else 0, device=target.device)
    output = steppo_loss_from_logits(
        logits,
        case.token_ids,
        None,
        advantages,
        layout,
        config=StepPOConfig(entropy_coef=0.1),
        backend=target.backend,
    )
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.metrics.values.isfinite().all()
    assert logits.grad.count_nonzero() == 0


def test_clipped_steps_have_no_gradient(target):
    """Backward does not read their logits either."""
    case = draw(target, 5, moved=2.0)
    config = StepPOConfig(clip_low=0.01, clip_high=0.01)
    logits = case.logits.clone().requires_grad_()
    output = steppo_loss_from_logits(
        logits,
        *case.arguments(False),
        temperature=case.temperature,
        config=config,
        backend=target.backend,
    )
    dead = output.metrics.as_dict()["dead_token_fraction"]
    assert 0.2 < dead < 0.8
    (grad,) = torch.autograd.grad(output.loss, logits, retain_graph=True)
    is_dead = (grad == 0).all(-1)
    assert is_dead[case.mask].float().mean().item() == pytest.approx(dead)
    if target.backend != "reference":
        logits.data[is_dead] = math.nan
        assert torch.equal(torch.autograd.grad(output.loss, logits)[0], grad)


def test_on_policy(target, masked):
    """Without old log-probs every ratio is 1, and the gradient is that of A log p."""
    case = draw(target, 6, dtype=torch.float64)
    logits = case.logits.clone().requires_grad_()
    ids, _, advantages, layout = case.arguments(masked)
    output = steppo_loss_from_logits(
        logits, ids, None, advantages, layout, temperature=0.8, backend=target.backend
    )
    output.loss.backward()
    index = POLICY_METRICS.index("ratio_mean")
    assert output.metrics.values[index] == 1.0
    plain = torch.where(case.mask[..., None], case.logits, 0.0).requires_grad_()
    log_p = (plain / 0.8).log_softmax(-1)
    ids = torch.where(case.mask, ids, 0)
    chosen = log_p.gather(-1, ids[..., None]).squeeze(-1)
    spread = broadcast_to_tokens(case.advantages, case.layout, backend="reference")
    lengths = case.layout.step_lengths.to(torch.float64)
    length = broadcast_to_tokens(lengths, case.layout, backend="reference").clamp_min(1)
    steps = int((case.layout.step_lengths > 0).sum())
    (-(spread / length * chosen).sum() / steps).backward()
    torch.testing.assert_close(logits.grad, plain.grad, rtol=1e-9, atol=1e-12)


@grid(cover=1, name=["plain", "everything"])
def test_inplace_backward(kernel, masked, name):
    case = draw(kernel, 7)
    expected = run(case, kernel.backend, _CONFIGS[name], masked=masked)
    logits = case.logits.clone().requires_grad_()
    output = steppo_loss_from_logits(
        logits,
        *case.arguments(masked),
        temperature=case.temperature,
        inplace_backward=True,
        backend=kernel.backend,
        **case.options(_CONFIGS[name]),
    )
    loss = output.loss * 0.5
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(grad, expected["grad"])
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "not-a-leaf"])
@pytest.mark.parametrize("name", ["plain", "entropy"])
@pytest.mark.parametrize("inplace", [False, True], ids=["plain", "inplace"])
def test_torch_launches_nothing_beside_the_kernels(kernel, masked, inplace, name, is_leaf):
    """Nothing but one fill around the logits. The others are autograd's own."""
    if kernel.backend != "cuda":
        pytest.skip("the others launch torch's products for a gradient's scale, or nothing")
    case = draw(kernel, 12)
    ids, old, advantages, layout = case.arguments(masked)
    options = {"config": _CONFIGS[name], "inplace_backward": inplace, "backend": kernel.backend}
    seen = []
    for _ in range(2):
        leaf = torch.nn.functional.pad(case.logits, (0, 0, 0, 1)).requires_grad_()
        whole = leaf if is_leaf else leaf.view(leaf.shape)
        with launches() as forward:
            output = steppo_loss_from_logits(whole[:, :-1], ids, old, advantages, layout, **options)
        with launches() as backward:
            output.loss.backward()
        seen.append((forward, backward))
    # A layout keeps its mask from the first call on.
    forward, backward = seen[1]
    assert forward == []
    root = "ones_like"
    assert backward == [root, "zero_" if inplace else "slice_backward"]


def test_a_mask_of_any_bytes_is_read_as_torch_reads_it(target):
    """A bool tensor made of other bytes than 0 and 1 is True wherever a byte is not 0."""
    case = draw(target, 13)
    expected = run(case, target.backend, masked=True)
    bytes_ = torch.arange(case.mask.numel(), device=target.device) % 255 + 1
    raw = torch.where(case.mask, bytes_.view(case.mask.shape), 0).to(torch.uint8)
    found = run(dataclasses.replace(case, mask=raw.view(torch.bool)), target.backend, masked=True)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_shifted_logits_of_a_causal_model(target):
    """Slices, and what a trainer passes: one position less than there are tokens."""
    case = draw(target, 8)
    rows, length = case.mask.shape
    whole = torch.zeros((rows, length + 1, _VOCABULARY), device=target.device)
    whole[:, :-1] = case.logits
    whole[:, -1] = math.nan
    whole.requires_grad_()
    output = steppo_loss_from_logits(
        whole[:, :-1],
        *case.arguments(False),
        temperature=case.temperature,
        backend=target.backend,
        **case.options(_CONFIG),
    )
    grad = everything(output, whole)["grad"]
    assert_same_rows(target, grad[:, :-1], run(case, target.backend)["grad"])
    assert grad[:, -1].count_nonzero() == 0


def test_packed_tokens(target):
    """Logits, ids and the rest as ``[N]`` views of the layout's shape."""
    case = draw(target, 9)
    flat = dataclasses.replace(
        case,
        **{
            name: getattr(case, name).flatten(0, 1)
            for name in ("logits", "token_ids", "old_log_probs", "ref_log_probs", "is_weights")
        },
        temperature=case.temperature.view(-1),
    )
    expected, found = run(case, target.backend), run(flat, target.backend)
    assert torch.equal(found.pop("grad"), expected.pop("grad").flatten(0, 1))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_needs_no_gradient(target, masked):
    case = draw(target, 10)
    output = steppo_loss_from_logits(
        case.logits,
        *case.arguments(masked),
        temperature=case.temperature,
        backend=target.backend,
        **case.options(_CONFIG),
    )
    assert not output.loss.requires_grad
    assert torch.equal(output.loss, run(case, target.backend, masked=masked)["loss"])


def test_micro_batches_add_up(target):
    """Each part is given the normalizer of the whole batch."""
    if target.interpreted:
        pytest.skip("rows are cut outside of the kernels")
    case = draw(target, 11, dtype=torch.float64)
    config = StepPOConfig(clip_low=0.2, clip_high=0.3, entropy_coef=0.1)
    normalizer = float((case.layout.step_lengths > 0).sum())
    options = {"config": config, "normalizer": normalizer, "backend": target.backend}

    def gradient(rows):
        logits = case.logits[rows].clone().requires_grad_()
        ids, old, spread, mask = (value[rows] for value in case.arguments(True))
        loss = steppo_loss_from_logits(logits, ids, old, spread, mask, **options).loss
        return torch.autograd.grad(loss, logits)[0]

    parts = torch.cat([gradient(slice(i, i + 1)) for i in range(4)])
    assert Error.between(parts, gradient(slice(None))).largest < 1e-12


def step(case, args, backend, inplace, config):
    # A leaf cannot be written to; the output of a model can.
    output = steppo_loss_from_logits(
        case.logits * 1.0,
        *args,
        temperature=case.temperature,
        inplace_backward=inplace,
        backend=backend,
        **case.options(config),
    )
    return output.loss, output.metrics.values


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("inplace", "config"),
    [
        pytest.param(False, _CONFIG, id="plain"),
        pytest.param(True, _CONFIG, id="inplace"),
        *(
            pytest.param(False, METHODS[name].config(kl_coef=0.1), id=name)
            for name in ("tv-token", "cispo-geometric", "quadratic-product", "soft-centered")
        ),
    ],
)
def test_compile(kernel, masked, inplace, config):
    """One graph; the reference counts the rows of a mask, which no graph can."""
    if kernel.interpreted:
        pytest.skip("what is compiled around interpreted kernels is no different")
    torch._dynamo.reset()
    compiled = in_one_graph(step)
    for seed, (rows, length) in enumerate([(3, 17), (4, 23)]):
        case = draw(kernel, seed, rows, length)
        # Comparisons of NaN fail.
        case.logits = torch.where(case.mask[..., None], case.logits, 0.0).requires_grad_()
        args = case.arguments(masked)
        results = []
        for function in (compiled, step):
            loss, metrics = function(case, args, kernel.backend, inplace, config)
            results.append((loss, metrics, *torch.autograd.grad(loss, case.logits)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
