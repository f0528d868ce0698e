"""Whatever tensors operators and bindings are given: none reads or writes outside them.

Calls that the public functions make are recorded, then repeated with one argument changed. Here a fault shows as a
crash or a wrong result; under ``make sanitize`` each read or write outside a tensor ends the process.
"""

import sys
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metarec_fast import _C, ops
from metarec_fast.ops import arrays
from metarec_fast.ops.epoch_batches import EpochBatches, draw_batches
from metarec_fast.ops.gradient_estimators import rotate_to
from metarec_fast.ops.missed_steps import Past, missed_steps_
from metarec_fast.ops.sample_negatives import seen_items

REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, OverflowError, MemoryError)
NUMBERS = (-(2**63), -2, -1, 0, 1, 2**31, 2**62)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)


# what is recorded


def lookups():
    for dtype in (torch.float32, torch.float64):
        for H, N, K, D in ((1, 5, 7, 3), (2, 19, 33, 16)):
            x, codebook = torch.randn(H, N, D, dtype=dtype), torch.randn(H, K, D, dtype=dtype)
            indices = ops.nearest_codeword(x, codebook).indices
            ops.nearest_codeword(x, codebook, with_margin=False)
            ops.vq_commit(x, codebook)
            counts, sums = ops.vq_statistics(x, indices, K, row_weight=torch.rand(N, dtype=dtype))
            ops.vq_ema_update_(*(t.clone() for t in (counts, sums, sums, counts, sums)), decay=0.5, eps=1e-5)
            x.requires_grad_()
            rotate_to(x, codebook[:, :1].expand_as(x)).sum().backward()
    bounds = ops.RowBounds.empty(rows=9, heads=1, codes=7, dim=3, neighbours=2)
    for _ in range(3):
        ops.bounded_lookup_(bounds, torch.randint(9, (6,)), torch.randn(6, 3), torch.randn(7, 3))


def sequence_operators():
    for dtype in (torch.float32, torch.float64):
        a, u = torch.rand(2, 5, dtype=dtype, requires_grad=True), torch.randn(6, 2, 5, dtype=dtype, requires_grad=True)
        ops.linear_scan(a, u, torch.tensor([0, 2, 2, 6])).sum().backward()
    h, table, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 6), (9, 6), (9,)))
    targets = torch.tensor([0, 8, -100, 3, 3])
    for reduction in ("none", "sum"):
        loss = ops.linear_cross_entropy(h, table, targets, bias=bias, reduction=reduction).sum()
        grads = torch.autograd.grad(loss, (h, table, bias), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    ops.linear(torch.randn(4, 3), torch.randn(2, 3), torch.randn(2))
    graph = ops.CooccurrenceGraph(
        np.array([0, 2, 3, 3, 4]), np.array([1, 3, 0, 2], np.int32), np.ones((4, 2), np.float32)
    )
    ops.gather_cooccurrence(graph, np.array([0, 2, 2, 3]), np.array([0, 3, 1], np.int32), ages=(0, 1, 4))


def ranks():
    seen = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 1, 4])
    for dtype in (torch.float32, torch.float64):
        h, table, bias = (torch.randn(*shape, dtype=dtype) for shape in ((3, 8), (5, 8), (5,)))
        added = torch.tensor([0, 0, 2, 3]), torch.tensor([0, 4, 2]), torch.randn(3, dtype=dtype)
        ops.target_ranks(h, table, torch.tensor([0, 4, 2]), bias=bias, seen=seen, added=added)


def sampling():
    offsets = np.array([0, 3, 3, 8, 9])
    for dtype in (np.int32, np.int64):
        items = np.array([0, 4, 4, 1, 2, 3, 2, 6, 5], dtype)
        users = torch.tensor([2, 0, 3, 2])
        ops.pack_windows(offsets, items, users, max_length=3, window="crop")
        ops.pack_windows(offsets, items, users, max_length=2, window="sliding", window_index=users)
        for distribution in ("uniform", "popularity"):
            ops.sample_negatives(offsets, items, users, num_items=9, count=3, distribution=distribution)
    ops.epoch_order(300, 5, 20)
    for values in (torch.arange(6), torch.randn(6, 2)):
        ops.pad_packed(values, torch.tensor([0, 4, 4, 6]), length=3)
    table = ops.popularity_table(np.array([1, 2, 0, 3, 1, 1, 2]))
    seen = seen_items(offsets, items, num_items=7, table=table)
    options = {"num_items": 7, "batch_size": 3, "max_length": 2, "table": table}
    shares = np.full(7, 1 / 7)
    domains = [
        EpochBatches(offsets, items, np.array([0, 1, 1, 3, 3]), window="sliding", negatives=2, seen=seen, **options),
        EpochBatches(offsets, items, np.array([0, 1, 1, 2, 2]), negatives=2, **options),
        EpochBatches(offsets, items, np.array([0, 1, 1, 2, 2]), shared_negatives=4, target_shares=shares, **options),
    ]
    draw_batches(domains, [0, 1, 2])


