"""A text file as pieces of whole records."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

GZIP = b"\x1f\x8b"
NEWLINE = ord("\n")
BOM = b"\xef\xbb\xbf"
LINE_BREAK = re.compile(rb"[\r\n]")
HEAD = 64  # bytes that tell an encoding
FOREIGN = {  # what a file begins with -> what it is
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"PAR1": 'a Parquet file (format="parquet")',
}
LONGEST = 1 << 26  # bytes of a record


@dataclass(frozen=True)
class Piece:
    """Records of a file, with LF as the only line end."""

    data: bytes
    line: int  # of the file, from 1, where data begins
    read: int  # bytes of the file (as it lies on disk) read so far


class Unpacked:
    """A file's bytes, unpacked if it is gzipped. position: in the file as it lies on disk."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        with self._named():
            self._source = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == GZIP else file
        self.position = 0

    @property
    def packed(self) -> bool:
        return self._source is not self._file

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer at the end; all if -1. Raises ValueError where a gzip file is damaged or cut short."""
        with self._named():
            data = self._source.read(size)
        self.position = self._file.tell() if self._file.seekable() else self.position + len(data)
        return data

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of reading name the file."""
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self._path}: not a complete gzip file: {error}") from None
        except OSError as error:
            if error.filename is None:
                raise OSError(error.errno, error.strerror or str(error), str(self._path)) from error
            raise


@contextmanager
def unpacked(path: Path) -> Iterator[Unpacked]:
    with open(path, "rb") as file:
        yield Unpacked(path, file)


def pieces(
    path: Path, *, size: int | None, record_end: Callable[[bytes], int], quoted: bool = False
) -> Iterator[Piece]:
    """The records of a UTF-8 text, about ``size`` bytes of them at a time, or all at once if None.

    The first piece is never blank. record_end: where the last whole record of some bytes ends, 0 if there is none.
    quoted: a line break within quotes does not end a line.

    Lines end in LF or CRLF. Where the first ends in CR alone, all three end lines.

    Raises ValueError for a file that is empty or not UTF-8, and for a row longer than 64 MiB.
    """
    with unpacked(path) as file:
        line, rest, begun = 1, b"", False
        blocks = _blocks(path, file, size, quoted)
        block = next(blocks)
        while True:
            rest = rest + block if rest else block
            block = next(blocks, b"")
            last = not block
            begun = begun or bool(rest.strip())
            end = len(rest) if last else record_end(rest) if begun else 0
            if end and begun:
                data, rest = rest[:end], rest[end:]
                if b"\r" in data:
                    data = data.replace(b"\r\n", b"\n")
                ends = np.flatnonzero(np.frombuffer(data, np.uint8) == NEWLINE)
                if len(data) > LONGEST:
                    _check_lengths(path, ends, len(data), line)
                yield Piece(data, line, file.position)
                line += len(ends)
            elif len(rest) > LONGEST:
                raise _too_long(path, line)
            if last:
                break
        if not begun:
            raise ValueError(f"{path}: empty file")


def _blocks(path: Path, file: Unpacked, size: int | None, quoted: bool) -> Iterator[bytes]:
    """The text of a file without its byte order mark; at least one block, and none but the first is empty.

    Where the first line ends in CR alone, every CR and CRLF is an LF.
    """
    block = file.read(-1 if size is None else size)
    while 0 < len(block) < HEAD and (more := file.read(HEAD - len(block))):
        block += more
    _check_encoding(path, block)
    block = block.removeprefix(BOM)
    returns: bool | None = None  # lines end in CR alone; not known yet
    while True:
        following = b"" if size is None else file.read(size)
        if returns is None:
            returns = _ends_in_return(block, quoted)
            if returns is None and following and len(block) <= LONGEST:
                block += following
                continue
            if returns is None:
                returns = bool(_ends_in_return(block, False))
        held = b"\r" if returns and following and block.endswith(b"\r") else b""
        if returns:
            block = block[: len(block) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if block or not following:
            yield block
        if not following:
            return
        block = held + following


def _ends_in_return(text: bytes, quoted: bool) -> bool | None:
    """Whether the first line ends in CR alone; None where the text does not tell."""
    inside, begin = False, 0
    for found in LINE_BREAK.finditer(text):
        at = found.start()
        if quoted:
            inside ^= bool(text.count(b'"', begin, at) % 2)
            begin = at
        if not inside:
            if text[at] == NEWLINE:
                return False
            return text[at + 1] != NEWLINE if at + 1 < len(text) else None
    return None


def _check_encoding(path: Path, head: bytes) -> None:
    for mark, kind in FOREIGN.items():
        if head.startswith(mark):
            raise ValueError(f"{path}: expected UTF-8, got {kind}")
    if len(head) >= 4 and any(not any(head[k:HEAD:2]) for k in (0, 1)):  # every second byte of Latin letters is 0
        raise ValueError(f"{path}: expected UTF-8, got UTF-16")


def _check_lengths(path: Path, ends: np.ndarray, size: int, line: int) -> None:
    """ends: of all lines but perhaps the last of ``size`` bytes, the first of which is this ``line`` of the file."""
    lengths = np.diff(ends, prepend=-1, append=size)
    if (lengths > LONGEST).any():
        raise _too_long(path, line + int(np.argmax(lengths > LONGEST)))


def _too_long(path: Path, line: int) -> ValueError:
    return ValueError(f"{path}:{line}: a row longer than {LONGEST >> 20} MiB")
