"""The GPU that is accounted for, and the shapes: data sheet, guide, and what is assumed."""

from __future__ import annotations

import torch

# H100 SXM5: the rates of its data sheet, and of the CUDA programming guide for compute capability
# 9.0 (results a clock and processor). The clock is what the tensor cores' peak implies.
BANDWIDTH = 3.35e12
MEMORY = 80 * 10**9
FLOPS = 989e12
PROCESSORS = 132
CLOCK = FLOPS / (PROCESSORS * 4096)
RATES = {"issue": 128, "ALU": 64, "MUFU": 16, "LSU": 32}
SECTOR = 32
# Assumed: how long a load takes when the memory is busy, at best and at worst. What has to be in
# flight for full bandwidth follows from it.
LATENCIES = 0.8e-6, 1.3e-6
# What is asked of the kernels, and of the one-pass loss by the share of rows with a gradient.
MEMORY_SHARE = 0.85
TARGETS = {1.0: 52e-3, 0.3: 28e-3}
# What matrix products reach on this GPU (reported by others for cuBLAS: 684 to 769 TFLOP/s).
PRODUCT_SHARE = 0.74

ROWS, HIDDEN, VOCABULARY = 8192, 4096, 151_936
SHAPES = {"aligned": (2, 3, 4096), "any": (2, 3, 4099)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Rows of a chunk where the changes are accounted for: with the default there is one chunk.
SMALL_CHUNK = 2048
