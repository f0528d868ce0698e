"""The recommender: private item tables, a shared codebook and encoder between them, scores on the private table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarec_fast.config import ModelConfig
from metarec_fast.data.domain import Sequences
from metarec_fast.models.lru import LRUEncoder
from metarec_fast.models.sasrec import SASRecEncoder
from metarec_fast.ops import linear_cross_entropy, sampled_cross_entropy
from metarec_fast.profiling.regions import in_region, region
from metarec_fast.sampling.batch import PackedBatch
from metarec_fast.statistics.descriptors import NUM_DESCRIPTORS, item_descriptors
from metarec_fast.statistics.spectral import moments, spectral_table, turned
from metarec_fast.vq.functional import quantize_learned

Parameters = dict[str, Tensor]


class Repeats(NamedTuple):
    """How often rows count, [N], and the row of each position [T], or None if each position has its own."""

    counts: Tensor
    row: Tensor | None = None


def _unique_items(
    items: Tensor, num_items: int, valid: Tensor, dtype: torch.dtype, *, compact: bool
) -> tuple[Tensor, Repeats]:
    """The items of a batch, each once, and how they repeat over the positions that ``valid`` [T] marks.

    compact: only the items that occur, whose number the host waits for; otherwise all items of the catalogue.
    """
    if compact:
        items, row = items.unique(return_inverse=True)
    else:
        row, items = items, torch.arange(num_items, device=items.device)
    valid = valid.to(dtype)
    return items, Repeats(valid.new_zeros(len(items)).index_add(0, row, valid), row)


class ItemTable(nn.Module):
    """Private parameters of a domain: item rows, item biases, and the norm that brings its rows to a common scale."""

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_items, dim))
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)


class SharedEncoder(nn.Module):
    """The parameters that all domains share: normalised item rows [T, D] -> codes -> states [T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.dim, config.codebook_heads
        if config.vq != "none" and D % H:
            raise ValueError(f"dim must be a multiple of codebook_heads, got dim {D} and codebook_heads {H}")
        self.config = config
        if config.vq != "none":
            self.codebook = nn.Parameter(torch.randn(H, config.codebook_size, D // H))
        if config.init == "aligned":  # moments of the first domain, towards which the others are rotated
            self.register_buffer("frame", torch.zeros(D, NUM_DESCRIPTORS))
        self.norm = nn.LayerNorm(D)
        if config.encoder == "lru":
            self.encoder = LRUEncoder(D, layers=config.layers, dropout=config.dropout)
        else:
            self.encoder = SASRecEncoder(
                D, layers=config.layers, heads=config.heads, dropout=config.dropout, max_length=config.max_length
            )

    def quantize(self, z_TD: Tensor, *, counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of rows, one a head: quantized [T, D], indices int64 [H, T], VQ loss (`vq.quantize_learned`).

        z_TD: normalised item rows [T, D], of which head h takes columns h D / H to (h + 1) D / H.
        counts: [T], how often each row counts in the loss, a mean; by default once.
        """
        H = self.codebook.shape[0]
        z_HTd = z_TD.unflatten(1, (H, -1)).transpose(0, 1).contiguous()
        options = {"gradient": self.config.vq_gradient, "commitment_weight": self.config.commitment_weight}
        q_HTd, indices, loss = quantize_learned(z_HTd, self.codebook, row_weight=counts, **options)
        return q_HTd.transpose(0, 1).flatten(1), indices, loss

    def forward(self, z_TD: Tensor, offsets: Tensor, repeats: Repeats | None = None) -> tuple[Tensor, Tensor]:
        """repeats: which of the rows z stands at each position, and how often each counts; by default each once."""
        loss = z_TD.new_zeros(())
        if self.config.vq != "none":
            q_TD, _, loss = self.quantize(z_TD, counts=None if repeats is None else repeats.counts)
            z_TD = q_TD if self.config.vq == "quantized" else z_TD + q_TD
        if repeats is not None and repeats.row is not None:
            z_TD = F.embedding(repeats.row, z_TD)
        x_TD = self.norm(F.dropout(z_TD, self.config.dropout, self.training))
        with region("encoder"):
            return self.encoder(x_TD, offsets), loss


class Recommender(nn.Module):
    """One shared encoder and one item table for each domain, by name."""

    def __init__(self, config: ModelConfig, catalogues: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.domains = list(catalogues)
        self.shared = SharedEncoder(config)
        self.tables = nn.ModuleList(ItemTable(size, config.dim) for size in catalogues.values())

    def table(self, domain: str) -> ItemTable:
        if domain not in self.domains:
            raise ValueError(f"domain must be one of {', '.join(self.domains)}, got {domain!r}")
        return self.tables[self.domains.index(domain)]

    def shared_parameters(self) -> Parameters:
        return dict(self.shared.named_parameters())

    def private_parameters(self, domain: str) -> Parameters:
        return dict(self.table(domain).named_parameters())

    def compile_encoder(self, **options: object) -> None:
        """Run the encoder through torch.compile from now on, for packed lengths that change from step to step."""
        self.shared.encoder.compile(dynamic=True, **options)

    @in_region("gather + VQ")
    def states(
        self, shared: Parameters, private: Parameters, items: Tensor, offsets: Tensor, *, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encoder states [T, D] of packed items, and the VQ loss over the positions that ``valid``, bool [T], marks."""
        weight, once = private["weight"], self.config.unique_items
        repeats = None if valid is None else Repeats(valid.to(weight.dtype))
        if once == "always" or (once == "auto" and len(items) > len(weight)):
            valid = torch.ones_like(items) if valid is None else valid
            items, repeats = _unique_items(items, len(weight), valid, weight.dtype, compact=items.device.type == "cpu")
        rows_TD = F.embedding(items, weight)
        z_TD = F.layer_norm(rows_TD, (self.config.dim,), private["norm.weight"], private["norm.bias"])
        return functional_call(self.shared, shared, (z_TD, offsets, repeats))

    @in_region("loss")
    def loss(self, shared: Parameters, private: Parameters, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy of the next item over the batch's valid positions, plus the weighted VQ loss.

        Full softmax, or sampled softmax with logQ correction if the batch carries shared negatives.
        """
        h_TD, vq_loss = self.states(shared, private, batch.items, batch.offsets, valid=batch.valid)
        table, bias = private["weight"], private["bias"]
        if batch.negatives is None:  # positions that only fill the batch have a target that is ignored
            task = linear_cross_entropy(h_TD, table, batch.targets, bias, reduction="mean")
        elif batch.valid is None:
            task = sampled_cross_entropy(h_TD, table, batch.targets, batch.negatives, batch.logq, bias=bias).mean()
        else:
            targets, valid = batch.targets.where(batch.valid, 0), batch.valid.to(h_TD.dtype)
            losses = sampled_cross_entropy(h_TD, table, targets, batch.negatives, batch.logq, bias=bias)
            task = losses @ valid / valid.sum()
        return task + self.config.vq_loss_weight * vq_loss

    @torch.no_grad()
    def init_table(self, domain: str, train: Sequences, *, seed: int) -> None:
        """Item rows from the domain's own co-occurrence, item biases from its popularity.

        Where ``config.init`` is aligned, rows are rotated towards the domain that was initialised first.
        Raises ValueError if the rows are not finite.
        """
        table = self.table(domain)
        rows = spectral_table(train, self.config.dim, seed=seed)
        if not rows.isfinite().all():
            raise ValueError(f"the spectral initialisation of {domain!r} is not finite")
        if self.config.init == "aligned":
            own = moments(rows, item_descriptors(train))
            if self.shared.frame.any():
                rows = turned(rows, own, self.shared.frame.cpu())
            else:
                self.shared.frame.copy_(own)
        table.weight.copy_(self.config.init_scale * rows)
        counts = torch.bincount(torch.from_numpy(train.items.astype("int64")), minlength=train.num_items)
        table.bias.copy_(torch.log((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) * len(counts)))

    @torch.no_grad()
    def codes(self, domain: str) -> Tensor:
        """[H, V] int64: the code of each item in each head. Raises ValueError for a model without codes."""
        if self.config.vq == "none":
            raise ValueError("codes need a model with a codebook, got vq 'none'")
        table = self.table(domain)
        return self.shared.quantize(table.norm(table.weight))[1]

    @torch.no_grad()
    def init_codebook(self, domains: Sequence[str], *, seed: int) -> None:
        """Set the codes to normalised item rows, drawn evenly from the domains, so that none is dead at first.

        With more domains than codes, each head draws from the next ones.
        Raises ValueError for a table with rows that are not finite.
        """
        if self.config.vq == "none":
            return
        generator = torch.Generator().manual_seed(seed)
        H, K, d = self.shared.codebook.shape
        for name in domains:
            bad = ~self.table(name).weight.isfinite().all(1)
            if bad.any():
                raise ValueError(
                    f"codes cannot be initialised from {name!r}: {int(bad.sum()):,} of {len(bad):,} rows of its table "
                    "are not finite"
                )
        rows = [F.layer_norm(self.table(name).weight, (self.config.dim,)) for name in domains]
        for head in range(H):
            which = (torch.arange(K) + (head * K if len(rows) > K else 0)) % len(rows)
            for index, z in enumerate(rows):
                slots = (which == index).nonzero()[:, 0]
                if not len(slots):
                    continue
                # distinct rows as long as there are enough: equal codes would only share their use
                rounds = -(-len(slots) // len(z))
                chosen = torch.cat([torch.randperm(len(z), generator=generator) for _ in range(rounds)])[: len(slots)]
                self.shared.codebook[head, slots] = z[chosen, head * d : (head + 1) * d]
