"""Importing a file gives what reading it gives, in less memory than the file takes; or it leaves nothing."""

import csv
import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarec_fast.data import import_file, load_domain, read
from metarec_fast.data.io import importing
from tests.examples import examples

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
    """Both give the same domain, or both an error that leaves no trace. Returns what read gives without bad rows."""
    target = folder / "domain"
    for on_error in ("raise", "skip"):
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
    @examples(150)
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


def write_log(path, frame):
    frame.write_parquet(path, row_group_size=97) if path.suffix == ".parquet" else frame.write_csv(path)
    return path


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
@pytest.mark.parametrize("events", [7, 100, 10**6])
def test_many_parts_of_many_pieces(tmp_path, small, name, events):
    small(piece=64 * 50, events=events)
    path = write_log(tmp_path / name, shuffled_log(2000))
    for duplicates in ("keep", "drop_pairs"):
        (tmp_path / "out").mkdir(exist_ok=True)
        assert_import_is_read(tmp_path / "out", path, duplicates=duplicates)


def test_strings_that_share_a_hash_stay_apart(tmp_path, small, monkeypatch):
    from metarec_fast.data.io import numbering

    true, seeds = numbering._hashes, set()

    def coarse(strings, seed):
        seeds.add(seed)
        return true(strings, seed) % np.uint64(4) if seed < 3 else true(strings, seed)

    monkeypatch.setattr(numbering, "_hashes", coarse)
    small(piece=100, events=10)
    frame = shuffled_log(300).with_columns(pl.format("u{}", "user_id"), pl.format("i{}", "item_id"))
    rows = frame.rows()
    users = assert_import_is_read(tmp_path, write_log(tmp_path.parent / "hash.csv", frame)).users
    assert list(users) == list(dict.fromkeys(user for user, _, _ in rows))
    assert {0, 1, 2, 3} <= seeds


@pytest.mark.parametrize("last", ["007", str(2**64), "-1"])
def test_one_late_id_makes_strings_of_all(tmp_path, small, last):
    small(piece=50, events=10)
    rows = [f"{2**63 + k if last == '-1' else k},x{k}" for k in range(40)]
    path = tmp_path / "d.csv"
    path.write_text("user,item\n" + "\n".join([*rows, f"{last},x"]))
    (tmp_path / "out").mkdir()
    assert not assert_import_is_read(tmp_path / "out", path).users.is_integer


def test_what_late_rows_tell_is_known_from_the_start(tmp_path, small):
    small(piece=40, events=10)
    few, many = ["a,x,5"] * 3, ["b,y,2020-01-01"] * 9
    quoted = ['a,"x\ny",1', "b,z,2", 'c,"open,3', "d,z,4"]
    (tmp_path / "out").mkdir()
    for rows in (few + many, many[:3] + few * 3, quoted):
        path = tmp_path / "d.csv"
        path.write_text("user,item,time\n" + "\n".join(rows))
        assert assert_import_is_read(tmp_path / "out", path).report.rejected == 3


def through_a_pipe(data, folder, **options):
    """Import from a descriptor that cannot be read twice."""
    end, start = os.pipe()

    def feed():
        with open(start, "wb") as file:
            file.write(data)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        return import_file(f"/dev/fd/{end}", folder, format="csv", name="d", **options)
    finally:
        feeder.join()
        os.close(end)


def test_a_pipe_is_a_file(tmp_path, small):
    small(piece=100, events=50)
    path = write_log(tmp_path / "d.csv", shuffled_log(500))
    got, whole = through_a_pipe(path.read_bytes(), tmp_path / "domain"), read(path)
    assert np.array_equal(got.sequences.items, whole.sequences.items) and got.users == whole.users
    late = b"user,item,time\n" + b"a,x,5\n" * 9 + b"a,x,2020-01-01\n" * 20
    with pytest.raises(ValueError, match="most times are dates, unlike the first ones: this cannot be read again"):
        through_a_pipe(late, tmp_path / "other", on_error="skip")
    assert sorted(os.listdir(tmp_path)) == ["d.csv", "domain"]


# Errors


