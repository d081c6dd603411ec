"""`python -m forebay.nodes.cli`, for where the script `forebay` is not on the path."""

from __future__ import annotations

from .main import main

if __name__ == "__main__":
    main()
