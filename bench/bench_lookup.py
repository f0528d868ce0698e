"""The codebook lookup against a product with argmin, faiss and a vector-quantisation module in eval mode."""

import pytest
import torch

from metarec_fast import FastVQ
from metarec_fast.ops import nearest_codeword

SHAPES = [(32_768, 64, 1_024, 7), (16_384, 64, 1_024, 9), (4_096, 256, 8_192, 5)]  # rows, dim, codes, rounds
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
        lambda: nearest_codeword(x, codebook).indices,
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
        lambda: nearest_codeword(x, codebook).indices,
        lambda: by_argmin(x, codebook),
        subject="nearest_codeword",
        shape=f"{HEADS}x{ROWS}x{DIM}x{CODES}",
        against="torch baddbmm + argmin",
        check=as_near(x, codebook),
    )


@pytest.mark.parametrize(("N", "D", "K", "rounds"), SHAPES)
def bench_against_faiss(compare, N, D, K, rounds):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    x, codebook = problem(N=N, D=D, K=K)
    index = faiss.IndexFlatL2(D)
    index.add(codebook.numpy())
    compare(
        lambda: nearest_codeword(x, codebook).indices,
        lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0]),
        subject="nearest_codeword",
        shape=f"{N}x{D}x{K}",
        against="faiss IndexFlatL2",
        packages=("faiss-cpu",),
        check=as_near(x, codebook),
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
