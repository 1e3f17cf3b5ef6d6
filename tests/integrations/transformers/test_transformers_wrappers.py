"""A patched causal LM under what trainers put around models: hooks, DDP, FSDP2, PEFT, Trainer."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import transformers
from tiny_models import (
    CONFIG,
    LENGTH,
    ON_BACKENDS,
    ROWS,
    VOCAB,
    WIDTH,
    Batch,
    assert_same,
    fused_batch,
    gradients,
    make,
    old_and_ref,
    unfused_loss,
)

from steppo_kernels import StepLayout, broadcast_to_tokens
from steppo_kernels.integrations.transformers import (
    LogProbBatch,
    StepPOBatch,
    StepPOCausalLMOutput,
    patch_lm_head,
)


@pytest.mark.parametrize("mode", ["loss", "log_probs"])
def test_hooks_run(mode: str) -> None:
    model, batch = make("llama"), Batch()
    patch_lm_head(model)
    seen: list[str] = []
    modules = {"model": model, "layer": model.model.layers[0], "head": model.lm_head}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: seen.append(f"after {name}"))
    for name in ("layer", "head"):
        modules[name].register_full_backward_hook(lambda *_, n=name: seen.append(f"back {n}"))
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    if mode == "loss":
        out = model(**batch.inputs, steppo=StepPOBatch(None, batch.advantages, batch.layout))
        out.loss.backward()
    else:
        out = model(**batch.inputs, steppo=LogProbBatch(batch.layout))
        out.log_probs.sum().backward()
    assert [name for name in seen if isinstance(name, tuple)] == [(ROWS, LENGTH, WIDTH)]
    assert [name for name in seen if isinstance(name, str)] == [
        "before model",
        "before layer",
        "after layer",
        "before head",
        "after head",
        "after model",
        "back head",
        "back layer",
    ]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = make("qwen2"), Batch()
    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    model(**batch.inputs, steppo=request).loss.backward()
    expected = gradients(model)
    runs = []
    # The hook is of a module in the layer: hooks of the layer itself may stay outside.
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    # transformers has called it gradient checkpointing, too.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**batch.inputs, steppo=request).loss.backward()
    assert len(runs) == 2
    assert_same(gradients(model), expected, 1e-12)


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    distributed = torch.distributed
    if not worlds.is_possible():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, model.lm_head, model):
        fully_shard(module, mesh=mesh)
    return model


WRAPPERS = {
    "ddp": ddp(),
    "ddp static graph": ddp(static_graph=True),
    "ddp unused": ddp(find_unused_parameters=True),
    "fsdp2": fsdp2,
}


@pytest.mark.parametrize("mode", ["loss", "log_probs"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_data_parallel(wrapper: str, mode: str) -> None:
    batch = Batch()

    def run(model: nn.Module) -> None:
        if mode == "loss":
            request = StepPOBatch(None, batch.advantages, batch.layout)
            model(**batch.inputs, steppo=request).loss.backward()
        else:
            out = model(**batch.inputs, steppo=LogProbBatch(batch.layout))
            out.log_probs.square().sum().backward()

    model = make("llama")
    patch_lm_head(model)
    run(model)
    expected = gradients(model)
    wrapped = WRAPPERS[wrapper](model)
    for _ in range(2):
        wrapped.zero_grad()
        run(wrapped)
    found = {
        name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
        for name, p in wrapped.named_parameters()
    }
    assert_same(found, expected, 1e-12)


RANKS = 2
# What is to be wrapped on its own: a tied head is with the embedding.
OF_FAMILY = {"llama": True, "qwen2": False, "granite": True}


def on_a_rank(rank: int, rendezvous: str) -> None:
    """Compare the reduced gradients of one of the ranks with the mean of those of plain models."""
    from datetime import timedelta

    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    # A rank whose neighbour failed waits no longer than this.
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=30),
    )
    batch = Batch()
    advantages = batch.advantages * (1 - 3 * rank) + rank
    weights = torch.randn(
        ROWS, LENGTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
    )

    def run(model: nn.Module, mode: str) -> None:
        if mode == "loss":
            request: Any = StepPOBatch(
                batch.old_noise - 4,
                advantages,
                batch.layout,
                config=CONFIG,
                ref_log_probs=batch.ref_noise - 4,
            )
            model(**batch.inputs, steppo=request).loss.backward()
        else:
            out = model(**batch.inputs, steppo=LogProbBatch(batch.layout))
            (out.log_probs * weights).sum().backward()

    for family, mode in itertools.product(OF_FAMILY, ("loss", "log_probs")):
        models = [make(family) for _ in range(3)]
        for model in models:
            patch_lm_head(model)
        plain, replicated, sharded = models
        run(plain, mode)
        own = gradients(plain)
        expected = {name: grad.clone() for name, grad in own.items()}
        for name, grad in expected.items():
            distributed.all_reduce(grad)
            grad /= RANKS
            # Else it would not show if nothing was reduced.
            assert float((grad - own[name]).abs().max()) > 1e-3 * float(grad.abs().max()), name
        mesh = init_device_mesh("cpu", (RANKS,))
        for module in (*sharded.model.layers, *[sharded.lm_head] * OF_FAMILY[family], sharded):
            fully_shard(module, mesh=mesh)
        for wrapped in (sharded, nn.parallel.DistributedDataParallel(replicated)):
            # The second backward is of gathered weights that were freed after the first.
            for _ in range(2):
                wrapped.zero_grad()
                run(wrapped, mode)
            found = {
                name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
                for name, p in wrapped.named_parameters()
            }
            assert_same(found, expected, 1e-10)
    distributed.destroy_process_group()
    # Not through Python's own exit: a thread of gloo that still holds tensors of FSDP2 then now
    # and again ends the process with SIGABRT or SIGSEGV, in programs without this package too.
    os._exit(0)


def test_two_ranks_reduce_gradients(tmp_path: Any) -> None:
    """The batches of the ranks differ: with one rank alone, a missing sum shows nowhere."""
    worlds.spawn(on_a_rank, tmp_path, RANKS)


@pytest.mark.parametrize("first", ["patch", "hooks"])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_accelerate_hooks_stay_around_the_head(family: str, first: str) -> None:
    """Its offloading keeps weights elsewhere and brings them in around each module's forward."""
    accelerate = pytest.importorskip("accelerate", reason="the demo's extra is not installed")
    model, batch = make(family, torch.float32), Batch(torch.float32)
    patch = patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    with torch.no_grad():
        expected = model(**batch.inputs, steppo=request).log_probs
        plain = model(**batch.inputs).logits
        # What was measured is forgotten: the head is to be called again.
        patch.remove()
        if first == "patch":
            patch = patch_lm_head(model)
        accelerate.cpu_offload(model.lm_head, execution_device=torch.device("cpu"))
        assert model.lm_head.weight.is_meta
        if first == "hooks":
            patch = patch_lm_head(model)
        for _ in range(2):
            got = model(**batch.inputs, steppo=request).log_probs
            torch.testing.assert_close(got, expected)
        assert torch.equal(model(**batch.inputs).logits, plain)
        patch.remove()
        assert torch.equal(model(**batch.inputs).logits, plain)
        accelerate.hooks.remove_hook_from_module(model.lm_head)
        assert torch.equal(model(**batch.inputs).logits, plain)


