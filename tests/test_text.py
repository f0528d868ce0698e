"""Names and paths of other people: no markup, no control characters, no HTML wherever they are shown."""

import io
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from metarec_fast.report.console import ConsoleReporter, plain_console
from metarec_fast.report.plot import Interval, Point, heat_map, interval_chart, line_chart
from metarec_fast.report.table import Row, markdown
from metarec_fast.text import file_name, printable
from metarec_fast.text import markdown as text_in_markdown

NASTY = "[/]a|b<script>\n\x1b[31m:smile:\udcff\u202e`*"
SHOWN = r"[/]a|b<script>\n\x1b[31m:smile:\udcff\u202e`*"


def test_what_is_hidden_is_escaped_and_the_rest_stays():
    assert printable(NASTY) == SHOWN
    for plain in ("Bücher 书 कि\u200d क", "a b", "na\u00a0me", ""):
        assert printable(plain) == plain


def test_markdown_has_no_html_no_link_and_no_new_cell():
    assert text_in_markdown("amazon14_office, 5%") == "amazon14_office, 5%"
    escaped = text_in_markdown("a|b<i>&[x](y)`*\n")
    assert escaped == r"a\|b&lt;i&gt;&amp;\[x\](y)\`\*\\n"


@pytest.mark.parametrize(
    ("name", "want"),
    [("shop", "shop"), ("../../etc", "_.._etc"), ("a/b", "a_b"), ("..", "unnamed"), ("", "unnamed"), (".x", "x")],
)
def test_a_file_name_is_one_part_of_a_path(name, want):
    assert file_name(name) == want
    assert len(file_name("ä" * 500).encode()) <= 200


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("made", [lambda **o: Console(**o), None], ids=["console of rich", "ours"])
def test_progress_of_any_name_is_shown_as_it_is(terminal, made, tmp_path):
    out = io.StringIO()
    console = (made or Console)(file=out, force_terminal=terminal, width=200, color_system=None)
    with ConsoleReporter(console=console, log=tmp_path / "log.jsonl") as reporter:
        reporter.begin(f"from {NASTY}")
        reporter.step("finetune", 1, 2, {"losses": {NASTY: 1.5}})
        reporter.evaluation("finetune", 1, "NDCG@10", 0.5, 0.5)
    assert SHOWN in out.getvalue() and "\x1b[31m" not in out.getvalue()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_our_console_prints_markup_and_emoji_names_as_text(capsys):
    plain_console().print("[/] [bold]x :smile:", soft_wrap=True)
    assert capsys.readouterr().out == "[/] [bold]x :smile:\n"


def test_charts_stay_xml_with_any_name():
    for svg in (
        line_chart({NASTY: [Point(NASTY, 1.0)]}, title=NASTY),
        interval_chart([Interval(NASTY, 0.1, 0.0, 0.2)], title=NASTY),
        heat_map([NASTY], [[1.0]], title=NASTY),
    ):
        assert any("script" in (node.text or "") for node in ET.fromstring(svg).iter())
        assert "<script" not in svg


def test_a_table_of_results_keeps_its_cells(fitted_metrics=None):
    class Figures:
        recall, ndcg, mrr, protocol, among_all, outside = {10: 0.5}, {10: 0.25}, 0.1, "protocol", None, 0

    table = markdown([Row("MetaRec, adapted from a|<b>", Figures())])
    assert r"| MetaRec, adapted from a\|&lt;b&gt; |" in table