@pytest.fixture
def target(tmp_path):
    """A folder to import into; nothing may be left beside it, nor in it."""
    (tmp_path / "out").mkdir()
    yield tmp_path / "out" / "domain"
    assert os.listdir(tmp_path / "out") == []


def test_the_lines_of_bad_rows_count_over_pieces(tmp_path, small, target):
    small(piece=64, events=10)
    rows = [f"u{k},x,{k}" for k in range(200)]
    rows[150], rows[151] = "u,x,soon", '"q\n\nq",x,1'
    path = tmp_path / "d.csv"
    path.write_text("user,item,time\n" + "\n".join([*rows, "u,,3"]))
    with pytest.raises(ValueError) as raised:
        import_file(path, target)
    assert str(raised.value) == (
        f"{path}:152: time 'soon' is neither a finite number nor an ISO date\non_error=\"skip\" leaves such rows out"
    )
    folder = tmp_path / "skipped"
    assert import_file(path, folder, on_error="skip").report.examples == (
        (152, "time 'soon' is neither a finite number nor an ISO date"),
        (204, "missing item"),
    )


@pytest.mark.parametrize("name", ["d.csv.gz", "d.csv", "d.parquet", "d.jsonl"])
def test_a_file_cut_short(tmp_path, small, target, name):
    small(piece=1000, events=100)
    frame, path = shuffled_log(3000), tmp_path / name.removesuffix(".gz")
    if name == "d.jsonl":
        frame.write_ndjson(path)
    else:
        write_log(path, frame)
    data = path.read_bytes()
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(data)[:-8])
    else:
        path.write_bytes(data[: len(data) // 2] if name == "d.parquet" else data[: data.rfind(b",")])
    reason = {
        "d.csv.gz": "not a complete gzip file",
        "d.csv": r"d\.csv:3001: expected 3 fields, got 2",
        "d.parquet": "not a Parquet file that can be read",
        "d.jsonl": r"d\.jsonl:3000: not JSON",
    }[name]
    with pytest.raises(ValueError, match=reason):
        import_file(path, target)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "empty file"),
        ("\n \n", {}, "empty file"),
        ("who,what\na,b\n", {}, "no column looks like the user; .*columns found: 'who', 'what'"),
        ("user,item\na,b\n", {"time": "when"}, "no column 'when' for time"),
        ("user,item\na,b\n", {"memory": "much"}, "memory must be bytes or as '500MB', and at least 4 MiB, got 'much'"),
        ("user,item\na,b\n", {"memory": 1000}, "at least 4 MiB, got 1000"),
        ("user,item\na,b\n", {"on_error": "stop"}, "on_error must be one of"),
        ("user,item\na,b\n", {"format": "xml"}, "format must be one of"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path, target, content, options, message):
    path = tmp_path / "d.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        import_file(path, target, **options)


def test_a_missing_file(tmp_path, target):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        import_file(tmp_path / "none.csv", target)


def test_a_row_longer_than_any(tmp_path, target, monkeypatch):
    monkeypatch.setattr("metarec_fast.data.io.pieces.LONGEST", 1 << 20)
    monkeypatch.setattr(importing, "PIECE", 1 << 16)
    path = tmp_path / "d.csv"
    path.write_text("user,item\na,b\n" + "c" * (3 << 20))
    with pytest.raises(ValueError, match=r"d\.csv:3: a row longer than 1 MiB"):
        import_file(path, target)


def test_a_quote_that_is_never_closed_holds_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("metarec_fast.data.io.delimited.LONGEST", 2000)
    monkeypatch.setattr(importing, "PIECE", 500)
    path = tmp_path / "d.csv"
    path.write_text('user,item\n"a,x\n' + "b,y\n" * 3000)
    assert_same(import_file(path, tmp_path / "d", on_error="skip"), read(path, on_error="skip"))


def test_folders_that_are_taken(tmp_path):
    path = write_log(tmp_path / "d.csv", shuffled_log(50))
    domain = import_file(path, tmp_path / "d")
    with pytest.raises(ValueError, match="holds a domain already; --overwrite"):
        import_file(path, tmp_path / "d")
    assert import_file(path, tmp_path / "d", name="new", overwrite=True).name == "new"
    assert domain.sequences.items[0] >= 0  # the old one is mapped still
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(ValueError, match="holds files but no domain"):
        import_file(path, tmp_path / "foreign", overwrite=True)


@pytest.mark.parametrize("after", [0, 1, 7, 40, 200])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), MemoryError()], ids=repr
)
def test_a_write_that_fails_leaves_nothing(tmp_path, small, target, monkeypatch, after, error):
    small(piece=1000, events=100)
    from metarec_fast.data.io import folder as folders

    write, left = folders.write_all, [after]

    def fail(*given):
        left[0] -= 1
        if left[0] < 0:
            raise error
        write(*given)

    for module in (folders, importing):
        monkeypatch.setattr(module, "write_all", fail)
    with pytest.raises(type(error)) as raised:
        import_file(write_log(tmp_path / "d.csv", shuffled_log(2000)), target, memory=importing.LEAST_MEMORY)
    if isinstance(error, OSError):
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(target)


