"""The outer step on batches padded to a fixed size, against the plain one; as a CUDA graph where there is a card."""

import dataclasses
from unittest import mock

import pytest
import torch

from metarec_fast.meta import CapturedStep, FixedStep, GradientAverages, Source, outer_step
from metarec_fast.sampling import BatchShape, Sampler
from tests.models.problems import CATALOGUES, META, SMALL, World, as_expected, assert_same, sequences

SHAPE = BatchShape(windows=5, positions=30, length=6)
NAMES = "abc"


class Both:
    """The same steps, plain and on batches of a fixed size."""

    def __init__(self, world, config=META, kind=FixedStep, shape=SHAPE, **options):
        self.world, self.config = world, config
        private = {name: world.private[name] for name in NAMES}
        shapes = {"shapes": dict.fromkeys(NAMES, shape), "target_shape": shape}
        self.fixed = kind(
            world.model.loss, world.shared, private, world.private["t"], **shapes, config=config, **options
        )

    def batches(self, k):
        return {name: [self.world.batches[name][(k + i) % 3] for i in range(self.config.inner_steps)] for name in NAMES}

    def plain(self, k, **options):
        sources = [Source(name, self.world.private[name], given) for name, given in self.batches(k).items()]
        target = self.world.private["t"], self.world.batches["t"][k]
        return outer_step(self.world.model.loss, self.world.shared, sources, *target, config=self.config, **options)

    def step(self, k, **options):
        return self.fixed(self.batches(k), self.world.batches["t"][k], **options)


def sampled(world):
    """Negatives that the whole batch shares, and those that each position has."""
    for i, name in enumerate(world.batches):
        options = {"shared_negatives": 7} if i % 2 else {"negatives": 3}
        sampler = Sampler(sequences(CATALOGUES[name], i), batch_size=4, max_length=6, **options)
        world.batches[name] = [sampler.batch(k) for k in range(3)]
        for batch in world.batches[name]:
            batch.logq = batch.logq.double()
    return world


@pytest.mark.parametrize("target_pass", ["loop", "vmap"])
@pytest.mark.parametrize("encoder", ["lru", "sasrec"])
@pytest.mark.parametrize("order", [1, 2])
def test_equals_the_plain_step(order, encoder, target_pass):
    config = dataclasses.replace(META, order=order, inner_steps=2, target_pass=target_pass)
    both = Both(World(dataclasses.replace(SMALL, encoder=encoder)), config)
    for k in range(3):
        assert_same(both.step(k), as_expected(both.plain(k)), tolerance=1e-10)


@pytest.mark.parametrize("vq", ["residual", "none"])
@pytest.mark.parametrize("unique_items", ["never", "always"])
def test_equals_the_plain_step_whatever_the_loss(unique_items, vq):
    world = World(dataclasses.replace(SMALL, unique_items=unique_items, vq=vq, vq_gradient="rotation"))
    for both in (Both(world), Both(sampled(world))):
        assert_same(both.step(0), as_expected(both.plain(0)), tolerance=1e-10)


def test_reads_parameters_where_they_are():
    both = Both(World())
    before = both.step(0).source_losses.clone()
    for parameters in (both.world.shared, *both.world.private.values()):
        for p in parameters.values():
            p.mul_(1.1)
    after = both.step(0)
    assert (after.source_losses != before).all()
    assert_same(after, as_expected(both.plain(0)), tolerance=1e-10)


def test_averages_go_on_as_in_plain_steps():
    both, ours, plain = Both(World()), GradientAverages(0.9), GradientAverages(0.9)
    for k in range(3):
        assert_same(both.step(k, averages=ours), as_expected(both.plain(k, averages=plain)), tolerance=1e-10)
    for part in ("steps", "target_gradients"):
        torch.testing.assert_close(getattr(ours, part), getattr(plain, part), rtol=1e-10, atol=1e-12)


