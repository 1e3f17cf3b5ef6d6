"""A patched causal LM against the same model with logits."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import transformers
from transformers import PreTrainedModel

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    backends,
    broadcast_to_tokens,
    steppo_loss,
)
from steppo_kernels.integrations.transformers import (
    LogProbBatch,
    StepPOBatch,
    StepPOCausalLMOutput,
    patch_lm_head,
)

ROWS, LENGTH, VOCAB, WIDTH = 3, 14, 53, 16
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    # Logits of a few units: softcaps and scales must show.
    "initializer_range": 0.4,
}
# Architecture, whether the head is the embedding, and settings of its own.
FAMILIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "qwen2": ("Qwen2", True, {}),
    "qwen3": ("Qwen3", False, {}),
    "llama": ("Llama", False, {}),
    "smollm2": ("Llama", True, {}),
    "mistral": ("Mistral", False, {"sliding_window": 6}),
    "gemma": ("Gemma", True, {}),
    "gemma2": (
        "Gemma2", True, {"final_logit_softcapping": 1.5, "attn_implementation": "eager"}
    ),
    "gemma3": ("Gemma3", True, {"final_logit_softcapping": 2.5, "sliding_window": 6}),
    "granite": ("Granite", False, {"logits_scaling": 3.0}),
    "cohere": ("Cohere", True, {"logit_scale": 0.3}),
    "phi": ("Phi", False, {}),
    "mixtral": (
        "Mixtral", False,
        {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
}  # fmt: skip
CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.05)


def make(family: str = "qwen2", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    name, tied, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(
        transformers, f"{name}Config"
    )
    torch.manual_seed(0)
    settings = {**_SIZES, "tie_word_embeddings": tied, "attn_implementation": "sdpa", **extra}
    model = getattr(transformers, f"{name}ForCausalLM")(config(**settings))
    if model.lm_head.bias is not None:
        nn.init.normal_(model.lm_head.bias)
    return model.to(dtype).train()


class Batch:
    """Right-padded rows of two or three steps, with an old and a reference policy nearby."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        random = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=random)
        self.attention = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        self.attention[1, 11:] = 0
        self.ids[self.attention == 0] = 0
        self.mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        for row, begin, end in ((0, 1, 4), (0, 6, 7), (0, 9, 14), (1, 3, 6), (1, 8, 11), (2, 2, 9)):
            self.mask[row, begin:end] = True
        self.layout = StepLayout.from_mask(self.mask, backend="reference")
        noise = torch.randn(2, ROWS, LENGTH, generator=random, dtype=torch.float64)
        self.old_noise, self.ref_noise = 0.4 * noise[0].to(dtype), 0.4 * noise[1].to(dtype)
        self.advantages = torch.randn(6, generator=random, dtype=torch.float64).to(dtype)
        self.inputs = {"input_ids": self.ids, "attention_mask": self.attention}


