"""TableAdamW against torch.optim.AdamW on dense gradients."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from metarec_fast.train import optimizer as module
from metarec_fast.train.optimizer import TableAdamW

V, D = 30, 4


def gradients(steps, *, dtype, seed=0, scale=1.0, touched=3):
    """Ids and gradients [touched, D] of a few rows a step; row V - 1 is never touched, row 0 only at the beginning."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        ids = torch.randperm(V - 2, generator=generator)[:touched] + 1
        if step < 3:
            ids[0] = 0
        yield ids, scale * torch.randn(touched, D, generator=generator, dtype=torch.float64).to(dtype)


def pair(dtype, **options):
    start = torch.randn(V, D, dtype=dtype)
    dense, lazy = (torch.nn.Parameter(start.clone()) for _ in range(2))
    return dense, torch.optim.AdamW([dense], **options), lazy, TableAdamW([lazy], **options)


def both_step(dense, adamw, lazy, ours, ids, grad):
    dense.grad = torch.zeros_like(dense).index_add_(0, ids, grad)
    adamw.step()
    ours.catch_up(lazy, ids)
    lazy.grad = torch.sparse_coo_tensor(ids[None], grad, lazy.shape)
    ours.step()


def assert_equal_to_dense(dense, adamw, lazy, ours, **tolerance):
    ours.flush()
    torch.testing.assert_close(lazy, dense, **tolerance)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.state[lazy][name], adamw.state[dense][name], **tolerance)


# gradients about as small as eps are where the sum has no closed form; none is far below it
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7, 1e-8, 1e-9, 1e-12])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float64_equals_dense(scale, weight_decay):
    four = pair(torch.float64, lr=1e-2, weight_decay=weight_decay)
    for ids, grad in gradients(900, dtype=torch.float64, scale=scale):
        both_step(*four, ids, grad)
    assert_equal_to_dense(*four, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.98), (0.5, 0.9), (0.8, 0.9999)])
def test_any_betas(betas):
    """The series holds for some and the sum is taken step by step for others."""
    four = pair(torch.float64, lr=1e-2, betas=betas, eps=1e-4)
    for ids, grad in gradients(400, dtype=torch.float64, scale=1e-4):
        both_step(*four, ids, grad)
    assert_equal_to_dense(*four, rtol=1e-12, atol=1e-13)


def test_long_gaps_equal_dense():
    """Rows missed for 2,500 steps: beyond the window, and with a bias correction that changes all the while."""
    four = pair(torch.float64, lr=1e-2, eps=1e-6)
    for step, (ids, grad) in enumerate(gradients(2600, dtype=torch.float64, scale=1e-6)):
        ids = torch.where(ids % 2 == 0, ids, ids - 1) if step > 50 else ids  # odd rows rest
        ids, inverse = ids.unique(return_inverse=True)
        both_step(*four, ids, torch.zeros(len(ids), D, dtype=grad.dtype).index_add_(0, inverse, grad))
    assert_equal_to_dense(*four, rtol=1e-12, atol=1e-14)


def test_float32_is_as_near_to_the_real_numbers_as_dense():
    torch.manual_seed(0)
    exact = pair(torch.float64, lr=1e-2)
    torch.manual_seed(0)
    four = pair(torch.float32, lr=1e-2)
    with torch.no_grad():
        four[0].copy_(exact[0]), four[2].copy_(exact[0])
        exact[0].copy_(four[0]), exact[2].copy_(four[0])
    for ids, grad in gradients(600, dtype=torch.float32):
        both_step(*four, ids, grad)
        both_step(*exact, ids, grad.double())
    four[3].flush()
    ours, theirs = (float((p.double() - exact[0]).abs().max()) for p in (four[2], four[0]))
    assert ours < 1e-5 and ours < theirs  # values of about 2; each of 60 touches rounds


def test_the_learning_rate_may_change():
    four = pair(torch.float64, lr=1e-2, weight_decay=0.1)
    for step, (ids, grad) in enumerate(gradients(700, dtype=torch.float64)):
        for optimizer in (four[1], four[3]):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(step / 100))
        both_step(*four, ids, grad)
    assert_equal_to_dense(*four, rtol=1e-12, atol=1e-12)


