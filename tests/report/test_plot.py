"""Charts say what they were given, in well-formed SVG."""

from xml.etree import ElementTree

import pytest

from metarec_fast.report.plot import MOST_PLACES, Band, Interval, Point, heat_map, interval_chart, line_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_lines_go_through_their_points():
    lines = {"a < b": [Point("1%", 0.1), Point("10%", 0.3)], "c": [Point("10%", 0.2)]}
    svg = line_chart(lines, title="NDCG & users", y_from_zero=True)
    shown = texts(svg)
    assert {"NDCG & users", "a < b", "c", "1%", "10%"} <= set(shown)
    first, second = ElementTree.fromstring(svg).findall(f"{SVG}polyline")
    ys = [float(pair.split(",")[1]) for pair in first.get("points").split()]
    (y,) = [float(pair.split(",")[1]) for pair in second.get("points").split()]
    assert ys[0] > y > ys[1]  # downwards in SVG
    assert y == pytest.approx((ys[0] + ys[1]) / 2, abs=0.11)


def test_intervals_lie_about_zero():
    svg = interval_chart([Interval("up", 0.1, 0.05, 0.2, strong=True), Interval("down", -0.1, -0.2, 0.0)], title="t")
    up, down = ElementTree.fromstring(svg).findall(f"{SVG}circle")
    zero = next(e for e in ElementTree.fromstring(svg).findall(f"{SVG}line") if e.get("stroke") == "#444")
    assert float(down.get("cx")) < float(zero.get("x1")) < float(up.get("cx"))
    assert up.get("fill") != "#fff" == down.get("fill")
    assert {"up", "down", "0.1", "-0.1"} <= set(texts(svg))
    assert "+10.0%" in texts(interval_chart([Interval("up", 0.1, 0.05, 0.2)], title="t", percent=True))


def test_a_band_lies_behind_the_lines_and_is_named():
    line = {"a": [Point("1", 0.0), Point("2", 0.1)]}
    svg = line_chart(line, title="t", band=Band("noise", -0.2, 0.2))
    assert "noise" in texts(svg)
    first, *_ = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}rect") if e.get("width") != "100%"]
    (polyline,) = ElementTree.fromstring(svg).findall(f"{SVG}polyline")
    ys = [float(pair.split(",")[1]) for pair in polyline.get("points").split()]
    top, height = float(first.get("y")), float(first.get("height"))
    # 0 in the middle of the band, .1 in the middle of its upper half
    assert ys == pytest.approx([top + height / 2, top + height / 4], abs=0.11)


def test_many_places_are_not_all_named():
    points = [Point(str(10 * (i + 1)), 0.1) for i in range(30)]
    named = set(texts(line_chart({"a": points}, title="t"))) & {point.place for point in points}
    assert len(named) <= MOST_PLACES and "300" in named


def test_a_heat_map_shows_every_pair():
    svg = heat_map(["a", "b < c"], [[1.0, 0.25], [0.25, 1.0]], title="t")
    assert (
        texts(svg).count("0.25") == 2
        and texts(svg).count("1.00") == 2
        and {"a  1", "b < c  2", "1", "2"} <= set(texts(svg))
    )
    fills = [e.get("fill") for e in ElementTree.fromstring(svg).iter(f"{SVG}rect") if e.get("width") == "62.0"]
    assert fills[0] == fills[3] == "#0072b2" and fills[1] == fills[2] not in ("#ffffff", "#0072b2")
    with pytest.raises(ValueError, match="a square over 2 names"):
        heat_map(["a", "b"], [[1.0, 0.0]], title="t")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.07, 0.13, [-0.05, 0, 0.05, 0.1]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="at least one point"):
        line_chart({}, title="t")
    with pytest.raises(ValueError, match="at least one interval"):
        interval_chart([], title="t")