def unfused(model: Any, batch: Batch, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies at their tokens, from all logits."""
    if isinstance(temperature, Tensor):
        temperature = temperature[:, 1:, None]
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    every = torch.log_softmax(logits / temperature, dim=-1)
    chosen = every.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    entropy = -(every.exp() * every).sum(-1)
    first = torch.zeros_like(chosen[:, :1])
    found = (torch.cat((first, values), dim=1) for values in (chosen, entropy))
    chosen, entropy = (torch.where(batch.mask, values, 0.0) for values in found)
    return chosen, entropy


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name.removeprefix("module."): grad for name, grad in found.items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        worst = float((got[name] - grad).abs().max())
        assert worst <= tolerance * scale, f"{name}: off by {worst:.1e} of {scale:.1e}"


def old_and_ref(model: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        now = unfused(model, batch)[0]
    return {
        "old_log_probs": now + batch.old_noise,
        "ref_log_probs": now + batch.ref_noise,
        "advantages": batch.advantages,
    }


def unfused_loss(model: Any, batch: Batch, values: dict[str, Any], **more: Any) -> Tensor:
    log_probs, entropy = unfused(model, batch, more.pop("temperature", 1.0))
    out = steppo_loss(
        log_probs, layout=batch.layout, entropy=entropy, config=CONFIG, backend="reference",
        **values, **more,
    )  # fmt: skip
    out.loss.backward()
    return out.loss.detach()


def fused_batch(
    batch: Batch, values: dict[str, Any], layout: Any = None, **more: Any
) -> StepPOBatch:
    layout = batch.layout if layout is None else layout
    return StepPOBatch(layout=layout, config=CONFIG, **values, **more)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if why := backends.unavailable(request.param, torch.device("cpu")):
        pytest.skip(f"{request.param}: {why}")
    return request.param


# The numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str, dtype: torch.dtype, backend: str) -> None:
    model, batch = make(family, dtype), Batch(dtype)
    values = old_and_ref(model, batch)
    expected_loss = unfused_loss(model, batch, values)
    expected = gradients(model)
    with patch_lm_head(model):
        out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend))
        out.loss.backward()
    assert isinstance(out, StepPOCausalLMOutput)
    assert out.logits is None
    assert out.log_probs is None
    assert out.steppo.loss is out.loss
    metrics = out.steppo.metrics.as_dict()
    assert metrics["num_steps"] == 6
    assert 0 < metrics["clip_fraction"] < 1
    assert out.steppo.step_log_ratio.shape == (6,)
    # The fp64 models normalise in fp32.
    tolerance = 1e-6 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=tolerance, atol=tolerance)
    assert_same(gradients(model), expected, tolerance)


def test_the_settings_after_the_head_matter() -> None:
    """Else the families above would not show that they are honoured."""
    for family, name in (
        ("gemma2", "final_logit_softcapping"),
        ("gemma3", "final_logit_softcapping"),
        ("granite", "logits_scaling"),
        ("cohere", "logit_scale"),
    ):
        model, batch = make(family), Batch()
        with patch_lm_head(model), torch.no_grad():
            expected = unfused(model, batch)[0]
            bare = copy.copy(model.config)
            setattr(bare, name, None if "softcap" in name else 1.0)
            states = model.model(**batch.inputs, use_cache=False).last_hidden_state
            plain = torch.log_softmax(model.lm_head(states)[:, :-1], -1)
        plain = plain.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
        assert not torch.allclose(expected[:, 1:], plain.where(batch.mask[:, 1:], 0.0), rtol=0.1)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere"])
def test_log_probs_and_entropy(family: str, backend: str) -> None:
    model, batch = make(family), Batch()
    random = torch.Generator().manual_seed(2)
    temperature = 0.5 + torch.rand(ROWS, LENGTH, generator=random, dtype=torch.float64)
    weights = torch.randn(2, ROWS, LENGTH, generator=random, dtype=torch.float64)
    expected = unfused(model, batch, temperature)
    sum(w.mul(x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    expected_gradients = gradients(model)
    patch_lm_head(model)
    request = LogProbBatch(
        batch.layout, temperature=temperature, return_entropy=True, backend=backend
    )
    out = model(**batch.inputs, steppo=request)
    assert out.loss is None
    assert out.steppo is None
    for got, values in zip((out.log_probs, out.entropy), expected, strict=True):
        torch.testing.assert_close(got, values, rtol=1e-6, atol=1e-6)
        assert not got[~batch.mask].any()
    sum(
        w.mul(x).sum() for w, x in zip(weights, (out.log_probs, out.entropy), strict=True)
    ).backward()
    assert_same(gradients(model), expected_gradients, 1e-6)
    with torch.no_grad():
        again = model(**batch.inputs, steppo=LogProbBatch(batch.mask, backend=backend))
    assert not again.log_probs.requires_grad
    assert again.entropy is None


def test_a_gradient_of_the_entropy_alone(backend: str) -> None:
    model, batch = make(), Batch()
    unfused(model, batch)[1].sum().backward()
    expected = gradients(model)
    patch_lm_head(model)
    request = LogProbBatch(batch.layout, return_entropy=True, backend=backend)
    model(**batch.inputs, steppo=request).entropy.sum().backward()
    assert_same(gradients(model), expected, 1e-6)


def test_on_policy_loss_of_old_log_probs_is_the_loss_without(backend: str) -> None:
    """What the no-grad pass returns is what the loss takes: nothing is shifted in between."""
    model, batch = make(), Batch()
    patch_lm_head(model)
    with torch.no_grad():
        old = model(**batch.inputs, steppo=LogProbBatch(batch.layout, backend=backend)).log_probs
    losses = []
    for values in (old, None):
        request = StepPOBatch(values, batch.advantages, batch.layout, backend=backend)
        losses.append(model(**batch.inputs, steppo=request))
        assert losses[-1].steppo.metrics.as_dict()["approx_kl"] == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(losses[0].loss, losses[1].loss)


def test_what_is_given_per_token_is_at_its_token(backend: str) -> None:
    model, batch = make(), Batch()
    random = torch.Generator().manual_seed(3)
    values = old_and_ref(model, batch)
    weights = torch.rand(ROWS, LENGTH, generator=random, dtype=torch.float64)
    more = {"is_weights": weights, "step_weights": torch.rand(6, dtype=torch.float64),
            "normalizer": 5.0, "temperature": 0.7 + weights}  # fmt: skip
    expected_loss = unfused_loss(model, batch, values, **more)
    expected = gradients(model)
    patch_lm_head(model)
    # Garbage where no step begins: only the entry at a step's first token counts.
    by_token = torch.full((ROWS, LENGTH), torch.nan, dtype=torch.float64)
    first = batch.layout.token_index[batch.layout.step_offsets[:-1]]
    by_token.view(-1)[first] = values.pop("advantages")
    values["advantages"] = by_token
    out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend, **more))
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model), expected, 1e-6)


def test_a_mask_and_packed_rows(backend: str) -> None:
    """One packed row of [1, N] with positions of its own, its layout [N], is the padded batch."""
    model, batch = make("llama"), Batch()
    values = old_and_ref(model, batch)
    patch_lm_head(model)
    first = batch.layout.token_index[batch.layout.step_offsets[:-1]]
    by_token = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    by_token.view(-1)[first] = batch.advantages
    masked = fused_batch(batch, {**values, "advantages": by_token}, batch.mask, backend=backend)
    losses = [model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend)).loss,
              model(**batch.inputs, steppo=masked).loss]  # fmt: skip

    real = batch.attention.bool()
    lengths = real.sum(1)
    rows = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    layout = StepLayout.from_mask(batch.mask[real], cu_seqlens=rows, backend="reference")
    same_row = torch.repeat_interleave(torch.arange(ROWS), lengths)
    causal = (same_row[:, None] == same_row) & torch.ones(
        len(same_row), len(same_row)
    ).tril().bool()
    packed = {
        name: value if name == "advantages" else value[real] for name, value in values.items()
    }
    out = model(
        input_ids=batch.ids[real][None],
        position_ids=torch.cat([torch.arange(int(n)) for n in lengths])[None],
        attention_mask=causal[None, None],
        steppo=fused_batch(batch, packed, layout, backend=backend),
    )
    for loss in (*losses[1:], out.loss):
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-6)


def test_left_padding_and_masked_garbage(backend: str) -> None:
    model, batch = make("llama"), Batch()
    values = old_and_ref(model, batch)
    patch_lm_head(model)
    expected = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend)).loss
    pad = 3

    def moved(tensor: Tensor, fill: float) -> Tensor:
        return nn.functional.pad(tensor, (pad, 0), value=fill)

    attention = moved(batch.attention, 0)
    values = {
        name: value
        if name == "advantages"
        else moved(value.where(batch.mask, torch.nan), torch.nan)
        for name, value in values.items()
    }
    layout = StepLayout.from_mask(moved(batch.mask, False), backend="reference")
    out = model(
        input_ids=moved(batch.ids, 0),
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp_min(0),
        steppo=fused_batch(batch, values, layout, backend=backend),
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)
    out.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_a_batch_without_actions(backend: str) -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    nothing = torch.zeros_like(batch.mask)
    layout = StepLayout.from_mask(nothing, backend="reference")
    request = StepPOBatch(None, batch.advantages[:0], layout, backend=backend)
    out = model(**batch.inputs, steppo=request)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert not any(grad.any() for grad in gradients(model).values())


def test_frozen_head(backend: str) -> None:
    model, batch = make("qwen3"), Batch()
    values = old_and_ref(model, batch)
    model.lm_head.requires_grad_(False)
    unfused_loss(model, batch, values)
    expected = gradients(model)
    patch_lm_head(model)
    model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend)).loss.backward()
    assert_same(gradients(model), expected, 1e-6)


def test_autocast(backend: str) -> None:
    """As far from fp32 as the model with logits is."""
    model, batch = make("qwen2", torch.float32), Batch(torch.float32)
    values = old_and_ref(model, batch)
    exact_loss = unfused_loss(model, batch, values)
    exact = gradients(model)

    def error(loss: Tensor) -> tuple[float, float]:
        found = gradients(model)
        worst = max(float((found[name] - exact[name]).abs().max()) for name in exact)
        return abs(float(loss - exact_loss)), worst

    with torch.autocast("cpu", torch.bfloat16):
        allowed = error(unfused_loss(model, batch, values))
    patch_lm_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend))
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    for got, bound in zip(error(out.loss.detach()), allowed, strict=True):
        assert got <= 1.5 * bound


def test_bf16_weights(backend: str) -> None:
    model, batch = make("gemma2", torch.bfloat16), Batch(torch.float32)
    values = old_and_ref(model, batch)
    patch_lm_head(model)
    out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend))
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.isfinite()
    assert {grad.dtype for grad in gradients(model).values()} == {torch.bfloat16}


# Its own forward


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
        "before model", "before layer", "after layer", "before head", "after head", "after model",
        "back head", "back layer",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = make("qwen2"), Batch()
    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    model(**batch.inputs, steppo=request).loss.backward()
    expected = gradients(model)
    runs = []
    # Of a module in the layer: hooks of the layer itself may stay outside.
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if reentrant:
        model.enable_input_require_grads()
    model(**batch.inputs, steppo=request).loss.backward()
    assert len(runs) == 2
    assert_same(gradients(model), expected, 1e-12)


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
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


@pytest.mark.filterwarnings("ignore")
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
OF_FAMILY = {"llama": True, "qwen2": False}


def on_a_rank(rank: int, rendezvous: str) -> None:
    """Compare the reduced gradients of one of the ranks with the mean of those of plain models."""
    from datetime import timedelta

    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    # A rank whose neighbour failed waits no longer than this.
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    batch = Batch()
    advantages = batch.advantages * (1 - 3 * rank) + rank
    weights = torch.randn(
        ROWS, LENGTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
    )

    def run(model: nn.Module, mode: str) -> None:
        if mode == "loss":
            request: Any = StepPOBatch(batch.old_noise - 4, advantages, batch.layout, config=CONFIG,
                                       ref_log_probs=batch.ref_noise - 4)  # fmt: skip
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
    """Of batches that differ: with one rank alone, a sum that is missing shows nowhere."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    ranks = torch.multiprocessing.spawn(
        on_a_rank, (str(tmp_path / "rendezvous"),), nprocs=RANKS, join=False
    )
    deadline = time.monotonic() + 120
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks take too long"
    finally:
        for process in ranks.processes:
            process.kill()


