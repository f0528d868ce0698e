import csv
import time

import pytest

from bench.ratio import COLUMNS, interleaved, write_row


def row(**changes):
    return {name: name for name in COLUMNS} | changes


def test_ratio_of_sleeps():
    ratio = interleaved(lambda: time.sleep(0.002), lambda: time.sleep(0.006), rounds=9)
    assert 2 < ratio.ratio < 4  # 3, with room for the scheduler
    assert ratio.p5 <= ratio.ratio <= ratio.p95
    assert ratio.baseline_ms > ratio.fast_ms > 2


def test_each_round_runs_both_in_varying_order():
    runs = []
    interleaved(lambda: runs.append("f"), lambda: runs.append("b"), rounds=20, shortest_s=0.0)
    warm, rounds = runs[:4], ["".join(runs[i : i + 2]) for i in range(4, 44, 2)]
    assert sorted(warm) == ["b", "b", "f", "f"]
    assert set(rounds) == {"fb", "bf"}
    assert len(runs) == 44


def test_synchronises_before_the_clock_stops():
    clock = interleaved(lambda: None, lambda: None, rounds=3, synchronize=lambda: time.sleep(0.002), shortest_s=0.0)
    assert clock.fast_ms >= 2


def test_rows_are_replaced_by_what_measures_the_same(tmp_path):
    path = tmp_path / "results" / "cpu.csv"
    write_row(path, row(subject="b", ratio=1))
    write_row(path, row(subject="a", ratio=2))
    write_row(path, row(subject="b", ratio=3, commit="later, with a comma"))
    write_row(path, row(subject="b", shape="other", ratio=4))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["subject"], r["shape"], r["ratio"]) for r in rows] == [
        ("a", "shape", "2"),
        ("b", "other", "4"),
        ("b", "shape", "3"),
    ]
    assert rows[2]["commit"] == "later, with a comma"
    with pytest.raises(KeyError):
        write_row(path, {"subject": "a"})
