"""The fixture ``compare``: right first, then how much faster than the baseline, kept in results/<device>.csv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.machine import RESULTS, commit, machine, slug, versions
from bench.ratio import Ratio, interleaved, write_row


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= machine("cpu") | {"versions": versions(), "commit": commit()}


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Ratio]:
    """``compare(fast, baseline, subject=, shape=, against=, check=)`` -> `Ratio`.

    fast, baseline: callables without arguments that do the same work. check: called with both results before anything
    is timed, raises if they disagree. subject, shape, dtype, against (the baseline's name), provider: words for the
    row; packages: distributions whose versions belong to it. device: "cpu" or "cuda".

    The fast one's own time goes to pytest-benchmark, with the ratio in ``extra_info``. The row is written with
    ``--benchmark-only`` (``make bench``); under ``--benchmark-disable`` the results are checked and nothing is timed.
    """

    def run(
        fast: Callable[[], Any],
        baseline: Callable[[], Any],
        *,
        subject: str,
        shape: str,
        against: str,
        check: Callable[[Any, Any], None],
        provider: str = "metarec_fast",
        dtype: str = "float32",
        device: str = "cpu",
        packages: tuple[str, ...] = (),
        rounds: int = 15,
    ) -> Ratio | None:
        check(fast(), baseline())
        benchmark.group = f"{subject} {shape} {dtype}"
        if benchmark.disabled:
            benchmark.pedantic(fast)
            return None
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        ratio = interleaved(fast, baseline, rounds=rounds, synchronize=synchronize)
        row = {"subject": subject, "provider": provider, "baseline": against, "dtype": dtype, "shape": shape}
        row |= {name: f"{value:.4g}" for name, value in ratio._asdict().items()} | {"rounds": rounds}
        row |= machine(device) | {"versions": versions(*packages), "commit": commit()}
        benchmark.extra_info.update(row)
        benchmark.pedantic(lambda: (fast(), synchronize()), rounds=5, warmup_rounds=1)
        if request.config.getoption("benchmark_only"):
            write_row(RESULTS / f"{slug(row['device'])}.csv", row)
        return ratio

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The ratios under pytest-benchmark's own table."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for bench in session.benchmarks if session else ():
        if info := bench.extra_info:
            terminalreporter.write_line(
                f"{info['subject']} {info['shape']}: {info['ratio']}x as fast as {info['baseline']} "
                f"({info['p5']} to {info['p95']}; {info['fast_ms']} ms, {info['baseline_ms']} ms)"
            )
