"""A layout is what it was when it was built: whatever happens to what a caller holds."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle

import pytest
import torch
from torch.utils.data import default_collate

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    linear_steppo_loss,
    step_gae,
    step_value_loss,
    steppo_loss,
    steppo_loss_from_logits,
)

_CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.2)


def inputs(device: str) -> dict[str, tuple]:
    """Arguments of every constructor, each tensor in the dtype that needs no conversion."""

    def at(*values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype, device=device)

    mask = at(1, 1, 0, 1, 1, 0, 1, 1, dtype=torch.bool)
    rows = mask.view(4, 2).clone()
    return {
        "from_mask": (mask,),
        "from_mask packed": (mask, at(0, 3, 8), mask.clone()),
        "from_step_ids": (at(0, 0, -1, 1, 2, -1, 3, 3), at(0, 4, 8)),
        "from_rows": (rows, at(0, 0, 1, 1), at(0, 1, 0, 1), torch.ones_like(rows[:, 0])),
        "from_markers": (at(7, 1, 1, 9, 7, 2, 9, 3), at(7), at(9), at(8), mask, at(0, 8)),
    }


def build(name: str, given: tuple, backend: str) -> StepLayout:
    if name.startswith("from_mask"):
        options = dict(zip(("cu_seqlens", "boundaries"), given[1:], strict=False))
        return StepLayout.from_mask(given[0], **options, backend=backend)
    if name == "from_step_ids":
        return StepLayout.from_step_ids(given[0], cu_seqlens=given[1], backend=backend)
    if name == "from_rows":
        return StepLayout.from_rows(*given[:3], valid=given[3], backend=backend)
    ids, start, end, stop, valid, rows = given
    return StepLayout.from_markers(
        ids, start, end, stop=stop, valid=valid, cu_seqlens=rows, backend=backend
    )


def garbage(tensor: torch.Tensor) -> None:
    tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(2**40)


def held(layout: StepLayout) -> dict[str, list]:
    return {name: value.tolist() for name, value in layout.tensors().items()}


def calls(layout: StepLayout, backend: str) -> dict[str, object]:
    """Every function that is given a layout."""
    device, shape, steps = layout.device, layout.shape, layout.num_steps

    def tokens(*last):
        return torch.linspace(-1.0, -0.1, shape.numel(), device=device).view(*shape, *last)

    per_step = torch.linspace(-1.0, 1.0, steps, device=device)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    weight = torch.ones((3, 1), device=device)
    two = torch.stack((tokens(), -tokens()), -1)
    return {
        "steppo_loss": lambda: (
            steppo_loss(tokens(), None, per_step, layout, config=_CONFIG, backend=backend).loss
        ),
        "from_logits": lambda: (
            steppo_loss_from_logits(
                two, ids, None, per_step, layout, config=_CONFIG, backend=backend
            ).loss
        ),
        "linear_steppo_loss": lambda: (
            linear_steppo_loss(
                tokens(1), weight, ids, None, per_step, layout, config=_CONFIG, backend=backend
            ).loss
        ),
        "step_value_loss": lambda: (
            step_value_loss(tokens(), per_step, layout, backend=backend).loss
        ),
        "step_gae": lambda: step_gae(tokens(), tokens(), layout, backend=backend).advantages,
        "broadcast_to_tokens": lambda: broadcast_to_tokens(per_step, layout, backend=backend),
        "per_token": lambda: layout.per_token().step_ids,
        "per_trajectory": lambda: layout.per_trajectory().step_ids,
        "keep": lambda: layout.keep(torch.ones(shape, device=device)).step_ids,
        "to": lambda: layout.to(device).step_ids,
        "reduction_weights": lambda: layout.reduction_weights("token_mean")[0],
    }


@pytest.mark.parametrize("name", inputs("cpu"))
def test_what_a_layout_was_built_from_may_be_overwritten(target, name):
    given = inputs(target.device)[name]
    layout = build(name, given, target.backend)
    views = [layout, layout.per_token(), layout.per_trajectory()]
    before = [held(view) for view in views]
    for tensor in given:
        garbage(tensor)
    assert [held(view) for view in views] == before
    fresh = build(name, inputs(target.device)[name], target.backend)
    assert held(fresh) == before[0]


@pytest.mark.parametrize("name", ["step_ids", "token_index", "step_offsets", "row_offsets"])
@pytest.mark.parametrize("way", ["data", "numpy"])
def test_writes_that_nobody_counts_have_no_effect(name, way):
    layout = build("from_rows", inputs("cpu")["from_rows"], "auto")
    wanted = {call: run().clone() for call, run in calls(layout, "auto").items()}
    shown = getattr(layout, name)
    if way == "data":
        shown.data.fill_(2**30)
    else:
        shown.numpy().fill(2**30)
    for call, run in calls(layout, "auto").items():
        if (call, name) not in {("to", "step_ids")}:
            assert torch.equal(run(), wanted[call]), call


def test_writes_that_are_counted_raise_where_the_layout_enters(target):
    for name in StepLayout.from_mask(torch.ones(1, 2)).tensors():
        given = inputs(target.device)["from_rows"]
        layout = build("from_rows", given, target.backend)
        ready = calls(layout, target.backend)
        getattr(layout, name).fill_(2**30)
        for call, run in ready.items():
            with pytest.raises(ValueError, match=f"^layout: got .*{name}.*, expected"):
                run()
            assert call


def test_the_fields_of_a_layout_cannot_be_replaced():
    layout = build("from_mask", inputs("cpu")["from_mask"], "auto")
    for replace in (
        lambda name: setattr(layout, name, torch.zeros(0)),
        lambda name: object.__setattr__(layout, name, torch.zeros(0)),
        lambda name: delattr(layout, name),
    ):
        for name in layout.tensors():
            with pytest.raises(dataclasses.FrozenInstanceError, match=name):
                replace(name)
    with pytest.raises(TypeError, match=r"^StepLayout: got a call, expected one of its constr"):
        StepLayout(**layout.tensors())
    with pytest.raises(TypeError):
        dataclasses.replace(layout, step_ids=layout.step_ids)
    with pytest.raises(TypeError, match=r"^layout: got a StepLayout that no constructor made"):
        broadcast_to_tokens(torch.ones(1), object.__new__(StepLayout))


def test_copies_that_are_shown_are_those_of_one_layout():
    layout = build("from_mask", inputs("cpu")["from_mask"], "auto")
    assert layout.token_index is layout.token_index
    again = copy.copy(layout)
    layout.token_index.zero_()
    assert again.token_index.tolist() == [0, 1, 3, 4, 6, 7]
    assert layout.per_token is not None
    with pytest.raises(ValueError, match=r"^layout: "):
        layout.per_token()
    del layout
    gc.collect()
    assert again.per_token().num_steps == 6


def test_layouts_of_inference_mode_are_as_others(target):
    given = inputs(target.device)["from_rows"]
    with torch.inference_mode():
        made = inputs(target.device)["from_rows"]
        layout = build("from_rows", made, target.backend)
        views = [
            layout,
            layout.per_token(),
            layout.per_trajectory(),
            layout.keep(torch.ones(layout.shape, device=target.device)),
            pickle.loads(pickle.dumps(layout)),
            layout.to(target.device),
        ]
        assert not layout.step_ids.is_inference()
    assert held(layout) == held(build("from_rows", given, target.backend))
    for view in views:
        assert not any(value.is_inference() for value in view.tensors().values())
        values = torch.ones(view.shape, device=target.device, requires_grad=True)
        returns = torch.zeros(view.num_steps, device=target.device)
        step_value_loss(values, returns, view, backend=target.backend).loss.backward()
        assert values.grad is not None


def test_what_a_layout_makes_in_inference_mode_serves_training(target):
    """It keeps which tokens are actions from the first loss that asks."""

    def loss_of(logits, layout):
        ids = torch.zeros(layout.shape, dtype=torch.int64, device=target.device)
        advantages = torch.ones(layout.num_steps, device=target.device)
        return steppo_loss_from_logits(
            logits, ids, None, advantages, layout, backend=target.backend
        ).loss

    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]], device=target.device)
    layout = StepLayout.from_mask(mask, backend="reference")
    with torch.inference_mode():
        before = loss_of(torch.zeros((2, 4, 3), device=target.device), layout)
    kept = layout._held.is_action()
    assert kept is layout._held.is_action()
    assert kept.tolist() == mask.flatten().bool().tolist()
    logits = torch.zeros((2, 4, 3), device=target.device, requires_grad=True)
    loss = loss_of(logits, layout)
    loss.backward()
    assert torch.equal(loss, before)
    assert torch.equal(logits.grad.any(-1), mask.bool())


def test_to_takes_devices_alone():
    layout = StepLayout.from_mask(torch.ones(1, 2))
    for device in ("cpu", torch.device("cpu")):
        assert layout.to(device) is layout
        assert layout.to(device=device, non_blocking=True) is layout
    meta = layout.to("meta")
    assert meta.device.type == "meta"
    assert meta.to("meta") is meta
    for wrong, got in (
        (torch.float32, "torch.float32"),
        (torch.int64, "torch.int64"),
        (None, "NoneType"),
        (torch.ones(1), "Tensor"),
        (True, "bool"),
        (1.0, "float"),
    ):
        with pytest.raises(TypeError, match=f"^device: got {got}, expected a device"):
            layout.to(wrong)
    for unknown in ("nowhere", 2**63):
        with pytest.raises(ValueError, match=f"^device: got {unknown!r}, expected a device"):
            layout.to(unknown)
    with pytest.raises(TypeError, match=r"^non_blocking: got dtype, expected a bool"):
        layout.to("cpu", torch.float32)
    with pytest.raises(TypeError, match="dtype"):
        layout.to(dtype=torch.float32)


def test_layouts_are_not_collated():
    layout = StepLayout.from_mask(torch.ones(1, 2))
    for batch in ([layout, layout], [{"layout": layout, "x": 1}, {"layout": layout, "x": 2}]):
        with pytest.raises(TypeError, match=r"^default_collate: got 2 StepLayouts, expected what"):
            default_collate(batch)
