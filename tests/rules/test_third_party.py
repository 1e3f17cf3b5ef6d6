"""Deprecated calls of other packages are errors, and the tests that touch these are known."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import third_party


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_a_deprecated_call_is_an_error(category: type[Warning]) -> None:
    with pytest.raises(category, match="use the other"):
        warnings.warn("use the other", category, stacklevel=1)


def test_any_other_warning_is_none() -> None:
    with pytest.warns(UserWarning, match="slow"):
        warnings.warn("slow", UserWarning, stacklevel=1)


@pytest.mark.parametrize("name", ["transformers", "transformers.models.llama", "accelerate"])
def test_a_deprecated_call_that_is_only_logged_is_an_error(name: str) -> None:
    logger = logging.getLogger(name)
    with pytest.raises(DeprecationWarning, match=f"{name}: `old` is deprecated"):
        logger.warning("`%s` is deprecated", "old")
    logger.warning("The weights are new.")


def test_what_touches_other_packages_is_found(tmp_path: Path) -> None:
    def touches(program: str) -> bool:
        path = tmp_path / f"test_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(program)
        return third_party.touches(path)

    assert touches("from transformers import LlamaConfig")
    assert touches("def test_it():\n    import accelerate.utils")
    assert touches("from steppo_kernels.integrations.transformers import patch_lm_head")
    assert touches("from steppo_kernels import StepLayout, cli")
    assert touches("from tiny_models import make")
    assert not touches("import torch, pytest\nfrom steppo_kernels import StepLayout, richer")
    assert not touches("import oracles")
