"""An output head whose rows are split over the ranks of a tensor-parallel group.

`parallelize_module` of torch, and transformers' `tp_plan`, put hooks around the head: the hidden
states come as a DTensor, the weight is one that is placed as ``Shard(0)``, and the hook behind it
wants a DTensor of logits. transformers computes without gradients on the parts themselves instead.
FSDP has gathered what it shards by then: a DTensor in the forward is one of tensor parallelism.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...log_probs.vocabulary_shard import check_mesh, first_row, local_hidden, local_rows
from ...ranks import Ranks

_HEAD = "model: the weight of its output head"


class Part(NamedTuple):
    """What this rank has of a head, from within the forward of that.

    Attributes:
        weight, bias: its rows, as plain tensors.
        vocabulary: how many rows all ranks have together.
        mesh: the ranks that hooks of the head work on; None where the head is a plain one.
        ranks: those that the rows are split over; None where this rank has all.
        start: the first of its rows.
    """

    weight: Tensor
    bias: Tensor | None
    vocabulary: int
    mesh: Any = None
    ranks: Ranks | None = None
    start: int | None = None

    @property
    def tp_group(self) -> Any:
        """The group that the functions are given as theirs."""
        return None if self.ranks is None else self.ranks.group

    @property
    def is_one_of_several(self) -> bool:
        """Whether no rank has all rows."""
        # Rows lie in equal parts, but for the last ranks. Of a single one, a rank has all.
        return self.ranks is not None and self.ranks.size > 1 and self.vocabulary > 1

    def cut(self, width: int | None) -> Part:
        """Return the part of a head that has the first `width` rows alone."""
        if width is None:
            return self
        start = self.start or 0
        rows = min(max(width - start, 0), len(self.weight))
        return self._replace(
            weight=self.weight[:rows],
            bias=None if self.bias is None else self.bias[:rows],
            vocabulary=width,
            start=None if self.start is None else min(start, width),
        )

    def plain(self, hidden: Any) -> Tensor:
        """Return hidden states that all ranks have as a plain tensor.

        Raises:
            ValueError: they are a DTensor of another kind.
        """
        name = "model: the input of its output head"
        if self.mesh is None:
            if hasattr(hidden, "full_tensor"):
                raise ValueError(
                    f"{name}: got a DTensor with a weight that is none, expected a plain tensor"
                )
            return hidden  # type: ignore[no-any-return]
        found: Tensor = local_hidden(name, hidden, self.ranks or _ranks_of(self.mesh))
        # What is on its way from another rank waits in a tensor of another kind.
        return found if type(found) in (Tensor, nn.Parameter) else found.clone()

    def as_logits(self, whole: Tensor) -> Tensor:
        """Return logits that all ranks have in the form that the hooks of the head take."""
        if self.mesh is None:
            return whole
        from torch.distributed.tensor import DTensor, Replicate

        # It needs no word between ranks to become any part of it.
        placed: Tensor = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return placed

    def is_own(self, logits: Any) -> bool:
        """Return whether logits are those of this rank's rows, or a DTensor of which it has some.

        All ranks find the same of what hooks of the head return, unless there are as many as this
        rank's rows of those that all ranks have.
        """
        if hasattr(logits, "full_tensor"):
            return not all(placement.is_replicate() for placement in logits.placements)
        return (
            isinstance(logits, Tensor)
            and self.is_one_of_several
            and logits.dim() > 0
            and logits.shape[-1] == len(self.weight)
        )

    def gathered(self, logits: Any) -> Tensor:
        """Return all logits where `is_own` holds on all ranks: one collective."""
        from torch.distributed.tensor import DTensor, Shard

        made = logits.detach()
        if not hasattr(made, "full_tensor"):
            shape = torch.Size((*made.shape[:-1], self.vocabulary))
            stride = torch.empty(shape, dtype=made.dtype, device="meta").stride()
            placed = [Shard(made.dim() - 1)]
            made = DTensor.from_local(
                made, self.mesh, placed, run_check=False, shape=shape, stride=stride
            )
        whole: Tensor = made.full_tensor()
        return whole


def part_of(head: nn.Linear, mesh: Any) -> Part:
    """Return what this rank has of a head, from within its forward.

    `mesh` is that of the ranks whose hooks surround the head, where that is known from elsewhere.

    Raises:
        TypeError, ValueError: naming the model.
    """
    weight: Any = head.weight
    bias: Any = head.bias
    _refuse_hidden_parts(head)
    if not hasattr(weight, "full_tensor"):
        # Without gradients, transformers has put the parts in the place of the DTensors.
        if mesh is None or len(weight) == head.out_features:
            return Part(weight, bias, len(weight), mesh)
        mesh = mesh if mesh.ndim == 1 else mesh["tp"]
        ranks = _ranks_of(mesh)
        check_mesh(_HEAD, mesh, ranks)
        start = first_row(head.out_features, ranks)
        return Part(weight, bias, head.out_features, mesh, ranks, start)
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise TypeError(
            f"{_HEAD} is a DTensor over {mesh.ndim} dimensions of a mesh in its forward, expected "
            "one: that of tensor parallelism"
        )
    if all(placement.is_replicate() for placement in weight.placements):
        return Part(_replica(weight), _replica(bias), len(weight), mesh)
    ranks = _ranks_of(mesh)
    rows, first = local_rows(_HEAD, weight, ranks)
    bias, _ = local_rows("model: the bias of its output head", bias, ranks)
    return Part(rows, bias, len(weight), mesh, ranks, first)


def _replica(value: Any) -> Any:
    """Return a DTensor that every rank has whole, whose gradient they all have whole too."""
    is_placed = hasattr(value, "full_tensor")
    return value.to_local(grad_placements=value.placements) if is_placed else value


def local(tensor: Any) -> Tensor:
    """Return what this rank has of a DTensor; any other tensor is returned."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "full_tensor") else tensor
    return found


def _ranks_of(mesh: Any) -> Ranks:
    return Ranks.of("model", mesh)


def _refuse_hidden_parts(head: nn.Linear) -> None:
    """Raise for parts that do not show: releases of transformers from 5.0 on made such ones."""
    # It says there over which ranks it has split a module.
    mesh = getattr(head, "_hf_device_mesh", None)
    if mesh is not None and mesh.size() > 1 and not hasattr(head.weight, "full_tensor"):
        raise TypeError(
            f"{_HEAD} is a plain tensor that transformers has split over ranks, expected a DTensor "
            "as newer releases make it: upgrade transformers, or use parallelize_module of torch"
        )
