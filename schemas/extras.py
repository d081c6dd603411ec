"""How to install what is optional, for hints in errors.

The name is that of the distribution, the extras are those in pyproject.toml (a test compares).
Quoted, since brackets are patterns in some shells. Where Forebay is installed already, however it
was, pip adds what the extra needs.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["DISTRIBUTION", "Extra", "pip_install"]

DISTRIBUTION = "forebay"
Extra = Literal["embedded", "cli", "speed", "zstd", "sql", "fake"]


def pip_install(extra: Extra) -> str:
    return f"pip install '{DISTRIBUTION}[{extra}]'"
