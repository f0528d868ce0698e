"""A training step through FastVQ against vector_quantize_pytorch: forward, backward and the moving averages."""

import pytest
import torch

from metarec_fast import FastVQ

VectorQuantize = pytest.importorskip("vector_quantize_pytorch").VectorQuantize


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


@pytest.mark.parametrize(("N", "D", "K", "rounds"), [(16384, 64, 1024, 7), (4096, 256, 8192, 5)])
@pytest.mark.parametrize("gradient", ["rotation", "straight_through"])
def bench_fast_vq_training_step(compare, N, D, K, rounds, gradient):
    torch.manual_seed(0)
    x, g = torch.randn(1, N, D), torch.randn(1, N, D)
    peer = VectorQuantize(D, K, rotation_trick=gradient == "rotation")
    peer.codebook = x[0, torch.randperm(N)[:K]] if N > K else torch.randn(K, D)
    fast = FastVQ(D, K, rotation_trick=gradient == "rotation")
    fast.load_state_dict(peer.state_dict())
    leaves = [x.clone().requires_grad_() for _ in range(2)]
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
