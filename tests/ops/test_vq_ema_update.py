import pytest
import torch
import torch.nn.functional as F

from metarec_fast import reference
from metarec_fast.ops import vq_ema_update_


def problem(shape=(2, 6), D=4, dtype=torch.float32):
    counts = torch.randint(0, 5, shape).to(dtype)
    buffers = [torch.rand(shape, dtype=dtype) + 0.5, torch.randn(*shape, D, dtype=dtype)]
    return [*buffers, torch.randn(*shape, D, dtype=dtype), counts, torch.randn(*shape, D, dtype=dtype)]


@pytest.mark.parametrize("shape", [(6,), (2, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weight", [None, "shared", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_follows_the_formula(shape, normalize, weight, dtype):
    cluster_size, embed_avg, embed, counts, sums = problem(shape, dtype=dtype)
    w = {None: None, "shared": torch.rand(shape[-1:], dtype=dtype), "full": torch.rand(shape, dtype=dtype)}[weight]
    step = 0.2 * (1 if w is None else w.expand(shape).double())
    size = cluster_size.double() + step * (counts.double() - cluster_size.double())
    average = embed_avg.double() + torch.as_tensor(step).unsqueeze(-1) * (sums.double() - embed_avg.double())
    n, K = size.sum(-1, keepdim=True), shape[-1]
    codes = average / ((size + 1e-5) / (n + K * 1e-5) * n).unsqueeze(-1)
    codes = F.normalize(codes, dim=-1) if normalize else codes
    vq_ema_update_(cluster_size, embed_avg, embed, counts, sums, decay=0.8, eps=1e-5, weight=w, normalize=normalize)
    expected = [t.to(dtype) for t in (size, average, codes)]
    torch.testing.assert_close([cluster_size, embed_avg, embed], expected)


def test_equals_reference_bit_for_bit():
    ours, theirs = problem(), None
    theirs = [t.clone() for t in ours]
    vq_ema_update_(*ours, decay=0.99, eps=1e-5)
    reference.vq_ema_update_(*theirs, decay=0.99, eps=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_weight_zero_keeps_the_averages():
    cluster_size, embed_avg, embed, counts, sums = problem((6,))
    before = cluster_size.clone(), embed_avg.clone()
    weight = torch.tensor([1.0, 0, 1, 0, 1, 1])
    vq_ema_update_(cluster_size, embed_avg, embed, counts, sums, decay=0.5, eps=1e-5, weight=weight)
    kept = weight == 0
    assert torch.equal(cluster_size[kept], before[0][kept]) and torch.equal(embed_avg[kept], before[1][kept])
    assert not torch.equal(embed_avg[~kept], before[1][~kept])


def test_parameters_are_updated_in_place():
    cluster_size, embed_avg, embed, counts, sums = problem()
    embed = torch.nn.Parameter(embed)
    before = embed.detach().clone()
    vq_ema_update_(cluster_size, embed_avg, embed, counts, sums, decay=0.5, eps=1e-5)
    assert not torch.equal(embed, before)


def test_compiles_without_breaks():
    eager, compiled = problem(), None
    compiled = [t.clone() for t in eager]
    step = lambda *t: vq_ema_update_(*t, decay=0.8, eps=1e-5)  # noqa: E731
    step(*eager)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_opcheck():
    for weight in (None, torch.rand(6)):
        torch.library.opcheck(
            torch.ops.metarec_fast.vq_ema_update_.default, (*problem(), 0.8, 1e-5, weight, weight is None)
        )


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(6), r"cluster_size must have 2 dimensions, got shape \(6,\)"),
        (1, torch.ones(2, 6, 5), r"embed_avg must be \(2, 6, 4\) to match embed, got \(2, 6, 5\)"),
        (3, torch.ones(2, 7), r"counts must be \(2, 6\) to match embed, got \(2, 7\)"),
    ],
)
def test_bad_tensors(position, value, message):
    tensors = problem()
    tensors[position] = value
    with pytest.raises(ValueError, match=message):
        vq_ema_update_(*tensors, decay=0.8, eps=1e-5)


def test_bad_options():
    with pytest.raises(TypeError, match="sums must be float32, got float64"):
        vq_ema_update_(*problem()[:-1], torch.ones(2, 6, 4, dtype=torch.float64), decay=0.8, eps=1e-5)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        vq_ema_update_(*problem(), decay=1.5, eps=1e-5)
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        vq_ema_update_(*problem(), decay=0.5, eps=-1)
    with pytest.raises(ValueError, match=r"weight must be \(2, 6\) or \(6,\) on cpu, got \(5,\) on cpu"):
        vq_ema_update_(*problem(), decay=0.5, eps=0, weight=torch.ones(5))
