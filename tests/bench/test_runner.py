"""One command runs every benchmark, and the pages show what the results hold."""

import runpy
import sys

import pytest

from bench import __main__ as runner
from bench import pages

MODULES = [name for name in runner.BENCHMARKS if name != "ratios"]


def test_the_list_names_every_benchmark(capsys):
    assert runner.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in runner.BENCHMARKS)
    scripts = {p.stem for p in (runner.ROOT / "bench").glob("*.py") if "__main__" in p.read_text(encoding="utf-8")}
    assert {name for name in scripts if not name.startswith("bench_")} == {*MODULES, "__main__"}
    assert runner.main(["wings"]) == 2 and "got 'wings'" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODULES)
def test_help_is_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"bench.{name}", run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage:")


def test_figures_of_the_pages_are_those_of_the_results():
    for path, text in pages.pages().items():
        where = path.relative_to(pages.ROOT)
        assert path.read_text(encoding="utf-8") == text, f"{where} differs: python -m bench pages writes it"


def test_a_page_without_its_block_is_an_error():
    results = pages.Results.of(pages.PUBLISHED)
    text = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"README.md must have one block <!-- bench: summary --> .* has 0"):
        pages.with_blocks("README.md", text.replace("bench: summary", "bench: other"), results)
    with pytest.raises(KeyError, match="no result of 'flight'"):
        results.row("flight", "birds", "1")


def test_a_block_changes_with_the_results():
    results = pages.Results.of(pages.PUBLISHED)
    before = pages.summary_table(results)
    for row in results.rows:
        row["ratio"] = str(2 * float(row["ratio"]))
    assert pages.summary_table(results) != before and "| 4.8 | 2.4 |" in pages.summary_table(results)
