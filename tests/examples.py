"""How many examples hypothesis draws: fewer in the default run than under ``pytest --all``."""

from typing import Any

from hypothesis import settings

# max_examples of a profile is a percentage of what a test asks for
settings.register_profile("gate", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("all", max_examples=100, deadline=None, derandomize=True)


def examples(number: int, **options: Any) -> settings:
    """Settings of a test that draws ``number`` examples under ``pytest --all``, and a quarter of them otherwise."""
    return settings(max_examples=max(1, number * settings().max_examples // 100), **options)
