"""verl on a machine without an accelerator: what the tests put in the place of a GPU.

``VERL_USE_EXTERNAL_MODULES=cpu_platform`` and ``VERL_PLATFORM=cpu`` select it in every process.
verl 0.9.1 has a registry of platforms, and assumes a GPU in three other places.
"""

from __future__ import annotations

import contextlib
import os
import types
from typing import Any

import torch
import transformers
import verl.utils.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

torch.set_num_threads(1)

# What Ray counts where verl asks for GPUs.
RESOURCE = "TRAINER"


def _device_module() -> types.ModuleType:
    made = types.ModuleType("cpu_device")
    for name in dir(torch.cpu):
        setattr(made, name, getattr(torch.cpu, name))
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated"):
        setattr(made, name, lambda *_, **__: 0)
    made.memory_reserved = made.memory_allocated
    made.mem_get_info = lambda *_, **__: (0, 0)
    made.empty_cache = made.reset_peak_memory_stats = made.ipc_collect = lambda *_, **__: None
    made.get_device_name = lambda *_, **__: "cpu"
    return made


_MODULE = _device_module()


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: _MODULE)

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, index: int) -> None:
        pass

    def synchronize(self, index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, message: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return RESOURCE

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, count: float) -> dict[str, Any]:
        return {"resources": {RESOURCE: count}}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def _init_process_group(timeout_second: int | None = None, backend: str | None = None) -> None:
    # verl joins "cpu:gloo" and the backend of the device, which torch refuses for one device.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo",
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )


verl.utils.distributed.initialize_global_process_group_ray = _init_process_group

_from_pretrained = transformers.AutoModelForTokenClassification.from_pretrained.__func__


def _with_eager_attention(cls: type, *args: Any, **options: Any) -> Any:
    # verl writes flash_attention_2 there, whatever the model's own config says.
    return _from_pretrained(cls, *args, **{**options, "attn_implementation": "eager"})


transformers.AutoModelForTokenClassification.from_pretrained = classmethod(_with_eager_attention)

# verl keeps the reference policy in pinned memory, which takes an accelerator.
torch.Tensor.pin_memory = lambda self, *_: self
