import csv
import gzip
import io
import json
import subprocess
import sys
from datetime import date, datetime, timedelta, timezone

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarec_fast.data import import_file, read
from tests.examples import examples

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


def events(domain):
    """{user: [(item, time), ...]} in the order of the sequence."""
    s = domain.sequences
    times = [None] * s.num_events if s.times is None else s.times.tolist()
    users, items = domain.users.decode(np.arange(len(s))), domain.items.decode(s.items)
    return {
        user: list(zip(items[a:b], times[a:b], strict=True))
        for user, a, b in zip(users, s.offsets[:-1].tolist(), s.offsets[1:].tolist(), strict=True)
    }


def expected(rows):
    """The same from (user, item, time) rows, by plain sorting."""
    result = {}
    for user, item, time in rows:
        result.setdefault(user, []).append((item, time))
    return {user: sorted(found, key=lambda event: event[1] or 0) for user, found in result.items()}


def rejected_lines(domain):
    return [line for line, _ in domain.report.examples]


ROWS = [("b", "x", 30), ("a", "y", 10), ("b", "y", 20), ("a", "x", 10), ("b", "z", 30), ("c", "x", 5)]


def as_inter(rows):
    return HEADER + "".join(f"{u}\t{i}\t{t}\n" for u, i, t in rows)


def as_separated(rows, separator, **options):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, **options)
    writer.writerows([("user_id", "item_id", "timestamp"), *rows])
    return out.getvalue()


def as_json(rows):
    return "".join(
        json.dumps({"rating": 5, "user_id": u, "item_id": i, "timestamp": t}, ensure_ascii=False) + "\n"
        for u, i, t in rows
    )


def as_parquet(rows):
    out = io.BytesIO()
    users, items, times = map(list, zip(*rows, strict=True))
    kind = pl.UInt64 if isinstance(users[0], int) and max(users) >= 2**63 else None
    columns = {"user_id": pl.Series(users, dtype=kind), "item_id": items, "timestamp": times}
    pl.DataFrame(columns).write_parquet(out)
    return out.getvalue()


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.inter", as_inter(ROWS)),
        ("d.csv", as_separated(ROWS, ",")),
        ("d.csv", as_separated(ROWS, ";", lineterminator="\n")),
        ("d.tsv", as_separated(ROWS, "\t", quoting=csv.QUOTE_ALL)),
        ("d.jsonl", as_json(ROWS)),
        ("d.json", as_json(ROWS)),
        ("d.parquet", as_parquet(ROWS)),
    ],
)
def test_every_format_gives_the_same_domain(file, name, content, gz):
    domain = read(file(name + gz, content))
    assert events(domain) == expected(ROWS)
    assert list(domain.users) == ["b", "a", "c"]  # by first appearance
    assert list(domain.items) == ["x", "y", "z"]
    assert domain.name == "d"
    assert domain.sequences.items.dtype == np.int32
    assert domain.sequences.times.dtype == np.int64
    assert (domain.report.rows, domain.report.rejected, domain.report.duplicates) == (6, 0, 0)
    # Neighbours with equal times: b 30-30 and a 10-10, of three neighbouring pairs.
    assert domain.report.tied == pytest.approx(2 / 3)


def test_options_override_what_names_say(file):
    path = file("odd.txt", "who|what|when\nu|i|2\nu|j|1\n")
    domain = read(path, format="csv", separator="|", user="who", item="what", time="when", name="shop")
    assert events(domain) == {"u": [("j", 1), ("i", 2)]}
    assert domain.name == "shop"
    assert str(domain).startswith(
        "<Domain shop: 1 users, 2 items, 2 interactions, mean length 2.0, ordered by column 'when'"
    )


def test_typed_header_is_found_by_the_bare_name(file):
    path = file("d.inter", "u:token\ti:token\nA\tB\n")
    assert events(read(path, user="u", item="i:token")) == {"A": [("B", None)]}


