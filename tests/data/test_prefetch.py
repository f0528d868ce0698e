import gc
import multiprocessing
import threading
import time

import numpy as np
import pytest
import torch

from metarec_fast.data import Prefetch, Sampler, Sequences
from metarec_fast.data.prefetch import PrefetchError


def threads() -> int:
    return sum(t.name == "metarec_fast.Prefetch" for t in threading.enumerate())


def test_steps_come_in_order_and_equal_what_is_made_in_place():
    offsets = np.arange(101) * 9
    data = Sequences(offsets, np.random.default_rng(0).integers(0, 500, offsets[-1]), 500)
    sampler = Sampler(data, batch_size=16, max_length=5, negatives=2)
    with Prefetch(sampler.batch, start=3, stop=30, depth=3) as batches:
        for step, batch in enumerate(batches, 3):
            assert torch.equal(batch.items, sampler.batch(step).items)
            assert torch.equal(batch.negatives, sampler.batch(step).negatives)
        assert step == 29
    assert threads() == 0


def test_another_step_restarts_there():
    made = []
    with Prefetch(lambda step: made.append(step) or step) as batches:
        assert [batches.get(s) for s in (0, 1, 2)] == [0, 1, 2]
        assert [batches.get(s) for s in (10, 11, 4)] == [10, 11, 4]
    assert set(made) <= {0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14}  # and what was made ahead


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_more_than_depth_is_made_ahead(depth):
    made = []
    with Prefetch(lambda step: made.append(step), depth=depth) as batches:
        for step in range(5):
            batches.get(step)
            time.sleep(0.02)
            assert len(made) - (step + 1) <= depth + 1  # the one being handed over is no longer ahead
    assert len(made) >= 5


def test_an_error_names_its_step_and_stops():
    def fail(step):
        if step == 2:
            raise ValueError("no such luck")
        return step

    with Prefetch(fail) as batches:
        assert [batches.get(0), batches.get(1)] == [0, 1]
        with pytest.raises(PrefetchError, match="making the batch of step 2 failed: no such luck") as raised:
            batches.get(2)
        assert isinstance(raised.value.__cause__, ValueError)
        assert threads() == 0
        assert batches.get(3) == 3  # another request starts again


def test_waiting_is_measured():
    with Prefetch(lambda step: time.sleep(0.02)) as slow:
        for _ in range(6):
            next(slow)
    assert slow.wait_share > 0.5
    with Prefetch(lambda step: step) as quick:
        for _ in range(6):
            next(quick)
            time.sleep(0.02)
    assert quick.wait_share < 0.1


def test_closing_is_quick_and_a_dropped_one_leaves_no_thread():
    batches = Prefetch(lambda step: step)
    next(batches)
    began = time.perf_counter()
    batches.close()
    assert time.perf_counter() - began < 0.1
    batches.close()
    assert next(batches) == 1
    del batches
    gc.collect()
    for _ in range(100):
        if threads() == 0:
            break
        time.sleep(0.01)
    assert threads() == 0


def in_child(batches, answers):
    try:
        next(batches)
    except RuntimeError as error:
        answers.put(str(error))


def test_a_forked_process_is_told():
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with Prefetch(lambda step: step) as batches:
        child = context.Process(target=in_child, args=(batches, answers))
        child.start()
        assert "does not survive a fork" in answers.get(timeout=20)
        child.join()
        assert next(batches) == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Prefetch(lambda step: step, depth=0)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        Prefetch(lambda step: step, start=-1)
    with Prefetch(lambda step: step, stop=3) as batches, pytest.raises(ValueError, match=r"step must be in \[0, 3\)"):
        batches.get(3)
