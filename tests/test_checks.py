"""Options of the public functions are checked like those of a configuration: no string falls through to a default."""

import numpy as np
import pytest

from metarec_fast import Mixture, Prefetch, Sampler, synthetic
from metarec_fast.data import leave_one_out, limit_users, random_items, relabelled_copy, shuffled_order
from metarec_fast.evaluation import evaluate, paired_bootstrap
from metarec_fast.evaluation.baselines import Popularity
from tests.tiny import DOMAINS

TARGET = DOMAINS.target
SPLIT = leave_one_out(TARGET)
SAMPLER = Sampler(TARGET.sequences, batch_size=4)


def sampler(**options):
    return Sampler(TARGET.sequences, **{"batch_size": 4, **options})


def queries(**options):
    return evaluate(Popularity(SPLIT.train), SPLIT.test, **{"mask_history": False, "protocol": "", **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampler(targets="lst"), "targets must be one of every, last, got 'lst'; did you mean 'last'"),
        (lambda: sampler(in_batch="false"), "in_batch must be True or False, got 'false'; did you mean False"),
        (lambda: sampler(sorted_copy="no"), "sorted_copy must be True or False"),
        (lambda: sampler(seed=2**64), "seed must be in"),
        (lambda: Mixture({"a": SAMPLER}, seed=-1), "seed must be in"),
        (lambda: Mixture({"a": SAMPLER}, beta="1"), "beta must be a number, got '1'"),
        (lambda: Mixture({"a": SAMPLER}, always="a"), "always must be a list of names, got the string 'a'"),
        (lambda: Prefetch(SAMPLER.batch, start=1.5), "start must be an integer, got 1.5"),
        (lambda: Prefetch(SAMPLER.batch, depth=0), "depth must be at least 1, got 0"),
        (lambda: synthetic(source_users="60"), "source_users must be an integer, got '60'"),
        (lambda: synthetic(noise=float("nan")), r"noise must be in \[0, 1\], got nan"),
        (lambda: leave_one_out(TARGET, max_history=0), "max_history must be at least 1, got 0"),
        (lambda: leave_one_out(TARGET, max_history="5"), "max_history must be an integer, got '5'"),
        (lambda: limit_users(SPLIT, "0.5", seed=0), "fraction must be a number, got '0.5'"),
        (lambda: limit_users(SPLIT, 0.5, seed=-1), r"seed must be in \[0, 2\*\*64\), got -1"),
        (lambda: random_items(TARGET, seed=-1), "seed must be in"),
        (lambda: shuffled_order(TARGET, seed=2**64), "seed must be in"),
        (lambda: relabelled_copy(TARGET, seed=2**64), "seed must be in"),
        (lambda: queries(mask_history="false"), "mask_history must be True or False, got 'false'; did you mean False"),
        (lambda: queries(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: queries(tile=0), "tile must be at least 1, got 0"),
        (lambda: paired_bootstrap(np.ones(3), np.zeros(3), seed=-1), "seed must be in"),
        (lambda: paired_bootstrap(np.ones(3), np.zeros(3), seed=0, samples=0), "samples must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
