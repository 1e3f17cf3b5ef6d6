"""The arguments of the step objective that do not depend on where log-probs come from."""

from __future__ import annotations

import math
import sys
import warnings
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks
from ..backends.choice import resolve
from ..backends.records import Steps
from ..config import DEFAULT_CONFIG, KernelConfig, StepPOConfig
from ..layout.step_layout import StepLayout, require_layout
from ..layout.step_tensors import StepTensors


class Constants(NamedTuple):
    """What a loss takes besides log-probs and entropies: arguments of the operator `policy_loss`.

    Tensors are contiguous in the dtype of the computation, and have no graph.

    Attributes:
        old_log_probs, ref_log_probs: N entries in the order of the token shape.
        advantages, is_weights: N entries or ``[S]``, as the flag of each says.
        step_weights, clip_low, clip_high: ``[S]``.
        ratio_center, normalizer: 0-dim fp64.
        steps: None with a mask.
        config: the hyper-parameters.
    """

    old_log_probs: Tensor | None
    advantages: Tensor
    ref_log_probs: Tensor | None
    is_weights: Tensor | None
    step_weights: Tensor | None
    clip_low: Tensor | None
    clip_high: Tensor | None
    ratio_center: Tensor | None
    normalizer: Tensor | None
    steps: Steps | None
    config: KernelConfig
    advantages_per_token: bool
    is_weights_per_token: bool


class LossInputs(NamedTuple):
    """Checked arguments.

    Attributes:
        backend: the one that runs.
        shape, device, dtype: the token shape, and where and in what to compute.
        layout, mask: what was given; one of them is None. A mask may have any byte but 0 where it
            is True (`checks.ones_of`).
        config: as it was given.
        constants: the tensors.
    """

    backend: str
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    layout: StepTensors | None
    mask: Tensor | None
    config: StepPOConfig
    constants: Constants

    @property
    def adds_up(self) -> bool:
        """Whether the loss is a part of a whole, which adds up with other parts."""
        return self.constants.normalizer is not None or self.config.reduction == "sum"