def test_accelerate_hooks_stay_around_the_head() -> None:
    """Its offloading keeps weights elsewhere and brings them in around each module's forward."""
    accelerate = pytest.importorskip("accelerate", reason="the demo's extra is not installed")
    model, batch = make("llama", torch.float32), Batch(torch.float32)
    patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    with torch.no_grad():
        expected = model(**batch.inputs, steppo=request).log_probs
        accelerate.cpu_offload(model.lm_head, execution_device=torch.device("cpu"))
        assert model.lm_head.weight.is_meta
        got = model(**batch.inputs, steppo=request).log_probs
        again = model(**batch.inputs).logits
    torch.testing.assert_close(got, expected)
    assert again.shape == (ROWS, LENGTH, VOCAB)


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


@pytest.mark.filterwarnings("ignore")
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


# What it costs


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("mode", ["loss", "log_probs"])
def test_no_tensor_of_all_logits(mode: str) -> None:
    if why := backends.unavailable("cpu", torch.device("cpu")):
        pytest.skip(f"cpu: {why}")
    config = transformers.LlamaConfig(**{**_SIZES, "vocab_size": 4000, "head_dim": 8})
    model = transformers.LlamaForCausalLM(config).train()
    patch_lm_head(model)
    ids = torch.randint(1, 4000, (4, 64))
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[:, 10:30] = mask[:, 40:64] = True
    layout = StepLayout.from_mask(mask)
    chunk = 24
    with _Largest() as plain:
        model(ids)
    assert plain.numel == 4 * 64 * 4000
    with _Largest() as fused:
        if mode == "loss":
            request: Any = StepPOBatch(
                None, torch.ones(8), layout, chunk_tokens=chunk,
                config=StepPOConfig(entropy_coef=0.1),
            )  # fmt: skip
            model(ids, steppo=request).loss.backward()
        else:
            request = LogProbBatch(layout, chunk_tokens=chunk)
            model(ids, steppo=request).log_probs.sum().backward()
    assert fused.numel == chunk * 4000


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        batch = self.batch
        return {
            "input_ids": batch.ids[row], "attention_mask": batch.attention[row],
            "action_mask": batch.mask[row], "old_log_probs": batch.old_noise[row],
            "advantages": broadcast_to_tokens(batch.advantages, batch.layout)[row],
        }  # fmt: skip


