"""Training batches: packed sequence windows with negatives, drawn as a function of (seed, step)."""

from metarec_fast.sampling.batch import BatchShape, PackedBatch, PaddedBatch
from metarec_fast.sampling.episodes import support_and_query
from metarec_fast.sampling.mixture import Mixture
from metarec_fast.sampling.prefetch import Prefetch, PrefetchError
from metarec_fast.sampling.sampler import BatchBuffers, Sampler, batch_buffers, draw

__all__ = [
    "BatchBuffers",
    "BatchShape",
    "Mixture",
    "PackedBatch",
    "PaddedBatch",
    "Prefetch",
    "PrefetchError",
    "Sampler",
    "batch_buffers",
    "draw",
    "support_and_query",
]