def check_loss_inputs(
    name: str,
    values: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    layout: StepLayout | Tensor,
    config: StepPOConfig,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    step_weights: Tensor | None,
    normalizer: float | Tensor | None,
    ratio_center: float | Tensor | None,
    clip_low: Tensor | None,
    clip_high: Tensor | None,
    backend: str,
) -> tuple[Tensor, LossInputs]:
    """Return `values`, the argument `name` that a loss is taken of, and the others, all checked."""
    if not isinstance(config, StepPOConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a StepPOConfig")
    mask: Tensor | None = None
    held: StepTensors | None = None
    if isinstance(layout, Tensor):
        mask = checks.flags("layout", layout, (1, 2), wait=False, any_byte=True)
        mask = mask if mask.is_contiguous() else mask.contiguous()
        num_steps, shape, device = None, mask.shape, mask.device
    elif not isinstance(layout, StepLayout):
        kind = type(layout).__name__
        raise TypeError(f"layout: got {kind}, expected a StepLayout or a mask, a torch.Tensor")
    else:
        held = require_layout(layout)
        num_steps, shape, device = held.num_steps, held.shape, held.device
    values = checks.floating(name, values, device, saved=False)
    dtype = checks.compute_dtype(values)
    chosen = resolve(backend, device)
    if old_log_probs is not None:
        own = values if name == "log_probs" else None
        _warn_of_rounding(own, old_log_probs, config, clip_low, clip_high)
        if clip_low is None and clip_high is None:
            _warn_of_single_tokens(config, held)
        old_log_probs = checks.tokens("old_log_probs", old_log_probs, shape, device, dtype)
        old_log_probs = checks.constant(old_log_probs)
    if ref_log_probs is not None:
        ref_log_probs = checks.tokens("ref_log_probs", ref_log_probs, shape, device, dtype)
        ref_log_probs = checks.constant(ref_log_probs)
    elif config.kl_coef != 0:
        raise ValueError("ref_log_probs: got None, expected a tensor, as config.kl_coef is not 0")
    advantages, by_token = _per_step_or_token(
        "advantages", advantages, num_steps, shape, device, dtype
    )
    weights_by_token = False
    if is_weights is not None:
        is_weights, weights_by_token = _per_step_or_token(
            "is_weights", is_weights, num_steps, shape, device, dtype
        )
        is_weights = checks.constant(is_weights)
    if step_weights is not None:
        step_weights = _per_step("step_weights", step_weights, held, dtype)
    if clip_low is not None or clip_high is not None:
        clip_low = _bounds("clip_low", clip_low, 1.0, held, config, dtype)
        clip_high = _bounds("clip_high", clip_high, math.inf, held, config, dtype)
    if ratio_center is not None:
        ratio_center = checks.scalar("ratio_center", ratio_center, device)
    if old_log_probs is None and config.ratio == "centered":
        # On-policy every ratio is 1, whatever the center of an earlier batch was.
        ratio_center = checks.scalar("ratio_center", 0.0, device)
    if normalizer is not None:
        is_empty = held is not None and held.num_tokens == 0
        normalizer = checks.normalizer(normalizer, device, is_empty)
    constants = Constants(
        old_log_probs,
        checks.constant(advantages),
        ref_log_probs,
        is_weights,
        step_weights,
        clip_low,
        clip_high,
        ratio_center,
        normalizer,
        None if held is None else held.steps,
        config.kernel,
        by_token,
        weights_by_token,
    )
    return values, LossInputs(chosen, shape, device, dtype, held, mask, config, constants)


def _warn_of_rounding(
    log_probs: Tensor | None,
    old_log_probs: Tensor,
    config: StepPOConfig,
    clip_low: Tensor | None,
    clip_high: Tensor | None,
) -> None:
    """Warn of log-probs that are rounded by more than what clips a ratio."""
    rounded = []
    if log_probs is not None and log_probs.dtype in checks.HALF_DTYPES:
        rounded.append(("log_probs", log_probs.dtype))
    if isinstance(old_log_probs, Tensor) and old_log_probs.dtype in checks.HALF_DTYPES:
        rounded.append(("old_log_probs", old_log_probs.dtype))
    if not rounded or config.surrogate == "soft" or is_compiling():
        return
    # Bounds of steps may lie on a GPU. A bound of 0 leaves no range.
    bounds = {"clip_low": config.clip_low} if clip_low is None else {}
    bounds |= {"clip_high": config.clip_high} if clip_high is None else {}
    narrow, bound = min(
        ((name, bound) for name, bound in bounds.items() if bound > 0),
        key=lambda one: one[1],
        default=("", math.inf),
    )
    for name, dtype in rounded:
        error = torch.finfo(dtype).eps / 2
        if bound < error:
            warnings.warn(
                f"{name}: got {dtype} with {narrow}={bound:g}, expected float32: it rounds a "
                f"log-prob between -1 and -2 by up to {error:.2g}, so that rounding decides what "
                "is clipped. Keep log-probs in float32 from the logits on, as token_log_probs and "
                "the losses from logits and hidden states do, or widen the clip range",
                stacklevel=_level_of_the_caller(),
            )


# What the default clip range does to single tokens whose log-ratios are about 0.001. "cispo" bounds
# the weight of a gradient alone, and "soft" has no range.
_LEAVES = "leaves a quarter of all tokens or more without a gradient"
_OF_SINGLE_TOKENS = {
    "clip": _LEAVES,
    "mask": _LEAVES,
    "tv": _LEAVES,
    "quadratic": "pulls tokens back harder than their advantages push them",
}


def _warn_of_single_tokens(config: StepPOConfig, held: StepTensors | None) -> None:
    """Warn of ratios of single tokens with the clip range of means over steps."""
    bounds = config.clip_low, config.clip_high
    if bounds != (DEFAULT_CONFIG.clip_low, DEFAULT_CONFIG.clip_high) or is_compiling():
        return
    # How many tokens each step has is not looked at: that would wait for a GPU.
    what = "ratio='token'" if config.ratio == "token" else ""
    if not what and held is not None and held.num_steps == held.num_tokens > 1:
        what = "as many steps as tokens"
    if what and (does := _OF_SINGLE_TOKENS.get(config.surrogate)):
        warnings.warn(
            f"config: got {what} with the default clip range {bounds}, expected one for single "
            "tokens, such as clip_low=0.2, clip_high=0.2: the default is for the mean over a step, "
            f"and {does} where their log-ratios are about 0.001",
            stacklevel=_level_of_the_caller(),
        )


def _level_of_the_caller() -> int:
    """Return the `stacklevel` of a warning that stands at the line that called the package."""
    own, level = f"{__name__.partition('.')[0]}.", 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(own):
        frame, level = frame.f_back, level + 1
    return level


def _per_step_or_token(
    name: str,
    value: object,
    num_steps: int | None,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, bool]:
    """Return numbers of steps or of tokens; a mask (no `num_steps`) takes those of tokens alone."""
    if ready := checks.ready_steps_or_tokens(value, num_steps, shape, device, dtype):
        return ready
    value = checks.floating(name, value, device)
    found = value.shape
    if num_steps is None and found.numel() != shape.numel():
        raise ValueError(
            f"{name}: got shape {tuple(found)} with a mask, expected the token shape "
            f"{tuple(shape)}; one of a step goes with a layout, StepLayout.from_mask(mask)"
        )
    if found == shape[:1] != (num_steps,) and found.numel() != shape.numel():
        raise ValueError(
            f"{name}: got shape {tuple(found)}, expected one entry per step {(num_steps,)} or "
            f"the token shape {tuple(shape)}; one of a row goes to its steps by x[layout.step_rows]"
        )
    return checks.steps_or_tokens(name, value, num_steps, shape, device, dtype)


def _per_step(name: str, value: Tensor, held: StepTensors | None, dtype: torch.dtype) -> Tensor:
    """Return a number per step; a mask tells nothing of the order of its steps."""
    if held is None:
        raise ValueError(f"{name}: got it with a mask, expected a StepLayout with it")
    return checks.constant(checks.vector(name, value, held.num_steps, "step", held.device, dtype))


def _bounds(
    name: str,
    value: Tensor | None,
    most: float,
    held: StepTensors | None,
    config: StepPOConfig,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return bounds of the steps, looked at where that costs no wait."""
    if value is None:
        return None
    if config.surrogate == "soft":
        raise ValueError(f"{name}: got it with the surrogate 'soft', expected one with bounds")
    given = _per_step(name, value, held, dtype)
    assert held is not None
    if given.device.type == "cpu" and not is_compiling() and len(given):
        divides = config.surrogate == "quadratic"
        least, largest = (float(end) for end in torch.aminmax(given))
        # A NaN is neither. Only bounds of empty steps may be anything.
        if not ((least > 0 if divides else least >= 0) and largest <= most and largest < math.inf):
            good = (given > 0 if divides else given >= 0) & (given <= most) & (given < math.inf)
            bad = ~good & (held.step_lengths > 0)
            if bool(bad.any()):
                above = "above 0" if divides else "of at least 0"
                raise ValueError(
                    f"{name}: got {given[bad][0].item()}, expected finite numbers {above}"
                    + (f", at most {most:g}" if most < math.inf else "")
                )
    return given


def check_entropy(entropy: Tensor | None, inputs: LossInputs) -> Tensor | None:
    """Return per-token entropies as they are, checked; they are needed if they have a weight."""
    if entropy is not None:
        return checks.token_count("entropy", entropy, inputs.shape, inputs.device)
    if inputs.config.entropy_coef != 0:
        raise ValueError("entropy: got None, expected a tensor, as config.entropy_coef is not 0")
    return None