class _Trainer(transformers.Trainer):
    """A subclass as the README shows it."""

    normalizer = 1.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        layout = StepLayout.from_mask(inputs.pop("action_mask"))
        old, advantages = inputs.pop("old_log_probs"), inputs.pop("advantages")
        out = model(
            **inputs,
            steppo=StepPOBatch(
                old, advantages, layout,
                normalizer=self.normalizer / self.args.gradient_accumulation_steps,
            ),
        )  # fmt: skip
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
            str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=ROWS,
            max_steps=1, max_grad_norm=0.0, remove_unused_columns=False, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        ),
        train_dataset=_Rows(batch), callbacks=[Look()],
    )  # fmt: skip
    trainer.normalizer = float(batch.layout.reduction_weights("step_mean")[1])
    trainer.train()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-4, atol=1e-6)


def test_no_cache_is_kept() -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    assert model(**batch.inputs, steppo=request).past_key_values is None
    out = model(**batch.inputs, steppo=request, use_cache=True, output_hidden_states=True)
    assert out.past_key_values is not None
    assert out.hidden_states[-1].shape == (ROWS, LENGTH, WIDTH)


def test_router_loss_of_a_mixture_of_experts() -> None:
    model, batch = make("mixtral"), Batch()
    expected = model(**batch.inputs, output_router_logits=True).aux_loss
    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    alone = model(**batch.inputs, steppo=request)
    out = model(**batch.inputs, steppo=request, output_router_logits=True)
    assert alone.aux_loss is None
    torch.testing.assert_close(out.aux_loss, expected)
    torch.testing.assert_close(out.loss, alone.loss)
    assert len(out.router_logits) == 2


