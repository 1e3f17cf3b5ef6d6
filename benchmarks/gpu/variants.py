"""The variants that are timed on a GPU, and what is known of them before they run."""

from __future__ import annotations

from ..variants import Variant

CUDA = Variant("cuda")
TRITON = Variant("triton")
CPU = Variant("cpu")
EAGER = Variant("eager")
EAGER_HALF = Variant("eager bf16")
COMPILED = Variant("torch.compile")
# Matrix products alone: nothing is computed between them.
PRODUCTS = Variant("bare products")
# A function that computes nothing (bare.py): what PyTorch itself takes of the host's time.
BARE = Variant("bare")

LIGER = Variant("Liger GRPO, Triton", project="liger-kernel")
LIGER_SELECTIVE = Variant("Liger selective log-softmax", project="liger-kernel")
LIGER_CHUNKED = Variant("Liger fused linear GRPO", project="liger-kernel")
LIGER_SCALED = Variant("Liger scaled CE", project="liger-kernel")
TRL_SELECTIVE = Variant("TRL selective log-softmax", project="trl")
TRL_CHUNKED = Variant("TRL chunked", project="trl")
CCE = Variant("CCE", project="cut-cross-entropy")
QUACK = Variant("quack cross entropy", project="quack-kernels")
TORCH_LINEAR = Variant("F.linear_cross_entropy", project="torch")

# The implementations of this package. One that is wrong or raises fails the check.
OF_BACKENDS = {"cuda": CUDA, "triton": TRITON, "cpu": CPU}
OURS = (*OF_BACKENDS.values(), EAGER)
# What is compiled before its first call takes longest to prepare.
SLOW_TO_PREPARE = (COMPILED, LIGER_CHUNKED)
