"""Files that are whole or as they were, whatever happens while they are written, and checks of what is read back."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # where there are no such locks, leftovers stay and nobody is refused
    fcntl = None

LOCK = ".lock"
LARGEST_JSON = 256 << 20  # bytes; a description is a few kilobytes, a history a few megabytes


class Damaged(ValueError):
    """What is wrong with a file that was read, its name first."""


# writing


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, or leave it as it was. A link is replaced, not followed.

    What a killed process left of an earlier attempt is removed. Raises OSError with the path where it fails.
    """
    path = Path(path)
    with naming(path):
        _remove_leftovers(path)
        partial, descriptor = _new_file(path)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                write_all(file, memoryview(data))
                os.fsync(file.fileno())
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_all(file: Any, data: memoryview) -> None:
    """An unbuffered file takes as much of a write as fits."""
    while len(data):
        data = data[file.write(data) :]


def sync(folder: Path) -> None:
    """Names of files in ``folder`` reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such thing
            raise
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path, remark: str = "") -> Iterator[None]:
    """An OSError of the block that names no file, or a file still hidden, names ``path``."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if error.errno is None or (named is not None and not _HIDDEN.search(os.fsdecode(named))):
            raise
        raise OSError(error.errno, f"{error.strerror or error}{remark}", str(path)) from error


# Hidden names: what is being written beside what it will replace

_HIDDEN = re.compile(r"\.(partial|replaced)-[0-9a-f]{16}(/|$)")


def _hidden(path: Path, role: str) -> Path:
    """A name beside ``path`` that nobody can foresee."""
    return path.with_name(f".{_stem(path.name)}.{role}-{secrets.token_hex(8)}")


def _stem(name: str) -> str:
    """The name, or a digest where it is so long that nothing could be added."""
    coded = os.fsencode(name)
    return name if len(coded) <= 200 else hashlib.sha256(coded).hexdigest()


def _beside(path: Path, role: str) -> list[Path]:
    """What lies beside ``path`` under its hidden names of a role."""
    pattern = re.compile(re.escape(f".{_stem(path.name)}.{role}-") + "[0-9a-f]{16}")
    try:
        return [path.with_name(name) for name in os.listdir(path.parent) if pattern.fullmatch(name)]
    except OSError:
        return []


