"""Files that are mangled, foreign or at the edge of what can be written: a domain, or an error that names the file.

Reading and importing agree on each.
"""

import gzip
import io
import itertools
import json
import os
import random
import subprocess
import sys
import warnings
from datetime import date, datetime, timezone
from fractions import Fraction

import numpy as np
import polars as pl
import pytest

from metarec_fast.data import import_file, read
from metarec_fast.data.io import importing

FOUND = ("user_id", "item_id", "timestamp")


@pytest.fixture
def both(tmp_path, monkeypatch):
    """What reading and importing a file both give: a domain, or a message."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def call(path, *, piece=importing.PIECE, **options):
        monkeypatch.setattr(importing, "PIECE", piece)
        results = []
        for load in (read, lambda p, **o: import_file(p, tmp_path / "imported", overwrite=True, **o)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results.append(load(path, **options))
            except ValueError as error:
                results.append(str(error))
        first, second = results
        if isinstance(first, str) or isinstance(second, str):
            assert isinstance(first, str) and isinstance(second, str), results
            assert first.startswith(str(path)) and second.startswith(str(path)), results
            assert len(first) < 3000 and len(second) < 3000
        else:
            assert first.users == second.users and first.items == second.items and first.report == second.report
            for field in ("offsets", "items", "times"):
                mine, theirs = getattr(first.sequences, field), getattr(second.sequences, field)
                assert (mine is None) == (theirs is None)
                assert mine is None or (mine.dtype == theirs.dtype and np.array_equal(mine, theirs))
        return first

    return call


def write(folder, name, content):
    path = folder / name
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def write_parquet(folder, name="d.parquet", **columns):
    pl.DataFrame(columns).write_parquet(io_ := io.BytesIO())
    return write(folder, name, io_.getvalue())


def rows_of(domain):
    s = domain.sequences
    users = np.repeat(np.arange(len(s)), s.lengths)
    times = [None] * len(users) if s.times is None else s.times.tolist()
    return list(zip(domain.users.decode(users), domain.items.decode(s.items), times, strict=True))


# Line ends and encodings


@pytest.mark.parametrize("piece", [1, 10**6])
@pytest.mark.parametrize("end", ["", "\r", "\r\r"])
@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.inter", "d.csv.gz", "d.jsonl"])
def test_lines_that_end_in_a_carriage_return(tmp_path, both, name, end, piece):
    rows = [("1", "10", 3), ("1", "11", 4), ("2", "10", 5)]
    if name == "d.jsonl":
        lines = [json.dumps(dict(zip(FOUND, row, strict=True))) for row in rows]
    else:
        separator = "," if "csv" in name else "\t"
        lines = [separator.join(map(str, row)) for row in (FOUND, *rows)]
    for bom in ("", "\ufeff"):
        domain = both(write(tmp_path, name, bom + "\r".join(lines) + end), piece=piece)
        assert [(str(u), str(i), t) for u, i, t in rows_of(domain)] == rows


@pytest.mark.parametrize("piece", [5, 10**6])
def test_mixed_line_ends(tmp_path, both, piece):
    # Whatever ends the first line, no row is lost and no two rows become one.
    head, rows = "user,item,time", ["a,x,1", "b,y,2", "c,z,3"]
    for ends in itertools.product(("\r", "\n", "\r\n"), ("\r", "\n", "\r\r\n"), ("\r", "\r\n")):
        text = head + "".join(map("".join, zip(ends, rows, strict=True)))
        path = write(tmp_path, "d.csv", text)
        domain = both(path, piece=piece, on_error="skip")
        stray = ends[0] in ("\n", "\r\n") and ("\r" in ends[1:] or "\r\r\n" in ends[1:])
        if stray:
            reported = domain if isinstance(domain, str) else str(domain.report)
            assert "carriage return in the row" in reported
            assert isinstance(domain, str) or domain.report.rejected
        else:
            assert rows_of(domain) == [("a", "x", 1), ("b", "y", 2), ("c", "z", 3)]


def test_carriage_returns_and_quotes(tmp_path, both):
    path = write(tmp_path, "d.csv", 'user,item,"no\rte",time\r"a","x\ry",n,2\r"b","x\r\ny",n,1\r')
    for piece in (1, 9, 10**6):
        assert rows_of(both(path, piece=piece)) == [("a", "x\ny", 2), ("b", "x\ny", 1)]
    path = write(tmp_path, "d.csv", '"user","item"\r"a","x\ry"\r"b","x\r\ny"\r"c,z\r')
    for piece in (1, 9, 10**6):
        domain = both(path, piece=piece, on_error="skip")
        assert "misplaced quote" in (domain if isinstance(domain, str) else str(domain.report))
    path = write(tmp_path, "d.csv", '"user","item"\r"a","x\ry"\r"b","x\r\ny"\r')
    for piece in (1, 9, 10**6):
        assert rows_of(both(path, piece=piece)) == [("a", "x\ny", None), ("b", "x\ny", None)]


@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029"])
def test_only_line_ends_end_lines(tmp_path, both, odd):
    text = f"user,item,time\na{odd}b,x,1\na,{odd},2\n"
    assert rows_of(both(write(tmp_path, "d.csv", text))) == [(f"a{odd}b", "x", 1), ("a", odd, 2)]
    line = json.dumps({"user": f"a{odd}b", "item": "x"}, ensure_ascii=False)
    assert rows_of(both(write(tmp_path, "d.jsonl", line))) == [(f"a{odd}b", "x", None)] or odd < " "


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *(("user,item\na,b\n".encode(code), "got UTF-16") for code in ("utf-16", "utf-16-le", "utf-16-be")),
        ("user,item\na,b\n".encode("utf-32"), "got UTF-32"),
        (b"PK\x03\x04 and so on", "got a zip archive"),
        (b"BZh91AY", "got a bzip2 file"),
        (b"\xfd7zXZ\0\0", "got an xz file"),
        (b"\x28\xb5\x2f\xfd\0", "got a Zstandard file"),
        (b"PAR1\x15", "got a Parquet file"),
        (b"", "empty file"),
        (b"\xef\xbb\xbf\r\n \n", "empty file"),
        ("user,größe\n".encode("latin-1"), "the header is not UTF-8"),
        (b'"user","item' + b"x" * 200_000 + b'"\n', "field larger"),
    ],
)
@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz"])
def test_what_is_no_text_of_ours(tmp_path, both, name, content, reason):
    for piece in (1000, 10**6):
        assert reason in both(write(tmp_path, name, content), piece=piece)


def test_a_packed_file_of_nothing(tmp_path, both):
    path = tmp_path / "d.csv.gz"
    for content in (b"", gzip.compress(b""), gzip.compress(b"user,item\n") + b"rest", gzip.compress(b"user")[:12]):
        path.write_bytes(content)
        message = both(path)
        assert "empty file" in message or "not a complete gzip file" in message


@pytest.mark.skipif(sys.platform != "linux", reason="a file that opens and cannot be read is made by Linux alone")
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_that_opens_and_cannot_be_read_is_named(tmp_path, kind):
    for load in (read, lambda path, **options: import_file(path, tmp_path / "out", **options)):
        with pytest.raises((OSError, ValueError)) as raised:
            load("/proc/self/mem", format=kind)
        assert "/proc/self/mem" in str(raised.value) and str(tmp_path) not in str(raised.value)


# File names


@pytest.mark.parametrize("name", ["d*.parquet", "[ab].parquet", "d?.parquet", "{d,e}.parquet", "year=2020.parquet"])
def test_a_file_name_is_no_pattern(tmp_path, both, name):
    for other in ("d1.parquet", "a.parquet", "d.parquet", "e.parquet"):
        write_parquet(tmp_path, other, user=["wrong"], item=["wrong"])
    assert rows_of(both(write_parquet(tmp_path, name, user=["a"], item=["x"]))) == [("a", "x", None)]


@pytest.mark.parametrize("piece", [7, 40, 1000])
def test_a_row_that_is_too_long(tmp_path, both, monkeypatch, piece):
    monkeypatch.setattr("metarec_fast.data.io.pieces.LONGEST", 64)
    path = write(tmp_path, "d.csv", "user,item\na,x\n" + "b" * 70 + ",y\nc,z\n")
    assert both(path, piece=piece).startswith(f"{path}:3: a row longer than")


def test_a_key_that_is_not_unicode(tmp_path, both):
    path = write(tmp_path, "d.jsonl", r'{"\ud800": "a", "item_id": "x", "\udc00": 3}' + "\n")
    domain = both(path, user="\ud800", time="\udc00")
    assert rows_of(domain) == [("a", "x", 3)] and domain.ordered_by == "\udc00"
    assert both(path, user="\udbff").startswith(f"{path}: no column '\\udbff' for user")


def test_a_file_in_a_folder_that_looks_like_home(tmp_path, both, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    write_parquet(tmp_path / "~", user=["a"], item=["x"])
    assert rows_of(both("~/d.parquet")) == [("a", "x", None)]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_file_name_that_is_not_unicode(tmp_path, both):
    content = {"d.csv": b"user,item\na,x\n", "d.parquet": write_parquet(tmp_path, user=["a"], item=["x"]).read_bytes()}
    for name, data in content.items():
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff" + name.encode()))
        with open(path, "wb") as file:
            file.write(data)
        domain = both(path)
        assert rows_of(domain) == [("a", "x", None)] and domain.name == "\ufffdd"
        command = [sys.executable, "-m", "metarec_fast", "import", path, str(tmp_path / f"{name}-domain")]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "\ufffdd: 1 users".encode() in done.stdout and rb"\udcff" in done.stdout


# JSON: one meaning, whatever path through the reader a line takes


GOOD = {"user_id": "a", "item_id": "x", "timestamp": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"user_id": "b", "user_id": "c", "item_id": "x", "timestamp": 1}', "a key appears twice: 'user_id'"),
        ('{"user_id": "b", "user\\u005fid": "c", "item_id": "x", "timestamp": 1}', "a key appears twice: 'user_id'"),
        ('{"user_id": "b", "item_id": "x", "item_id": "x", "timestamp": 1}', "a key appears twice: 'item_id'"),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "timestamp": 2}', "a key appears twice: 'timestamp'"),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "rating": 1, "rating": 2}', None),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "meta": {"user_id": 1, "user_id": 2}}', None),
        ('{"user\\u005fid": "b", "item_id": "x", "timestamp": 1}', None),
        ('{"user_id": "b", "item_id": "x", "timestamp": "\\ud800"}', "time is not valid Unicode"),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "note": "\\udc00", "\\ud800": 1}', None),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "n": ' + "[" * 400 + "]" * 400 + "}", None),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "n": ' + "[" * 99999 + "]" * 99999 + "}", "nested too deep"),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "n": ' + '{"a":' * 9999 + "1" + "}" * 10000, "too deep"),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "n": ' + "9" * 5000 + "}", "not JSON"),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1' + "0" * 400 + "}", "time"),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1e999}', "time 'inf'"),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1, "note": NaN}', None),
        ('{"user_id": "b", "item_id": "x", "timestamp": 1}}', "not JSON"),
    ],
)
@pytest.mark.parametrize("before", [1, 120])
def test_a_json_line_means_one_thing(tmp_path, both, line, reason, before):
    good = [GOOD | {"timestamp": k} for k in range(before)]
    path = write(tmp_path, "d.jsonl", "\n".join([*map(json.dumps, good), line, json.dumps(GOOD)]))
    for piece in (100, 10**6):
        domain = both(path, piece=piece, on_error="skip")
        assert rows_of(domain).count(("b", "x", 1)) == (reason is None)
        if reason is None:
            assert domain.report.rejected == 0
        else:
            assert [n for n, _ in domain.report.examples] == [before + 1] and reason in domain.report.examples[0][1]
    if reason is not None:
        assert both(path).startswith(f"{path}:{before + 1}: ")


# Times


@pytest.mark.parametrize(
    "text",
    [
        *("31-01-20", "20-01-31", "1-2-3", "031-01-20", "10000-01-01", "+2020-01-01", "-2020-01-01", "2020- 1-05"),
        *("31/01/2020", "31.01.2020", "01-31-2020", "2020-13-01", "2020-02-30", "2020-01-01 24:00:00", "2020-01"),
        *("2020-01-01 10", "2020-01-01 1:2:3", "2020-01-01 10:00:00+99:00", "2020-01-01 10:00:00 CET", "12:30:00"),
        *("2020-01-01Z", "\u0662020-01-01", "2020-W05-1", "0x10", "1_000", "NaN", "-inf", "1e400", "true"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_time_is_a_number_or_an_iso_date(tmp_path, both, suffix, text):
    fine = "2020-01-31" if "-" in text or "/" in text else "5"
    columns = {"user": ["a", "b", "c"], "item": ["x", "y", "z"], "time": [fine, text, fine]}
    if suffix == "parquet":
        path = write_parquet(tmp_path, **columns)
    else:
        lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        lines = (
            map(json.dumps, lines)
            if suffix == "jsonl"
            else [",".join(r.values()) for r in [{"": ",".join(columns)}, *lines]]
        )
        path = write(tmp_path, f"d.{suffix}", "\n".join(lines))
    domain = both(path, on_error="skip")
    assert [u for u, _, _ in rows_of(domain)] == ["a", "c"]
    assert f"time {text!r} is neither a finite number nor an ISO date" in domain.report.examples[0][1]
    assert domain.report.examples[0][0] == {"csv": 3, "jsonl": 2, "parquet": 2}[suffix]


def test_zones_of_dates(tmp_path, both):
    same = ["2019-10-01 10:00:00 UTC", "2019-10-01T10:00:00UTC", "2019-10-01T10:00:00Z", "2019-10-01 12:00:00+02:00"]
    same += ["2019-10-01 10:00", "2019-10-01T10:00:00.000", "2019-10-1 10:00:00 +00:00"]
    same += ["2019-10-01T10:00Z", "2019-10-01 10:00 UTC", "2019-10-01T12:00+02:00", "2019-10-01 12:00 +0200"]
    same += ["2019-10-01 12:00:00+02", "2019-10-01 08:00:00.000-02", "2019-10-01 12:00+02", "2019-10-01 4:30-0530"]
    path = write(tmp_path, "d.csv", "user,item,time\n" + "".join(f"u{k},x,{time}\n" for k, time in enumerate(same)))
    assert set(both(path).sequences.times.tolist()) == {1569924000}


def nearest(microseconds):
    return float(Fraction(microseconds, 10**6))  # a fraction becomes the float nearest to it


@pytest.mark.parametrize(("first", "last"), [("0001-01-01", "9999-12-31"), ("1970-01-01", "2030-01-01")])
def test_microseconds_are_the_nearest_float(tmp_path, both, first, last):
    rng = np.random.default_rng(0)
    bounds = [
        int(datetime.fromisoformat(day).replace(tzinfo=timezone.utc).timestamp()) * 10**6 for day in (first, last)
    ]
    ticks = np.concatenate([rng.integers(*bounds, 3000), [bounds[0], bounds[1] + 1, -1, 0, 1, 999_999, -999_999]])
    if first < "1900":
        ticks = np.concatenate([ticks, [s * 2**53 + k for s in (-1, 1) for k in range(-3, 4)]])
    series = pl.Series(ticks).cast(pl.Datetime("us"))
    expected = [nearest(int(t)) for t in ticks]
    users = [f"u{k}" for k in range(len(ticks))]
    path = write_parquet(tmp_path, user=users, item=["x"] * len(ticks), time=series)
    domain = both(path)
    assert domain.sequences.times.tolist() == expected
    texts = series.dt.to_string("%Y-%m-%dT%H:%M:%S%.6fZ")
    path = tmp_path / "d.csv"
    pl.DataFrame({"user": users, "item": ["x"] * len(ticks), "time": texts}).write_csv(path)
    assert both(path, piece=5000).sequences.times.tolist() == expected


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_dates_at_the_edge_of_their_range(tmp_path, both, unit, zone):
    second = {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    ticks = [-(2**63) + 1, -(2**63) + 2 * second, -1, 0, 1, 2**62 + 1, 2**63 - 1]
    series = pl.Series(ticks, dtype=pl.Int64).cast(pl.Datetime(unit, zone))
    domain = both(write_parquet(tmp_path, user=list("abcdefg"), item=list("abcdefg"), time=series))
    exact = [Fraction(t, second) if unit != "ns" else Fraction(t // 1000, 10**6) for t in ticks]
    assert domain.sequences.times.tolist() == [float(f) for f in exact]


def test_days_at_the_edge_of_their_range(tmp_path, both):
    days = [-(2**31), -1, 0, (date(9999, 12, 31) - date(1970, 1, 1)).days, 2**31 - 1]
    series = pl.Series(days, dtype=pl.Int32).cast(pl.Date)
    domain = both(write_parquet(tmp_path, user=list("abcde"), item=list("abcde"), time=series))
    assert domain.sequences.times.tolist() == [d * 86400 for d in days]


@pytest.mark.parametrize(
    ("series", "kind"),
    [
        (pl.Series([[1], [2]]), "List"),
        (pl.Series([1, 2]).cast(pl.Duration("us")), "Duration"),
        (pl.Series([1, 2]).cast(pl.Time), "Time"),
        (pl.Series([True, False]), "Boolean"),
        (pl.Series([b"a", b"b"]), "Binary"),
        (pl.Series([{"a": 1}, {"a": 2}]), "Struct"),
    ],
)
def test_columns_of_no_use(tmp_path, both, series, kind):
    message = both(write_parquet(tmp_path, user=["a", "b"], item=["x", "y"], time=series), on_error="skip")
    assert "column 'time': time must hold numbers, strings, dates or datetimes" in message and kind in message
    message = both(write_parquet(tmp_path, user=["a", "b"], item=series), on_error="skip")
    assert "column 'item' must hold strings or integers" in message and kind in message


def test_whole_numbers_of_more_than_64_bits(tmp_path, both):
    wide = pl.Series([2**100, 7, -(2**63)], dtype=pl.Int128)
    path = write_parquet(tmp_path, user=["a", "b", "c"], item=["x", "y", "z"], time=wide)
    assert both(path).startswith(f"{path}:row 1: time {2**100} is neither a finite number")
    assert rows_of(both(path, on_error="skip")) == [("b", "y", 7), ("c", "z", -(2**63))]
    message = both(write_parquet(tmp_path, user=wide, item=["x", "y", "z"]))
    assert "column 'user' must hold strings or integers, got Int128 of more than 64 bits" in message


@pytest.mark.parametrize("text", ["2020/01/31", "2020.01.31 10:00"])
def test_a_date_without_hyphens_gets_an_error_with_advice(tmp_path, both, text):
    message = both(write(tmp_path, "d.csv", f"user,item,time\na,x,{text}\n"))
    assert f"{text!r} is neither a finite number nor an ISO date: write it with hyphens, as in 2020-01-31" in message


def test_columns_of_nulls(tmp_path, both):
    nulls = pl.Series([None, None])
    message = both(write_parquet(tmp_path, user=["a", "b"], item=["x", "y"], time=nulls), on_error="skip")
    assert "none of 2 rows can be used" in message and "row 1: missing time" in message
    assert "must hold strings or integers, got Null" in both(write_parquet(tmp_path, user=nulls, item=["x", "y"]))


# Anything at all


def separated(rng, separator):
    quote = '"{}"' if rng.random() < 0.4 else "{}"
    rows = [FOUND, *((f"u{rng.randrange(5)}", rng.randrange(9), rng.randrange(10**9)) for _ in range(rng.randrange(9)))]
    end = rng.choice(["\n", "\r\n", "\r"])
    return "".join(separator.join(map(quote.format, row)) + end for row in rows).encode()


def json_lines(rng):
    more = {"meta": {"a": [1, "x"]}} if rng.random() < 0.3 else {}
    rows = [(f"u{rng.randrange(5)}", rng.randrange(9), rng.randrange(10**9)) for _ in range(1 + rng.randrange(9))]
    return "".join(json.dumps(dict(zip(FOUND, row, strict=True)) | more) + "\n" for row in rows).encode()


def parquet(rng):
    count, out = rng.randrange(1, 9), io.BytesIO()
    columns = {name: [rng.randrange(9) for _ in range(count)] for name in FOUND}
    columns["user_id"] = [f"u{u}" for u in columns["user_id"]]
    compression = rng.choice(["zstd", "snappy", "uncompressed"])
    pl.DataFrame(columns).write_parquet(out, row_group_size=3, compression=compression)
    return out.getvalue()


PARTS = [
    *(b'"', b'""', b"\r", b"\n", b"\0", b"\xff", b"\xef\xbb\xbf", b",", b"\t", b";", b"9" * 40, b"-1e400", b"[" * 3000),
    *(b'{"a":' * 600, b"\\ud800", b"\\u005f", b'"user_id":1,', b"nan", b"31-01-20", b"9999-12-31 23:59:59.999999999"),
    *("\u2028".encode(), b"\xed\xa0\x80", b"x" * 5000, b":token", b"null", b"true", b"{}", b"[]", b"0" * 30, b"PAR1"),
]


def mutated(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, until = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
        part = rng.choice(PARTS)
        how = rng.randrange(6)
        if how == 0:
            del content[at:]
        elif how == 1 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            content[at:at] = part
        elif how == 3:
            del content[at:until]
        elif how == 4:
            content[at:at] = content[at : min(until, at + 30)]
        else:
            content[at : at + len(part)] = part
    return bytes(content)


MAKERS = {
    "d.csv": lambda rng: separated(rng, rng.choice(",;\t")),
    "d.tsv": lambda rng: separated(rng, "\t"),
    "d.inter": lambda rng: separated(rng, "\t"),
    "d.jsonl": json_lines,
    "d.parquet": parquet,
}


@pytest.mark.parametrize("name", MAKERS)
def test_mutated_files_are_domains_or_errors_that_name_them(tmp_path, both, name):
    rng = random.Random(name)
    good = 0
    for _ in range(40):
        content = mutated(rng, MAKERS[name](rng))
        packed = rng.random() < 0.15
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(mutated(rng, gzip.compress(content)) if packed else content)
        got = both(path, piece=rng.choice([1, 20, 200, 10**6]), on_error=rng.choice(["raise", "skip", "skip"]))
        good += not isinstance(got, str)
    assert 3 < good < 37
