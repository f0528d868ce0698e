"""A training step (forward, backward, moving averages) against vector_quantize_pytorch and compiled plain torch."""

import pytest
import torch

from bench.peers.plain_vq import PlainVQ
from bench.shapes import SHAPES
from metarec_fast import FastVQ

VectorQuantize = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
GRADIENTS = ["rotation", "straight_through"]


def training_step(module, x, g):
    x.grad = None
    quantized, indices, loss = module(x)
    torch.autograd.backward((quantized, loss), (g, None))
    return quantized.detach(), indices, loss.detach(), x.grad


def same_codes(actual, expected):
    # the baseline rounds its distances and now and then takes the second nearest
    same = actual[1] == expected[1]
    assert same.float().mean() > 0.999
    for ours, theirs in ((actual[0], expected[0]), (actual[3], expected[3])):
        torch.testing.assert_close(ours[same], theirs[same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-6)


def problem(N, D, K, gradient):
    """Rows, the gradient from above, and modules that start from one state: codes at some of the rows."""
    torch.manual_seed(0)
    x, g = torch.randn(1, N, D), torch.randn(1, N, D)
    peer = VectorQuantize(D, K, rotation_trick=gradient == "rotation")
    peer.codebook = x[0, torch.randperm(N)[:K]] if N > K else torch.randn(K, D)
    fast = FastVQ(D, K, rotation_trick=gradient == "rotation")
    fast.load_state_dict(peer.state_dict())
    return [x.clone().requires_grad_() for _ in range(2)], g, fast, peer


@pytest.mark.parametrize(("N", "D", "K", "rounds"), SHAPES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def bench_fast_vq_training_step(compare, N, D, K, rounds, gradient):
    leaves, g, fast, peer = problem(N, D, K, gradient)
    compare(
        lambda: training_step(fast, leaves[0], g),
        lambda: training_step(peer, leaves[1], g),
        subject=f"FastVQ training step, {gradient}",
        shape=f"{N}x{D}x{K}",
        against="vector_quantize_pytorch",
        packages=("vector-quantize-pytorch",),
        check=same_codes,
        rounds=rounds,
    )


@pytest.mark.parametrize(("N", "D", "K", "rounds"), SHAPES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def bench_fast_vq_training_step_against_plain_torch(compare, N, D, K, rounds, gradient):
    leaves, g, fast, peer = problem(N, D, K, gradient)
    plain = PlainVQ(D, K, rotation=gradient == "rotation")
    plain.load(peer.state_dict())
    compiled = torch.compile(plain)
    compare(
        lambda: training_step(fast, leaves[0], g),
        lambda: training_step(compiled, leaves[1], g),
        subject=f"FastVQ training step, {gradient}",
        shape=f"{N}x{D}x{K}",
        against="torch.compile of plain torch",
        check=same_codes,
        rounds=rounds,
    )
