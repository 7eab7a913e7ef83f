"""AutoGPTQ's own files, loaded one by one: the package's ``__init__`` does not import beside transformers 5."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def auto_gptq(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """A function that gives the module ``auto_gptq.PACKAGE.MODULE`` without running any ``__init__``.

    Skips the test where AutoGPTQ is not installed.
    """
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # called at the end of every layer
    return _load


def _load(package: str, module: str) -> Any:
    spec = importlib.util.find_spec("auto_gptq")
    if spec is None or spec.origin is None:
        pytest.skip("needs AutoGPTQ: `make test-reference`, or pip install -e '.[reference]'")
    alias = f"auto_gptq_{package.replace('.', '_')}"
    if alias not in sys.modules:
        stand_in = types.ModuleType(alias)
        stand_in.__path__ = [str(Path(spec.origin).parent.joinpath(*package.split(".")))]
        sys.modules[alias] = stand_in
    return importlib.import_module(f"{alias}.{module}")
