"""Are the codes exact? Random and adversarial rows against float64, on every instruction set and the Triton kernels.

    python -m bench exactness [--rows 10000000] [--interpreted-rows 10000] [--seed 0] [--isa avx2 ...]

The nearest code is that of least distance, or of largest product: always in the families of codes for cosine
similarity, and in every fourth problem of the others. Each problem is drawn from (family, seed) alone;
`metarec_fast.vq.verify` is the referee. Per problem: the indices of nearest_codeword against float64; those of
vq_commit, and its quantized rows bit for bit, against them; its weighted loss against float64; and whole results
against results of random splits of the rows under another number of threads, bit for bit. Every instruction set runs
in a process of its own, the Triton kernels under Triton's interpreter (fewer
rows, small shapes: it is a thousand times slower). Prints a table, writes results/exactness.md, and exits with 1 if
anything was wrong; every finding is printed with the call that draws its problem again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from metarec_fast.ops import backend_info, nearest_codeword, vq_commit  # noqa: E402
from metarec_fast.reference.nearest_codeword import Metric  # noqa: E402
from metarec_fast.vq import verify  # noqa: E402

CODES = (1, 2, 5, 63, 64, 65, 257, 1000, 8196)
DIMS = (1, 2, 3, 5, 8, 16, 17, 32, 64, 100, 256)
HEADS = (1, 1, 1, 2, 5)
DTYPES = (torch.float32,) * 17 + (torch.float16, torch.bfloat16, torch.float64)
INTERPRETER = "triton interpreter"
COUNTS = ("rows", "problems", "wrong", "commit", "codes", "split", "loss")
INF, NAN = float("inf"), float("nan")
Drawn = tuple[Tensor, Tensor]


class Shape(NamedTuple):
    H: int
    N: int
    K: int
    D: int


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def gaussian(N: int, K: int, D: int) -> Drawn:
    return normal(N, D), normal(K, D)


def clusters(N: int, K: int, D: int) -> Drawn:
    """Rows close to codes, as after training."""
    codes = normal(K, D)
    return codes[torch.randint(K, (N,))] + 10.0 ** -random.randint(1, 6) * normal(N, D), codes


def offset(N: int, K: int, D: int) -> Drawn:
    spread = 10.0 ** -random.randint(0, 4)
    return 1000 + spread * normal(N, D), 1000 + spread * normal(K, D)


def offset_rows(N: int, K: int, D: int) -> Drawn:
    """Far away from all codes, which then differ little in distance."""
    return 1000 + normal(N, D), normal(K, D)


def duplicates(N: int, K: int, D: int) -> Drawn:
    codes = normal(K, D)
    codes = codes[torch.randint(max(1, K // random.choice((2, 5, 50))), (K,))]
    codes[codes.abs() < 0.05] = 0
    return normal(N, D), torch.where((codes == 0) & (torch.rand(K, D) < 0.5), -0.0, codes)


def near_duplicates(N: int, K: int, D: int) -> Drawn:
    """Few places, each with many codes 1e-6 apart."""
    codes = normal(K, D)[torch.randint(max(1, K // 8), (K,))] + 1e-6 * normal(K, D)
    return normal(N, D), codes


def collapsed(N: int, K: int, D: int) -> Drawn:
    return normal(N, D), normal(1, D) + 1e-6 * normal(K, D)


def last_bit(N: int, K: int, D: int) -> Drawn:
    """Codes that differ in the last bits only."""
    bits = random.choice((2, 3, 17))
    return normal(N, D), normal(1, D).nextafter(torch.tensor(INF)) * (1 + 2.0**-23 * torch.randint(0, bits, (K, D)))


def halfway(N: int, K: int, D: int) -> Drawn:
    """Rows in the middle between two codes, to the last bit or so."""
    codes = normal(K, D) + random.choice((0, 100))
    a, b = (codes[torch.randint(K, (N,))] for _ in range(2))
    return ((a.double() + b.double()) / 2).float(), codes


def denormals(N: int, K: int, D: int) -> Drawn:
    scale, code_scale = (10.0 ** random.choice((-45, -42, -40, -38, -30, -22)) for _ in range(2))
    return scale * normal(N, D), code_scale * normal(K, D)


def huge(N: int, K: int, D: int) -> Drawn:
    """Around 1e18, where squares come close to the largest float32."""
    scale, code_scale = (10.0 ** random.choice((17, 18, 18.5, 19)) for _ in range(2))
    return scale * normal(N, D), code_scale * normal(K, D)


def overflow(N: int, K: int, D: int) -> Drawn:
    """Norms overflow float32, the elements do not all."""
    scale, code_scale = (10.0 ** random.choice((19, 20, 25, 30, 37, 38)) for _ in range(2))
    largest = torch.finfo(torch.float32).max
    return (scale * normal(N, D)).clamp(-largest, largest), (code_scale * normal(K, D)).clamp(-largest, largest)


def mixed_scales(N: int, K: int, D: int) -> Drawn:
    """Rows, codes and dimensions over 15 powers of ten."""
    exponent = torch.rand(N, 1) * 30 - 15, torch.rand(K, 1) * 30 - 15, torch.rand(1, D) * random.choice((0, 15))
    return normal(N, D) * 10 ** (exponent[0] + exponent[2]), normal(K, D) * 10 ** (exponent[1] + exponent[2])


def grid(N: int, K: int, D: int) -> Drawn:
    """Integers: exact ties between different codes."""
    reach, shift = random.choice((1, 2, 4, 100)), random.choice((0, 0, 4096))
    return tuple(torch.randint(-reach, reach + 1, (n, D)).float() + shift for n in (N, K))


def midpoints(N: int, K: int, D: int) -> Drawn:
    """Every code equally far from half of the rows."""
    return torch.randint(0, 2, (N, 1)) * torch.randint(-2, 3, (N, D)).float(), torch.randint(0, 2, (K, D)) * 2.0 - 1


def not_finite(N: int, K: int, D: int) -> Drawn:
    x, codes = normal(N, D), normal(K, D)
    for values, share in ((x, 0.1), (codes, random.choice((0, 0.05, 0.5, 1)))):
        broken = torch.rand(len(values)) < share
        at = torch.randint(D, (len(values),))[broken]
        values[broken, at] = torch.tensor([NAN, INF, -INF])[torch.randint(3, (len(at),))]
    return x, codes


def constant_dims(N: int, K: int, D: int) -> Drawn:
    x, codes = normal(N, D), normal(K, D)
    constant = torch.rand(D) < 0.7
    x[:, constant], codes[:, constant] = random.choice((0.0, 3.0, 1e4)), random.choice((0.0, 3.0, 1e4))
    return x, codes


def outlier_element(N: int, K: int, D: int) -> Drawn:
    """One large element takes the range of a row (of a code, too) away from the others: hard on 8-bit screens."""
    x, codes = normal(N, D), normal(K, D)
    size = 10.0 ** random.randint(2, 6)
    x[torch.arange(N), torch.randint(D, (N,))] = size
    if random.random() < 0.5:
        codes[torch.arange(K), torch.randint(D, (K,))] = size
    return x, codes


def outlier_code(N: int, K: int, D: int) -> Drawn:
    """One far code takes the mean and the largest norm with it."""
    codes = 10.0 ** -random.randint(0, 6) * normal(K, D)
    codes[random.randrange(K)] = 1e6
    return normal(N, D), codes


def on_codes(N: int, K: int, D: int) -> Drawn:
    """Rows that equal codes, but for the last bit of some."""
    codes = normal(K, D) * 10.0 ** random.choice((-20, 0, 15))
    x = codes[torch.randint(K, (N,))].clone()
    return torch.where(torch.rand(N, 1) < 0.5, x, x.nextafter(torch.tensor(INF))), codes


def unit(N: int, K: int, D: int) -> Drawn:
    return F.normalize(normal(N, D), dim=-1), F.normalize(normal(K, D), dim=-1)


def cosine_shrunk(N: int, K: int, D: int) -> Drawn:
    """Lengths from 1 to denormal, and zeros, as averages leave codes out of use; rows of zeros."""
    x, codes = unit(N, K, D)
    shrinks = torch.rand(K, 1) < random.choice((0.1, 0.5, 0.99))
    codes = codes * torch.where(shrinks, 10.0 ** -(46 * torch.rand(K, 1)), 1)
    codes[torch.rand(K) < random.choice((0.0, 0.3, 0.9))] = 0
    x[torch.rand(N) < 0.05] = 0
    return x, codes


def cosine_half_stored(N: int, K: int, D: int) -> Drawn:
    """Lengths not quite 1."""
    x, codes = unit(N, K, D)
    return x, codes.to(random.choice((torch.float16, torch.bfloat16))).float()


def cosine_near_duplicates(N: int, K: int, D: int) -> Drawn:
    """Few directions, each with many codes, and few rows that are not along one."""
    x, codes = unit(N, max(1, K // random.choice((2, 20, 500))), D)
    codes = codes[torch.randint(len(codes), (K,))]
    x = torch.where(torch.rand(N, 1) < 0.5, codes[torch.randint(K, (N,))], x)
    return x, codes + 10.0 ** -random.randint(4, 8) * normal(K, D)


def cosine_opposite(N: int, K: int, D: int) -> Drawn:
    """Codes and their opposites, some twice, and rows along, against and across them."""
    x, codes = unit(N, K, D)
    codes = codes[torch.randint(K, (K,))] * (1 - 2 * torch.randint(0, 2, (K, 1)))
    x = torch.where(torch.rand(N, 1) < 0.3, -codes[torch.randint(K, (N,))], x)
    return x, codes


def cosine_lengths(N: int, K: int, D: int) -> Drawn:
    """A few directions at lengths about 1 or far apart, so that lengths decide."""
    x, codes = unit(N, max(1, K // random.choice((1, 5, 100))), D)
    codes = codes[torch.randint(len(codes), (K,))]
    spread = random.choice((1e-7, 1e-4, 0.1, 3.0))
    return x, codes * torch.exp(spread * normal(K, 1))


def cosine_narrow(N: int, K: int, D: int) -> Drawn:
    """All within a narrow cone, where products differ by little."""
    axis, spread = normal(1, D), 10.0 ** -random.randint(1, 5)
    return tuple(F.normalize(axis + spread * normal(n, D), dim=-1) for n in (N, K))


COSINE = (
    unit, cosine_shrunk, cosine_half_stored, cosine_near_duplicates, cosine_opposite, cosine_lengths, cosine_narrow
)  # fmt: skip
FAMILIES: dict[str, Callable[[int, int, int], Drawn]] = {
    draw.__name__: draw
    for draw in (
        gaussian, clusters, offset, offset_rows, duplicates, near_duplicates, collapsed, last_bit, halfway, denormals,
        huge, overflow, mixed_scales, grid, midpoints, not_finite, constant_dims, outlier_element, outlier_code,
        on_codes, *COSINE,
    )
}  # fmt: skip


def metric_of(family: str, number: int) -> Metric:
    return "product" if FAMILIES[family] in COSINE or number % 4 == 3 else "distance"


def problem(family: str, seed: int, shape: Shape, dtype: torch.dtype = torch.float32) -> Drawn:
    """x [H, N, D] and codebook [H, K, D]; without heads if H is 1."""
    torch.manual_seed(seed)
    random.seed(seed)
    heads = [FAMILIES[family](*shape[1:]) for _ in range(shape.H)]
    x, codebook = (torch.stack(parts).to(dtype) for parts in zip(*heads, strict=True))
    return (x, codebook) if shape.H > 1 else (x[0], codebook[0])


def plan(family: str, seed: int, rows: int, *, codes: tuple, dims: tuple, dtypes: tuple) -> Iterator[tuple]:
    """(seed, shape, dtype) of problems until at least ``rows`` rows are drawn.

    All pairs of K and D come up before one comes again. Large ones have fewer rows, and few rows in all mean small
    problems rather than few shapes.
    """
    order = random.Random(f"{family} {seed}")
    most = min(4000, max(120, rows // (len(codes) * len(dims))))
    drawn = 0
    while True:
        shapes = [(K, D) for K in codes for D in dims]
        order.shuffle(shapes)
        for K, D in shapes:
            if drawn >= rows:
                return
            H = order.choice(HEADS)
            N = order.randint(1, max(2, min(most, (1 << 26) // (K * D)) // H))
            if order.random() < 0.02:
                N = order.randint(0, 1)
            drawn += H * N
            yield order.getrandbits(31), Shape(H, N, K, D), order.choice(dtypes)


def bits(tensor: Tensor) -> Tensor:
    """Integers that are equal where the bits are; for NaN too."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