def test_errors():
    world = World()
    with pytest.raises(ValueError, match="shapes must have one for each source, got none for b, c"):
        FixedStep(
            world.model.loss, world.shared, {n: world.private[n] for n in NAMES}, world.private["t"],
            shapes={"a": SHAPE}, target_shape=SHAPE, config=META,
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"a captured step \(train.capture\) needs parameters on a CUDA device, got cpu"
    ):
        Both(world, kind=CapturedStep)
    small = Both(world, shape=BatchShape(windows=5, positions=3, length=6))
    assert not small.fixed.fits(small.batches(0), world.batches["t"][0])
    with pytest.raises(ValueError, match=r"batch must have at most 3 positions in 5 windows .*, got \d+ in 4"):
        small.step(0)
    both = Both(world)
    assert both.fixed.fits(both.batches(0), world.batches["t"][0])
    both.step(0)
    averages = GradientAverages(0.9)
    both.plain(0, averages=averages)
    with pytest.raises(ValueError, match="a step must have inputs like those of the first one"):
        both.step(0, averages=averages)


class WithoutCuda(CapturedStep):
    """With torch.cuda stood in for: a replay does nothing."""

    def __init__(self, *args, **options):
        FixedStep.__init__(self, *args, **options)
        self._streams = [mock.MagicMock() for _ in self.sources]


@pytest.fixture
def cuda(monkeypatch):
    stand_in = mock.MagicMock()
    stand_in.get_rng_state = lambda device: torch.get_rng_state()
    stand_in.set_rng_state = lambda state, device: torch.set_rng_state(state)
    for name in (
        "Stream",
        "Event",
        "CUDAGraph",
        "graph",
        "stream",
        "current_stream",
        "get_rng_state",
        "set_rng_state",
        "device",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


def test_is_recorded_once_and_sources_fork_from_the_main_stream_and_join_it(cuda):
    both = Both(World(), kind=WithoutCuda)
    assert_same(both.step(0), as_expected(both.plain(0)), tolerance=1e-10)
    both.step(1)
    assert cuda.CUDAGraph.call_count == 1 and cuda.CUDAGraph.return_value.replay.call_count == 2
    runs = 4  # three to warm up, one to be recorded
    main = cuda.current_stream.return_value
    assert main.record_event.call_count == runs
    for stream in both.fixed._streams:
        assert stream.wait_event.call_count == runs
        assert sum(call.args == (stream,) for call in main.wait_stream.call_args_list) == runs


def test_draws_of_the_first_step_are_those_of_a_plain_one(cuda):
    both = Both(World(dataclasses.replace(SMALL, dropout=0.5)), kind=WithoutCuda)
    state = torch.get_rng_state()
    both.step(0)
    assert torch.equal(torch.get_rng_state(), state)


class OnDevice(World):
    def __init__(self, config=SMALL):
        super().__init__(config, torch.float32)
        self.model.cuda()
        self.shared = {k: v.detach() for k, v in self.model.shared_parameters().items()}
        self.private = {n: {k: v.detach() for k, v in self.model.private_parameters(n).items()} for n in CATALOGUES}
        self.batches = {n: [b.to("cuda") for b in given] for n, given in self.batches.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("target_pass", ["loop", "vmap"])
@pytest.mark.parametrize("encoder", ["lru", "sasrec"])
@pytest.mark.parametrize("order", [1, 2])
def test_captured_equals_the_plain_step(order, encoder, target_pass, parallel):
    config = dataclasses.replace(META, order=order, inner_steps=2, target_pass=target_pass)
    both = Both(OnDevice(dataclasses.replace(SMALL, encoder=encoder)), config, CapturedStep, parallel=parallel)
    averages = GradientAverages(0.9), GradientAverages(0.9)
    for k in (0, 1, 2, 0):
        found, expected = both.step(k, averages=averages[0]), both.plain(k, averages=averages[1])
        # float32, and sums in another order
        assert_same(found, as_expected(expected), tolerance=1e-4)
        for p in both.world.shared.values():
            p.mul_(1.01)


@pytest.mark.gpu
def test_captured_does_not_wait_for_the_device():
    both = Both(OnDevice(), kind=CapturedStep)
    both.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both.step(1)
        both.plain(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_captured_dropout_is_new_at_each_step_and_a_function_of_the_seed():
    both = Both(OnDevice(dataclasses.replace(SMALL, dropout=0.5)), kind=CapturedStep)

    def losses():
        torch.manual_seed(1)
        return torch.stack([both.step(0).source_losses.clone() for _ in range(2)])

    losses()
    first, again = losses(), losses()
    assert torch.equal(first, again)
    assert (first[0] != first[1]).all()
