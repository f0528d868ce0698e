import subprocess
import sys
from pathlib import Path

import pytest

from bench.ratio import COLUMNS
from bench.summary import GOALS, NAMES, least_ratios, summary, verdict

FAISS = GOALS[0]


def rows(ratios, baseline="faiss IndexFlatL2", subject="nearest_codeword"):
    other = dict.fromkeys(COLUMNS, "1") | {"subject": subject, "baseline": baseline}
    return [other | {"shape": shape, "ratio": str(ratio)} for shape, ratio in zip(NAMES, ratios, strict=False)]


@pytest.mark.parametrize(
    ("ratios", "mean", "words"),
    [
        ([2.0] * 6, 2.0, "met"),
        ([1.2] + [2.5] * 5, 1.2 ** (1 / 6) * 2.5 ** (5 / 6), "met"),
        ([1.1] + [9.0] * 5, 1.1 ** (1 / 6) * 9 ** (5 / 6), "NOT met"),
        ([1.9] * 6, 1.9, "NOT met"),
        ([4.0, 1.0], 2.0, "2 of 6 sizes measured"),
    ],
)
def test_goal_of_mean_and_least(ratios, mean, words):
    found, said = verdict(FAISS, ratios)
    assert found == pytest.approx(mean) and said == f"goal 2, never below 1.2: {words}"


def test_the_fastest_baseline_counts():
    both = rows([3.0] * 6, "faiss IndexFlatL2, OpenBLAS Haswell") + rows(
        [1.5] * 6, "faiss IndexFlatL2, OpenBLAS SkylakeX"
    )
    other = rows([0.1] * 6, "torch addmm + argmin") + rows([0.1] * 6, subject="FastVQ in eval mode")
    assert {row["ratio"] for row in least_ratios(both + other, FAISS).values()} == {"1.5"}
    text = summary(both + other)
    assert "lookup against faiss: geometric mean 1.5 goal 2, never below 1.2: NOT met" in text
    assert "eval forward against vector_quantize_pytorch: not measured" in text
    assert text.count("SkylakeX") == 6


def test_the_command(tmp_path):
    script = Path(__file__).parents[2] / "bench" / "summary.py"
    missing = subprocess.run([sys.executable, script, tmp_path / "none.csv"], capture_output=True, text=True)
    assert missing.returncode == 2 and "none.csv does not exist: run `make bench`" in missing.stderr
    (tmp_path / "cpu.csv").write_text(",".join(COLUMNS) + "\n" + ",".join(["x"] * len(COLUMNS)) + "\n")
    run = subprocess.run([sys.executable, script, tmp_path / "cpu.csv"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("x\nlookup against faiss: not measured\n")
