"""Fast vector quantization and transferable sequential recommendation for PyTorch.

>>> import metarec_fast as mf
>>> model = mf.MetaRec.fit([mf.read("books.csv"), mf.read("toys.csv")], mf.read("beauty.csv"))
>>> model.evaluate(), model.recommend(users=["u1"], k=10)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded when first used, so that the operators and FastVQ need nothing but torch.
_HOMES = {
    "Config": "config",
    "Domain": "data",
    "FastGroupedResidualVQ": "vq",
    "FastResidualVQ": "vq",
    "FastVQ": "vq",
    "MetaRec": "api",
    "Mixture": "sampling",
    "Prefetch": "sampling",
    "Sampler": "sampling",
    "Sequences": "data",
    "support_and_query": "sampling",
    "backend_info": "ops",
    "compare": "api",
    "import_file": "data",
    "load_domain": "data",
    "read": "data",
    "replace_vector_quantize": "vq",
    "synthetic": "data",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from metarec_fast.api import MetaRec as MetaRec
    from metarec_fast.api import compare as compare
    from metarec_fast.config import Config as Config
    from metarec_fast.data import Domain as Domain
    from metarec_fast.data import Sequences as Sequences
    from metarec_fast.data import import_file as import_file
    from metarec_fast.data import load_domain as load_domain
    from metarec_fast.data import read as read
    from metarec_fast.data import synthetic as synthetic
    from metarec_fast.ops import backend_info as backend_info
    from metarec_fast.sampling import Mixture as Mixture
    from metarec_fast.sampling import Prefetch as Prefetch
    from metarec_fast.sampling import Sampler as Sampler
    from metarec_fast.sampling import support_and_query as support_and_query
    from metarec_fast.vq import FastGroupedResidualVQ as FastGroupedResidualVQ
    from metarec_fast.vq import FastResidualVQ as FastResidualVQ
    from metarec_fast.vq import FastVQ as FastVQ
    from metarec_fast.vq import replace_vector_quantize as replace_vector_quantize


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