# Patching


def test_remove_restores() -> None:
    model, batch = make("gemma2"), Batch()
    batch_inputs = {**batch.inputs, "labels": batch.ids}
    before = model(**batch_inputs)
    state = dict(model.__dict__)
    head_state = dict(model.lm_head.__dict__)
    handle = patch_lm_head(model)
    during = model(**batch_inputs)
    model(**batch.inputs, steppo=LogProbBatch(batch.layout))
    handle.remove()
    handle.remove()
    after = model(**batch_inputs)
    for out in (during, after):
        assert type(out) is type(before)
        assert torch.equal(out.logits, before.logits)
        assert torch.equal(out.loss, before.loss)
    assert model.__dict__ == state
    assert model.lm_head.__dict__ == head_state
    assert "forward" not in model.__dict__


def test_an_error_in_the_call_restores_the_head() -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    with pytest.raises(ValueError, match="advantages"):
        model(**batch.inputs, steppo=StepPOBatch(None, batch.advantages[:2], batch.layout))
    assert "forward" not in model.lm_head.__dict__
    assert model(**batch.inputs).logits.shape == (ROWS, LENGTH, VOCAB)


def test_a_forward_set_before_comes_back() -> None:
    model, batch = make(), Batch()
    calls = []
    inner = model.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = own
    with patch_lm_head(model):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))
    assert calls == [1]
    assert model.forward is own


def test_patching_twice() -> None:
    model = make()
    with patch_lm_head(model), pytest.raises(RuntimeError, match="patched already"):
        patch_lm_head(model)
    patch_lm_head(model).remove()


