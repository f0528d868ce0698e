"""A profile as people read it: a table with bars on the terminal, an SVG, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape as html
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metarec_fast.files import write_atomically
from metarec_fast.text import printable


class StageProfile(Protocol):
    """What is shown of ``profiling.steps.StageProfile``, which lies outside what a report may import."""

    run: str
    stage: str
    step_ms: float
    traced_ms: float
    threads: int
    peak_flops: float
    peak_bytes: float
    parts: dict[str, Any]

    @property
    def roofline_share(self) -> float: ...

    def roofline_ms(self, part: Any) -> float: ...

    def as_dict(self) -> dict[str, Any]: ...


FORWARD, BACKWARD, ROOFLINE = "#3b6fb6", "#9dbfe8", "#c0392b"


def title(profile: StageProfile) -> str:
    return printable(f"{profile.run} {profile.stage}".strip())


def show(profiles: Sequence[StageProfile], console: Console, *, width: int = 24) -> None:
    """One table a stage; the bars are of the whole step, darker the forward part."""
    for profile in profiles:
        table = Table(title=Text(f"{title(profile)}: {profile.step_ms:.1f} ms a step"))
        for column in ("part", "share", "forward ms", "backward ms", "roofline ms"):
            table.add_column(column, justify="left" if column == "part" else "right")
        table.add_column("")
        for name, part in profile.parts.items():
            forward, backward = (round(width * ms / profile.step_ms) for ms in (part.forward_ms, part.backward_ms))
            table.add_row(
                name,
                f"{part.ms / profile.step_ms:.1%}",
                f"{part.forward_ms:.2f}",
                f"{part.backward_ms:.2f}" if part.backward_ms else "",
                f"{profile.roofline_ms(part):.2f}" if part.bytes else "",
                "█" * forward + "▒" * backward,
            )
        console.print(table)
        console.print(
            f"█ forward ▒ backward. Roofline: {profile.roofline_share:.0%} of the step, "
            f"at {profile.peak_flops / 1e9:.0f} GFLOP/s and {profile.peak_bytes / 1e9:.0f} GB/s measured on "
            f"{profile.threads} threads. Traced steps took {profile.traced_ms:.1f} ms; shares are theirs.",
            highlight=False,
        )


def svg(profiles: Sequence[StageProfile]) -> str:
    """Bars of every part of every stage, the roofline as a line in each."""
    left, right, row, head = 110, 640, 20, 44
    bodies, y = [], 8
    for profile in profiles:
        scale = (right - left) / max(part.ms for part in profile.parts.values())
        heading = f"{title(profile)}: {profile.step_ms:.1f} ms a step, roofline {profile.roofline_share:.0%}"
        bodies.append(f'<text x="8" y="{y + 18}" font-weight="bold">{html(heading)}</text>')
        y += head - row // 2
        for name, part in profile.parts.items():
            x = left
            bodies.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html(name)}</text>')
            for ms, color in ((part.forward_ms, FORWARD), (part.backward_ms, BACKWARD)):
                bodies.append(f'<rect x="{x:.1f}" y="{y}" width="{ms * scale:.1f}" height="14" fill="{color}"/>')
                x += ms * scale
            bodies.append(
                f'<text x="{x + 6:.1f}" y="{y + 12}">{part.ms:.2f} ms, {part.ms / profile.step_ms:.1%}</text>'
            )
            roofline = left + profile.roofline_ms(part) * scale
            if part.bytes:
                bodies.append(f'<path d="M{roofline:.1f} {y - 2}v18" stroke="{ROOFLINE}" stroke-width="2"/>')
            y += row
        y += 12
    legend, x = [], left
    for color, word in ((FORWARD, "forward"), (BACKWARD, "backward"), (ROOFLINE, "roofline")):
        legend.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{color}"/>')
        legend.append(f'<text x="{x + 18}" y="{y + 11}">{word}</text>')
        x += 100
    body = "\n".join(bodies + legend)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{y + 24}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def write(profiles: Sequence[StageProfile], folder: Path) -> None:
    """``profile.json`` and ``profile.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "profile.json", json.dumps([p.as_dict() for p in profiles], indent=2).encode())
    write_atomically(folder / "profile.svg", svg(profiles).encode())
