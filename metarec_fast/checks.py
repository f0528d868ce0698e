"""Options are checked where they come into being, whatever their source: kinds by annotation, ranges by a table."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import numbers
import operator
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``, each of them included unless said otherwise."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """low itself is none of them."""
    below: bool = False
    """high itself is none of them."""

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def words(self, value: float) -> str:
        """What ``value``, which lies outside, should have been."""
        if self.below and self.high > 2**32:
            return f"in [{self.low}, 2**{self.high.bit_length() - 1})"
        if self.high <= 1:
            return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"
        if value > self.high:
            return f"at most {self.high}"
        return f"{'above' if self.above else 'at least'} {self.low:g}"


LARGEST = 2**31 - 1
COUNT = Range(0, LARGEST)
SEED = Range(0, 2**63, below=True)
PHILOX_SEED = Range(0, 2**64, below=True)
POSITIVE_COUNT = Range(1, LARGEST)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1, above=True)
DECAY = Range(0, 1, below=True)


def shown(value: object) -> str:
    """A value as it stands in a message, which a long one does not fill."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(choices: Iterable[Any]) -> str:
    """'a', 'b' or 'c'"""
    *first, last = map(repr, choices)
    return f"{', '.join(first)} or {last}" if first else last


def nearest(value: object, choices: Iterable[Any]) -> str:
    """A question that names the choice most like ``value``; nothing if none is like it."""
    by_text = {str(choice).lower().replace("-", "_"): choice for choice in choices}
    found = difflib.get_close_matches(str(value).lower().replace("-", "_"), by_text, n=1)
    return f"; did you mean {by_text[found[0]]!r}?" if found else ""


def check_choice(value: object, name: str, choices: Iterable[Any]) -> Any:
    """The choice that ``value`` is, by kind too: True is not 1. Raises ValueError naming the nearest one."""
    choices = tuple(choices)
    for choice in choices:
        if isinstance(choice, str):
            if isinstance(value, str) and value == choice:
                return choice
        elif not _is_bool(value) and isinstance(value, numbers.Real) and value == choice:
            return choice
    raise ValueError(f"{name} must be {listed(choices)}, got {shown(value)}{nearest(value, choices)}")


def check_flag(value: object, name: str) -> bool:
    """Raises ValueError unless ``value`` is True or False (or NumPy's); "false" is neither."""
    if _is_bool(value):
        return bool(value)
    meant = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(str(value).lower())
    raise ValueError(
        f"{name} must be True or False, got {shown(value)}" + ("" if meant is None else f"; did you mean {meant}?")
    )


def check_number(value: object, name: str, allowed: Range = NOT_NEGATIVE) -> float:
    """``value`` as a finite float in a range. Raises ValueError for anything else, also for text that reads as one."""
    if _is_bool(value) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if number not in allowed and not (allowed == Range() and math.isnan(number)):
        raise ValueError(f"{name} must be {allowed.words(number)}, got {shown(value)}")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return number


def check_count(value: object, name: str, allowed: Range = COUNT) -> int:
    """``value`` as an int in a range; NumPy's are, and 4e2, which is how files write whole numbers too.

    Raises ValueError for anything else.
    """
    number = None
    if not _is_bool(value):
        if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
            number = int(value) if math.isfinite(value) and value == math.floor(value) else None
        else:
            with suppress(TypeError):
                number = operator.index(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if number not in allowed:
        raise ValueError(f"{name} must be {allowed.words(number)}, got {shown(number)}")
    return number


def checked(value: object, kind: Any, name: str, allowed: Range | None = None) -> Any:
    """``value`` as its annotation ``kind`` wants it. Raises ValueError that names it, what it must be and what came."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        rest = [part for part in parts if part is not type(None)]
        return None if value is None else checked(value, rest[0], name, allowed)
    if origin is Literal:
        return check_choice(value, name, parts)
    if origin is tuple:
        of_none = getattr(value, "ndim", 1) == 0  # an array of no dimension, which claims to be iterable
        if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)) or of_none:
            raise ValueError(f"{name} must be a list, got {shown(value)}")
        return tuple(checked(one, parts[0], f"{name}[{i}]", allowed) for i, one in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be an object of names and values, got {shown(value)}")
        of = parts[1]
        return {checked(key, str, f"a name in {name}"): checked(one, of, f"{name}.{key}") for key, one in value.items()}
    if kind is bool:
        return check_flag(value, name)
    if kind is int:
        return check_count(value, name, COUNT if allowed is None else allowed)
    if kind is float:
        return check_number(value, name, NOT_NEGATIVE if allowed is None else allowed)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, got {shown(value)}")
        return str(value)
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {kind.__name__}, got {shown(value)}")
    return value


_postponed: ContextVar[bool] = ContextVar("postponed", default=False)


class Checked:
    """Options that check themselves when they are made: ``check`` raises ValueError for what cannot be."""

    def __post_init__(self) -> None:
        if not _postponed.get():
            self.check()

    def check(self) -> None:
        check_options(self)


@contextmanager
def postponed() -> Iterator[None]:
    """Options that are made here are left unchecked, for whoever calls their ``check``, to tell errors in his words."""
    token = _postponed.set(True)
    try:
        yield
    finally:
        _postponed.reset(token)


def check_options(
    options: Any,
    *,
    prefix: str = "",
    ranges: Mapping[str, Range] | None = None,
    only: type | None = None,
) -> None:
    """Check every field of a dataclass by its annotation, in place; for ``check``.

    prefix: before the names of options. ranges: of numbers that may not be any from 0 on. only: the fields of this
    class, of which that of ``options`` is a subclass.
    """
    kind = only or type(options)
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        given = getattr(options, field.name)
        value = checked(given, hints[field.name], prefix + field.name, (ranges or {}).get(field.name))
        if value is not given:
            object.__setattr__(options, field.name, value)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def check_names(given: Iterable[str], known: Iterable[str], *, owner: str, what: str, plural: str) -> None:
    """Raise ValueError for the first of ``given`` that ``owner`` does not have, with those that it has."""
    known = list(known)
    for name in given:
        if name not in known:
            message = f"{owner} has no {what} {name!r}; {plural} are {', '.join(known)}"
            raise ValueError(message + nearest(name, known))


def parse_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError, also for a key that stands twice and for nesting without end."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return made


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))