def test_accelerate_mixed_precision_wrapper() -> None:
    operations = pytest.importorskip(
        "accelerate.utils.operations", reason="the demo's extra is not installed"
    )
    model, batch = make("llama", torch.float32), Batch(torch.float32)
    handle = patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    expected = model(**batch.inputs, steppo=request)
    model.forward = operations.convert_outputs_to_fp32(model.forward)
    out = model(**batch.inputs, steppo=request)
    assert isinstance(out, StepPOCausalLMOutput)
    torch.testing.assert_close(out.loss, expected.loss)
    with pytest.raises(RuntimeError, match="forward: was replaced"):
        handle.remove()


def test_accelerate_unwraps() -> None:
    """Its mixed precision replaces the forward, and puts back a method that it makes anew."""
    accelerate = pytest.importorskip("accelerate", reason="the demo's extra is not installed")
    model, batch = make("llama", torch.float32), Batch(torch.float32)
    handle = patch_lm_head(model)
    request = StepPOBatch(batch.old_noise - 4, batch.advantages, batch.layout)
    expected = model(**batch.inputs, steppo=request).loss
    # One of the process, which a Trainer may have left behind.
    forget = accelerate.state.AcceleratorState._reset_state
    forget(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    try:
        prepared = accelerator.prepare(model)
        assert "steppo" in inspect.signature(prepared.forward).parameters
        assert prepared(**batch.inputs, steppo=request).loss != expected
        assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    finally:
        forget(reset_partial_state=True)
    torch.testing.assert_close(model(**batch.inputs, steppo=request).loss, expected)
    handle.remove()
    assert "forward" not in model.__dict__


def test_wrappers_leave_the_batch_alone() -> None:
    """FSDP casts what it finds in arguments: old log-probs in bf16 would be no log-probs."""
    from torch.distributed.utils import _apply_to_tensors
    from torch.utils._pytree import tree_map_only

    batch = Batch(torch.float32)
    for request in (
        StepPOBatch(batch.old_noise, batch.advantages, batch.layout),
        LogProbBatch(batch.layout),
    ):
        arguments = {"steppo": request}
        cast = _apply_to_tensors(lambda tensor: tensor.bfloat16(), arguments)
        assert cast["steppo"] is request
        assert tree_map_only(Tensor, lambda tensor: tensor.bfloat16(), cast)["steppo"] is request
    assert batch.old_noise.dtype == torch.float32


@pytest.mark.parametrize("what", ["layers", "model"])
def test_compiled(what: str) -> None:
    model, batch = make("llama"), Batch()
    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    model(**batch.inputs, steppo=request).loss.backward()
    expected = gradients(model)
    called: Any = model
    if what == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    else:
        called = torch.compile(model, backend="eager")
    for _ in range(2):
        called(**batch.inputs, steppo=request).loss.backward()
        assert_same(gradients(model), expected, 1e-9)
    assert called(**batch.inputs).logits.shape == (ROWS, LENGTH, VOCAB)


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        batch = self.batch
        return {
            "input_ids": batch.ids[row],
            "attention_mask": batch.attention[row],
            "action_mask": batch.mask[row],
            "old_log_probs": batch.old_noise[row],
            "advantages": broadcast_to_tokens(batch.advantages, batch.layout)[row],
        }


class _Trainer(transformers.Trainer):
    """A subclass whose loss is that of the patched model."""

    normalizer = 1.0

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        layout = StepLayout.from_mask(inputs.pop("action_mask"))
        old, advantages = inputs.pop("old_log_probs"), inputs.pop("advantages")
        out = model(
            **inputs,
            steppo=StepPOBatch(
                old,
                advantages,
                layout,
                normalizer=self.normalizer / self.args.gradient_accumulation_steps,
            ),
        )
        return (out.loss, out) if return_outputs else out.loss


def test_a_trainer_that_accumulates_gradients(tmp_path: Any) -> None:
    pytest.importorskip("accelerate", reason="the demo's extra is not installed")
    model, batch = make(dtype=torch.float32), Batch(torch.float32)
    patch_lm_head(model)
    whole = StepPOBatch(batch.old_noise, batch.advantages, batch.layout)
    model(**batch.inputs, steppo=whole).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    seen: dict[str, Tensor] = {}

    class Look(transformers.TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.update({name: value.grad.clone() for name, value in model.named_parameters()})

    trainer = _Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ROWS,
            max_steps=1,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=_Rows(batch),
        callbacks=[Look()],
    )
    trainer.normalizer = float(batch.layout.reduction_weights("step_mean")[1])
    trainer.train()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-4, atol=1e-6)


# PEFT


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed")


@ON_BACKENDS
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_lora(peft: Any, first: str, backend: str) -> None:
    model, batch = make("llama"), Batch()
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if first == "patch":
        patch_lm_head(model)
        model = peft.get_peft_model(model, adapter)
    else:
        model = peft.get_peft_model(model, adapter)
        patch_lm_head(model)
    model.double()
    values = old_and_ref(model, batch)
    expected_loss = unfused_loss(model, batch, values)
    expected = gradients(model)
    assert expected
    assert all("lora" in name for name in expected)
    out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend))
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model), expected, 1e-6)


@pytest.mark.parametrize(
    "where", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_adapters_on_the_head_are_refused(peft: Any, where: dict[str, Any]) -> None:
    batch = Batch()
    adapter = peft.LoraConfig(**{"target_modules": ["q_proj"], **where})
    model = peft.get_peft_model(make("llama"), adapter)
    with pytest.raises(TypeError, match=r"adapters on the head .* would be left out"):
        patch_lm_head(model)
    model = make("llama")
    patch_lm_head(model)
    model = peft.get_peft_model(model, adapter)
    with pytest.raises(TypeError, match=r"adapters on the head .* would be left out"):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))
