"""Which domains a step shows: all of them, or some drawn in proportion to size ** beta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from metarec_fast.checks import Range, check_number
from metarec_fast.data.csr import offsets
from metarec_fast.ops.arrays import check_integer
from metarec_fast.ops.epoch_batches import BatchBuffers
from metarec_fast.ops.epoch_order import epoch_order
from metarec_fast.sampling.batch import PackedBatch
from metarec_fast.sampling.sampler import Sampler, draw, empty_buffers

BLOCK = 1024  # draws in which every domain has exactly its share
DRAWS = 2**64 - 1  # the stream of the draws; samplers count theirs from 0


class Mixture:
    """Batches of several domains, filled in one call: ``batches(step)`` is a function of the step alone.

    samplers: by name; give each a stream of its own.
    draws: batches of a step, their domains drawn in proportion to num_windows ** beta; None: ``each`` of every domain.
    each: batches of every domain, without ``draws``.
    always: names that every step has one batch of, after the others; they are not drawn. A target, for example.
    beta: 0 draws all domains alike, 1 all windows alike.
    seed: of the draws.

    Draws come in blocks of 1,024 in which each domain has its share, rounded to whole draws and at least one, in an
    order of the block's own. Each of a domain's batches comes once, those of a block of draws in any order, so its
    epochs stay complete, whatever was drawn between. A domain drawn twice in a step gives two batches.

    Raises ValueError for no or unknown names and options out of range.
    """

    def __init__(
        self,
        samplers: Mapping[str, Sampler],
        *,
        draws: int | None = None,
        each: int = 1,
        always: Sequence[str] = (),
        beta: float = 0.5,
        seed: int = 0,
    ) -> None:
        if isinstance(always, str):
            raise ValueError(f"always must be a list of names, got the string {always!r}")
        for name in always:
            if name not in samplers:
                raise ValueError(f"always must name samplers, got {name!r}; samplers are {', '.join(samplers)}")
        drawn = [name for name in samplers if name not in always]
        if draws is not None:
            check_integer(draws, "draws", least=1, below=2**16)
            if not 0 < len(drawn) <= BLOCK:
                raise ValueError(f"draws={draws} needs between 1 and {BLOCK} domains to draw from, got {len(drawn)}")
        elif not samplers:
            raise ValueError("samplers must hold at least one domain, got none")
        check_integer(each, "each", least=1, below=2**16)
        if draws is not None and each != 1:
            raise ValueError(f"each must be 1 where draws are given, got each={each} and draws={draws}")
        beta = check_number(beta, "beta", Range())
        check_integer(seed, "seed", least=0, below=2**64)
        self.samplers, self.always, self.seed = dict(samplers), tuple(always), seed
        self.each, self.draws = each, len(drawn) * each if draws is None else draws
        self.domains = tuple(drawn)
        self.quotas = None if draws is None else quotas([samplers[name].num_windows for name in drawn], beta=beta)
        self._first = None if draws is None else offsets(self.quotas)  # entries of a block that are a domain's

    def schedule(self, step: int) -> list[tuple[str, int]]:
        """The names of a step's batches, and which of the domain's own batches each is."""
        check_integer(step, "step", least=0, below=2**48)
        always = [(name, step) for name in self.always]
        if self.quotas is None:
            return [(name, step * self.each + k) for name in self.domains for k in range(self.each)] + always
        chosen = []
        for place in range(step * self.draws, (step + 1) * self.draws):
            block, within = divmod(place, BLOCK)
            entry = int(epoch_order(BLOCK, within, 1, seed=self.seed, stream=DRAWS, epoch=block)[0])
            which = int(np.searchsorted(self._first, entry, side="right")) - 1
            chosen.append((self.domains[which], block * int(self.quotas[which]) + entry - int(self._first[which])))
        return chosen + always

    def batches(
        self, step: int, *, buffers: BatchBuffers | None = None, device: torch.device | str = "cpu"
    ) -> list[tuple[str, PackedBatch]]:
        """The batches of ``step`` with their domains' names. Arguments as in ``Sampler.batch``."""
        names, steps = zip(*self.schedule(step), strict=True)
        drawn = draw([self.samplers[name] for name in names], steps, buffers=buffers, device=device)
        return list(zip(names, drawn, strict=True))

    def buffers(self, *, pin_memory: bool = False) -> BatchBuffers:
        """Memory that any step's batches fit into."""
        sizes = [self.samplers[name].largest_batch() for name in self.domains for _ in range(self.each)]
        if self.quotas is not None:  # the most windows may be one domain's, the most negatives another's
            sizes = [tuple(map(max, zip(*sizes, strict=True)))] * self.draws
        sizes += [self.samplers[name].largest_batch() for name in self.always]
        return empty_buffers(*map(sum, zip(*sizes, strict=True)), pin_memory=pin_memory)


def quotas(sizes: Sequence[int], *, beta: float) -> np.ndarray:
    """Draws of each domain in a block, in proportion to size ** beta: int64 [domains], at least 1, summing to BLOCK.

    What whole draws leave over goes to the largest remainders, the first among equals.
    """
    weights = np.asarray(sizes, np.float64) ** beta
    exact = weights / weights.sum() * (BLOCK - len(sizes))
    counts = exact.astype(np.int64)
    left = BLOCK - len(sizes) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts + 1
