# ruff: noqa: E402 - what is missing has to be said before it is imported
"""StepPO in the place of GRPO, for trainings that run on TRL 1.16.

    from steppo_kernels.integrations.trl import StepPOTrainer, StepPOTrainingArguments

`StepPOTrainer` is a `GRPOTrainer`: models, datasets, rollouts, reward functions, tools,
environments, PEFT and what it logs are those of TRL. Advantages and the loss are of steps. A step
is a run of tokens that the policy wrote, up to the next token of a tool or of the environment.

What a trainer has to know of steps is in modules of its own: `arguments` and `options` (what is
set, and what would be lost), `rewards` (which reward belongs to which step), `samples` and
`advantages` (over all ranks), `denominators` (what losses are divided by), `heads` (where log-probs
come from), `critic`, `loss` and `metrics`. `trainer` calls them from the hooks of TRL.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

_RELEASE = "1.16"

if importlib.util.find_spec("trl") is None:
    raise ModuleNotFoundError(
        f"trl: is not installed, expected TRL {_RELEASE}: pip install '.[trl]' in a clone",
        name="trl",
    )
if not f"{importlib.metadata.version('trl')}.".startswith(f"{_RELEASE}."):
    raise ImportError(
        f"trl: got version {importlib.metadata.version('trl')}, expected {_RELEASE}, whose hooks "
        f"this is written for: pip install 'trl=={_RELEASE}.*'",
        name="trl",
    )

from .arguments import StepPOTrainingArguments
from .samples import StepSamples
from .trainer import StepPOTrainer

__all__ = ["StepPOTrainer", "StepPOTrainingArguments", "StepSamples"]