def _new_file(path: Path) -> tuple[Path, int]:
    """A new file under a hidden name, and its descriptor, locked while it is open."""
    while True:
        partial = _hidden(path, "partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # or it was taken for a leftover before it was locked
            return partial, descriptor
        os.close(descriptor)


def _new_folder(path: Path) -> tuple[Path, int]:
    """A new folder under a hidden name that its owner alone can enter, and its descriptor, locked while it is open."""
    while True:
        partial = _hidden(path, "partial")
        os.mkdir(partial, 0o700)
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        lock(descriptor)
        if partial.is_dir():
            return partial, descriptor
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool = True) -> bool:
    """Lock what a descriptor is of until it is closed or the process ends; False if another holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF):
            raise
    return True


def _remove_leftovers(path: Path, *, replaced: bool = False) -> None:
    """Remove what killed processes left beside ``path``: what is still written is locked, and stays.

    replaced: what was there before too, since ``path`` is whole.
    """
    if fcntl is None:
        return
    for left in _beside(path, "partial") + (_beside(path, "replaced") if replaced else []):
        with contextlib.suppress(OSError):  # somebody else's, or removed meanwhile
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if lock(descriptor, wait=False):
                    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
                    shutil.rmtree(left, ignore_errors=True) if is_folder else left.unlink()
            finally:
                os.close(descriptor)


# Folders of several files


@dataclass(frozen=True)
class Kind:
    """A folder of several files.

    name: what it is called. last: the file that makes it whole. owns: whether a name in it is its own.
    describe: what a whole one holds, in words.
    """

    name: str
    last: str
    owns: Callable[[str], bool]
    describe: Callable[[Path], str]

    def is_in(self, folder: str | Path) -> bool:
        """Whether a whole one is in ``folder``, perhaps after putting back what a killed process had moved away."""
        folder = Path(folder)
        if not os.path.lexists(folder):
            self._put_back(folder)
        return (folder / self.last).is_file()

    def _put_back(self, folder: Path) -> None:
        own = [p for p in _beside(folder, "replaced") if not p.is_symlink() and p.stat().st_uid == os.geteuid()]
        whole = [p for p in own if (p / self.last).is_file()]
        for old in sorted(whole, key=lambda p: p.stat().st_mtime, reverse=True)[:1]:
            descriptor = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                lock(descriptor)  # a process that is at it between its two steps is waited for
                if not os.path.lexists(folder) and old.is_dir():
                    os.rename(old, folder)
            finally:
                os.close(descriptor)


@contextmanager
def replacing(folder: str | Path, kind: Kind, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside ``folder`` that takes its name when the block ends well, and is gone when it does not.

    What ``folder`` holds stays whole until the very step in which the new takes its place, whenever the process is
    killed. Files in it that are not of its kind go into the new one. Leftovers of killed processes are removed.

    Raises ValueError, before anything is written, for a folder that holds something: one of its kind unless
    ``overwrite``, and anything else always. A write that fails raises OSError with the folder's name.
    """
    folder = Path(os.path.realpath(folder))
    refuse_occupied(folder, kind, overwrite=overwrite)
    with naming(folder, "; what was there before is as it was" if kind.is_in(folder) else "; nothing is left there"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder, replaced=kind.is_in(folder))
        partial, descriptor = _new_folder(folder)
        try:
            yield partial
            if kind.is_in(folder):
                _keep_foreign(folder, partial, kind)
            os.chmod(partial, _usual_mode(partial))
            sync(partial)
            _take_place(partial, folder, kind)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)


def refuse_occupied(folder: str | Path, kind: Kind, *, overwrite: bool) -> None:
    """Raises ValueError for a folder that ``replacing`` would not write."""
    folder = Path(os.path.realpath(folder))
    if kind.is_in(folder):
        if not overwrite:
            raise ValueError(
                f"{folder} holds a {kind.name} already; --overwrite (overwrite=True) replaces it. "
                f"In it: {kind.describe(folder)}"
            )
    elif folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file, expected a folder")
        if any(folder.iterdir()):
            raise ValueError(f"{folder} holds files but no {kind.name}; give an empty or a new folder")


def _usual_mode(folder: Path) -> int:
    """What a folder made here without further ado is allowed."""
    probe = folder / secrets.token_hex(8)
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    return mode


def _keep_foreign(old: Path, new: Path, kind: Kind) -> None:
    for entry in os.scandir(old):
        target = new / entry.name
        if kind.owns(entry.name) or _HIDDEN.search(entry.name) or os.path.lexists(target):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry, target, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry.path, target)


def _link_or_copy(source: str, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _take_place(partial: Path, folder: Path, kind: Kind) -> None:
    if not kind.is_in(folder):
        os.replace(partial, folder)  # an empty folder gives way
        sync(folder.parent)
        return
    if _exchange(partial, folder):
        old = partial
    else:
        old = _hidden(folder, "replaced")
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            lock(descriptor)  # so that nobody puts it back while it is between its two names
            os.rename(folder, old)
            try:
                os.rename(partial, folder)
            except BaseException:
                os.rename(old, folder)
                raise
        finally:
            os.close(descriptor)
    with contextlib.suppress(OSError):  # the new is whole and in its place, whenever its name reaches the disk
        sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, ctypes.c_uint(2))  # RENAME_SWAP
    elif hasattr(libc, "renameat2"):
        here = ctypes.c_int(-100)  # AT_FDCWD
        failed = libc.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))  # RENAME_EXCHANGE
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


# One process a folder


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """No other process, and no other run of this one, is in ``folder`` meanwhile. The lock ends with the process.

    Raises ValueError naming the process and its host if there is one.
    """
    path = folder / LOCK
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            if not lock(descriptor, wait=False):
                holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                raise ValueError(f"{folder} is in use by {holder}; wait for it, or give another folder")
            try:
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    break
            except FileNotFoundError:  # its last holder has just removed it
                pass
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now()}\n".encode(), 0)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


