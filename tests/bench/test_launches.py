"""No step waits for the device: on meta tensors, where a look at a value is an error."""

import dataclasses
import itertools

import pytest
import torch

from bench import launches
from metarec_fast.config import MetaConfig, ModelConfig
from metarec_fast.models.recommender import Recommender
from metarec_fast.sampling import BatchShape
from tests.examples import representative

SHAPE = BatchShape(windows=4, positions=40, length=12)
SMALL = ModelConfig(dim=16, codebook_heads=2, codebook_size=16, max_length=12, layers=1)


@pytest.mark.parametrize(
    ("order", "encoder", "target_pass"),
    representative(
        itertools.product([1, 2], ["lru", "sasrec"], ["loop", "vmap"]), [(1, "lru", "loop"), (2, "sasrec", "vmap")]
    ),
)
def test_an_outer_step_never_waits(order, encoder, target_pass):
    dropout = 0.0 if target_pass == "vmap" else 0.5
    model = Recommender(dataclasses.replace(SMALL, encoder=encoder, dropout=dropout), {"a": 30, "b": 50, "t": 45})
    config = MetaConfig(order=order, inner_steps=2, similarity_decay=0.0, target_pass=target_pass)
    run = launches.step(model, config, shape=SHAPE)
    with launches.traced() as trace:
        run()
    # a source of fewer items than positions has each item looked up once
    assert trace.counts["triton linear_cross_entropy._forward"] >= 4
    assert trace.counts["triton vq_commit._gather"] >= 4
    assert (trace.counts["triton linear_scan._scan"] > 0) == (encoder == "lru")


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.unique(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(1).to("meta"),
        lambda x: x + torch.tensor(1.0).to("meta"),
        lambda x: torch.arange(3, device="meta").repeat_interleave(x.long().expand(3)),
    ],
)
def test_a_look_is_found(look):
    with pytest.raises(launches.HostWaits), launches.traced():
        look(torch.empty(1, device="meta"))


def test_counts_what_makes_no_view():
    with launches.traced() as trace:
        x = torch.empty(4, 6, device="meta")
        (x.t()[1:].exp() + x.view(6, 4)[1:].mul(2)).sum(0)
    assert trace.counts == {"exp": 1, "mul": 1, "add": 1, "sum": 1}
