"""Which columns are taken for users, items and times, and what is said of the choice and of times that are ignored."""

import io
import json
import warnings
from datetime import datetime, timedelta

import polars as pl
import pytest

from metarec_fast.data import DataWarning, import_file, load_domain, read, save_domain


def written(folder, columns, suffix):
    path = folder / f"d.{suffix}"
    if suffix == "csv":
        pl.DataFrame(columns).write_csv(path)
    elif suffix == "jsonl":
        rows = zip(*columns.values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True)), default=str) + "\n" for row in rows))
    else:
        out = io.BytesIO()
        pl.DataFrame(columns).write_parquet(out)
        path.write_bytes(out.getvalue())
    return path


@pytest.fixture(params=["read", "import"])
def load(request, tmp_path):
    """The domain of a file by either path, and the warnings on the way."""

    def call(path, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if request.param == "read":
                domain = read(path, **options)
            else:
                domain = import_file(path, tmp_path / "domain", overwrite=True, **options)
        assert all(w.category is DataWarning and w.filename == __file__ for w in caught)
        return domain, [str(w.message) for w in caught]

    return call


@pytest.mark.parametrize(
    "header",
    [
        *("user_id,item_id,ordered_at", "Customer ID,Product ID,Order Date", "customerId,productId,createdAt"),
        *("client_id,sku,purchased_at", "visitorid,itemid,time_stamp", "session-id,article_id,event.time"),
        *("uid,parent_asin,unixReviewTime", "USER,ASIN,DateTime", "msno:token,song_id:token,ts:float"),
        *("member_id,movie_id,visit_time", "device_id,track,t_dat", "account_id,businessId,review_time"),
        *(" user_id , item_id , date ", "user_id,item_id,event_ts", "user_id,item_id,created_utc"),
    ],
)
def test_usual_names_however_they_are_written(tmp_path, header):
    options = {"user": "msno"} if "msno" in header else {}
    path = tmp_path / "d.csv"
    path.write_text(f"{header}\na,x,2\na,y,1\nb,x,3\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        domain = read(path, **options)
    assert domain.items.decode(domain.sequences[0]) == ["y", "x"]
    time = header.split(",")[2]
    assert domain.ordered_by == time and f"ordered by column {time!r}" in repr(domain)
    assert f"ordered by column {time!r}" in str(domain.report)


def test_a_choice_among_columns_is_reported(tmp_path, load):
    path = written(
        tmp_path,
        {"asin": ["x"], "parent_asin": ["p"], "user_id": ["a"], "date": [7], "time": [3], "session": [1]},
        "csv",
    )
    domain, said = load(path)
    assert list(domain.items) == ["p"] and domain.sequences.times.tolist() == [3]
    reported = (
        "the item is read from column 'parent_asin', though 'asin' could be meant too; item=... names another",
        "the time is read from column 'time', though 'date' could be meant too; time=... names another",
    )
    assert domain.report.notes == reported and said == [f"{path}: {note}" for note in reported]
    assert all(note in str(domain.report) for note in reported)
    assert load(path, item="asin", time="date")[1] == []
    path.write_text("userId,user_id,item\na,b,c\n")
    with pytest.raises(ValueError, match=r"d\.csv: 2 columns could be the user: 'userId', 'user_id'"):
        load(path)


DAYS = [datetime(2020, 1, 31) + timedelta(days=k) for k in range(3)]
EPOCH = 1_580_000_000


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bought", ["2020-01-31", "2020-02-01", "2020-02-02"]),
        ("bought", ["2020-01-31 10:00:00+01:00", "2020-02-01 11:00", "2020-02-02T00:00:00Z"]),
        ("bought", ["31/01/2020", "01/02/2020", "02/02/2020"]),
        ("bought", ["31-01-20", "01-02-20", "02-02-20"]),
        ("bought", DAYS),
        ("bought", [EPOCH, EPOCH + 9, EPOCH - 9]),
        ("bought", [EPOCH * 1000, EPOCH * 1000 + 9, EPOCH * 1000 - 9]),
        ("bought", [EPOCH + 0.5, EPOCH + 9.25, EPOCH - 9.0]),
        ("bought", [str(EPOCH), None, str(EPOCH + 2)]),
        ("my_time", [1, 2, 3]),
        ("whenBought", [3, 1, 2]),
        ("shipped_at", ["5", "6", "7"]),
        ("day", [1, 2, 3]),
    ],
)
def test_times_that_are_ignored_are_named(tmp_path, load, suffix, name, values):
    rows = {"user": ["a", "b", "a"], "item": [1, 2, 3], "rating": [4, 5, 1], name: values, "title": ["x", "time", "z"]}
    domain, said = load(written(tmp_path, rows, suffix))
    (reported,) = said
    assert f"{name!r} looks like times" in reported and "in the order of rows" in reported and "time=..." in reported
    assert "rating" not in reported and "title" not in reported
    assert domain.report.notes[0] in reported and domain.report.notes[0] in str(domain.report)
    assert "in the order of rows: no time column" in repr(domain)
    assert domain.items.decode(domain.sequences[0]) == [1, 3]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_other_columns_are_not_taken_for_times(tmp_path, load, suffix):
    rows = {
        "user": ["a", "b"],
        "item": [1, 2],
        "order_id": [EPOCH, EPOCH + 1],
        "price": [2.5, 3.0],
        "lifetime": [1, 2],
        "update": ["x", "y"],
        "time_of_day": ["morning", "night"],
        "year": [2019, 2020],
        "count": [0, 10**7],
    }
    domain, said = load(written(tmp_path, rows, suffix))
    assert said == [] and domain.report.notes == () and domain.ordered_by is None


def test_many_rows_in_small_pieces_tell_the_same(tmp_path, monkeypatch):
    from metarec_fast.data.io import importing

    head = "user,item,note,bought\n"
    rows = [f"u{k % 5},i{k},n,{EPOCH + k}\n" for k in range(150)]
    rows[3:3] = ["short\n", "\n", 'u,"i,\nj",n,"1580000000"\n', ",x,n,later\n"]
    rows[110:] = [row.replace(",15", ",") for row in rows[110:]]  # past the rows that are looked at
    path = tmp_path / "d.csv"
    path.write_text(head + "".join(rows))
    with pytest.warns(DataWarning, match="'bought' looks like times"):
        whole = read(path, on_error="skip")
    for piece in (1, 30, 10**6):
        monkeypatch.setattr(importing, "PIECE", piece)
        with pytest.warns(DataWarning, match="'bought' looks like times"):
            got = import_file(path, tmp_path / "d", on_error="skip", overwrite=True)
        assert got.report == whole.report


def test_the_order_is_kept_in_a_folder(tmp_path):
    path = written(tmp_path, {"user": ["a", "a"], "item": [1, 2], "Event Time": [2, 1]}, "csv")
    domain = read(path)
    save_domain(domain, tmp_path / "saved")
    import_file(path, tmp_path / "imported")
    for folder in ("saved", "imported"):
        loaded = load_domain(tmp_path / folder)
        assert loaded.ordered_by == "Event Time" and "ordered by column 'Event Time'" in loaded.summary()
    assert loaded.report == domain.report
    read_as = json.loads((tmp_path / "saved" / "domain.json").read_text())
    assert read_as["ordered_by"] == "Event Time"
    read_as["ordered_by"] = 3
    (tmp_path / "saved" / "domain.json").write_text(json.dumps(read_as))
    with pytest.raises(ValueError, match=r"is damaged: .*'ordered_by' must be the name of a column or null, got 3"):
        load_domain(tmp_path / "saved")
