"""Domains and options small enough to train within a fraction of a second."""

import numpy as np

from metarec_fast.config import Config, CooccurrenceConfig, ModelConfig, TrainConfig
from metarec_fast.data import Domain, Sequences, Vocabulary, synthetic

DOMAINS = synthetic(source_users=60, source_items=40, target_users=40, target_items=30)


def config(**sections) -> Config:
    base = Config(
        model=ModelConfig(dim=8, codebook_heads=2, codebook_size=8, layers=1, max_length=12),
        train=TrainConfig(
            warmup_steps=3,
            meta_steps=4,
            finetune_steps=6,
            finetune_passes=0,
            batch_size=16,
            evaluate_every=2,
            negatives=16,
            lr=1e-2,
        ),
        cooccurrence=CooccurrenceConfig(
            hidden=8,
            warmup_steps=4,
            meta_steps=2,
            finetune_steps=4,
            finetune_passes=0,
            batch_size=8,
            evaluate_every=2,
        ),
    )
    return base.replace(**sections)


def shop(*, bought: int = 20, known: int = 60) -> Domain:
    """A target whose training events hold ``bought`` items; the others are known from held-out events alone."""
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(bought, size=6), *rng.integers(known, size=2)] for _ in range(50)]
    events = Sequences(np.arange(0, 401, 8), np.concatenate(rows).astype(np.int32), known)
    return Domain("shop", events, Vocabulary(f"u{u}" for u in range(50)), Vocabulary(f"i{i}" for i in range(known)))
