"""``python -m metarec_fast``: the command ``metarec-fast``."""

import sys

from metarec_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
