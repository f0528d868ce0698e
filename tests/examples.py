"""How much the default run checks, and how much more ``pytest --all`` does."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings

# max_examples of a profile is a percentage of what a test asks for
settings.register_profile("gate", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("all", max_examples=100, deadline=None, derandomize=True)


def examples(number: int, **options: Any) -> settings:
    """Settings of a test that draws ``number`` examples under ``pytest --all``, and a quarter of them otherwise."""
    return settings(max_examples=max(1, number * settings().max_examples // 100), **options)


def representative(cases: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """Cases for ``parametrize``: those in ``kept`` run by default, and the others are slow."""
    kept, cases = list(kept), list(cases)
    assert kept and all(case in cases for case in kept), "a case that is kept is none of the cases"
    left = [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
    return [case if case in kept else marked for case, marked in zip(cases, left, strict=True)]
