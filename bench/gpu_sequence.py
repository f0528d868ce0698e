"""Cases of bench/gpu_kernels.py: linear_scan, linear_cross_entropy, and the outer step they serve.

Data are drawn here: nothing is read.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bench_meta
from bench.gpu_case import Case, Rates
from bench.peers import padded_meta_step
from metarec_fast import ops, reference
from metarec_fast.config import MetaConfig
from metarec_fast.meta import CapturedStep, FixedStep, Source, outer_step
from metarec_fast.sampling.batch import BatchShape

Wanted = Callable[[dict[str, str]], bool]
Providers = Iterator[tuple[str, Callable[[], Any]]]
CHECKED_ROWS = 1024


class Packed(NamedTuple):
    """B windows of L positions at most, half of that on average, D complex channels."""

    B: int
    L: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B} L{self.L} D{self.D}"


class Catalogue(NamedTuple):
    T: int
    V: int
    D: int

    def __str__(self) -> str:
        return f"T{self.T} V{self.V} D{self.D}"


SCANS = (Packed(128, 16, 128), Packed(128, 64, 128), Packed(1024, 64, 128), Packed(128, 1024, 128))
TINY_SCANS = (Packed(5, 8, 6),)
CATALOGUES = tuple(Catalogue(T, V, 64) for V in (12_000, 57_289) for T in (900, 3_600, 20_000))
TINY_CATALOGUES = (Catalogue(30, 50, 16),)


def close(found: Any, expected: Any, *, tolerance: float) -> None:
    """Every tensor within ``tolerance`` of its largest element."""
    ours, theirs = (torch.utils._pytree.tree_leaves(x) for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        other = other.to(one.device, torch.float64)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * float(other.abs().max()))


def row(kernel: str, shape: object) -> dict[str, str]:
    return {"kernel": kernel, "dtype": "float32", "shape": str(shape)}


def scan_cases(device: str, wanted: Wanted, rates: Rates) -> Iterator[Case]:
    """Forward, and the gradients of both inputs; the peer is the scan over padded rows by doubling blocks."""
    for shape in SCANS if device == "cuda" else TINY_SCANS:
        rows = [row(kernel, shape) for kernel in ("linear_scan", "linear_scan backward")]
        if not any(map(wanted, rows)):
            continue
        B, L, D = shape
        lengths = torch.randint(1, L + 1, (B,))
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        T = int(offsets[-1])
        a = torch.polar(torch.full((D,), 0.95), 6 * torch.rand(D))
        a, u, weight = torch.stack((a.real, a.imag)), torch.randn(T, 2, D), torch.randn(T, 2, D)
        exact = [x.double().requires_grad_() for x in (a, u)]
        h = ops.linear_scan(*exact, offsets)  # the C++ kernel in float64
        expected = h.detach(), torch.autograd.grad(h, exact, weight.double())

        on = [x.to(device).requires_grad_() for x in (a, u)]
        at, weight = offsets.to(device), weight.to(device)
        valid = (torch.arange(L) >= L - lengths[:, None]).to(device)
        padded = [torch.complex(*on[0]), torch.zeros(B, L, D, dtype=torch.complex64, device=device)]
        padded[1][valid] = torch.complex(*on[1].detach().unbind(1))
        padded = [x.detach().requires_grad_() for x in padded]

        def forward(on: list = on, at: Tensor = at, padded: list = padded, valid: Tensor = valid) -> Providers:
            yield "metarec_fast", lambda: ops.linear_scan(*(x.detach() for x in on), at)
            yield "torch padded, by doubling", lambda: padded_meta_step.scan(*(x.detach() for x in padded), valid)

        def backward(
            on: list = on, at: Tensor = at, padded: list = padded, valid: Tensor = valid, weight: Tensor = weight
        ) -> Providers:
            h = ops.linear_scan(*on, at)
            yield "metarec_fast", lambda: torch.autograd.grad(h, on, weight, retain_graph=True)
            other = padded_meta_step.scan(*padded, valid)
            ones = torch.ones_like(other)
            yield "torch padded, by doubling", lambda: torch.autograd.grad(other, padded, ones, retain_graph=True)

        for names, providers, right, passes in zip(rows, (forward, backward), expected, (2, 3), strict=True):
            if wanted(names):
                roofline_ms = 1e3 * passes * T * 2 * D * 4 / rates.copy
                yield Case(
                    names, providers(), lambda found, right=right: close(found, right, tolerance=1e-5), roofline_ms
                )


def cross_entropy_cases(device: str, wanted: Wanted, rates: Rates) -> Iterator[Case]:
    """The mean loss and the gradients of states, table and bias."""
    for shape in CATALOGUES if device == "cuda" else TINY_CATALOGUES:
        names = row("linear_cross_entropy fwd+bwd", shape)
        if not wanted(names):
            continue
        T, V, D = shape
        inputs = [torch.randn(T, D), torch.randn(V, D) / D**0.5, torch.randn(V)]
        h, table, bias = (x.to(device).requires_grad_() for x in inputs)
        targets = torch.randint(V, (T,), device=device)

        def result(loss: Tensor, wanted: tuple = (h, table, bias)) -> tuple[Tensor, tuple[Tensor, ...]]:
            return loss.detach(), torch.autograd.grad(loss, wanted)

        def dense(h: Tensor, table: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(torch.addmm(bias, h, table.T), targets)

        def providers(given: tuple = (h, table, bias, targets), result: Callable = result) -> Providers:
            h, table, bias, targets = given
            ours = lambda: ops.linear_cross_entropy(h, table, targets, bias, reduction="mean")  # noqa: E731
            yield "metarec_fast", lambda: result(ours())
            yield "torch addmm+cross_entropy", lambda: result(dense(*given))
            compiled = torch.compile(dense, backend="inductor" if device == "cuda" else "eager")
            yield "torch.compile addmm+cross_entropy", lambda: result(compiled(*given))

        def check(found: Any, given: tuple = (h, table, bias, targets), T: int = T) -> None:
            *floats, targets = given
            exact = h, table, bias = [x.detach().double().requires_grad_() for x in floats]
            total, grads = 0.0, [torch.zeros_like(x) for x in exact]
            for rows in torch.arange(len(targets), device=targets.device).split(CHECKED_ROWS):
                loss = reference.linear_cross_entropy(h[rows], table, targets[rows], bias, reduction="sum") / T
                for grad, part in zip(grads, torch.autograd.grad(loss, exact), strict=True):
                    grad += part
                total = total + loss.detach()
            close(found, (total, grads), tolerance=1e-4)

        moved = 4 * (2 * T * D + 2 * V * (D + 1) + 3 * T)
        roofline_ms = 1e3 * max(moved / rates.copy, 3 * 3 * 2.0 * T * V * D / rates.tf32)
        yield Case(names, providers(), check, roofline_ms)


def outer_step_cases(device: str, wanted: Wanted, rates: Rates) -> Iterator[Case]:
    """Four sources and a target of bench_meta's sizes. Ours, captured first, against padded rows and dense logits."""
    windows = 128 if device == "cuda" else 4
    rows = {order: row(f"outer step, order {order}", f"S4 B{windows} L50 D64") for order in (1, 2)}
    if not any(map(wanted, rows.values())):
        return
    model, shared, private, batches, names = bench_meta.world(4, batch_size=windows)
    model.to(device)
    shared, *tables = (
        {k: v.detach().to(device).requires_grad_() for k, v in part.items()} for part in (shared, *private.values())
    )
    private = dict(zip(private, tables, strict=True))
    *sources, target = names
    padded = {n: padded_meta_step.pad_left(b.items, b.targets, b.offsets, 64) for n, b in batches.items()}
    padded = {n: tuple(x.to(device) for x in batch) for n, batch in padded.items()}
    positions = {n: len(b.items) for n, b in batches.items()}
    batches = {n: b.to(device) for n, b in batches.items()}
    # an eighth more than this batch has: about three times what batches of 128 windows vary by
    shapes = {n: BatchShape(windows, T + T // 8, model.config.max_length) for n, T in positions.items()}
    compiled = copy.deepcopy(model)
    compiled.compile_encoder(backend="inductor" if device == "cuda" else "aot_eager")

    def public(order: int, *, valid_only: bool) -> tuple:
        given = [(private[n], padded[n]) for n in sources]
        options = {"layers": model.config.layers, "beta": model.config.commitment_weight, "order": order}
        meta = MetaConfig()
        options |= {k: getattr(meta, k) for k in ("inner_lr", "temperature", "source_loss_weight")}
        return padded_meta_step.outer_step(
            shared, given, private[target], padded[target], valid_only=valid_only, **options
        )

    def providers(order: int) -> Providers:
        def captured(loss: Callable = model.loss, target_pass: str = "loop", **options: Any) -> Callable[[], Any]:
            config = MetaConfig(similarity_decay=0.0, order=order, target_pass=target_pass)
            kind = CapturedStep if device == "cuda" else FixedStep
            step = kind(
                loss, shared, {n: private[n] for n in sources}, private[target],
                shapes=shapes, target_shape=shapes[target], config=config, **(options if device == "cuda" else {}),
            )  # fmt: skip
            given = {n: [batches[n]] for n in sources}
            return lambda: step(given, batches[target])

        yield "metarec_fast captured", captured()
        yield "captured, sources side by side", captured(parallel=True)
        yield "captured, target vmapped", captured(target_pass="vmap")
        if order == 1:  # a compiled encoder has one derivative
            yield "captured, encoder compiled", captured(compiled.loss)
            yield "captured, compiled, side by side", captured(compiled.loss, parallel=True)
        config = MetaConfig(similarity_decay=0.0, order=order)
        given = [Source(n, private[n], [batches[n]]) for n in sources]
        yield "eager", lambda: outer_step(model.loss, shared, given, private[target], batches[target], config=config)
        yield "padded, dense logits", lambda: public(order, valid_only=False)
        yield "padded, logits at valid ones", lambda: public(order, valid_only=True)

    def check(found: Any, order: int) -> None:
        ours = found.shared_grad, found.target_grad, list(found.source_grads.values()), found.weights
        close(ours, public(order, valid_only=True), tolerance=1e-4)

    D, passes = model.config.dim, [*sources, *[target] * len(sources)]
    weights = sum(p.numel() for name, p in shared.items() if name.startswith("encoder") and p.dim() == 2)
    products = sum(6.0 * positions[n] * (D * bench_meta.SHAPES[n][1] + weights) for n in passes)
    moved = 4.0 * sum(2 * D * bench_meta.SHAPES[n][1] for n in passes)
    roofline_ms = 1e3 * max(moved / rates.copy, 3 * products / rates.tf32)
    for order, names in rows.items():
        if wanted(names):
            yield Case(names, providers(order), lambda found, order=order: check(found, order), roofline_ms)


def cases(device: str, only: str, rates: Rates) -> Iterator[Case]:
    for kind in (scan_cases, cross_entropy_cases, outer_step_cases):
        yield from kind(device, lambda names: only in " ".join(names.values()), rates)
