"""``python -m faults.delivery``: see ``run``."""

from __future__ import annotations

import sys

from faults.delivery.run import main

if __name__ == "__main__":
    sys.exit(main())
