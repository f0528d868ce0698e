"""Fast vector quantization and transferable sequential recommendation for PyTorch.

>>> import metarec_fast as mf
>>> model = mf.MetaRec.fit([mf.read("books.csv"), mf.read("toys.csv")], mf.read("beauty.csv"))
>>> model.evaluate(), model.recommend(users=["u1"], k=10)
"""

from __future__ import annotations
from importlib import import_module
from typing import Any, TYPE_CHECKING

__all__ = ["Any", "TYPE_CHECKING", "annotations", "import_module"]
