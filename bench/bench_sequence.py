"""The loss over an item table and the scan of the encoder, against what torch makes of them.

linear_cross_entropy: against a product, then cross_entropy on the [T, V] logits, eager and compiled. The shapes are
packed batches of a small, a mid-sized and a large domain; the composition gets valid rows only, too.
linear_scan: against a loop over time on padded rows, one step for all segments at once, eager.

python -m bench.bench_sequence prints what the processor's multiply-adds would take and the fraction that is reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarec_fast.ops import linear_cross_entropy, linear_scan

SHAPES = [(300, 2_420, 64), (900, 12_000, 64), (900, 57_289, 64), (3_600, 12_000, 64)]
SCANS = [(900, 128, 128), (20_000, 128, 128), (20_000, 4, 128)]  # events, segments of one length, width


def problem(T, V, D):
    generator = torch.Generator().manual_seed(0)
    h, table = torch.randn(T, D, generator=generator), torch.randn(V, D, generator=generator) / 4
    bias, targets = torch.zeros(V), torch.randint(V, (T,), generator=generator)
    return [x.requires_grad_() for x in (h, table, bias)], targets


def fused(h, table, bias, targets):
    return linear_cross_entropy(h, table, targets, bias, reduction="mean")


def dense(h, table, bias, targets):
    return F.cross_entropy(torch.addmm(bias, h, table.T), targets)


def first_order(loss, inputs, targets):
    value = loss(*inputs, targets)
    return value.detach(), *torch.autograd.grad(value, inputs)


def second_order(loss, inputs, targets):
    """Forward, backward and the product of the Hessian with the gradient."""
    first = torch.autograd.grad(loss(*inputs, targets), inputs, create_graph=True)
    return torch.autograd.grad(first, inputs, [g.detach() for g in first])


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_loss_and_gradients(compare, compiled, shape):
    case = problem(*shape)
    baseline = torch.compile(dense) if compiled else dense
    compare(
        lambda: first_order(fused, *case),
        lambda: first_order(baseline, *case),
        subject="linear_cross_entropy forward+backward",
        shape="T={} V={} D={}".format(*shape),
        against="torch addmm + cross_entropy" + (", compiled" if compiled else ""),
        check=same,
        rounds=9,
    )


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_second_order(compare, shape):
    case = problem(*shape)
    compare(
        lambda: second_order(fused, *case),
        lambda: second_order(dense, *case),
        subject="linear_cross_entropy second order",
        shape="T={} V={} D={}".format(*shape),
        against="torch addmm + cross_entropy",
        check=same,
    )


def scan_problem(T, segments, width):
    generator = torch.Generator().manual_seed(0)
    modulus, phase = torch.rand(width, generator=generator) * 0.9, torch.rand(width, generator=generator) * 6
    a = torch.stack((modulus * phase.cos(), modulus * phase.sin()))
    u, weight = (torch.randn(T, 2, width, generator=generator) for _ in range(2))
    return (a.requires_grad_(), u.requires_grad_()), torch.linspace(0, T, segments + 1).long(), weight


def loop_over_time(a: Tensor, u: Tensor, offsets: Tensor) -> Tensor:
    """The recurrence, one step of all segments at a time."""
    lengths = offsets.diff()
    u_LB = torch.nn.utils.rnn.pad_sequence(torch.complex(*u.unbind(1)).split(lengths.tolist()))
    a_D = torch.complex(*a.unbind(0))
    steps = [u_LB[0]]
    for u_B in u_LB[1:]:
        steps.append(a_D * steps[-1] + u_B)
    inside = torch.arange(len(steps)) < lengths[:, None]
    return torch.view_as_real(torch.stack(steps, 1)[inside]).movedim(-1, 1)


@pytest.mark.parametrize("shape", SCANS, ids=str)
def test_scan(compare, shape):
    inputs, offsets, weight = scan_problem(*shape)

    def run(scan: Callable) -> tuple[Tensor, ...]:
        h = scan(*inputs, offsets)
        return h.detach(), *torch.autograd.grad(h, inputs, weight)

    compare(
        lambda: run(linear_scan),
        lambda: run(loop_over_time),
        subject="linear_scan forward+backward",
        shape="T={} segments={} D={}".format(*shape),
        against="torch loop over time",
        check=same,
        rounds=9 if shape[1] > 10 else 3,
    )


def main() -> None:
    """Time in the least of several runs against 6 T V D operations at the measured peak."""
    from metarec_fast.ops.peak import measured_peak

    def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
        times = []
        for _ in range(9):
            begin = clock()
            run()
            times.append(clock() - begin)
        return min(times)

    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        clock = (
            time.thread_time if threads == 1 else time.perf_counter
        )  # one thread's time is its own on a busy machine
        peak = measured_peak(threads).flops
        for shape in SHAPES:
            T, V, D = shape
            case = problem(*shape)
            taken = seconds(lambda case=case: first_order(fused, *case), clock)
            print(
                f"{threads} threads, T={T} V={V} D={D}: {1e3 * taken:.2f} ms, "
                f"{100 * 6 * T * V * D / taken / peak:.0f} % of {1e-9 * peak:.0f} GFLOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