@pytest.mark.parametrize(
    "header", ["user_id,item_id,timestamp", "UserID,ASIN,Time", "uid,sku,ts", "reviewerID,asin,unixReviewTime"]
)
def test_common_columns_are_found(file, header):
    assert events(read(file("d.csv", header + "\na,x,1\n"))) == {"a": [("x", 1)]}


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("who,item_id", {}, r"looks like the user; name it with user=.*columns found: 'who', 'item_id'"),
        ("user_id,thing", {}, r"looks like the item"),
        ("user_id,item_id", {"time": "when"}, r"no column 'when' for time; columns found: 'user_id', 'item_id'"),
        ("user_id,item_id", {"item": "user_id"}, "different columns"),
        ("user_id,user_id,item_id", {}, "2 columns could be the user"),
    ],
)
def test_columns_that_cannot_be_chosen(file, header, options, message):
    path = file("d.csv", header + "\n" + "1," * header.count(",") + "1\n")
    with pytest.raises(ValueError, match=message):
        read(path, **options)


def test_argument_errors(file):
    path = file("d.csv", "user,item\na,b\n")
    for options, message in (
        ({"on_error": "ignore"}, "on_error must be one of 'raise', 'skip', got 'ignore'"),
        ({"duplicates": "merge"}, "duplicates must be one of"),
        ({"format": "xml"}, "format must be one of"),
        ({"separator": "::"}, "separator must be one ASCII character"),
        ({"separator": '"'}, "separator must be one ASCII character"),
    ):
        with pytest.raises(ValueError, match=message):
            read(path, **options)
    with pytest.raises(ValueError, match=r"format must be given, or the file end in \.inter"):
        read(file("d.dat", "x"))
    with pytest.raises(FileNotFoundError):
        read(path.parent / "absent.csv")


# Order and duplicates


def test_order_is_by_time_and_stable(file):
    rng = np.random.default_rng(0)
    rows = [(f"u{rng.integers(7)}", f"i{k}", int(rng.integers(4))) for k in range(300)]
    for name, content in (("d.inter", as_inter(rows)), ("d.jsonl", as_json(rows)), ("d.parquet", as_parquet(rows))):
        assert events(read(file(name, content))) == expected(rows)


def test_without_times_rows_are_the_order(file):
    domain = read(file("d.csv", "user,item\nb,2x\na,1x\nb,1x\nb,2x\n"))
    assert events(domain) == {"b": [("2x", None), ("1x", None), ("2x", None)], "a": [("1x", None)]}
    assert domain.sequences.times is None
    assert domain.report.tied is None
    assert "in the order of rows: no time column" in domain.summary()


def test_duplicates(file):
    rows = [("a", "x", 3), ("a", "x", 1), ("a", "y", 2), ("a", "x", 3), ("b", "x", 3), ("a", "x", 1)]
    path = file("d.inter", as_inter(rows))
    assert events(read(path)) == expected(rows)
    dropped = read(path, duplicates="drop")
    assert events(dropped) == {"a": [("x", 1), ("y", 2), ("x", 3)], "b": [("x", 3)]}
    pairs = read(path, duplicates="drop_pairs")
    assert events(pairs) == {"a": [("x", 1), ("y", 2)], "b": [("x", 3)]}
    for domain, count in ((read(path), 0), (dropped, 2), (pairs, 3)):
        assert (domain.report.duplicates, domain.report.dropped) == (2, count)
    untimed = file("d.csv", "user,item\na,x\na,y\na,x\n")
    for how in ("drop", "drop_pairs"):
        assert events(read(untimed, duplicates=how)) == {"a": [("x", None), ("y", None)]}


# Ids