# Descriptions in JSON


class Field(NamedTuple):
    """What a field of a description must be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


COUNT = Field("a whole number of at least 0", lambda v: type(v) is int and 0 <= v < 2**63)
FINITE = Field("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v))
TEXT = Field("a string", lambda v: isinstance(v, str) and is_unicode(v))
OBJECT = Field("an object", lambda v: isinstance(v, dict))
LIST = Field("a list", lambda v: isinstance(v, list))
SHA256 = Field("64 hexadecimal digits", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None)


def is_unicode(text: str) -> bool:
    """Without half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_fields(found: Any, known: Mapping[str, Field], where: str, *, exact: bool = True) -> None:
    """Raises Damaged, naming ``where`` and the field, for one that is missing, unknown or of another kind.

    exact: unknown fields are faults.
    """
    if not isinstance(found, dict):
        raise Damaged(f"{where} must be an object, got {short_json(found)}")
    if missing := [name for name in known if name not in found]:
        raise Damaged(f"{where} has no {missing[0]!r}")
    if exact and (extra := [name for name in found if name not in known]):
        raise Damaged(f"{where} has the unknown field {short_json(extra[0])}")
    for name, field in known.items():
        if not field.fits(found[name]):
            raise Damaged(f"{where}: {name!r} must be {field.words}, got {short_json(found[name])}")


def short_json(value: Any) -> str:
    """A value of JSON, short."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def inside(folder: Path, name: str) -> Path:
    """The regular file ``name`` in ``folder``. Raises Damaged if there is none, or it leads out of the folder."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Damaged(f"{short_json(name)} leads out of the folder")
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise Damaged(f"{name} is missing: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{name} is not a file")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise Damaged(f"{name} is a link that leads out of the folder")
    return path


def read_json(folder: Path, name: str) -> Any:
    """What ``name`` in ``folder`` holds. Raises Damaged for what is no JSON."""
    path = inside(folder, name)
    if path.stat().st_size > LARGEST_JSON:
        raise Damaged(f"{name} has {path.stat().st_size:,} bytes, more than any description")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise Damaged(f"{name} is nested too deeply") from error
    except ValueError as error:  # also of Unicode
        raise Damaged(f"{name} is no JSON: {error}") from error


def check_format(manifest: Any, current: int, what: str, *, older: str) -> None:
    """Raises ValueError, with advice, for the description of another format. older: what to do with an older one."""
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is int and found > 0 and found != current:
        advice = older if found < current else "a newer version of metarec_fast wrote it"
        raise ValueError(f"{what} has format {found}, this version reads {current}: {advice}")


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """JSON of ``manifest`` with a checksum of them all, which ``check_seal`` looks at."""
    plain = json.loads(json.dumps(manifest))
    return json.dumps({**plain, "checksum": _checksum(plain)}, indent=2).encode()


def check_seal(manifest: Mapping[str, Any], name: str) -> None:
    """Raises Damaged if ``manifest`` are not what was sealed."""
    if manifest.get("checksum") != _checksum({key: value for key, value in manifest.items() if key != "checksum"}):
        raise Damaged(f"{name} was changed after it was written: its checksum is another")


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Its size and checksum, for a manifest."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


FILE = {"bytes": COUNT, "sha256": SHA256}  # as describe_file gives it


def check_file(folder: Path, name: str, described: Mapping[str, Any], *, verify: bool = True) -> Path:
    """The file of a manifest, of the size it had. Raises Damaged otherwise. verify: and of the same bytes."""
    path = inside(folder, name)
    size = path.stat().st_size
    if size != described["bytes"]:
        raise Damaged(f"{name} has {size} bytes, expected {described['bytes']}")
    if verify and _sha256(path) != described["sha256"]:
        raise Damaged(f"{name} has another checksum than when it was written")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
