"""Which columns of a file hold users, items and times, and which others look like times."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

SAMPLE = 100  # rows that are looked at for what a file is like

# By preference; as `_plain` gives them, so that "Order Date", "order_date" and "orderDate" are one name. The names of
# a second list count where there is none of the first.
COMMON_NAMES = {
    "user": (
        (
            *("userid", "user", "uid", "reviewerid", "customerid", "customer", "visitorid", "visitor", "accountid"),
            *("clientid", "client", "memberid", "member", "buyerid", "buyer", "shopperid", "shopper", "playerid"),
            *("listenerid", "viewerid", "readerid", "subscriberid", "patronid", "personid", "profileid", "custid"),
            *("householdid", "householdkey", "userkey", "useridx", "userindex", "usernum", "usercode"),
        ),
        (
            *("username", "account", "player", "reviewer", "userpseudoid", "anonymousid", "deviceid", "cookieid"),
            *("sessionid", "session", "basketid"),
        ),
    ),
    "item": (
        (
            *("itemid", "item", "iid", "sku", "parentasin", "asin", "productid", "product", "movieid", "articleid"),
            *("bookid", "trackid", "songid", "videoid", "newsid", "gameid", "appid", "recipeid", "goodsid", "skuid"),
            *("merchandiseid", "businessid", "gmapid", "venueid", "poiid", "placeid", "restaurantid", "hotelid"),
            *("animeid", "showid", "episodeid", "podcastid", "courseid", "jobid", "listingid", "offerid", "contentid"),
            *("documentid", "docid", "postid", "photoid", "beerid", "stockcode", "productcode", "itemcode", "itemidx"),
            *("itemindex", "itemkey", "itemnum", "articlenumber"),
        ),
        (
            *(
                "isbn",
                "ean",
                "upc",
                "gtin",
                "artistid",
                "albumid",
                "movie",
                "book",
                "article",
                "track",
                "song",
                "video",
            ),
            *("game", "app", "recipe", "business", "venue", "anime"),
        ),
    ),
    "time": (
        (
            *("timestamp", "time", "ts", "unixreviewtime", "unixtime", "unixtimestamp", "eventtime", "eventtimestamp"),
            *("datetime", "date", "createdat", "orderedat", "purchasedat", "boughtat", "soldat", "visitedat"),
            *("viewedat", "watchedat", "playedat", "listenedat", "clickedat", "ratedat", "reviewedat", "readat"),
            *("addedat", "postedat", "submittedat", "loggedat", "occurredat", "happenedat", "startedat", "checkedinat"),
            *("borrowedat", "purchasetimestamp", "orderpurchasetimestamp", "ordertimestamp", "interactiontimestamp"),
            *("clicktimestamp", "ratingtimestamp", "reviewtimestamp", "actiontimestamp", "transactiontimestamp"),
            *("visittimestamp", "timestampms", "timestamps", "timestampseconds", "timestampmillis", "timems"),
            *("epochms", "epochtime", "epochseconds", "epoch", "unix", "tstamp", "visittime", "purchasetime"),
            *("ordertime", "interactiontime", "actiontime", "behaviortime", "behaviourtime", "clicktime", "ratingtime"),
            *("reviewtime", "checkintime", "transactiontime", "createtime", "createdtime", "creationtime", "logtime"),
            *("servertime", "requesttime", "submissiontime", "posttime", "starttime", "timecreated", "timeutc"),
            *("utctime", "utctimestamp", "datetimeutc", "localtime", "eventdatetime", "orderdatetime"),
            *("purchasedatetime", "transactiondatetime", "eventdate", "orderdate", "purchasedate", "interactiondate"),
            *("visitdate", "ratingdate", "reviewdate", "transactiondate", "invoicedate", "checkindate", "saledate"),
            *("salesdate", "viewdate", "clickdate", "createdate", "createddate", "createdon", "created"),
            *("creationdate", "submissiondate", "submitdate", "postdate", "dateadded", "datecreated", "tdat", "dt"),
            *("eventts", "clickts", "actionts", "visitts", "orderts", "createdutc", "unixtimems", "unixtimestampms"),
            *(
                "timestamputc",
                "timestampus",
                "timestampns",
                "eventtimems",
                "eventtimestampms",
                "rentaldate",
                "loandate",
            ),
            *("checkoutdate", "borrowdate", "bookingdate", "watchdate", "playdate", "dateread", "tweettime"),
        ),
        (),
    ),
}

TIME_WORDS = frozenset(
    ("time", "date", "datetime", "timestamp", "timestamps", "ts", "epoch", "utc", "when", "day", "moment")
)
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
ISO = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?:[ T]\S.*)?", re.ASCII)
OTHER_DATE = re.compile(r"\d{1,2}[-/. ]\d{1,2}[-/., ]+(?:\d{2}|\d{4})(?:[ T]\S.*)?", re.ASCII)
EPOCH = (900_000_000, 2_200_000_000)  # seconds: 1998 to 2039


class Columns:
    """The columns that a file is read from, and what there is to say about that.

    chosen: role (user, item, time) -> name of the column; the time may be absent. unused: the other columns.

    Raises ValueError for a role without a column, or with several of one name.
    """

    def __init__(self, path: Path, names: list[str], wanted: dict[str, str | None]):
        self.chosen: dict[str, str] = {}
        self._path = path
        self._choices: list[str] = []
        found = f"columns found: {_listed(names)}"
        for role, name in wanted.items():
            if name is not None:
                matches = [c for c in names if c == name] or [c for c in names if _bare(c) == name]
                if not matches:
                    raise ValueError(f"{path}: no column {name!r} for {role}; {found}")
            else:
                matches, others = _guess(role, names)
                if not matches and role == "time":
                    continue
                if not matches:
                    raise ValueError(f"{path}: no column looks like the {role}; name it with {role}=...; {found}")
                if others:
                    self._choices.append(
                        f"the {role} is read from column {matches[0]!r}, though {_listed(others)} could be meant too; "
                        f"{role}=... names another"
                    )
            if len(matches) > 1:
                raise ValueError(f"{path}: {len(matches)} columns could be the {role}: {_listed(matches)}; {found}")
            self.chosen[role] = matches[0]
        if len(set(self.chosen.values())) != len(self.chosen):
            raise ValueError(f"{path}: user, item and time must be different columns, got {self.chosen}")
        used = set(self.chosen.values())
        self.unused = [name for name in names if name not in used]
        self._seen = 0
        self._typed: set[str] = set()
        self._values: dict[str, list[object]] = {name: [] for name in self.unused}

    @property
    def wants_rows(self) -> bool:
        """Whether rows of the unused columns are looked at: there is no column of times, and few have been seen."""
        return "time" not in self.chosen and self._seen < SAMPLE and bool(self.unused)

    def look(self, rows: Iterable[Sequence[object]]) -> None:
        """Rows of the unused columns, in the order of the file; the first SAMPLE of them count."""
        for row in rows:
            if self._seen >= SAMPLE:
                return
            self._seen += 1
            for name, value in zip(self.unused, row, strict=True):
                self._values[name].append(value)

    def add_times(self, names: Iterable[str]) -> None:
        """Columns whose type says that they hold times."""
        self._typed.update(names)

    def ignored_times(self) -> str | None:
        """A sentence that names the unused columns that look like times, if rows are ordered by none."""
        if "time" in self.chosen:
            return None
        alike = [name for name, values in self._values.items() if name in self._typed or _look_like_times(name, values)]
        if not alike:
            return None
        verb = "looks" if len(alike) == 1 else "look"
        return (
            f"events stay in the order of rows, for no column of times was found; but {_listed(alike)} {verb} like "
            "times: time=... names the one to order by"
        )

    def notes(self) -> tuple[str, ...]:
        """What was chosen where there was a choice, and columns of times that are not used."""
        ignored = self.ignored_times()
        return (*self._choices, *((ignored,) if ignored else ()))


def _guess(role: str, names: list[str]) -> tuple[list[str], list[str]]:
    """(the columns of the most usual name, columns of less usual ones of the same list)."""
    plain = {name: _plain(name) for name in names}
    for usual in COMMON_NAMES[role]:
        by_rank = ([c for c in names if plain[c] == common] for common in usual)
        ranked = [found for found in by_rank if found]
        if ranked:
            return ranked[0], [name for found in ranked[1:] for name in found]
    return [], []


def _bare(column: str) -> str:
    name, _, kind = column.strip().rpartition(":")
    return name if kind in ("token", "float", "token_seq", "float_seq") else column.strip()


def _plain(column: str) -> str:
    return re.sub(r"[\s_.\-]+", "", _bare(column)).lower()


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(_short, names[:50]))
    return shown if len(names) <= 50 else f"{shown} and {len(names) - 50:,} more"


def _short(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 100 else text[:97] + "..."


def _look_like_times(name: str, values: list[object]) -> bool:
    """By the values: dates, or seconds (or thousandths, millionths, ... of them) since 1970; or by name and values."""
    words = [word.lower() for word in WORD.findall(_bare(name))]
    named = bool(TIME_WORDS.intersection(words)) or (len(words) > 1 and words[-1] == "at")
    values = [v for v in values if v is not None and not isinstance(v, (bool, list, dict)) and str(v).strip()]
    if not values:
        return False
    kinds = [_kind_of_time(value) for value in values]
    most = 0.9 * len(values)
    if kinds.count("date") >= most:
        return True
    if kinds.count("epoch") >= most and not (words and words[-1] in ("id", "ids")):
        return True
    return named and len(values) - kinds.count(None) >= most


def _kind_of_time(value: object) -> str | None:
    """date, epoch, number, or None."""
    if isinstance(value, (datetime.date, datetime.datetime)):
        return "date"
    text = str(value).strip()
    if ISO.fullmatch(text) or OTHER_DATE.fullmatch(text):
        return "date"
    try:
        number = float(text)
    except ValueError:
        return None
    return "epoch" if any(EPOCH[0] <= number / unit <= EPOCH[1] for unit in (1, 1e3, 1e6, 1e9)) else "number"