@pytest.mark.parametrize(
    ("ids", "integers"),
    [
        (["7", "10", "-3", "0"], True),
        (["7", "007"], False),
        (["7", "+7"], False),
        (["7", " 7"], False),
        (["0", "-0"], False),
        (["7", "7.0"], False),
        (["7", "1e3"], False),
        ([str(2**63 - 1), str(-(2**63))], True),
        ([str(2**64 - 1), "0"], True),
        ([str(2**64 - 1), "-1"], False),
        ([str(2**64), "1"], False),
        (["٧", "1"], False),
        ([str(2**53), str(2**53 + 1)], True),
    ],
)
def test_text_columns_of_canonical_integers_are_integers(file, ids, integers):
    domain = read(file("d.csv", "user,item\n" + "".join(f"{v},x\n" for v in ids)))
    assert list(domain.users) == ([int(v) for v in ids] if integers else ids)


@pytest.mark.parametrize(
    "odd", ["1.0", "1e3", "1_0", "1 0", "1x0", "1-0", "007", "0" * 9, str(2**64), "9" * 25, "1\u0660"]
)
def test_what_is_nearly_a_column_of_integers_is_verbatim(file, odd):
    # past the rows that are looked at one by one, and with the digits at both ends that a look at the bytes accepts
    ids = [str(k) for k in range(200)] + [odd]
    domain = read(file("d.csv", "user,item,time\n" + "".join(f"{v},{v},{k}\n" for k, v in enumerate(ids))))
    assert list(domain.users) == list(domain.items) == ids
    assert domain.sequences.times.tolist() == list(range(201))


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
@pytest.mark.parametrize("ids", [["7", "10"], [7, 10], [2**53, 2**53 + 1], [2**64 - 1, 2**63], [2**63 - 1, -5]])
def test_typed_formats_keep_the_type(file, name, ids):
    rows = [(value, "x", 1) for value in ids]
    domain = read(file(name, as_json(rows) if name == "d.jsonl" else as_parquet(rows)))
    assert list(domain.users) == ids


def test_json_integers_beyond_64_bits_are_strings(file):
    domain = read(file("d.jsonl", as_json([(2**64, "x", 1), (3, "x", 1)])))
    assert list(domain.users) == [str(2**64), "3"]


def test_json_strings_and_integers_do_not_merge(file):
    path = file("d.jsonl", as_json([("7", "x", 1), (7, "y", 2), ("8", "x", 1)]))
    with pytest.raises(ValueError, match=r"d\.jsonl:2: user is a int where earlier rows have str"):
        read(path)
    domain = read(path, on_error="skip")
    assert events(domain) == {"7": [("x", 1)], "8": [("x", 1)]}
    # Past the sampled rows too, where types are no longer looked at one by one.
    rows = [(f"{k}", "x", k) for k in range(300)]
    rows[250] = (250, "x", 250)
    assert rejected_lines(read(file("e.jsonl", as_json(rows)), on_error="skip")) == [251]


def test_parquet_columns(file):
    def written(**columns):
        out = io.BytesIO()
        pl.DataFrame(columns).write_parquet(out)
        return file("d.parquet", out.getvalue())

    path = written(user=pl.Series(["a", "b"], dtype=pl.Categorical), item=pl.Series([1, 2], dtype=pl.UInt8))
    assert events(read(path)) == {"a": [(1, None)], "b": [(2, None)]}
    with pytest.raises(ValueError, match="column 'user' must hold strings or integers, got Float64; ids never"):
        read(written(user=[1.0, 2.0], item=[1, 2]))
    path = written(user=["a", None, "c"], item=[1, 2, None], time=[1.0, 2.0, float("nan")])
    with pytest.raises(ValueError, match=r"d\.parquet:row 2: missing user\n.*row 3: missing item\n"):
        read(path)
    assert events(read(path, on_error="skip")) == {"a": [(1, 1.0)]}
    with pytest.raises(ValueError, match="not a Parquet file"):
        read(file("e.parquet", b"PAR1 nonsense"))


ID_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1)


