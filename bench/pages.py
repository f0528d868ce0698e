"""Writes the speed figures of README and docs, and docs/speed.svg, from one device's results.

python -m bench pages [--check] [--device SLUG]
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.shapes import SHAPES  # noqa: E402

PUBLISHED = "amd-epyc-family-26-model-2"  # the device whose figures the pages quote
RESULTS = ROOT / "bench/results"
NAMES = [f"{N}x{D}x{K}" for N, D, K, _ in SHAPES]
VQP, PLAIN = "vector_quantize_pytorch", "torch.compile of plain torch"
FAISS = ("faiss IndexFlatL2, OpenBLAS Haswell", "faiss IndexFlatL2, OpenBLAS SkylakeX")
STEP = "FastVQ training step, "

Row = dict[str, str]


class Results:
    """The rows of a device's file."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    @staticmethod
    def of(device: str) -> Results:
        with (RESULTS / f"{device}.csv").open(newline="", encoding="utf-8") as file:
            return Results(csv.DictReader(file))

    def row(self, subject: str, baseline: str, shape: str, *, threads: int = 2) -> Row:
        """Raises KeyError for what was not measured."""
        for row in self.rows:
            if (row["subject"], row["baseline"], row["shape"], row["threads"]) == (
                subject,
                baseline,
                shape,
                str(threads),
            ):
                return row
        raise KeyError(f"no result of {subject!r} against {baseline!r} at {shape!r}, {threads} threads")

    def ratios(self, subject: str, *baselines: str) -> list[float]:
        """At each of SHAPES, against the fastest of the baselines."""
        return [min(float(self.row(subject, one, name)["ratio"]) for one in baselines) for name in NAMES]


