"""Names and paths are other people's text: how they stand on a terminal, in Markdown and as a file's name."""

from __future__ import annotations

import re
import unicodedata

JOINERS = "\u200c\u200d"  # invisible, and part of how some scripts are written


def printable(text: object) -> str:
    """On one line and harmless: line ends, control and direction characters and lone surrogates as escapes."""
    text = str(text)
    return text if text.isprintable() else "".join(_escaped(c) if not c.isprintable() else c for c in text)


def _escaped(c: str) -> str:
    hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in JOINERS
    return c.encode("unicode_escape").decode() if hidden else c


def markdown(text: object) -> str:
    """As text in Markdown, also in a cell of a table: no HTML, no link, no new cell."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", plain)


def file_name(text: str) -> str:
    """One part of a path, whatever the text: neither separators nor anything hidden, and not empty."""
    safe = "".join("_" if c in "/\\\0" else c for c in printable(text)).strip(". ")
    return safe.encode()[:200].decode(errors="ignore") or "unnamed"
