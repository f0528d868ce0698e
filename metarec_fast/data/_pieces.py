"""A text file as pieces of whole records."""

from __future__ import annotations

import gzip
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
        self._source = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == GZIP else file
        self.position = 0

    @property
    def packed(self) -> bool:
        return self._source is not self._file

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer at the end; all if -1. Raises ValueError where a gzip file is damaged or cut short."""
        try:
            data = self._source.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self._path}: not a complete gzip file: {error}") from None
        self.position = self._file.tell() if self._file.seekable() else self.position + len(data)
        return data


@contextmanager
def unpacked(path: Path) -> Iterator[Unpacked]:
    with open(path, "rb") as file:
        yield Unpacked(path, file)


def pieces(path: Path, *, size: int | None, record_end: Callable[[bytes], int]) -> Iterator[Piece]:
    """The records of a UTF-8 text, about ``size`` bytes of them at a time, or all at once if None.

    The first piece is never blank. record_end: where the last whole record of some bytes ends, 0 if there is none.

    Raises ValueError for a file that is empty or not UTF-8, and for a record longer than 64 MiB when in pieces.
    """
    with unpacked(path) as file:
        line, rest = 1, b""
        block = file.read(-1 if size is None else size)
        while 0 < len(block) < len(BOM) and (more := file.read(len(BOM) - len(block))):
            block += more
        if block[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path}: expected UTF-8, got UTF-16")
        block = block.removeprefix(BOM)
        begun = False
        while True:
            rest = rest + block if rest else block
            last = size is None or not (block := file.read(size))
            begun = begun or bool(rest.strip())
            end = len(rest) if last else record_end(rest) if begun else 0
            if end and begun:
                data, rest = rest[:end], rest[end:]
                if b"\r" in data:
                    data = data.replace(b"\r\n", b"\n")
                yield Piece(data, line, file.position)
                line += int(np.count_nonzero(np.frombuffer(data, np.uint8) == NEWLINE))
            elif len(rest) > LONGEST:
                raise ValueError(f"{path}:{line}: a row longer than {LONGEST >> 20} MiB")
            if last:
                break
        if not begun:
            raise ValueError(f"{path}: empty file")
