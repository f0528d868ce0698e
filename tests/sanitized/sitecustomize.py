"""Python imports this by itself when the folder is on PYTHONPATH: ``metarec_fast._C`` is then build/sanitize's, here
and in every process that a test starts. See run.py."""

import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

EXTENSION = Path(__file__).parents[2] / "build/sanitize" / f"_C{EXTENSION_SUFFIXES[0]}"


class SanitizedExtension:
    @staticmethod
    def find_spec(name, path=None, target=None) -> ModuleSpec | None:
        return spec_from_file_location(name, EXTENSION) if name == "metarec_fast._C" else None


sys.meta_path.insert(0, SanitizedExtension)
