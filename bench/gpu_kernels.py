"""Times the Triton kernels and the outer step on a CUDA card, against torch code and against the card's roofline.

    python -m bench gpu_kernels [--out bench/results] [--only SUBSTRING]
    python -m bench gpu_kernels --dry-run       # no card: the same checks, tiny, on the CPU; nothing is written, and
                                                # what is captured in a graph there runs without one

Every result is checked before it is timed. The roofline is the larger of two times: each input read and each output
written once at the card's copy bandwidth, and the products at its matrix rate (three float16 products for a float32
lookup, one for a half type; for target_ranks those of float32 itself).
For linear_cross_entropy and the outer step it is three TF32 products for each of float32: logits and both gradients,
and the encoder's; of any order of the outer step what the first order cannot leave out. These rates are measured here.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import gpu_sequence
from bench.gpu_case import Case, Rates
from metarec_fast import ops, reference

COLUMNS = (
    "kernel",
    "provider",
    "dtype",
    "shape",
    "ms",
    "p20",
    "p80",
    "ratio",
    "of_roofline",
    "device",
    "torch",
    "triton",
    "commit",
)
KERNELS = ("nearest_codeword", "vq_commit", "vq_statistics", "target_ranks")
DTYPES = (torch.float32, torch.bfloat16)
CHECKED_ROWS = 4096


class Shape(NamedTuple):
    H: int
    N: int
    D: int
    K: int

    def __str__(self) -> str:
        return f"H{self.H} N{self.N} D{self.D} K{self.K}"


SHAPES = (
    Shape(1, 1 << 20, 64, 1024),
    Shape(1, 1 << 20, 64, 8192),
    Shape(1, 1 << 16, 256, 8192),
    Shape(8, 1024, 8, 256),
)
TINY = (Shape(1, 100, 16, 20), Shape(2, 60, 8, 10))


def lookup_by_product(x: Tensor, codebook: Tensor) -> Tensor:
    """What torch users write: all N x K scores, then argmin."""
    return torch.baddbmm(codebook.square().sum(-1)[:, None], x, codebook.transpose(1, 2), alpha=-2).argmin(-1)


def commit_by_product(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    indices = lookup_by_product(x, codebook)
    quantized = codebook.gather(1, indices[..., None].expand_as(x))
    return quantized, indices, (x.float() - quantized.float()).square().sum(-1)


def statistics_by_one_hot(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    one_hot = F.one_hot(indices, K).to(x.dtype)
    return one_hot.float().sum(1), (one_hot.transpose(1, 2) @ x).float()


def statistics_by_atomics(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Fast and not the same at every run: index_add_ in whatever order the additions arrive."""
    H, _, D = x.shape
    slot = (indices + torch.arange(H, device=x.device)[:, None] * K).flatten()
    counts = torch.bincount(slot, minlength=H * K).view(H, K).float()
    sums = torch.zeros(H * K, D, device=x.device).index_add_(0, slot, x.flatten(0, 1).float())
    return counts, sums.view(H, K, D)


def ranks_by_product(h: Tensor, table: Tensor, targets: Tensor, *, chunk: int = 8192) -> Tensor:
    """Counts, from the scores of some rows at a time."""
    greater = []
    for rows, target in zip(h.split(chunk), targets.split(chunk), strict=True):
        scores = rows @ table.T
        greater.append((scores > scores.gather(1, target[:, None])).sum(1))
    return torch.cat(greater)