@examples(60)
@given(rows=st.lists(st.tuples(ID_TEXT, ID_TEXT, st.integers(-(2**63), 2**63 - 1)), min_size=1))
@pytest.mark.parametrize("kind", ["csv", "tsv", "quoted", "jsonl", "parquet"])
def test_any_ids_survive(tmp_path_factory, kind, rows):
    # Any text is an id: separators, quotes, line breaks, blanks, emoji, what looks like a number.
    rows = [("id:" + u, "id:" + i, t) for u, i, t in rows]
    content = {
        "csv": lambda: as_separated(rows, ",").encode(),
        "tsv": lambda: as_separated(rows, "\t").encode(),
        "quoted": lambda: as_separated(rows, ",", quoting=csv.QUOTE_ALL, lineterminator="\n").encode(),
        "jsonl": lambda: as_json(rows).encode(),
        "parquet": lambda: as_parquet(rows),
    }[kind]()
    path = tmp_path_factory.mktemp("ids") / f"d.{'csv' if kind == 'quoted' else kind}"
    path.write_bytes(content)
    domain = read(path)
    assert events(domain) == expected(rows)
    assert list(domain.users) == list(dict.fromkeys(u for u, _, _ in rows))
    assert list(domain.items) == list(dict.fromkeys(i for _, i, _ in rows))


def test_inter_is_verbatim(file):
    rows = [('5" nail', " x ", 1), ('"q"', "'", 2), ("🛒", "e\u0301", 3), ("a,b;c", "é", 4)]
    domain = read(file("d.inter", as_inter(rows)))
    assert events(domain) == expected(rows)


def test_lookalike_ids_are_noted(file):
    domain = read(file("d.inter", as_inter([("é", "x", 1), ("e\u0301", "x", 1), ("日", "x", 1)])))
    assert domain.num_users == 3
    assert domain.report.notes == ("1 user ids differ from another only by Unicode normalisation",)
    assert "Unicode normalisation" in str(domain.report)


# Times


