"""The codebook lookup against a product with argmin, faiss, a module in eval mode, and the processor's peak.

faiss brings an OpenBLAS of its own, which takes the kernel that OPENBLAS_CORETYPE names and may know no fast one for a
newer processor: the row names the kernel that ran. Measure faiss under each that the processor has:

    for kernel in Haswell SkylakeX; do OPENBLAS_CORETYPE=$kernel pytest bench/bench_lookup.py -k faiss --benchmark-only
"""

from pathlib import Path

import pytest
import torch

from bench.shapes import SHAPES
from metarec_fast import FastVQ
from metarec_fast.ops import backend_info, nearest_codeword
from metarec_fast.ops.peak import multiply_adds

HEADS, ROWS, DIM, CODES = 8, 1_000, 8, 256


def problem(*lead, N, D, K):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*lead, N, D, generator=generator), torch.randn(*lead, K, D, generator=generator)


def by_argmin(x, codebook):
    """||x - c||^2 less the constant ||x||^2."""
    if x.dim() == 2:
        return torch.addmm(codebook.square().sum(-1), x, codebook.T, alpha=-2).argmin(-1)
    return torch.baddbmm(codebook.square().sum(-1).unsqueeze(1), x, codebook.mT, alpha=-2).argmin(-1)


def as_near(x, codebook):
    """A check that no other code is nearer than ours, and that the peer's is nearest but for its rounding."""

    def distance(indices):
        codes = codebook.gather(-2, indices.unsqueeze(-1).expand_as(x))
        return (x.double() - codes.double()).square().sum(-1)

    def check(ours, theirs):
        assert (ours != theirs).float().mean() <= 1e-3
        least = distance(ours)
        excess = (distance(theirs) - least) / least
        # two codes whose distances are equal in float32 may come in either order
        assert excess.min() >= -1e-6 and excess.max() <= 1e-4

    return check


@pytest.mark.parametrize(("N", "D", "K", "rounds"), SHAPES)
def bench_against_addmm_argmin(compare, N, D, K, rounds):
    x, codebook = problem(N=N, D=D, K=K)
    compare(
        lambda: nearest_codeword(x, codebook, with_margin=False).indices,
        lambda: by_argmin(x, codebook),
        subject="nearest_codeword",
        shape=f"{N}x{D}x{K}",
        against="torch addmm + argmin",
        check=as_near(x, codebook),
        rounds=rounds,
    )


def bench_heads_against_baddbmm_argmin(compare):
    x, codebook = problem(HEADS, N=ROWS, D=DIM, K=CODES)
    compare(
        lambda: nearest_codeword(x, codebook, with_margin=False).indices,
        lambda: by_argmin(x, codebook),
        subject="nearest_codeword",
        shape=f"{HEADS}x{ROWS}x{DIM}x{CODES}",
        against="torch baddbmm + argmin",
        check=as_near(x, codebook),
    )


def faiss_kernel():
    """The kernel of the OpenBLAS that faiss brings, or nothing if it brings another library."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    blas = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    kernels = [library["architecture"] for library in blas if "faiss" in str(Path(library["filepath"]).parent)]
    return f", OpenBLAS {kernels[0]}" if kernels else ""


@pytest.mark.parametrize(("N", "D", "K", "rounds"), SHAPES)
def bench_against_faiss(compare, N, D, K, rounds):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    x, codebook = problem(N=N, D=D, K=K)
    index = faiss.IndexFlatL2(D)
    index.add(codebook.numpy())
    compare(
        lambda: nearest_codeword(x, codebook, with_margin=False).indices,
        lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0]),
        subject="nearest_codeword",
        shape=f"{N}x{D}x{K}",
        against=f"faiss IndexFlatL2{faiss_kernel()}",
        packages=("faiss-cpu",),
        check=as_near(x, codebook),
        rounds=rounds,
    )


@pytest.mark.parametrize(("N", "D", "K", "rounds"), SHAPES)
def bench_against_the_peak(compare, N, D, K, rounds):
    """The ratio is to the float32 multiply-add peak of all threads; above 1 where the screen in integers runs.

    One thread does its share of the multiply-adds: a second would find its core taken by the operators' threads, which
    wait for more work by spinning.
    """
    isa = backend_info()["cpu"]["isa"]
    if not isa.startswith(("avx2", "avx512")):
        pytest.skip(f"the peak is measured for AVX2 and AVX-512, the operators run on {isa}")
    x, codebook = problem(N=N, D=D, K=K)
    threads = torch.get_num_threads()

    def nothing_to_compare(ours, theirs):
        assert ours.shape == (N,) and theirs is None

    compare(
        lambda: nearest_codeword(x, codebook, with_margin=False).indices,
        lambda: multiply_adds(N * D * K // threads),
        subject="nearest_codeword",
        shape=f"{N}x{D}x{K}",
        against="multiply-add peak",
        check=nothing_to_compare,
        rounds=rounds,
    )


@pytest.mark.parametrize(
    ("H", "N", "D", "K", "rounds"), [(1, *shape) for shape in SHAPES] + [(HEADS, ROWS, DIM, CODES, 15)]
)
def bench_eval_against_vector_quantize_pytorch(compare, H, N, D, K, rounds):
    """Whole modules, as the peer has no lookup alone: codes and indices of rows [1, N, H * D]."""
    peers = pytest.importorskip("vector_quantize_pytorch")
    x, codebook = problem(H, N=N, D=D, K=K)
    rows = x.transpose(0, 1).reshape(1, N, H * D)
    options = {"codebook_size": K, "heads": H, "separate_codebook_per_head": H > 1}
    peer = peers.VectorQuantize(H * D, codebook_dim=D, **options).eval()
    # a projection would only add the same work to both sides
    peer.project_in = peer.project_out = torch.nn.Identity()
    state = {name: codebook if name == "_codebook.embed" else value for name, value in peer.state_dict().items()}
    peer.load_state_dict(state)
    fast = FastVQ(H * D, codebook_dim=D, **options).eval()
    fast.project_in = fast.project_out = torch.nn.Identity()
    fast.load_state_dict(state)

    def same_codes(ours, theirs):
        assert (ours[0] - theirs[0]).abs().gt(1e-6).float().mean() <= 1e-3
        as_near(x, codebook)(*(found[1].view(N, H).T for found in (ours, theirs)))

    def run(module):
        with torch.inference_mode():
            return module(rows)

    compare(
        lambda: run(fast),
        lambda: run(peer),
        subject="FastVQ in eval mode",
        shape=f"{H}x{N}x{D}x{K}" if H > 1 else f"{N}x{D}x{K}",
        against="vector_quantize_pytorch",
        packages=("vector-quantize-pytorch",),
        check=same_codes,
        rounds=rounds,
    )