def test_memory_of_past_steps_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "CAPACITY", 50)
    four = pair(torch.float64, lr=1e-2)
    for ids, grad in gradients(170, dtype=torch.float64):
        both_step(*four, ids, grad)
    assert len(four[3].state[four[2]]["past"]) == 51
    assert_equal_to_dense(*four, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_dict_taken_between_steps_goes_on_bit_for_bit(dtype):
    *_, lazy, ours = pair(dtype, lr=1e-2)
    other = torch.nn.Parameter(lazy.detach().clone())
    restored = TableAdamW([other], lr=1e-2)
    for step, (ids, grad) in enumerate(gradients(300, dtype=dtype)):
        if step == 150:
            restored.load_state_dict(copy.deepcopy(ours.state_dict()))
            other.data.copy_(lazy)
        for table, optimizer in ((lazy, ours), (other, restored)) if step >= 150 else ((lazy, ours),):
            optimizer.catch_up(table, ids)
            table.grad = torch.sparse_coo_tensor(ids[None], grad, table.shape)
            optimizer.step()
    ours.flush(), restored.flush()
    assert torch.equal(other, lazy)


def test_embedding_with_repeated_ids_and_bias_rows():
    torch.manual_seed(0)
    tables = [torch.randn(V, D, dtype=torch.float64), torch.randn(V, dtype=torch.float64)]
    dense, lazy = ([torch.nn.Parameter(t.clone()) for t in tables] for _ in range(2))
    adamw, ours = torch.optim.AdamW(dense), TableAdamW(lazy)
    for _ in range(40):
        ids = torch.randint(V, (6,))
        adamw.zero_grad()
        (F.embedding(ids, dense[0]).sum(1) * dense[1][ids]).square().sum().backward()
        adamw.step()
        for table in lazy:
            ours.catch_up(table, ids)
        ours.zero_grad()
        rows, where = ids.unique(return_inverse=True)
        leaves = [t.detach()[rows].requires_grad_() for t in lazy]
        (leaves[0][where].sum(1) * leaves[1][where]).square().sum().backward()
        for table, leaf in zip(lazy, leaves, strict=True):
            table.grad = torch.sparse_coo_tensor(rows[None], leaf.grad, table.shape)
        ours.step()
    ours.flush()
    for a, b in zip(lazy, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_tables_without_gradient_take_no_step():
    *_, lazy, ours = pair(torch.float32)
    before = lazy.detach().clone()
    ours.step()
    ours.flush()
    assert torch.equal(lazy, before) and not ours.state[lazy]


def test_stale_rows_and_dense_gradients_are_refused():
    *_, lazy, ours = pair(torch.float32)
    lazy.grad = torch.zeros_like(lazy)
    with pytest.raises(ValueError, match=r"sparse in rows alone, got torch\.strided"):
        ours.step()
    one, two = torch.tensor([1]), torch.tensor([2])
    for ids in (one, two):
        ours.catch_up(lazy, ids)
        lazy.grad = torch.sparse_coo_tensor(ids[None], torch.ones(1, D), lazy.shape)
        ours.step()
    lazy.grad = torch.sparse_coo_tensor(one[None], torch.ones(1, D), lazy.shape)
    with pytest.raises(RuntimeError, match="call catch_up"):
        ours.step()
    with pytest.raises(ValueError, match="no closure"):
        ours.step(lambda: 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.99, 0.9)}, "beta1 < sqrt"),
        ({"betas": (0.9, 1.0)}, "beta1 < sqrt"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"lr": 2.0, "weight_decay": 0.5}, "product below 1"),
        ({"lr": -1.0}, "at least 0"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TableAdamW([torch.zeros(V, D)], **options)
    with pytest.raises(ValueError, match=r"float32 or float64 on cpu, got torch\.float16"):
        TableAdamW([torch.zeros(V, D, dtype=torch.float16)])