class Operators(NamedTuple):
    """lookup(x, codebook, metric) -> (indices, margin); commit(x, codebook, row_weight, metric) -> (quantized,
    indices, loss). The metric is given by name."""

    lookup: Callable[..., tuple[Tensor, Tensor]]
    commit: Callable[..., tuple[Tensor, Tensor, Tensor]]
    interpreted: bool = False  # whose products, by NumPy, round by a row's place in its tile, and with them the margin


def public_operators() -> Operators:
    def commit(x: Tensor, codebook: Tensor, weight: Tensor, *, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
        return vq_commit(x, codebook, row_weight=weight, metric=metric)

    return Operators(nearest_codeword, commit)


def loss_is_close(loss: Tensor, x: Tensor, codes: Tensor, weight: Tensor, narrow: bool) -> bool:
    """Against the weighted mean of squared errors in float64; anything may come of sums that overflow float32."""
    error = (x.double() - codes.double()).square().sum(-1)
    error = torch.where(weight == 0, 0, error)  # such rows may be NaN
    total = (error * weight.double()).sum()
    if narrow and not total < 1e37:
        return True
    expected = total / max(1e-300, float(weight.double().expand_as(error).sum()) * x.shape[-1])
    # float32 sums of D squares and N rows, and what underflows float32
    return bool((loss.double() - expected).abs() <= 1e-5 * expected + (1e-37 if narrow else 0))


def check(
    x: Tensor,
    codebook: Tensor,
    operators: Operators,
    cuts: list[int],
    threads: tuple[int, int],
    metric: Metric = "distance",
) -> dict:
    """Counts of what is wrong, and the first wrong row."""
    torch.set_num_threads(threads[0])
    indices, margin = operators.lookup(x, codebook, metric=metric)
    codes = codebook.gather(
        -2, indices.clamp(0, codebook.shape[-2] - 1).unsqueeze(-1).expand(*indices.shape, x.shape[-1])
    )
    with torch.no_grad():
        error = (x.double() - codes.double()).square().sum(-1)
    N = x.shape[-2]
    weight = torch.randint(0, 4, (N,)).float() / 2
    weight[~((error if x.dim() == 2 else error.amax(0)) < 1e33)] = 0
    quantized, commit_indices, loss = operators.commit(x, codebook, weight, metric=metric)
    found = verify(x, codebook, indices, metric=metric)

    torch.set_num_threads(threads[1])
    edges = [0, *sorted(cuts), N]
    parts = [x[..., a:b, :] for a, b in itertools.pairwise(edges)]
    part_weights = [weight[a:b] for a, b in itertools.pairwise(edges)]
    looked = [operators.lookup(part, codebook, metric=metric) for part in parts]
    pieces = [torch.cat(p, -1) for p in zip(*looked, strict=True)]
    if operators.interpreted:
        wholes, pieces = (indices,), pieces[:1]
    else:
        committed = [
            operators.commit(part, codebook, w, metric=metric) for part, w in zip(parts, part_weights, strict=True)
        ]
        pieces += [torch.cat([c[1] for c in committed], -1), torch.cat([c[0] for c in committed], -2)]
        wholes = indices, margin, commit_indices, quantized
    torch.set_num_threads(threads[0])
    changed = torch.zeros(indices.shape, dtype=torch.bool)
    for whole, piece in zip(wholes, pieces, strict=True):
        differs = bits(whole) != bits(piece)
        changed |= differs.any(-1) if differs.dim() > indices.dim() else differs

    stored = bits(quantized) != bits(codes.to(x.dtype))
    narrow = x.dtype != torch.float64
    outcome = {
        "rows": found.checked,
        "problems": 1,
        "wrong": found.wrong,
        "commit": int((commit_indices != indices).sum()),
        "codes": int(stored.any(-1).sum()),
        "split": int(changed.sum()),
        "loss": int(not loss_is_close(loss, x, codes, weight, narrow)),
    }
    if found.wrong:
        at = found.rows[0].tolist()
        given = int(indices[tuple(at) if isinstance(at, list) else at])
        outcome["first"] = f"row {at}: {given}, expected {int(found.expected[0])}, excess {float(found.excess[0]):.3g}"
    elif outcome["split"]:
        outcome["first"] = f"row {changed.nonzero()[0].tolist()} changes, cut at {cuts}, {threads[1]} threads"
    elif outcome["loss"]:
        outcome["first"] = f"loss {float(loss):.9g}"
    return outcome


def run_family(
    family: str, seed: int, rows: int, operators: Operators, *, codes: tuple = CODES, dims: tuple = DIMS,
    dtypes: tuple = DTYPES, threads: int = 2,
) -> dict:  # fmt: skip
    """Totals over the family's problems, with findings: each the call of `problem` and what was wrong.

    One thread against one on split rows, and every third time against ``threads``.
    """
    total = dict.fromkeys(COUNTS, 0) | {"findings": []}
    for number, (drawn, shape, dtype) in enumerate(plan(family, seed, rows, codes=codes, dims=dims, dtypes=dtypes)):
        x, codebook = problem(family, drawn, shape, dtype)
        cuts = [random.randint(0, shape.N) for _ in range(2)]
        metric = metric_of(family, number)
        outcome = check(x, codebook, operators, cuts, (1, 1 if number % 3 else threads), metric)
        for name in COUNTS:
            total[name] += outcome[name]
        if any(outcome[name] for name in COUNTS[2:]):
            counts = ", ".join(f"{name} {outcome[name]}" for name in COUNTS[2:] if outcome[name])
            call = f"problem({family!r}, {drawn}, {shape}, {dtype}) by {metric}"
            total["findings"].append(f"{call}: {counts}; {outcome.get('first', '')}")
    return total


def interpreted_operators() -> Operators:
    """The Triton launchers on CPU tensors, in taller tiles to save time; the screen is never left out."""
    import warnings

    from metarec_fast.kernels import nearest_codeword as kernel
    from metarec_fast.kernels.vq_commit import vq_commit as commit_kernel
    from metarec_fast.reference.vq_commit import mean_row_error

    warnings.filterwarnings("ignore", "(invalid value|overflow|divide by zero) encountered", RuntimeWarning)
    kernel._REFINE_ALL = 0
    config = kernel.screen_config
    kernel.screen_config = lambda D, *, split: config(D, split=split) | {"BLOCK_N": 512}

    def lookup(x: Tensor, codebook: Tensor, *, metric: Metric) -> tuple[Tensor, Tensor]:
        if x.dim() == 3:
            return kernel.nearest_codeword(x, codebook, metric=metric)
        indices, margin = kernel.nearest_codeword(x[None], codebook[None], metric=metric)
        return indices[0], margin[0]

    def commit(x: Tensor, codebook: Tensor, weight: Tensor, *, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
        heads = (x, codebook) if x.dim() == 3 else (x[None], codebook[None])
        quantized, indices, row_error, *_ = commit_kernel(*heads, metric=metric)
        loss = mean_row_error(row_error, weight, x.shape[-1])
        return (quantized, indices, loss) if x.dim() == 3 else (quantized[0], indices[0], loss)

    return Operators(lookup, commit, interpreted=True)


def work(families: list[str], seed: int, rows: int) -> dict[str, dict]:
    """One process's share: every family, on the backend that the environment forces."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        # no bfloat16, which the interpreter computes wrongly, nor float64, which skips the screen
        options = {"codes": (1, 2, 5, 63, 64, 65, 257), "dims": (1, 2, 3, 5, 8, 16, 17, 32, 64, 100), "threads": 1}
        options["dtypes"] = (torch.float32,) * 6 + (torch.float16,)
        operators = interpreted_operators()
    else:
        options, operators = {}, public_operators()
    return {family: run_family(family, seed, rows // len(families), operators, **options) for family in families}


def run_backend(backend: str, families: list[str], seed: int, rows: int) -> dict[str, dict]:
    """`work` in a process whose environment forces ``backend``: an instruction set, or the interpreter."""
    forced = {"TRITON_INTERPRET": "1"} if backend == INTERPRETER else {"METAREC_FAST_ISA": backend}
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "METAREC_FAST_ISA")} | forced
    command = [sys.executable, __file__, "--worker", "--seed", str(seed), "--rows", str(rows), "--families", *families]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{backend}: the process failed\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    result = json.loads(run.stdout.splitlines()[-1])
    if backend != INTERPRETER and result["isa"] != backend:
        raise RuntimeError(f"asked for {backend}, the operators ran on {result['isa']}")
    return result["families"]


def totals(found: dict[str, dict]) -> dict[str, int]:
    return {name: sum(family[name] for family in found.values()) for name in COUNTS}


def table(found: dict[str, dict[str, dict]]) -> str:
    """Markdown: a line per backend, and a line per family over all backends."""
    header = "| {} | problems | rows | wrong codes | commit's index | stored codes | split or threads | losses |"
    lines = [header.format("backend"), "|---|" + "--:|" * 7]

    def line(name: str, count: dict[str, int]) -> str:
        cells = (f"{count[key]:,}" for key in ("problems", "rows", *COUNTS[2:]))
        return f"| {name} | " + " | ".join(cells) + " |"

    lines += [line(backend, totals(families)) for backend, families in found.items()]
    lines += ["", header.format("family"), "|---|" + "--:|" * 7]
    for family in next(iter(found.values())):
        lines.append(line(family.replace("_", " "), totals({b: families[family] for b, families in found.items()})))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows on each instruction set")
    parser.add_argument("--interpreted-rows", type=int, default=10_000, help="rows of the Triton kernels; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--isa", nargs="+", default=backend_info()["cpu"]["supported_isas"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "exactness.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        families = work(args.families, args.seed, args.rows)
        print(json.dumps({"isa": backend_info()["cpu"]["isa"], "families": families}))
        return 0

    from bench.machine import commit, device_name, versions

    found: dict[str, Any] = {}
    begin = time.perf_counter()
    for backend in [*args.isa, *([INTERPRETER] if args.interpreted_rows else [])]:
        rows = args.interpreted_rows if backend == INTERPRETER else args.rows
        found[backend] = run_backend(backend, args.families, args.seed, rows)
        count = totals(found[backend])
        print(f"{backend}: {count}, {time.perf_counter() - begin:.0f} s", flush=True)
    findings = [f"{b}: {f}" for b, families in found.items() for t in families.values() for f in t["findings"]]
    text = f"""# Exactness

`python -m bench exactness --rows {args.rows} --interpreted-rows {args.interpreted_rows} --seed {args.seed}` on
{device_name("cpu")}, {versions()}, commit {commit()}. K in {{{", ".join(map(str, CODES))}}}, D in
{{{", ".join(map(str, DIMS))}}}, 1 to 5 heads, float32 with a share of float16, bfloat16 and float64; the interpreter
runs K up to 257, D up to 100, float32 and float16, in taller tiles than a card would.

Wrong codes: rows whose index is not the lowest of least float64 distance, or of largest float64 product. Commit's
index: rows where vq_commit chose another than nearest_codeword. Stored codes: rows of vq_commit that are not the code's
bits. Split or threads: rows of which any bit changed when the rows were cut at random places under another number of
threads. Losses: problems whose
weighted loss is not within 1e-5 of float64's. Every column after the rows must be 0.

{table(found)}
"""
    if findings:
        text += "\n## Findings\n\n" + "\n".join(f"- {finding}" for finding in findings[:200]) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
