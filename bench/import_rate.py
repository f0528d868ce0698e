"""Importing a CSV that is larger than the memory given: rows a second, peak memory, and whether the domain is right.

    python -m bench import_rate [--rows 50000000 ...] [--memory 1GB ...] [--folder DIR]

The file is drawn block by block from the seed: integer ids, users alike, items by a power law, times in no order. Its
truth is kept as it is drawn: events of each user and item, a checksum over (user, item, time) triples that no order
changes, and whole rows of some users. The import runs in a process of its own, whose highest resident size the
kernel tells; what it takes to import the package is in it and reported apart. Linux only. Writes
results/import-<device>.md, and exits with 1 if a domain was not the file's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.machine import RESULTS, commit, device_name, slug, versions  # noqa: E402
from bench.memory import status  # noqa: E402
from metarec_fast.data import Domain, import_file, load_domain  # noqa: E402

BLOCK = 5_000_000
WATCHED = 64  # the first users, whose rows are kept
EVENTS_A_USER, USERS_AN_ITEM = 25, 4
FIRST_USER, FIRST_ITEM, FIRST_TIME = 100_000, 1, 1_400_000_000


@dataclass
class Truth:
    per_user: np.ndarray
    per_item: np.ndarray
    checksum: int
    rows: pl.DataFrame  # of watched users, in the order of the file


def mixed(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> int:
    """A sum over events that changes with any one of them and not with their order."""
    word = users.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + items.astype(np.uint64)
    word = word * np.uint64(0xBF58476D1CE4E5B9) + times.astype(np.uint64)
    word ^= word >> np.uint64(29)
    return int((word * np.uint64(0x94D049BB133111EB)).sum(dtype=np.uint64))


def write(path: Path, rows: int, seed: int = 0) -> Truth:
    num_users = max(rows // EVENTS_A_USER, WATCHED)
    num_items = max(num_users // USERS_AN_ITEM, 10)
    truth = Truth(np.zeros(num_users, np.int64), np.zeros(num_items, np.int64), 0, pl.DataFrame())
    watched = []
    with open(path, "wb") as file:
        for first in range(0, rows, BLOCK):
            rng, count = np.random.default_rng((seed, first)), min(BLOCK, rows - first)
            users = rng.integers(0, num_users, count)
            items = (num_items * rng.random(count) ** 3).astype(np.int64)
            times = FIRST_TIME + rng.integers(0, 5 * 365 * 86400, count)
            truth.per_user += np.bincount(users, minlength=num_users)
            truth.per_item += np.bincount(items, minlength=num_items)
            truth.checksum = (truth.checksum + mixed(users + FIRST_USER, items + FIRST_ITEM, times)) % 2**64
            frame = pl.DataFrame({"user_id": users + FIRST_USER, "item_id": items + FIRST_ITEM, "timestamp": times})
            watched.append(frame.filter(pl.col("user_id") < FIRST_USER + WATCHED))
            frame.write_csv(file, include_header=first == 0)
    truth.rows = pl.concat(watched)
    return truth


def wrong(domain: Domain, truth: Truth) -> list[str]:
    """What of the domain is not what was written."""
    s = domain.sequences
    users, items = (np.fromiter(ids, np.int64, len(ids)) for ids in (domain.users, domain.items))
    found = []
    if not np.array_equal(np.sort(users - FIRST_USER), np.flatnonzero(truth.per_user)):
        found.append("user ids")
    if not np.array_equal(s.lengths, truth.per_user[users - FIRST_USER]):
        found.append("events of users")
    if not np.array_equal(np.bincount(s.items, minlength=len(items)), truth.per_item[items - FIRST_ITEM]):
        found.append("events of items")
    checksum, block = 0, 1_000_000 // EVENTS_A_USER
    for first in range(0, len(s), block):
        last = min(first + block, len(s))
        bounds = s.offsets[first : last + 1]
        times, owner = s.times[bounds[0] : bounds[-1]], np.repeat(np.arange(first, last), np.diff(bounds))
        checksum += mixed(users[owner], items[s.items[bounds[0] : bounds[-1]]], times)
        if ((np.diff(times) < 0) & (np.diff(owner) == 0)).any():
            found.append(f"order of events from user {first} on")
    if checksum % 2**64 != truth.checksum:
        found.append("events")
    for (user,), rows in truth.rows.group_by("user_id"):
        rows = rows.sort("timestamp", maintain_order=True)
        u = domain.users.encode([user])[0]
        if domain.items.decode(s[u]) != rows["item_id"].to_list():
            found.append(f"items of user {user}")
    return found


def measure(path: Path, folder: Path, memory: str) -> dict[str, float]:
    """In this process, so only once."""
    pl.read_csv(b"a\n1\n")  # the threads and code of polars are there
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    started, used = time.perf_counter(), time.process_time()
    import_file(path, folder, memory=memory)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "cpu": time.process_time() - used,
        "before": before,
        "peak": status("VmHWM"),
    }


def run(rows: int, memories: list[str], parent: str | None) -> tuple[list[str], bool]:
    """(lines of the table, whether all was right)."""
    lines, right = [], True
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        path, folder = Path(scratch) / "log.csv", Path(scratch) / "domain"
        truth = write(path, rows)
        for memory in memories:
            load = os.getloadavg()[0]
            command = [sys.executable, __file__, "--child", str(path), str(folder), memory]
            figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rate = rows / figures["seconds"] / 1e6
            domain = load_domain(folder, mmap=True, verify=True)
            problems = wrong(domain, truth)
            right &= not problems
            size, csv = sum(file.stat().st_size for file in folder.iterdir()), path.stat().st_size
            verdict = ", ".join(problems) or "yes"
            lines.append(
                f"| {rows:,} | {csv / 1e9:.2f} | {domain.num_users:,} | {domain.num_items:,} | {memory} "
                f"| {load:.1f} | {figures['cpu']:.1f} | {figures['seconds']:.1f} | {rate:.2f} "
                f"| {figures['before'] / 1e6:.0f} | {figures['peak'] / 1e6:.0f} | {size / 1e9:.2f} | {verdict} |"
            )
            print(lines[-1], flush=True)
            for file in folder.iterdir():
                file.unlink()
    return lines, right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000_000])
    parser.add_argument("--memory", nargs="+", default=["1GB", "256MB"])
    parser.add_argument("--folder", help="where the file and the domain are written for a while")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, folder, memory = options.child
        print(json.dumps(measure(Path(path), Path(folder), memory)))
        return 0
    device = device_name("cpu")
    text = [
        "# Import of a CSV of integer ids",
        "",
        f"By `python -m bench import_rate` on {device}, {len(os.sched_getaffinity(0))} cores, "
        f"{versions('polars')}, commit {commit()}.",
        "Load is the machine's load average before the run, others' work on it; CPU s is user and system time of all "
        "threads. Resident sizes in MB: before is with the package, torch and polars imported; peak is the highest of "
        "the import's process. Right: counts, order and every event agree with what was written.",
        "",
        "| rows | CSV GB | users | items | memory | load | CPU s | s | M rows/s | before | peak | domain GB | right |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    right = True
    for rows in options.rows:
        lines, fine = run(rows, options.memory, options.folder)
        text += lines
        right &= fine
    (RESULTS / f"import-{slug(device)}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
