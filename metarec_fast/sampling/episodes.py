"""Support and query batches of one domain, for meta-learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metarec_fast.ops.epoch_order import epoch_order
from metarec_fast.sampling.sampler import QUERY, Sampler

if TYPE_CHECKING:
    from metarec_fast.data.domain import Sequences

NO_EPOCH = 2**48 - 1  # the order that divides the users: epochs count up from 0


def support_and_query(
    sequences: Sequences, *, by: Literal["windows", "users"], query_share: float = 0.5, **options: Any
) -> tuple[Sampler, Sampler]:
    """Samplers of support and query batches that share no event.

    by: "windows": both show the same users in the same rows, support the older events of each, query the newest
        ``query_share``, at least two each; users of fewer than four events are left out. Not for "sliding" windows, of
        which the two sides have different numbers.
        "users": query has ``query_share`` of the users with windows, drawn by seed and stream, support has the others;
        each has epochs of its own.
    The two draw negatives and crops apart. options: of ``Sampler``.

    Raises ValueError as ``Sampler`` does, and if a side would be left without users.
    """
    if by not in ("windows", "users"):
        raise ValueError(f"by must be windows or users, got {by!r}")
    if not 0 < query_share < 1:
        raise ValueError(f"query_share must be in (0, 1), got {query_share}")
    if by == "windows":
        if options.get("window") == "sliding":
            raise ValueError("by='windows' needs window='last' or 'crop', got 'sliding'")
        support, query = (
            Sampler(sequences, part=part, query_share=query_share, **options) for part in ("support", "query")
        )
        return support, query
    able = np.flatnonzero(sequences.lengths >= 2)
    count = round(query_share * len(able))
    if not 0 < count < len(able):
        raise ValueError(f"query_share={query_share} of {len(able)} users with windows leaves one side without any")
    seed, stream = options.get("seed", 0), options.get("stream", 0)
    shuffled = able[epoch_order(len(able), 0, len(able), seed=seed, stream=stream, epoch=NO_EPOCH).numpy()]
    support = Sampler(sequences, users=shuffled[count:], **options)
    return support, Sampler(sequences, users=shuffled[:count], **{**options, "stream": stream ^ QUERY})
