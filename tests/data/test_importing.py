"""Importing a file gives what reading it gives, in less memory than the file takes; or it leaves nothing."""

import csv
import gzip
import io
import json
import os

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarec_fast.data import import_file, importing, load_domain, read

DERANDOMIZED = settings(deadline=None, derandomize=True, max_examples=150)
FOUND = ("user_id", "item_id", "timestamp")


@pytest.fixture
def small(monkeypatch):
    """Pieces of so many bytes, parts of so many events."""

    def set_sizes(piece, events):
        monkeypatch.setattr(importing, "PIECE", piece)
        monkeypatch.setattr(importing, "EVENT_COST", importing.LEAST_MEMORY // events)

    return set_sizes


def outcome(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except ValueError as error:
        return error


def assert_same(imported, whole):
    assert imported.name == whole.name
    assert imported.users == whole.users and imported.items == whole.items
    assert imported.num_items == whole.num_items
    for field in ("offsets", "items", "times"):
        mine, theirs = getattr(imported.sequences, field), getattr(whole.sequences, field)
        if theirs is None:
            assert mine is None
        else:
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    assert imported.report == whole.report


def assert_import_is_read(folder, path, **options):
    """Both give the same domain, or both an error; an error leaves no trace."""
    target = folder / "domain"
    for on_error in ("skip", "raise"):
        whole = outcome(read, path, on_error=on_error, **options)
        got = outcome(
            import_file, path, target, on_error=on_error, memory=importing.LEAST_MEMORY, overwrite=True, **options
        )
        if isinstance(whole, ValueError):
            assert isinstance(got, ValueError), whole
            assert os.listdir(folder) == (["domain"] if target.exists() else [])
            continue
        if isinstance(got, ValueError):
            raise got
        assert_same(got, whole)
        assert_same(load_domain(target, mmap=False, verify=True), whole)
    return whole


USERS = st.sampled_from(
    ["7", "12", "-3", "007", "+7", " 7", "u", "é", "e\u0301", "🛒", str(2**63), str(2**64), "", "a\0"]
)
PLAIN = st.sampled_from(["1", "2", "3", "44"])
ITEMS = st.sampled_from(["x", "y", "z,w", 'say "hi"', "two\nlines", "1", "22"])
WHOLE = st.integers(0, 9).map(str)
TIMES = WHOLE | st.sampled_from(["1.5", "2e3", " 4 ", "", "soon", "nan", str(2**53 + 1), "-0.0"])
DATES = st.sampled_from(["2020-01-01", "2020-01-01 00:00:00.25", "1969-12-31T23:59:59Z", "2500-01-01"])
ROW = st.tuples(USERS | PLAIN, ITEMS, TIMES) | st.tuples(PLAIN, PLAIN, DATES | WHOLE)
ROWS = st.one_of(
    st.lists(ROW, max_size=12),
    st.lists(st.tuples(PLAIN, PLAIN, WHOLE), max_size=40),
    st.tuples(st.lists(st.tuples(PLAIN, PLAIN, WHOLE), max_size=8), st.lists(ROW, max_size=8)).map(
        lambda two: two[0] + two[1]
    ),
)
BROKEN = st.sampled_from(['"open,x,1', 'a"b,x,1', "a,x", "a,x,1,2", '"a"b,x,1', "", "a\rb,x,1", 'a,"x\ny",3'])


@st.composite
def separated(draw, separator):
    """The bytes of a file: rows as a csv writer quotes them, some broken lines among them."""
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    lines = []
    for row in [FOUND, *draw(ROWS)]:
        out = io.StringIO()
        csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=end).writerow(row)
        lines.append(out.getvalue())
    for broken in draw(st.lists(BROKEN, max_size=2)):
        lines.insert(draw(st.integers(1, len(lines))), broken.replace(",", separator) + end)
    text = "".join(lines)
    text = text.removesuffix(end) if draw(st.booleans()) else text
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()


JSON_ID = st.sampled_from(["7", "007", "é", "", 7, 12, 2**63, 2**64, -5, None, True, 1.5, "\ud83d"])
JSON_TIME = st.sampled_from([1, 2, 2.5, "3", "2020-01-01", None, "soon", True, float("nan"), 10**30])
JSON_ROWS = st.one_of(
    st.lists(st.tuples(JSON_ID, st.sampled_from(["x", "y"]), JSON_TIME), max_size=10),
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["x", "y", "z"]), st.integers(0, 5) | st.just(0.5)), max_size=30
    ),
)