def test_a_deep_copy_is_patched_on_its_own() -> None:
    model, batch = make(), Batch()
    handle = patch_lm_head(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
        request = LogProbBatch(batch.layout)
        of_twin = twin(**batch.inputs, steppo=request).log_probs
        of_model = model(**batch.inputs, steppo=request).log_probs
    assert not torch.allclose(of_twin, of_model)
    torch.testing.assert_close(
        of_twin[batch.mask], torch.full_like(of_twin[batch.mask], 1 / VOCAB).log()
    )
    handle.remove()
    twin(**batch.inputs, steppo=request)
    twin.steppo_patch.remove()
    assert "forward" not in twin.__dict__


def test_generate_and_signature() -> None:
    model, batch = make("qwen2", torch.float32), Batch()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.eval().generate(batch.ids[:1, :5], **options)
    before = inspect.signature(model.forward)
    patch_lm_head(model)
    assert torch.equal(model.generate(batch.ids[:1, :5], **options), expected)
    after = dict(inspect.signature(model.forward).parameters)
    assert after.pop("steppo").default is None
    assert after == dict(before.parameters)


def test_tokens_by_position_and_embeddings(backend: str) -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    request = LogProbBatch(batch.layout, backend=backend)
    with torch.no_grad():
        expected = model(**batch.inputs, steppo=request).log_probs
        by_position = model(batch.ids, batch.attention, steppo=request).log_probs
        embeddings = model.get_input_embeddings()(batch.ids)
        request = LogProbBatch(batch.layout, token_ids=batch.ids, backend=backend)
        out = model(inputs_embeds=embeddings, attention_mask=batch.attention, steppo=request)
    assert torch.equal(by_position, expected)
    torch.testing.assert_close(out.log_probs, expected)
    with pytest.raises(ValueError, match="token_ids: got None"):
        model(inputs_embeds=embeddings, steppo=LogProbBatch(batch.layout))


@pytest.mark.parametrize("mode", ["loss", "log_probs"])
def test_labels_are_the_tokens(mode: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training code has them, -100 where nothing is learned; nothing else is made of them."""
    model, batch = make(), Batch()
    values = old_and_ref(model, batch)
    patch_lm_head(model)
    monkeypatch.setattr(model, "_loss_function", None, raising=False)
    embeddings = model.get_input_embeddings()(batch.ids).detach()
    attention = batch.attention
    labels = batch.ids.where(batch.mask, -100)
    other = (batch.ids + 1) % VOCAB

    def run(*args: Any, token_ids: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        if mode == "loss":
            request: Any = fused_batch(batch, values, token_ids=token_ids, backend=backend)
            out = model(*args, steppo=request, **kwargs).loss
        else:
            request = LogProbBatch(batch.layout, token_ids=token_ids, backend=backend)
            out = model(*args, steppo=request, **kwargs).log_probs
        out.square().sum().backward()
        return {"out": out.detach(), "head": gradients(model)["model.embed_tokens.weight"]}

    of_ids = run(**batch.inputs)
    of_embeddings = run(inputs_embeds=embeddings, attention_mask=attention, token_ids=batch.ids)
    position = list(inspect.signature(type(model).forward).parameters).index("labels") - 1
    by_position = (batch.ids, attention, *[None] * (position - 2), labels)
    for got, expected in (
        (run(**batch.inputs, labels=labels), of_ids),
        (run(*by_position), of_ids),
        (run(inputs_embeds=embeddings, attention_mask=attention, labels=labels), of_embeddings),
        (run(**batch.inputs, labels=other, token_ids=batch.ids), of_ids),
    ):
        for name, value in expected.items():
            assert torch.equal(got[name], value)
    torch.testing.assert_close(of_embeddings["out"], of_ids["out"])
    assert not torch.allclose(run(**batch.inputs, labels=other)["out"], of_ids["out"])


# What it refuses


def test_bad_models() -> None:
    for model, error, text in (
        (nn.Linear(2, 2), TypeError, "model: got Linear"),
        (nn.DataParallel(make()), TypeError, "model: got DataParallel"),
        (
            transformers.BertForMaskedLM(
                transformers.BertConfig(
                    vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                    intermediate_size=8,
                )
            ),
            TypeError, "expected a causal LM",
        ),
        (
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
                )
            ),
            TypeError, "expected a causal LM",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            patch_lm_head(model)


class _Quantised(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.round())


def test_bad_heads() -> None:
    for head in (_Quantised(WIDTH, VOCAB), nn.Sequential(nn.Linear(WIDTH, VOCAB)), None):
        model = make("llama")
        model.lm_head = head
        with pytest.raises(TypeError, match=r"expected a plain nn\.Linear"):
            patch_lm_head(model)
    model, batch = make("llama", torch.float32), Batch()
    patch_lm_head(model)
    model.lm_head = _Quantised(WIDTH, VOCAB)
    with pytest.raises(TypeError, match=r"_Quantised, expected a plain nn\.Linear"):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))


class _Shifted(transformers.LlamaForCausalLM):
    """What some model may do one day."""

    change: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 1.5,
        lambda z: z.clamp(max=10),
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z + 0.2,
        lambda z: z[:, :, :3],
        lambda z: z + torch.zeros(ROWS, LENGTH, 1),
        lambda z: None,
    ],
)
def test_unknown_changes_of_logits_raise(change: Callable[[Tensor], Tensor]) -> None:
    batch = Batch()
    model = _Shifted(transformers.LlamaConfig(**_SIZES))
    patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    model.change = lambda z: z.bfloat16()
    model(**batch.inputs, steppo=request)
    model.steppo_patch.remove()
    model.change = change
    patch_lm_head(model)
    with pytest.raises(ValueError, match="supported are the settings final_logit_softcapping"):
        model(**batch.inputs, steppo=request)


class _Headless(transformers.LlamaForCausalLM):
    calls = 0

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        for _ in range(self.calls):
            logits = self.lm_head(hidden)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits if self.calls else None)


@pytest.mark.parametrize(("calls", "text"), [(0, "did not call its"), (2, "called its .* again")])
def test_the_head_is_called_once(calls: int, text: str) -> None:
    batch = Batch()
    model = _Headless(transformers.LlamaConfig(**_SIZES))
    model.calls = calls
    patch_lm_head(model)
    with pytest.raises(RuntimeError, match=text):
        model(batch.ids, steppo=LogProbBatch(batch.layout))


def test_bad_arguments() -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    first = batch.mask.clone()
    first[2, 0] = True
    padded = batch.mask.clone()
    padded[1, 12] = True
    for arguments, error, text in (
        ({"steppo": batch.layout}, TypeError, "steppo: got StepLayout"),
        (
            {"steppo": request, "labels": batch.ids.where(batch.attention > 0, -100)[:, 1:]},
            ValueError, "labels: got shape",
        ),
        (
            {"steppo": request, "labels": torch.full_like(batch.ids, -100)},
            ValueError, "labels: got -100 in row 0, column 1, expected token ids at action tokens",
        ),
        ({"steppo": request, "labels": batch.ids.double()}, TypeError, "labels: got"),
        ({"steppo": request, "labels": batch.ids.tolist()}, TypeError, "labels: got list"),
        ({"steppo": request, "logits_to_keep": 3}, ValueError, "logits_to_keep: got it"),
        ({"steppo": request, "return_dict": False}, ValueError, "return_dict: got False"),
        ({"steppo": LogProbBatch(first)}, ValueError, "row 2, column 0"),
        ({"steppo": LogProbBatch(padded)}, ValueError, "row 1, column 12"),
        ({"steppo": LogProbBatch(batch.mask[:, 1:])}, ValueError, "layout: got shape"),
        ({"steppo": LogProbBatch("mask")}, TypeError, "layout: got str"),
        ({"steppo": LogProbBatch(0.5 * batch.mask)}, ValueError, "layout: got the value 0.5"),
        (
            {"steppo": LogProbBatch(batch.layout, token_ids=batch.ids.double())},
            TypeError, "token_ids: got",
        ),
        (
            {"steppo": StepPOBatch(batch.old_noise[:, 1:], batch.advantages, batch.layout)},
            ValueError, "old_log_probs: got shape",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            model(**batch.inputs, **arguments)


def test_an_action_at_the_start_of_a_row_raises() -> None:
    """Of a row of the layout or of the batch: neither has a state before it."""
    model, batch = make(), Batch()
    patch_lm_head(model)
    mask = torch.zeros(ROWS * LENGTH, dtype=torch.bool)
    mask[LENGTH : LENGTH + 2] = True
    rows = torch.tensor([0, LENGTH, ROWS * LENGTH, ROWS * LENGTH])
    packed = StepLayout.from_mask(mask, cu_seqlens=rows, backend="reference")
    with pytest.raises(ValueError, match=f"row 0, column {LENGTH}"):
        model(batch.ids.view(1, -1), steppo=LogProbBatch(packed))
    with pytest.raises(ValueError, match="row 1, column 0"):
        model(batch.ids, steppo=LogProbBatch(mask))


# PEFT


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed")


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
    with pytest.raises(TypeError, match="adapters on the head would be left out"):
        patch_lm_head(model)
    model = make("llama")
    patch_lm_head(model)
    model = peft.get_peft_model(model, adapter)
    with pytest.raises(TypeError, match="adapters on the head would be left out"):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))
