"""Programs that tests talk to: where CI runs they must be there, elsewhere a test is skipped."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import NoReturn

import pytest


def tool(name: str) -> str:
    """The path of a program of the machine."""
    path = shutil.which(name)
    return path if path is not None else _missing(name)


def installed(module: str) -> None:
    """A program that is a Python module."""
    if find_spec(module) is None:
        _missing(module)


def _missing(name: str) -> NoReturn:
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{name} is not installed")
    pytest.skip(f"{name} is not installed")