def as_json(rows):
    return "".join(json.dumps(dict(zip(FOUND, row, strict=True))) + "\n" for row in rows).encode()


@st.composite
def parquet(draw):
    number = draw(st.integers(0, 12))
    users = draw(
        st.sampled_from(
            [
                pl.Series([k * 7 % 5 for k in range(number)], dtype=pl.Int32),
                pl.Series([2**63 + k % 3 for k in range(number)], dtype=pl.UInt64),
                pl.Series([str(k % 4) for k in range(number)], dtype=pl.String),
                pl.Series([None if k % 3 == 0 else f"u{k % 4}" for k in range(number)], dtype=pl.Categorical),
            ]
        )
    )
    times = draw(
        st.sampled_from(
            [
                None,
                pl.Series([k % 3 for k in range(number)], dtype=pl.Int64),
                pl.Series([k % 3 / 2 for k in range(number)], dtype=pl.Float32),
                pl.Series(["2020-01-01" if k % 3 else "5" for k in range(number)], dtype=pl.String),
                pl.Series([k * 10**6 + (k == 9) for k in range(number)], dtype=pl.Int64).cast(pl.Datetime("us")),
            ]
        )
    )
    columns = {"user": users, "item": pl.Series([k % 6 for k in range(number)], dtype=pl.Int64)}
    if times is not None:
        columns["time"] = times
    out = io.BytesIO()
    pl.DataFrame(columns).write_parquet(out, row_group_size=3)
    return out.getvalue()


NOISE = st.binary(max_size=80) | st.text(st.sampled_from(' \t,"\n\r\0ab17é\ufeff{}:'), max_size=60).map(str.encode)
FILES = {
    "d.csv": separated(",") | NOISE.map(lambda noise: b"user,item,time\na,b,1\n" + noise),
    "d.tsv": separated("\t"),
    "d.inter": ROWS.map(lambda rows: "\n".join("\t".join(row) for row in [FOUND, *rows]).encode())
    | NOISE.map(lambda noise: b"user_id:token\titem_id:token\n" + noise),
    "d.jsonl": JSON_ROWS.map(as_json) | NOISE.map(lambda noise: b'{"user": "a", "item": "b"}\n' + noise),
    "d.parquet": parquet(),
}


@pytest.mark.parametrize("name", FILES)
def test_an_imported_file_is_the_file_read(tmp_path_factory, monkeypatch, name):
    @DERANDOMIZED
    @given(
        content=FILES[name],
        gz=st.booleans(),
        duplicates=st.sampled_from(["keep", "drop", "drop_pairs"]),
        piece=st.sampled_from([1, 7, 30, 200, 10**6]),
        events=st.sampled_from([1, 2, 5, 1000]),
    )
    def check(content, gz, duplicates, piece, events):
        monkeypatch.setattr(importing, "PIECE", 64 * piece if name == "d.parquet" else piece)
        monkeypatch.setattr(importing, "EVENT_COST", importing.LEAST_MEMORY // events)
        source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
        path = source / (name + (".gz" if gz else ""))
        path.write_bytes(gzip.compress(content) if gz else content)
        assert_import_is_read(folder, path, duplicates=duplicates)

    check()


def shuffled_log(count, *, users=50, seed=0):
    rng = np.random.default_rng(seed)
    columns = (rng.integers(0, users, count), rng.integers(0, 30, count), rng.integers(0, count // 4, count))
    return pl.DataFrame(dict(zip(FOUND, columns, strict=True)))
