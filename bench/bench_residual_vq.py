"""A training step of a residual quantizer: forward, backward and the averages of all levels.

FastResidualVQ against vector_quantize_pytorch's ResidualVQ as it is, and against the same with FastVQ inside.
"""

import copy

import pytest
import torch

from metarec_fast import FastResidualVQ, replace_vector_quantize

ResidualVQ = pytest.importorskip("vector_quantize_pytorch").ResidualVQ
# rows, width, codes, levels, options: a semantic-id tokenizer, an audio codec, an audio codec with narrow codes
SHAPES = {
    "16384x32x256x3": (16384, 32, 256, 3, {}),
    "4096x128x1024x8": (4096, 128, 1024, 8, {}),
    "8192x128x1024x8, codes of 8": (8192, 128, 1024, 8, {"codebook_dim": 8, "use_cosine_sim": True}),
}


def training_step(module, x, g):
    x.grad = None
    quantized, indices, losses = module(x)
    torch.autograd.backward((quantized, losses.sum()), (g, None))
    return quantized.detach(), indices, losses.detach(), x.grad


def same_codes(actual, expected):
    # the baseline rounds its distances and now and then takes the second nearest, then other codes in all later levels
    same = (actual[1] == expected[1]).all(-1)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(actual[0][same], expected[0][same], rtol=1e-4, atol=1e-4)
    # a rotation to a code that is nearly opposite blows roundings up
    error = (actual[3][same] - expected[3][same]).norm(dim=-1) / expected[3][same].norm(dim=-1)
    assert error.quantile(0.99) < 1e-3
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-3, atol=1e-6)


def modules(shape):
    N, D, K, L, options = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(1, N, D)
    peer = ResidualVQ(dim=D, num_quantizers=L, codebook_size=K, kmeans_init=True, kmeans_iters=2, **options)
    replace_vector_quantize(start := copy.deepcopy(peer))
    with torch.no_grad():
        start(torch.randn(1, max(N, 8 * K), D))  # codes as of a model in training, of other rows
    peer.load_state_dict(start.state_dict())
    fast = FastResidualVQ(dim=D, num_quantizers=L, codebook_size=K, kmeans_init=True, **options)
    fast.load_state_dict(start.state_dict())
    return peer, fast, x, torch.randn(1, N, D)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inside", ["VectorQuantize", "FastVQ"])
def bench_fast_residual_vq_training_step(compare, shape, inside):
    peer, fast, x, g = modules(shape)
    peer = replace_vector_quantize(peer) if inside == "FastVQ" else peer
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    compare(
        lambda: training_step(fast, leaves[0], g),
        lambda: training_step(peer, leaves[1], g),
        subject="FastResidualVQ training step",
        shape=shape,
        against="vector_quantize_pytorch" + (" with FastVQ inside" if inside == "FastVQ" else ""),
        packages=("vector-quantize-pytorch",),
        check=same_codes,
        rounds=5 if inside == "VectorQuantize" else 9,
    )
