import pytest
import torch

from bench.peers.plain_vq import PlainVQ
from metarec_fast import FastVQ


def step(module, x, g):
    x = x.clone().requires_grad_()
    quantized, indices, loss = module(x)
    torch.autograd.backward((quantized, loss), (g, None))
    return quantized.detach(), indices, loss.detach(), x.grad


def pair(rotation, **options):
    fast = FastVQ(6, 20, rotation_trick=rotation)
    plain = PlainVQ(6, 20, rotation=rotation, **options)
    plain.load(fast.state_dict())
    return fast, plain


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("chunk", [0, 64])
def test_does_the_same_work_as_fast_vq(rotation, chunk):
    fast, plain = pair(rotation, chunk=chunk)
    x, g = torch.randn(1, 150, 6), torch.randn(1, 150, 6)
    for _ in range(5):
        torch.testing.assert_close(step(plain, x, g), step(fast, x, g), rtol=1e-4, atol=1e-5)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffer, getattr(fast._codebook, name)[0], rtol=1e-4, atol=1e-5)
    plain.eval()(x + 1)
    torch.testing.assert_close(plain.embed, fast.codebook, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rotation", [True, False])
def test_compiled_equals_eager(rotation):
    _, plain = pair(rotation, chunk=64)
    _, other = pair(rotation, chunk=64)
    other.load_state_dict(plain.state_dict())
    compiled = torch.compile(other, fullgraph=True)
    x, g = torch.randn(1, 150, 6), torch.randn(1, 150, 6)
    for _ in range(3):
        torch.testing.assert_close(step(compiled, x, g), step(plain, x, g), rtol=1e-4, atol=1e-5)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(getattr(other, name), buffer, rtol=1e-4, atol=1e-5)
