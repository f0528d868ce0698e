import csv
import sys
from xml.etree import ElementTree

import pytest

from bench import scaling


def row(axis, value, ms):
    spread = {"ms": ms, "p5": 0.9 * ms, "p95": 1.2 * ms, "extra_mib": 2.0 * ms}
    return {"axis": axis, "value": value, "exponent": 1.0, "memory_exponent": 1.0} | spread


def test_the_exponent_is_of_the_upper_half():
    sizes = [1, 10, 100, 1000]
    assert scaling.exponent(sizes, [5.0, 5.0, 3e4, 3e6]) == pytest.approx(2)
    assert scaling.exponent([1, 2, 4], [9.0, 2.0, 4.0]) == pytest.approx(1)


def test_the_plot_shows_every_point():
    drawn = scaling.svg([row(axis, v, 10.0 + v) for axis, vs in scaling.AXES.items() for v in vs], "caption & more")
    svg = ElementTree.fromstring(drawn)
    dots = list(svg.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 2 * sum(map(len, scaling.AXES.values()))
    width, height = float(svg.get("width")), float(svg.get("height"))
    assert all(0 < float(d.get("cx")) < width and 0 < float(d.get("cy")) < height for d in dots)


def test_axes_hold_the_sizes_given():
    assert scaling.AXES["sources"][0] == 1 and scaling.AXES["sources"][-1] == 8
    assert scaling.AXES["items"][0] == 10**3 and scaling.AXES["items"][-1] == 10**6
    assert scaling.AXES["length"][0] == 20 and scaling.AXES["length"][-1] == 1000
    assert scaling.AXES["batch"][0] == 64 and scaling.AXES["batch"][-1] == 2048


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_a_run_writes_its_table_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "FIXED", {"sources": 1, "items": 300, "length": 20, "batch": 8})
    monkeypatch.setattr(scaling, "QUICK", {"sources": (1, 2)})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick", "--rounds", "2", "--out", str(tmp_path)])
    scaling.main()
    (table,) = tmp_path.glob("scaling-*.csv")
    one, two = csv.DictReader(table.open(encoding="utf-8"))
    assert (one["value"], two["value"]) == ("1", "2") and 0 < float(one["p5"]) <= float(one["ms"]) <= float(one["p95"])
    assert float(one["positions"]) < float(two["positions"])
    assert (tmp_path / "scaling.svg").exists()
