"""What `import forebay` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import forebay
from support.node_process import environ


def test_every_public_name_is_there() -> None:
    """Each name of the list leads to an object that knows itself by that name."""
    assert dir(forebay) == sorted(forebay.__all__)
    for name in forebay.__all__:
        found = getattr(forebay, name)
        assert name == "__version__" or found.__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    """A slip of the pen is told as Python tells it."""
    with pytest.raises(AttributeError, match="no attribute 'Nod'"):
        _ = forebay.Nod


def test_importing_it_loads_nothing_else() -> None:
    """Who only asks for the version, or never starts a node, pays nothing for it."""
    program = "import sys; old = set(sys.modules); import forebay; print(*set(sys.modules) - old)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ(), capture_output=True, text=True, timeout=30
    )
    loaded = {
        name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names
    }

    assert loaded == {"forebay"}, done.stderr