def hits_by_topk(h: Tensor, table: Tensor, targets: Tensor, *, chunk: int = 8192) -> Tensor:
    """What evaluations do that ask for the first ten only."""
    pairs = zip(h.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([(rows @ table.T).topk(10).indices == target[:, None] for rows, target in pairs])


def applies(kernel: str, shape: Shape, dtype: torch.dtype) -> bool:
    return kernel != "target_ranks" or (shape.H == 1 and dtype == torch.float32)


def our_kernel(kernel: str, device: str) -> Callable:
    """The Triton launcher on a card, the operator's CPU kernel in a dry run."""
    if device == "cpu":
        return getattr(ops, kernel)
    return getattr(__import__(f"metarec_fast.kernels.{kernel}", fromlist=[kernel]), kernel)


def vector_quantize_pytorch(x: Tensor, codebook: Tensor) -> Callable[[], Any] | None:
    """The library's forward in eval mode: one head, float32 inside."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return None
    if x.shape[0] != 1:
        return None
    module = VectorQuantize(x.shape[2], codebook.shape[1]).to(x.device).eval()
    module.codebook = codebook[0].float()
    return lambda: module(x)


def providers(kernel: str, x: Tensor, codebook: Tensor, indices: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call of everything that is timed; ours first."""
    K, device = codebook.shape[1], x.device.type
    ours = our_kernel(kernel, device)
    compiled = lambda f: torch.compile(f, backend="inductor" if device == "cuda" else "eager")  # noqa: E731
    if kernel == "target_ranks":  # rows are users, codes are items, and the nearest code is the target
        h, table, targets = x[0], codebook[0], indices[0]
        yield "metarec_fast", lambda: ops.target_ranks(h, table, targets)
        yield "torch product+comparison", lambda: ranks_by_product(h, table, targets)
        yield "torch product+topk(10)", lambda: hits_by_topk(h, table, targets)
        return
    if kernel == "vq_statistics":
        yield "metarec_fast", lambda: ours(x, indices, K)
        yield "torch one_hot", lambda: statistics_by_one_hot(x, indices, K)
        yield "torch index_add (not deterministic)", lambda: statistics_by_atomics(x, indices, K)
        return
    by_product = lookup_by_product if kernel == "nearest_codeword" else commit_by_product
    yield "metarec_fast", lambda: ours(x, codebook)
    yield "torch baddbmm+argmin", lambda: by_product(x, codebook)
    fused = compiled(by_product)
    yield "torch.compile baddbmm+argmin", lambda: fused(x, codebook)
    if kernel == "vq_commit" and (call := vector_quantize_pytorch(x, codebook)):
        yield "vector_quantize_pytorch eval", call


def check(kernel: str, result: Any, x: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """Raise AssertionError unless ours is right: indices exactly, on the first and the last rows; sums to rounding."""
    if kernel == "target_ranks":
        for rows in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
            h, table, target = x[0, rows].double(), codebook[0].double(), indices[0, rows, None]
            scores = h @ table.T
            own = scores.gather(1, target)
            error = 2 * (h.shape[1] + 2) * 2.0**-24 * h.norm(dim=1)[:, None] * table.norm(dim=1).max()
            assert (result.greater[rows] >= (scores > own + error).sum(1)).all(), "too few items above the target"
            assert (result.greater[rows] <= (scores > own - error).sum(1)).all(), "too many items above the target"
        return
    if kernel == "vq_statistics":
        counts, sums = result
        expected = reference.vq_statistics(x.double(), indices, codebook.shape[1])
        assert torch.equal(counts, expected[0].float()), "counts differ from the definition"
        torch.testing.assert_close(sums, expected[1].float(), rtol=1e-4, atol=1e-3)
        return
    got = result[0] if kernel == "nearest_codeword" else result[1]
    for rows in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
        expected, _ = reference.nearest_codeword(x[:, rows], codebook)
        assert torch.equal(got[:, rows], expected), "indices differ from the float64 definition"
        if kernel == "vq_commit":
            codes = codebook.gather(1, expected[..., None].expand_as(x[:, rows]))
            assert torch.equal(result[0][:, rows], codes), "quantized rows are not the codes of their indices"


def roofline_ms(kernel: str, shape: Shape, dtype: torch.dtype, rates: Rates) -> float:
    H, N, D, K = shape
    rows, codes = H * N * D * dtype.itemsize, H * K * D * dtype.itemsize
    if kernel == "vq_statistics":
        return 1e3 * (rows + H * N * 8 + H * K * (D + 1) * 4) / rates.copy
    if kernel == "target_ranks":
        return 1e3 * max((rows + codes + H * N * 4 * 8) / rates.copy, 2.0 * N * K * D / rates.float32)
    moved = rows + codes + H * N * (8 + 4) + (rows if kernel == "vq_commit" else 0)
    products = 2.0 * H * N * K * D * (3 if dtype == torch.float32 else 1)
    return 1e3 * max(moved / rates.copy, products / rates.product)


def measure_cuda(call: Callable[[], Any]) -> tuple[float, float, float]:
    from triton.testing import do_bench

    median, p20, p80 = do_bench(call, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8])
    return median, p20, p80


def once(call: Callable[[], Any]) -> tuple[float, float, float]:
    """Runs it and times nothing: the dry run."""
    call()
    return 1.0, 1.0, 1.0


def measure_rates(device: str, measure: Callable) -> Rates:
    size, n = (1 << 31, 8192) if device == "cuda" else (1 << 20, 128)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = 2 * size / (1e-3 * measure(lambda: target.copy_(source))[0])
    pair = [torch.randn(n, n, device=device) for _ in range(2)]

    def products(a: Tensor, b: Tensor) -> float:
        return 2 * n**3 / (1e-3 * measure(lambda: a @ b)[0])

    half, single = products(*(x.to(torch.bfloat16) for x in pair)), products(*pair)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    tf32 = products(*pair)
    torch.set_float32_matmul_precision(precision)
    return Rates(copy, half, single, tf32)


def commit() -> str:
    command = ("git", "describe", "--always", "--dirty", "--exclude=*")
    described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def cases(device: str, only: str, rates: Rates) -> Iterator[Case]:
    for shape in SHAPES if device == "cuda" else TINY:
        for dtype in DTYPES:
            x = torch.randn(shape.H, shape.N, shape.D, device=device).to(dtype)
            codebook = torch.randn(shape.H, shape.K, shape.D, device=device).to(dtype)
            for kernel in KERNELS:
                names = {"kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "shape": str(shape)}
                if only in " ".join(names.values()) and applies(kernel, shape, dtype):
                    indices = our_kernel("nearest_codeword", device)(x, codebook)[0]
                    arguments = kernel, x, codebook, indices
                    verify = lambda result, given=arguments: check(given[0], result, *given[1:])  # noqa: E731
                    yield Case(names, providers(*arguments), verify, roofline_ms(kernel, shape, dtype, rates))
    yield from gpu_sequence.cases(device, only, rates)


def run(device: str, only: str) -> Iterator[dict[str, str]]:
    """One row a provider, as they are measured."""
    measure = measure_cuda if device == "cuda" else once
    rates = measure_rates(device, measure)
    if device == "cuda":
        print(
            f"copy {rates.copy / 1e12:.3g} TB/s, bfloat16 product {rates.product / 1e12:.3g} TFLOP/s, "
            f"float32 {rates.float32 / 1e12:.3g}, as TF32 {rates.tf32 / 1e12:.3g}",
            flush=True,
        )
    import triton

    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }
    torch.manual_seed(0)
    for case in cases(device, only, rates):
        ours = None
        for provider, call in case.providers:
            row = case.names | {"provider": provider} | about
            try:
                if ours is None:
                    case.check(call())
                ms, p20, p80 = measure(call)
            except RuntimeError as error:
                if ours is None or device == "cpu":
                    raise
                print(f"{provider}: {error}", file=sys.stderr)
                yield row | {"ms": "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"}
                continue
            finally:
                if device == "cuda":
                    torch.cuda.empty_cache()
            ours = ours or ms
            times = {"ms": ms, "p20": p20, "p80": p80, "ratio": ms / ours, "of_roofline": case.roofline_ms / ms}
            yield row | {name: f"{value:.4g}" for name, value in times.items()}


def write(folder: Path, rows: list[dict[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
    path = folder / f"{slug}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of <card>.csv")
    parser.add_argument("--only", default="", help="cases whose kernel, dtype and shape contain this")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, nothing written")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_kernels: no CUDA device; --dry-run checks everything but the kernels' times", file=sys.stderr)
        return 1
    rows = []
    for row in run("cpu" if options.dry_run else "cuda", options.only):
        rows.append(row)
        if not options.dry_run:
            path = write(options.out, rows)  # after each row: what was measured stays, whatever comes
        print("{kernel:<29}{dtype:<9} {shape:<27}{provider:<37}".format(**row), end="")
        times = (f"{name} {row[name]}" for name in COLUMNS[4:9] if name in row)
        print("runs" if options.dry_run else " ".join(times), flush=True)
    if not rows:
        parser.error(f"--only {options.only!r} matches no case")
    if options.dry_run:
        return 0
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