@pytest.mark.parametrize(
    ("texts", "values", "dtype"),
    [
        (["1341964800", "5"], [1341964800, 5], np.int64),
        (["1341964800.0", "5"], [1341964800.0, 5.0], np.float64),
        (["1.5e3", " 7 "], [1500.0, 7.0], np.float64),
        ([str(2**53), str(2**53 + 1)], [2**53, 2**53 + 1], np.int64),
        (["2014-05-01", "1970-01-02"], [1398902400, 86400], np.int64),
        (["1970-01-01 00:01:00", "1970-01-01T00:00"], [60, 0], np.int64),
        (["1970-01-01T01:00:00Z", "1970-01-01T01:00:00.5+01:00"], [3600.0, 0.5], np.float64),
        (["1969-12-31 23:59:59", "1970-01-01"], [-1, 0], np.int64),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_times_as_text(file, kind, texts, values, dtype):
    rows = [(f"u{k}", "x", text) for k, text in enumerate(texts)]
    domain = read(file(f"d.{kind}", as_json(rows) if kind == "jsonl" else as_separated(rows, ",")))
    assert domain.sequences.times.tolist() == values
    assert domain.sequences.times.dtype == dtype


@pytest.mark.parametrize(
    ("series", "values"),
    [
        (pl.Series([datetime(1970, 1, 2), datetime(1970, 1, 1)]), [86400, 0]),
        (pl.Series([datetime(1970, 1, 1, 0, 0, 0, 500000)] * 2, dtype=pl.Datetime("ns")), [0.5, 0.5]),
        (pl.Series([datetime(1970, 1, 1, tzinfo=timezone(timedelta(hours=1)))] * 2), [-3600, -3600]),
        (pl.Series([date(1970, 1, 2)] * 2), [86400, 86400]),
        (pl.Series([1, 2], dtype=pl.UInt64), [1, 2]),
        (pl.Series([1, 2], dtype=pl.Int8), [1, 2]),
        (pl.Series([1.5, 2.0], dtype=pl.Float32), [1.5, 2.0]),
        (pl.Series(["1.5", "2"]).cast(pl.Decimal(10, 2)), [1.5, 2.0]),
    ],
)
def test_times_of_parquet(file, series, values):
    out = io.BytesIO()
    pl.DataFrame({"user": ["a", "b"], "item": ["x", "x"], "time": series}).write_parquet(out)
    domain = read(file("d.parquet", out.getvalue()))
    assert domain.sequences.times.tolist() == values
    assert domain.sequences.times.dtype == np.array(values).dtype


def test_rejected_rows_have_no_say_in_the_kind_of_times(file):
    rows = [("a", "x", 2**53 + 1), ("a", "y", 2**53), ("", "x", "0.5"), ("b", "x", "inf"), ("b", "x", "2020-01-01")]
    domain = read(file("d.inter", as_inter(rows)), on_error="skip")
    assert domain.sequences.times.dtype == np.int64
    assert events(domain) == {"a": [("y", 2**53), ("x", 2**53 + 1)]}


def test_times_of_no_kind(file):
    out = io.BytesIO()
    pl.DataFrame({"user": ["a"], "item": ["x"], "time": [[1]]}).write_parquet(out)
    with pytest.raises(ValueError, match="time must hold numbers, strings, dates or datetimes, got List"):
        read(file("d.parquet", out.getvalue()))


# Rows that cannot be used


BAD_TEXT = [
    ("\tx\t1", "missing user"),
    ("a\t\t1", "missing item"),
    ("a\tx\t", "missing time"),
    ("a\tx\t  ", "missing time"),
    ("a\tx\tnan", "time 'nan' is neither a finite number nor an ISO date"),
    ("a\tx\tinf", "time 'inf'"),
    ("a\tx\t1e999", "time '1e999'"),
    ("a\tx\tyesterday", "time 'yesterday'"),
    ("a\tx", "expected 3 fields, got 2"),
    ("a\tx\t1\t2", "expected 3 fields, got 4"),
    ("a", "expected 3 fields, got 1"),
    ("a\0b\tx\t1", "NUL in user"),
    ("a\tx\0\t1", "NUL in item"),
    ("a\tx\t1\0", "time"),
    ("a\rb\tx\t1", "carriage return"),
    (b"a\xff\tx\t1", "not UTF-8"),
    (b"a\xed\xa0\x80\tx\t1", "not UTF-8"),
    ("a" * 10**6, "expected 3 fields, got 1"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_TEXT)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_bad_rows_of_inter(file, bad, reason, end):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    lines = [HEADER.strip().encode(), b"a\tx\t1", b"", bad, b"b\ty\t2", "ü\tz\t3".encode(), bad]
    path = file("d.inter", end.encode().join(lines))
    with pytest.raises(ValueError) as raised:
        read(path)
    message = str(raised.value)
    assert message.startswith(f"{path}:4: ")
    assert f"{path}:7: " in message
    assert reason in message
    assert len(message) < 2000
    domain = read(path, on_error="skip")
    assert events(domain) == {"a": [("x", 1)], "b": [("y", 2)], "ü": [("z", 3)]}
    assert (domain.report.rows, domain.report.rejected) == (5, 2)
    assert rejected_lines(domain) == [4, 7]
    assert all(reason in given for _, given in domain.report.examples)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('"a,x,1', "misplaced quote"),
        ('a"b,x,1', "misplaced quote"),
        ('"a"b,x,1', "misplaced quote"),
        ('a,""x,1', "misplaced quote"),
        ('a,x,1"', "misplaced quote"),
        ('"a","x"', "expected 3 fields, got 2"),
        ('"",x,1', "missing user"),
        ('"a,x,1"', "expected 3 fields, got 1"),
    ],
)
def test_bad_rows_of_csv(file, bad, reason):
    path = file("d.csv", f'user,item,time\n"a","x",1\n{bad}\nb,"say ""y""",2\n"c,d",z,3\n')
    with pytest.raises(ValueError, match=f"d\\.csv:3: {reason}"):
        read(path)
    domain = read(path, on_error="skip")
    assert events(domain) == {"a": [("x", 1)], "b": [('say "y"', 2)], "c,d": [("z", 3)]}
    assert rejected_lines(domain) == [3]


def test_line_numbers_count_line_breaks_in_quotes(file):
    path = file("d.csv", 'user,item,note\r\na,x,"two\r\nlines, ""here"""\r\n\r\nb,,n\r\n"c\nc",y,"\n\n"\r\n,z,n\r\n')
    domain = read(path, on_error="skip")
    assert domain.report.examples == ((5, "missing item"), (10, "missing user"))
    assert events(domain) == {"a": [("x", None)], "c\nc": [("y", None)]}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"user_id": "a", "item_id": "x"}', "missing time"),
        ('{"user_id": null, "item_id": "x", "timestamp": 1}', "missing user"),
        ('{"user_id": "", "item_id": "x", "timestamp": 1}', "missing user"),
        ('{"user_id": "a", "item_id": 1.5, "timestamp": 1}', "item is a float, expected a string or an integer"),
        ('{"user_id": true, "item_id": "x", "timestamp": 1}', "user is a bool"),
        ('{"user_id": "a", "item_id": ["x"], "timestamp": 1}', "item is a list"),
        ('{"user_id": {"id": 1}, "item_id": "x", "timestamp": 1}', "user is a dict"),
        ('{"user_id": "a", "item_id": "x", "timestamp": NaN}', "time 'nan'"),
        ('{"user_id": "a", "item_id": "x", "timestamp": true}', "time is a bool"),
        ('{"user_id": "a", "item_id": "x", "timestamp": "soon"}', "time 'soon'"),
        ('{"user_id": "a", "user_id": "b", "item_id": "x", "timestamp": 1}', "a key appears twice"),
        ('{"user_id": "a\\u0000", "item_id": "x", "timestamp": 1}', "NUL in user"),
        ('{"user_id": "\\ud83d", "item_id": "x", "timestamp": 1}', "user is not valid Unicode"),
        ('{"user_id": "a", "item_id": "x", "timestamp": 1', "not JSON"),
        ('{"user_id": "a"}{"user_id": "b"}', "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("[" * 100000, "not JSON"),
        (b'{"user_id": "\xff", "item_id": "x", "timestamp": 1}', "not UTF-8"),
    ],
)
@pytest.mark.parametrize("before", [1, 150])  # within the sampled rows, and past them
def test_bad_rows_of_json_lines(file, bad, reason, before):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    good = [(f"u{k}", "x", k) for k in range(before)]
    content = as_json(good).encode() + b"\n \n" + bad + b"\n" + as_json([("z", "y", 2)]).encode()
    path = file("d.jsonl", content)
    with pytest.raises(ValueError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:{before + 3}: ")
    assert reason in str(raised.value)
    domain = read(path, on_error="skip")
    assert events(domain) == expected([*good, ("z", "y", 2)])
    assert rejected_lines(domain) == [before + 3]


def test_json_keys_within_values_mislead_nobody(file):
    rows = [
        {"user_id": 7, "item_id": 'say "user_id": 8', "meta": {"user_id": "9", "item_id": 3}},
        {"meta": {"item_id": "q"}, "item_id": "x", "user_id": 10},
    ]
    domain = read(file("d.jsonl", "\n".join(map(json.dumps, rows))))
    assert events(domain) == {7: [('say "user_id": 8', None)], 10: [("x", None)]}


def test_json_emoji_escapes(file):
    domain = read(file("d.jsonl", '{"user": "\\ud83d\\uded2", "item": "\\u00e9\\t"}\n'))
    assert events(domain) == {"🛒": [("é\t", None)]}


def test_the_list_of_rejects_is_capped_and_the_count_exact(file):
    rows = "".join("a\tx\n" if k % 2 else f"u\t\t{k}\n" for k in range(1000))
    path = file("d.inter", HEADER + rows + "v\tx\t1\n")
    domain = read(path, on_error="skip")
    assert domain.report.rejected == 1000
    assert rejected_lines(domain) == list(range(2, 102))
    assert "995 more rejected rows" in str(domain.report)
    with pytest.raises(ValueError, match=r'and 995 more rows\non_error="skip"'):
        read(path)


def test_ids_of_rejected_rows_are_unknown(file):
    domain = read(file("d.inter", as_inter([("007", "x", "?"), ("7", "y", 1)])), on_error="skip")
    assert list(domain.users) == [7]
    assert list(domain.items) == ["y"]


@examples(60)
@given(st.binary(max_size=200) | st.text(st.sampled_from(' \t,"\n\r\0ab17é\ufeff{}:'), max_size=80).map(str.encode))
@pytest.mark.parametrize("name", ["d.inter", "d.csv", "d.jsonl", "d.parquet"])
def test_any_bytes_are_rows_or_rejects(tmp_path_factory, name, noise):
    start = {
        "d.inter": HEADER.encode(),
        "d.csv": b"user,item,time\n",
        "d.jsonl": as_json([("a", "b", 1)]).encode(),
        "d.parquet": b"PAR1",
    }[name]
    path = tmp_path_factory.mktemp("noise") / name
    path.write_bytes(start + noise)
    try:
        domain = read(path, on_error="skip")
    except ValueError as error:
        assert str(path) in str(error)
        assert ("not a Parquet file" if name == "d.parquet" else "can be used") in str(error) or "no rows" in str(error)
        return
    report = domain.report
    assert report.rows == report.rejected + domain.num_interactions
    assert domain.num_interactions == 0 or 0 <= domain.sequences.items.max() < domain.num_items
    if report.rejected:
        with pytest.raises(ValueError, match=":"):
            read(path)


# Whole files


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\r", b"\r\n", b"\n\n\n"])
def test_bom_and_line_ends(file, bom, end):
    path = file("d.csv", bom + b"user,item,time\r\na,x,1\r\nb,y,2" + end)
    assert events(read(path)) == {"a": [("x", 1)], "b": [("y", 2)]}


@pytest.mark.parametrize("name", ["d.inter", "d.csv", "d.jsonl"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_files_are_errors(file, name, content):
    with pytest.raises(ValueError, match="empty file"):
        read(file(name, content))


def test_a_file_without_a_row_that_can_be_used(file, tmp_path):
    out = io.BytesIO()
    pl.DataFrame(schema={"user": pl.String, "item": pl.String, "time": pl.Int64}).write_parquet(out)
    nulls = io.BytesIO()
    pl.DataFrame({"user": [None, "a"], "item": ["x", "y"], "time": [1, None]}).write_parquet(nulls)
    days = "user,item,date\n" + "".join(f"u{k},x,{k + 13}/01/2020\n" for k in range(9))
    cases = [
        ("d.inter", HEADER, "{path}: no rows below the names of columns"),
        ("d.csv", "user,item,time", "{path}: no rows below the names of columns"),
        ("d.csv.gz", "user,item,time\r", "{path}: no rows below the names of columns"),
        ("d.parquet", out.getvalue(), "{path}: no rows"),
        ("e.inter", HEADER + "only\tbad\n", "{path}: none of 1 rows can be used\n{path}:2: expected 3 fields, got 2"),
        ("f.jsonl", '{"user": 1}\n{"item": 2}\n', "{path}: none of 2 rows can be used\n{path}:1: missing item\n"),
        ("f.parquet", nulls.getvalue(), "{path}: none of 2 rows can be used\n{path}:row 1: missing user\n"),
        ("g.csv", days, "{path}: none of 9 rows can be used\n{path}:2: time '13/01/2020' is neither a finite number"),
    ]
    for name, content, message in cases:
        path = file(name, content)
        for call in (read, lambda p, **options: import_file(p, tmp_path / "domain", **options)):
            with pytest.raises(ValueError) as raised:
                call(path, on_error="skip")
            assert str(raised.value).startswith(message.format(path=path))
        assert not (tmp_path / "domain").exists()
    assert str(raised.value).count("write the year first and in full, as in 2020-01-31") == 5
    assert str(raised.value).endswith("... and 4 more rows")


def test_one_event(file):
    assert events(read(file("d.inter", as_inter([("a", "x", 1)])))) == {"a": [("x", 1)]}


def test_damaged_and_foreign_files(file):
    whole = gzip.compress(as_inter(ROWS).encode())
    path = file("d.inter", "")
    for damaged in (whole[:-9], whole[:20], whole[:25] + b"\0" * 9 + whole[34:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a complete gzip file"):
            read(path)
    with pytest.raises(ValueError, match="UTF-16"):
        read(file("d.csv", "user,item\na,b\n".encode("utf-16")))
    with pytest.raises(ValueError, match=r":1: the header is not UTF-8"):
        read(file("d.csv", b"user,item\xff\na,b\n"))
    with pytest.raises(ValueError, match="one JSON object a line"):
        read(file("d.json", '[{"user": 1,\n "item": 2}]'))


def test_good_rows_meet_no_python_loop(file):
    # However many rows, the same handful of our calls.
    def calls(count, name, write):
        rows = [(f"u{k % 999}", f"i{k % 777}", k) for k in range(count)]
        path = file(name, write(rows))
        seen = 0

        def count_call(frame, event, _):
            nonlocal seen
            seen += event == "call" and "metarec_fast" in frame.f_code.co_filename

        sys.setprofile(count_call)
        try:
            read(path)
        finally:
            sys.setprofile(None)
        return seen

    for name, write in (("d.inter", as_inter), ("d.csv", lambda rows: as_separated(rows, ",")), ("d.jsonl", as_json)):
        read(file("warm" + name, write(ROWS)))
        assert calls(1000, name, write) == calls(20000, name, write)


def test_importing_leaves_polars_alone():
    # torch is there already: the sampler gives tensors
    script = "import sys, metarec_fast.data; assert 'polars' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [
        ("office", 4_905, 2_420, 53_258),
        ("tools", 16_638, 10_217, 134_476),
        ("beauty", 22_363, 12_101, 198_502),
        ("toys", 19_412, 11_924, 167_597),
        ("video_games", 24_303, 10_672, 231_780),
        ("health", 38_609, 18_534, 346_355),
        ("clothing", 39_387, 23_033, 278_677),
        ("sports", 35_598, 18_357, 296_337),
        ("apps", 87_271, 13_209, 752_937),
        ("home", 66_519, 28_237, 551_682),
    ],
)
def test_real_domains(real_domains, name, users, items, interactions):
    domain = read(real_domains / f"amazon14_{name}.inter.gz")
    assert (domain.num_users, domain.num_items, domain.num_interactions) == (users, items, interactions)
    assert domain.name == f"amazon14_{name}"
    assert domain.users.is_integer and domain.items.is_integer
    assert domain.sequences.lengths.min() >= 5
    sequences = domain.sequences
    same_user = np.ones(sequences.num_events - 1, bool)
    same_user[sequences.offsets[1:-1] - 1] = False
    assert (np.diff(sequences.times)[same_user] >= 0).all()
    if name in ("beauty", "sports"):
        assert 0.40 < domain.report.tied < 0.50  # days: about 44 % of neighbours share one
    else:
        assert domain.report.tied == 0  # positions
