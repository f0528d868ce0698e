import gc
import multiprocessing
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from metarec_fast.data import Sequences
from metarec_fast.sampling import Prefetch, Sampler
from metarec_fast.sampling.prefetch import PrefetchError


def threads() -> int:
    return sum(t.name == "metarec_fast.Prefetch" for t in threading.enumerate())


def wait_for_no_thread():
    deadline = time.monotonic() + 20
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


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
            deadline = time.monotonic() + 20
            while len(made) < step + 1 + depth and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert len(made) == step + 1 + depth
    assert len(made) == 5 + depth


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
    wait_for_no_thread()


def test_one_that_its_own_thread_collects_leaves_no_thread():
    class Owner:
        def __init__(self):
            self.collect = threading.Event()
            self.collected = threading.Event()
            self.batches = Prefetch(partial(make, self.collect, self.collected))
            self.batches.owner = self  # only the garbage collector ends this

    def make(collect, collected, step):
        if step == 1:
            collect.wait(20)
            gc.collect()
            collected.set()
        return step

    gc.disable()
    try:
        owner = Owner()
        assert next(owner.batches) == 0
        collect, collected = owner.collect, owner.collected
        del owner
        collect.set()
        assert collected.wait(20)
    finally:
        gc.enable()
    wait_for_no_thread()


def test_an_interrupted_request_loses_no_step():
    with Prefetch(lambda step: step, depth=1) as batches:
        assert next(batches) == 0
        taken = batches._ready.get

        class Interrupting:
            def get(self):
                taken()
                raise KeyboardInterrupt

        batches._ready = Interrupting()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert [next(batches), next(batches)] == [1, 2]


def test_the_interpreter_ends_while_a_batch_is_made():
    # a thread that the interpreter ends inside C++ takes the whole process down
    script = """
import numpy as np
from metarec_fast import _C
from metarec_fast.sampling import Prefetch
from metarec_fast.ops.arrays import span
order = np.empty(30_000_000, np.int64)
def make(step):
    if step:
        print("making", flush=True)
    size = len(order) if step else 1
    _C.epoch_order(span(order[:size]), size=len(order), first=0, count=size, seed=0, stream=0, epoch=step)
batches = Prefetch(make)
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def in_child(batches, results):
    try:
        next(batches)
    except RuntimeError as error:
        results.put(str(error))


def test_a_forked_process_is_reported():
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with Prefetch(lambda step: step) as batches:
        child = context.Process(target=in_child, args=(batches, results))
        child.start()
        assert "does not survive a fork" in results.get(timeout=20)
        child.join()
        assert next(batches) == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Prefetch(lambda step: step, depth=0)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        Prefetch(lambda step: step, start=-1)
    with Prefetch(lambda step: step, stop=3) as batches, pytest.raises(ValueError, match=r"step must be in \[0, 3\)"):
        batches.get(3)
    with Prefetch(lambda step: step) as batches, pytest.raises(ValueError, match="step must be at least 0, got -1"):
        batches.get(-1)