def optimizer():
    for dtype in (torch.float32, torch.float64):
        past = Past.empty((0.9, 0.999), dtype, step=3, capacity=8)
        for _ in range(4):
            past.record(lr=1e-2, weight_decay=0.1)
        moments = [torch.rand(5, 3, dtype=dtype) for _ in range(3)]
        last = torch.tensor([3, 4, 5, 6, 7])
        missed_steps_(*moments, last, past, eps=1e-8, ids=torch.tensor([4, 1]))
        missed_steps_(*moments, last, past, eps=1e-8)


CALLERS = (lookups, sequence_operators, ranks, sampling, optimizer)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "metarec_fast":
            # a copy in one piece of memory, as it was before the call
            self.calls.append((operator, [a.detach().clone() if isinstance(a, Tensor) else a for a in args]))
        return operator(*args, **(kwargs or {}))


class KeptSpan(tuple):
    """A span that keeps its array."""


def record_bindings(monkeypatch, caller):
    """The calls of ``_C`` that ``caller`` makes: functions or classes, arguments, keywords."""
    calls, kept, spans = [], [], arrays.span

    def keeping(array):
        made = spans(array)
        if made is not None:
            made = KeptSpan(made)
            made.array = array
            kept.append(array)
        return made

    def recorded(target):
        def call(*args, **kwargs):
            calls.append((target, args, kwargs))
            return target(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("metarec_fast.ops") and getattr(module, "span", None) is spans:
                patch.setattr(module, "span", keeping)
        for name in dir(_C):
            value = getattr(_C, name)
            if not name.startswith("__") and (callable(value)):
                patch.setattr(_C, name, recorded(value))
        caller()
    return calls, kept


# how an argument is changed


def other_tensors(tensor: Tensor):
    """Tensors that a caller could have given instead; True where they have the same elements."""
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield tensor.to(dtype), False
    for d, size in enumerate(tensor.shape):
        for fewer in {0, size - 1} - {-1, size}:
            yield tensor.narrow(d, 0, fewer), False
        yield torch.cat((tensor, tensor), d), False
    yield tensor.flatten(), False
    yield tensor[None], False
    yield tensor.sum(), False
    yield tensor.to_sparse() if tensor.dim() else tensor, False
    yield torch.empty_like(tensor, device="meta"), False
    if tensor.dim():
        wide = torch.stack((tensor, tensor), -1)
        yield wide[..., 0], True
        yield tensor.movedim(0, -1).contiguous().movedim(-1, 0), True
        yield torch.cat((tensor[:1], tensor))[1:], True
        yield tensor[:1].expand_as(tensor), False
    if tensor.dtype in (torch.int64, torch.int32) and tensor.numel():
        for value in NUMBERS:
            if abs(value) <= torch.iinfo(tensor.dtype).max:
                for at in {0, tensor.numel() // 2, tensor.numel() - 1}:
                    changed = tensor.clone()
                    changed.view(-1)[at] = value
                    yield changed, False
    elif tensor.is_floating_point() and tensor.numel():
        for value in (float("nan"), float("inf"), -1e38):
            changed = tensor.clone()
            changed.view(-1)[tensor.numel() // 2] = value
            yield changed, False


def copied(value):
    return value.clone() if isinstance(value, Tensor) and value.layout == torch.strided else value


def equal(a, b):
    pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (a, b)), strict=True)
    return all(torch.allclose(x, y, equal_nan=True) for x, y in pairs if x is not None)


@pytest.mark.parametrize("caller", CALLERS[:3], ids=lambda caller: caller.__name__)
def test_operators_check_their_tensors(caller):
    with Operators() as recorded:
        caller()
    calls, served, refused = recorded.calls, 0, 0
    assert calls
    for operator, args in calls:
        expected = operator(*map(copied, args))
        for position, argument in enumerate(args):
            if isinstance(argument, bool) or not isinstance(argument, (Tensor, int)):
                continue
            others = other_tensors(argument) if isinstance(argument, Tensor) else ((n, False) for n in (-1, 0, 2**62))
            for other, same in others:
                try:
                    changed = [copied(a) for a in args]
                    changed[position] = other if same else copied(other)
                    result = operator(*changed)
                except REFUSALS:
                    refused += 1
                    assert not same, f"{operator} refuses argument {position} for its strides {other.stride()}"
                    continue
                served += 1
                if same and expected is not None:
                    assert equal(result, expected), f"{operator} depends on the strides of argument {position}"
    assert served and refused


def other_spans(given: tuple):
    address, size, code = given
    yield None
    yield (address, 0, code)
    yield (address, size - 1, code) if size else (0, 0, "f4")
    if code != "V16":
        elements = size * int(code[1:]) // 8  # as many of any type as there is room for
        for other in {"f4", "f8", "i4", "i8", "torch.float16", ""} - {code}:
            yield (address, elements, other)
    yield (0, size, code)
    yield "span"


def other_arrays(array):
    """Arrays with another number in them."""
    numpy = array.detach().numpy() if isinstance(array, Tensor) else array
    if numpy.dtype.kind != "i" or not numpy.size:
        return
    for value in NUMBERS:
        if abs(value) <= np.iinfo(numpy.dtype).max:
            for at in {0, numpy.size // 2, numpy.size - 1}:
                changed = numpy.copy()
                changed.reshape(-1)[at] = value
                yield changed


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
def test_bindings_check_what_they_are_given(monkeypatch, caller):
    calls, kept = record_bindings(monkeypatch, caller)
    assert calls and kept
    served, refused = 0, 0

    def attempt(target, args, kwargs):
        nonlocal served, refused
        try:
            target(*args, **kwargs)
            served += 1
        except REFUSALS:
            refused += 1

    for target, args, kwargs in calls:
        for key, value in chain(enumerate(args), kwargs.items()):
            others = []
            if isinstance(value, KeptSpan):
                others += list(other_spans(value))
                alive = list(other_arrays(value.array))  # a span does not keep its array
                others += [arrays.span(array) for array in alive]
            elif isinstance(value, dict):  # bounds of a lookup
                others += [value | {name: other} for name, given in value.items() for other in other_spans(given)]
                alive = [(n, a) for n, given in value.items() for a in other_arrays(given.array)]
                others += [value | {name: arrays.span(array)} for name, array in alive]
            elif isinstance(value, int) and not isinstance(value, bool):
                others += [n for n in (-1, 0, value + 1, max(value - 1, 0), 2**62) if n != value]
            for other in others:
                changed = [other if key == i else a for i, a in enumerate(args)]
                attempt(target, changed, {**kwargs, key: other} if isinstance(key, str) else kwargs)
    assert served and refused


def test_an_epoch_has_entries():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        _C.epoch_order(
            arrays.span(torch.empty(1, dtype=torch.int64)), size=0, first=0, count=1, seed=0, stream=0, epoch=0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": torch.empty(1, 0, 3)}, "at least one code of one element, got 0 of 3"),
        ({"codebook": torch.empty(1, 4, 2)}, "codebook must have 1 x 4 x 3 elements, got 8"),
        ({"x": torch.empty(1, 5, 3, dtype=torch.float16)}, "x must have elements of type f4 or f8, got torch.float16"),
    ],
    ids=["no code", "narrow codes", "half"],
)
def test_refusals_name_argument_expected_and_given(change, message):
    given = {"x": torch.empty(1, 5, 3), "codebook": torch.empty(1, 4, 3)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.metarec_fast.nearest_codeword(**given)


@pytest.mark.parametrize(
    ("neighbours", "message"), [(0, "neighbours must be in 1..7, got 0"), (-1, "got -1"), (8, "got 8")]
)
def test_bounds_hold_one_neighbour_at_least(neighbours, message):
    with pytest.raises(ValueError, match=message):
        ops.RowBounds.empty(rows=9, heads=1, codes=7, dim=3, neighbours=neighbours)


def test_bounds_of_another_table_are_refused():
    bounds = ops.RowBounds.empty(rows=9, heads=1, codes=7, dim=3, neighbours=2)
    rows = torch.arange(6), torch.randn(6, 3), torch.randn(7, 3)
    ops.bounded_lookup_(bounds, *rows)
    bounds.neighbours = 3
    with pytest.raises(ValueError, match="records must have 9 x 1 x 15 elements, got 117"):
        ops.bounded_lookup_(bounds, *rows)