def rounded(value: float) -> str:
    """Three digits below 10, or two from there on."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def spread(row: Row) -> str:
    """Median and 5-95 % range."""
    ratio, low, high = (rounded(float(row[name])) for name in ("ratio", "p5", "p95"))
    return f"{ratio} ({low}-{high})"


def mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def table(header: list[str], rows: Iterable[list[str]], *, left: int = 1) -> str:
    """A Markdown table with ``left`` columns of words before those of numbers."""
    lines = [header, ["---"] * left + ["--:"] * (len(header) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("| --: ", "|--:")


SUMMARY = (  # what, against whom in words, subject, baselines
    ("codebook lookup, exact", "faiss-cpu 1.15 IndexFlatL2, the faster of its kernels", "nearest_codeword", FAISS),
    ("FastVQ forward + backward, rotation", "vector-quantize-pytorch 1.32", f"{STEP}rotation", (VQP,)),
    ("", "plain torch without one-hot, compiled", f"{STEP}rotation", (PLAIN,)),
    ("FastVQ forward + backward, straight-through", "vector-quantize-pytorch 1.32", f"{STEP}straight_through", (VQP,)),
    ("", "plain torch without one-hot, compiled", f"{STEP}straight_through", (PLAIN,)),
    ("FastVQ forward in eval", "vector-quantize-pytorch 1.32", "FastVQ in eval mode", (VQP,)),
)


def summary_table(results: Results) -> str:
    rows = []
    for what, against, subject, baselines in SUMMARY:
        ratios = results.ratios(subject, *baselines)
        rows.append([what, against, f"{mean(ratios):.2g}", f"{min(ratios):.2g}"])
    return table(["", "against", "times as fast", "least"], rows, left=2)


COLUMNS = {
    "faiss, Haswell kernel": ("nearest_codeword", FAISS[0]),
    "faiss, SkylakeX kernel": ("nearest_codeword", FAISS[1]),
    "VQP, rotation": (f"{STEP}rotation", VQP),
    "VQP, straight-through": (f"{STEP}straight_through", VQP),
    "compiled, rotation": (f"{STEP}rotation", PLAIN),
    "compiled, straight-through": (f"{STEP}straight_through", PLAIN),
    "VQP, eval": ("FastVQ in eval mode", VQP),
}


def vq_table(results: Results) -> str:
    rows = [
        [name.replace("x", " x "), *(spread(results.row(*column, name)) for column in COLUMNS.values())]
        for name in NAMES
    ]
    means = [f"{mean(results.ratios(subject, baseline)):.1f}" for subject, baseline in COLUMNS.values()]
    return table(["N x D x K", *COLUMNS], [*rows, ["geometric mean", *means]])


def utilisation_table(results: Results) -> str:
    rows = [
        [name.replace("x", " x "), spread(results.row("nearest_codeword", "multiply-add peak", name))] for name in NAMES
    ]
    return table(["N x D x K", "times the float32 multiply-add peak"], rows)


RESIDUAL = {"16384x32x256x3": "16384 x 32, 3 levels of 256", "4096x128x1024x8": "4096 x 128, 8 levels of 1,024"}
RESIDUAL |= {"8192x128x1024x8, codes of 8": "8192 x 128, 8 levels of 1,024, codes of width 8"}


def residual_table(results: Results) -> str:
    subject = "FastResidualVQ training step"
    rows = [
        [words, *(spread(results.row(subject, whom, shape)) for whom in (VQP, f"{VQP} with FastVQ inside"))]
        for shape, words in RESIDUAL.items()
    ]
    return table(["`FastResidualVQ`, training step", "against VQP", "against VQP with FastVQ inside"], rows)


def ranks_table(results: Results) -> str:
    rows = []
    for users, against in ((22363, "topk(10)"), (2795, "argsort")):
        row = results.row("target_ranks", f"torch matmul + {against}", f"{users}x12101x64")
        rows.append([f"{users:,}", f"torch matmul + {against}", spread(row)])
    return table(["users", "against", "times as fast"], rows, left=2)


SAMPLER = {
    "Python function for each user": "a Python function for each user, rows stacked (as SASRec's public code does)",
    "DataLoader over users": "the same through a `DataLoader` and its collation",
    "NumPy, padded": "NumPy over all positions at once, padded rectangles",
    "NumPy, packed": "NumPy over all positions at once, packed",
}


def sampler_table(results: Results) -> str:
    step = ("a step's batches, one exact negative", "5 domains x 128 x 50")
    rows = [[words, spread(results.row(step[0], baseline, step[1]))] for baseline, words in SAMPLER.items()]
    return table(["against", "times as fast"], rows)


def draws_table(results: Results) -> str:
    """Of one core, a drawn thing each."""
    rows = []
    for words, subject, baseline, shape, count, whom in (
        (
            "uniform negative, exact, V = 10^6",
            "204800 uniform negatives, none seen by its user",
            "torch.randint, nothing rejected",
            "V=1000000",
            204_800,
            "`torch.randint`, which rejects nothing",
        ),
        (
            "popularity negative, exact, V = 10^6",
            "204800 popularity negatives, none seen by its user",
            "torch.multinomial, nothing rejected",
            "V=1000000",
            204_800,
            "`torch.multinomial`, which rejects nothing",
        ),
        (
            "window of 50 positions, shuffled users",
            "1024 windows, shuffled users",
            "NumPy, packed",
            "1024 x 50",
            1024,
            "NumPy, packed",
        ),
    ):
        row = results.row(subject, baseline, shape, threads=1)
        ns = 1e6 * float(row["fast_ms"]) / count
        rows.append([words, f"{ns:.2g} ns", whom, spread(row)])
    return table(["one core", "time", "against", "times as fast"], rows, left=3)


def step_table(results: Results) -> str:
    rows = []
    for order in (1, 2):
        subject, shape = f"outer step, order {order}", "4 sources, 128 windows each"
        padded = results.row(subject, "padded loop with dense logits", shape)
        valid = results.row(subject, "padded loop with dense logits of valid positions", shape)
        rows.append([f"order {order}", f"{float(padded['fast_ms']):.0f}", spread(padded), spread(valid)])
    one = results.row("training step", "padded, dense logits", "57289 items, 128 windows")
    rows.append(["training step of one domain, 57,289 items", f"{float(one['fast_ms']):.0f}", spread(one), ""])
    header = ["", "ms", "against padded rows and dense logits", "against logits at valid positions alone"]
    return table(header, rows)


def loss_table(results: Results) -> str:
    subject, torch = "linear_cross_entropy forward+backward", "torch addmm + cross_entropy"
    rows = []
    for T, V in ((300, 2420), (900, 12000), (900, 57289), (3600, 12000)):
        pair = (results.row(subject, baseline, f"T={T} V={V} D=64") for baseline in (torch, f"{torch}, compiled"))
        rows.append([f"{T:,}", f"{V:,}", *map(spread, pair)])
    header = ["positions", "items", "against `addmm` and `F.cross_entropy`", "against the same compiled"]
    return table(header, rows, left=0)


BLOCKS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "summary": ("README.md", summary_table),
    "vq": ("docs/guides/fast_vq.md", vq_table),
    "utilisation": ("docs/guides/fast_vq.md", utilisation_table),
    "residual": ("docs/guides/fast_vq.md", residual_table),
    "ranks": ("docs/guides/evaluate.md", ranks_table),
    "sampler": ("docs/guides/sampler.md", sampler_table),
    "draws": ("docs/guides/sampler.md", draws_table),
    "outer-step": ("docs/guides/train.md", step_table),
    "losses": ("docs/guides/train.md", loss_table),
}
"""A page holds ``<!-- bench: NAME -->``, the table, ``<!-- end -->``."""


def with_blocks(page: str, text: str, results: Results) -> str:
    """``text`` of a page with its blocks as the results have them. Raises ValueError for a missing marker."""
    for name, (where, made) in BLOCKS.items():
        if where == page:
            pattern = re.compile(rf"(<!-- bench: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            text, count = pattern.subn(lambda m, made=made: f"{m[1]}\n{made(results)}\n\n{m[2]}", text)
            if count != 1:
                raise ValueError(f"{page} must have one block <!-- bench: {name} --> ... <!-- end -->, has {count}")
    return text


# the chart of the first page

CHART = (
    ("lookup against faiss, the faster kernel", "nearest_codeword", FAISS, "#0072b2"),
    ("training step against vector-quantize-pytorch", f"{STEP}rotation", (VQP,), "#d55e00"),
    ("training step against compiled plain torch", f"{STEP}rotation", (PLAIN,), "#009e73"),
)
STYLE = (
    "text{font:13px sans-serif;fill:#24292f}.axis{stroke:#8886}.one{stroke:#888;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}}"
)


def chart(results: Results) -> str:
    """Times as fast at every size, on a logarithmic axis, with the 5-95 % range."""
    width, left, right, each, top = 760, 150, 24, 15, 84
    group = each * len(CHART) + 14
    height = top + group * len(NAMES) + 44

    def x(ratio: float) -> float:
        return left + math.log10(ratio) / math.log10(256) * (width - left - right)

    parts = []
    for tick in (1, 2, 5, 10, 20, 50, 100, 200):
        kind = "one" if tick == 1 else "axis"
        parts.append(f'<path class="{kind}" d="M{x(tick):.1f} {top - 6}V{height - 36}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 18}" text-anchor="middle">{tick}x</text>')
    for i, (words, *_, colour) in enumerate(CHART):
        parts.append(f'<rect x="14" y="{26 + 17 * i}" width="12" height="11" fill="{colour}"/>')
        parts.append(f'<text x="32" y="{36 + 17 * i}">{words}</text>')
    parts.append(f'<text x="14" y="16" font-weight="bold">{title(results)}</text>')
    for i, name in enumerate(NAMES):
        y = top + group * i
        parts.append(f'<text x="{left - 10}" y="{y + group / 2}" text-anchor="end">{name.replace("x", " x ")}</text>')
        for k, (_, subject, baselines, colour) in enumerate(CHART):
            row = min((results.row(subject, one, name) for one in baselines), key=lambda r: float(r["ratio"]))
            ratio, low, high = (float(row[key]) for key in ("ratio", "p5", "p95"))
            at = y + each * k
            bar = f'<rect x="{left}" y="{at}" width="{x(ratio) - left:.1f}" height="{each - 4}" fill="{colour}"/>'
            whisker = f'<path d="M{x(low):.1f} {at + 5.5}H{x(high):.1f}" stroke="#888" stroke-width="2"/>'
            label = f'<text x="{x(high) + 5:.1f}" y="{at + 10}" font-size="11">{rounded(ratio)}</text>'
            parts += [bar, whisker, label]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{title(results)}</title><style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def title(results: Results) -> str:
    row = results.row("nearest_codeword", FAISS[0], NAMES[0])
    return f"Times as fast, rows x width x codes; float32, {row['threads']} threads, {row['device']}"


def pages(device: str = PUBLISHED) -> dict[Path, str]:
    """Every page with figures, as the results of ``device`` make it."""
    results = Results.of(device)
    made = {
        ROOT / page: with_blocks(page, (ROOT / page).read_text(encoding="utf-8"), results)
        for page in dict.fromkeys(page for page, _ in BLOCKS.values())
    }
    return made | {ROOT / "docs/speed.svg": chart(results)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    parser.add_argument("--device", default=PUBLISHED, help="the results file's name without its end")
    args = parser.parse_args()
    status = 0
    for path, text in pages(args.device).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path.relative_to(ROOT)} {'differs from the results' if args.check else 'written'}")
            status = int(args.check)
            if not args.check:
                path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
