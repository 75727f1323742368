"""The lean reference trainer: `python -m rlkern.train`, see docs/train.md."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


class TrainError(Exception):
    """Something the user can put right; printed without a traceback."""


class EngineHang(TrainError):
    """The engine gave no rollouts in time; nothing but a new process ends its thread."""


def load_function(setting: str, name: str) -> Callable[..., Any]:
    """What a setting names as module:function."""
    module, _, function = str(name).partition(":")
    if "" not in sys.path:  # a module in the current folder, also from the installed script
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainError(f"{setting}: {name!r} could not be loaded: {error}") from error
