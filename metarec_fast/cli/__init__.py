"""The command ``metarec-fast``: a file a command; see ``cli.run``."""

from metarec_fast.cli.run import main

__all__ = ["main"]