def in_child(code, *arguments, **options):
    """Run code in a process of its own, for limits that stay."""
    head = "import os, resource, signal, sys\nfrom pathlib import Path\nimport numpy as np\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False, **options)


def test_a_disk_that_is_full(tmp_path, target):
    path = write_log(tmp_path / "d.csv", shuffled_log(50_000))
    code = """
        from metarec_fast.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.exit(main(["import", sys.argv[1], sys.argv[2]]))
    """
    done = in_child(code, path, target)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr and str(target) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(tmp_path, target, number):
    code = """
        from metarec_fast.cli import main
        from metarec_fast.data.io import importing
        write = importing.write_all
        def write_and_interrupt(*given):
            write(*given)
            os.kill(os.getpid(), int(sys.argv[3]))
        importing.write_all = write_and_interrupt
        sys.exit(main(["import", sys.argv[1], sys.argv[2]]))
    """
    done = in_child(code, write_log(tmp_path / "d.csv", shuffled_log(1000)), target, int(number))
    assert done.returncode == 130 and "interrupted" in done.stderr, done.stderr


# Memory


def test_a_log_larger_than_the_memory_there_is(tmp_path):
    # 9 million rows are 216 MB of text and 144 MB of events; the process may take 110 MB beyond what it starts with.
    # RLIMIT_DATA leaves out what is mapped from files, which the kernel can drop at any time.
    code = """
        import polars as pl
        from metarec_fast.data import import_file
        from metarec_fast.sampling import Sampler
        limit, rows = 110 << 20, 9_000_000
        with open(sys.argv[1], "wb") as file:
            for block in range(9):
                n = np.arange(block * 1_000_000, (block + 1) * 1_000_000)
                pl.DataFrame(
                    {"user": n * 7919 % 200_003 + 10_000_000, "item": n * 31 % 50_021, "time": n * 104_729 % rows}
                ).write_csv(file, include_header=block == 0)
        del n
        size = os.stat(sys.argv[1]).st_size
        assert size > 1.5 * limit, size
        used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
        try:
            np.ones(2 * limit, np.uint8)
            sys.exit("the limit does not hold")
        except MemoryError:
            pass
        domain = import_file(sys.argv[1], sys.argv[2], memory="16MB")
        s = domain.sequences
        assert isinstance(s.items, np.memmap) and s.num_events == rows and len(s) == 200_003
        n = np.arange(0, rows, 200_003)  # the rows of one user
        n = n[np.argsort(n * 104_729 % rows, kind="stable")]
        u = domain.users.encode([10_000_000])[0]
        assert domain.items.decode(s[u]) == (n * 31 % 50_021).tolist()
        sampler = Sampler(s, batch_size=128, max_length=20)
        batches = [sampler.batch(step) for step in (0, 1, sampler.steps_per_epoch - 1)]
        assert sum(len(batch) for batch in batches) > 256
    """
    done = in_child(code, tmp_path / "log.csv", tmp_path / "domain")
    assert done.returncode == 0, done.stderr
