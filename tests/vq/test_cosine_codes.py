"""Cosine similarity on every path: the code of largest product, whatever has become of the codes' lengths."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from metarec_fast import FastResidualVQ, FastVQ
from metarec_fast.ops import vq_commit
from metarec_fast.reference.nearest_codeword import costs
from metarec_fast.vq import quantize, verify

DIM, CODES = 8, 60


def codes_of_all_lengths(heads=1):
    """Directions at lengths of 1, of half precision, below and above, tiny, denormal and 0; some twice or reversed."""
    codes = F.normalize(torch.randn(heads, CODES, DIM), dim=-1)
    codes[:, 20:30] = codes[:, 20:30].half().float()
    codes[:, 30:33], codes[:, 33:36] = -codes[:, 10:13], codes[:, 10:13]
    codes[:, 36:40] *= torch.tensor([0.5, 0.9, 1.1, 2.0])[:, None]
    codes[:, 40:50] *= 10.0 ** -torch.arange(1, 46, 4.5)[:, None]
    codes[:, 50:] = 0
    return codes[:, torch.randperm(CODES)]


def rows_to_compare(n):
    x = torch.randn(n, DIM)
    x[:3], x[3] = 0, 1e-9  # of no length, and too short to be made length 1
    return x


def definition(rows, codes):
    return costs(F.normalize(rows, dim=-1, eps=1e-6), codes, "product")


OPTIONS = {
    "default": {},
    "strict": {"strict_upstream": True},
    "straight_through": {"rotation_trick": False},
    "separate_heads": {"heads": 2, "separate_codebook_per_head": True},
    "shared_heads": {"heads": 2},
    "orthogonal": {"orthogonal_reg_weight": 1.0},
    "cross_entropy": {"commitment_use_cross_entropy_loss": True},
    "diversity": {"codebook_diversity_loss_weight": 1.0},
    "softmax_gradient": {"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False},
    "drawn_at_no_temperature": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.0},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_lookup(name, training, masked):
    heads = OPTIONS[name].get("heads", 1)
    separate = "separate_codebook_per_head" in OPTIONS[name]
    vq = FastVQ(DIM * heads, CODES, codebook_dim=DIM, use_cosine_sim=True, **OPTIONS[name]).train(training)
    codes = codes_of_all_lengths(heads if separate else 1)
    with torch.no_grad():
        vq._codebook.embed.copy_(codes)
    x = rows_to_compare(2 * 150 * heads).view(2, 150, heads * DIM)
    mask = torch.rand(2, 150) < 0.7 if masked else None
    indices = vq(x.clone().requires_grad_(), mask=mask)[1].view(300, heads)
    rows = x.view(300, heads, DIM).transpose(0, 1)
    expected = definition(rows, codes.expand(heads, -1, -1)).argmin(-1).T
    if masked:
        expected = expected.masked_fill(~mask.view(300, 1), -1)
    assert torch.equal(indices, expected)


def test_topk_begins_with_the_code_of_the_lookup():
    vq = FastVQ(DIM, CODES, use_cosine_sim=True).eval()
    vq._codebook.embed.copy_(codes := codes_of_all_lengths())
    x = rows_to_compare(200)[None]
    indices = vq(x, topk=30)[1]
    assert torch.equal(indices, definition(x, codes).sort(dim=-1, stable=True).indices[..., :30])
    assert torch.equal(indices[..., 0], vq(x)[1])


def test_codes_of_each_token_are_compared_by_the_same_products():
    vq = FastVQ(DIM, CODES, use_cosine_sim=True).eval()
    vq._codebook.embed.copy_(codes_of_all_lengths())
    x = rows_to_compare(40).view(1, 40, DIM)
    per_token = lambda codes: codes[:, None, None].expand(1, 1, 40, CODES, DIM)  # noqa: E731
    expected = definition(x, F.normalize(vq._codebook.embed, dim=-1, eps=1e-6))  # as upstream has it
    assert torch.equal(vq(x, codebook_transform_fn=per_token)[1], expected.argmin(-1))
    found = vq(x, codebook_transform_fn=per_token, topk=7)[1]
    assert torch.equal(found, expected.sort(dim=-1, stable=True).indices[..., :7])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"shared_codebook": True}, {"beam_size": 1}, {"stochastic_sample_codes": True}], ids=str
)
def test_levels_of_a_residual_quantizer(options, training):
    fused = "stochastic_sample_codes" not in options
    options = options if fused else options | {"sample_codebook_temp": 0.0}
    vq = FastResidualVQ(dim=DIM, num_quantizers=3, codebook_size=CODES, use_cosine_sim=True, **options).train(training)
    for layer in vq.layers:
        layer._codebook.embed.copy_(codes_of_all_lengths())
    codes = [layer._codebook.embed.clone() for layer in vq.layers]
    residual = rows_to_compare(200)[None]
    _, indices, _ = vq(residual, freeze_codebook=True)
    for level in range(3):
        expected = definition(residual, codes[level]).argmin(-1)
        assert torch.equal(indices[..., level], expected)
        residual = residual - codes[level][0][expected]


def test_beams_begin_with_the_codes_of_largest_product():
    vq = FastResidualVQ(dim=DIM, num_quantizers=1, codebook_size=CODES, use_cosine_sim=True, beam_size=4).eval()
    vq.layers[0]._codebook.embed.copy_(codes := codes_of_all_lengths())
    x = rows_to_compare(200)[None]
    best = definition(x, codes).sort(dim=-1, stable=True).indices[..., :4]
    assert (vq(x)[1] == best).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_function_and_verification(dtype):
    rows, codes = F.normalize(torch.randn(300, DIM), dim=-1).to(dtype), codes_of_all_lengths()[0].to(dtype)
    rows[:4] = 0
    expected = costs(rows[None], codes[None], "product")[0].argmin(-1)
    quantized, indices, loss = quantize(rows, codes, metric="product")
    assert torch.equal(indices, expected) and torch.equal(quantized, codes[indices])
    torch.testing.assert_close(loss, (rows - codes[indices]).square().mean().to(loss.dtype), rtol=1e-2, atol=0)
    assert torch.equal(vq_commit(rows, codes, metric="product", backend="reference").indices, expected)
    assert verify(rows, codes, indices, metric="product") and not verify(rows, codes, indices)


def test_margin_in_the_health_is_that_of_the_products():
    vq = FastVQ(2, 4, use_cosine_sim=True, freeze_codebook=False)
    vq._codebook.embed.copy_(torch.tensor([[[0.0, 0], [1, 0], [0, 0.5], [0, 0]]]))
    vq(torch.tensor([[[3.0, 0.0]]]))
    assert vq.stats().margin == pytest.approx(1.0)


# -- checkpoints of upstream


@pytest.fixture(scope="module")
def trained_upstream():
    """150 steps at decay .8 on few directions: what is unused has shrunk to the origin."""
    peers = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    peer = peers.VectorQuantize(DIM, 64, use_cosine_sim=True, decay=0.8)
    places = F.normalize(torch.randn(6, DIM), dim=-1)
    for _ in range(150):
        peer(places[torch.randint(6, (1, 256))] + 0.05 * torch.randn(1, 256, DIM))
    return peer.eval()


@pytest.mark.parametrize("half_stored", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_fresh_rows_avoid_what_has_shrunk(trained_upstream, strict, half_stored):
    state = trained_upstream.state_dict()
    if half_stored:
        state = {name: t.half().float() if t.is_floating_point() else t for name, t in state.items()}
    trained_upstream.load_state_dict(state)
    vq = FastVQ(DIM, 64, use_cosine_sim=True, decay=0.8, strict_upstream=strict).eval()
    vq.load_state_dict(state)
    assert (vq.codebook.norm(dim=-1) < 1e-3).sum() > 20
    x = torch.randn(1, 2000, DIM)
    indices, theirs = vq(x)[1], trained_upstream(x)[1]
    best = definition(x, vq._codebook.embed).sort(dim=-1).values
    clear = best[..., 1] - best[..., 0] > 1e-6
    assert clear.float().mean() > 0.5 and torch.equal(indices[clear], theirs[clear])
    assert verify(F.normalize(x, dim=-1, eps=1e-6)[0], vq.codebook, indices[0], metric="product")
    assert torch.equal(vq.train()(x)[1], indices)  # a training step looks up before it moves the codes


# -- k-means initialisation


def off(vq, rows):
    """How far a code is at most from the row nearest to it."""
    return (vq.codebook[:, None] - rows).norm(dim=-1).amin(-1).max()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_empty_clusters_start_at_rows(cosine, strict):
    directions = 2 + torch.randn(5, DIM)
    x = directions[torch.randint(5, (1, 200))]
    vq = FastVQ(DIM, 40, use_cosine_sim=cosine, kmeans_init=True, strict_upstream=strict)
    vq(x, freeze_codebook=True)
    rows = F.normalize(directions, dim=-1) if cosine else directions
    assert off(vq, rows) < 1e-3
    assert vq._codebook.cluster_size.sum() >= 200 and (vq._codebook.cluster_size >= 1).all()
    vq(x)
    vq._codebook.update_ema()
    assert off(vq, rows) < 1e-2


@pytest.mark.parametrize("cosine", [False, True])
def test_fewer_rows_than_codes_and_rows_of_zeros(cosine):
    vq = FastVQ(DIM, 64, use_cosine_sim=cosine, kmeans_init=True)
    x = torch.randn(1, 30, DIM)
    x[:, 10:] = 0
    rows = F.normalize(x, dim=-1) if cosine else x
    if cosine:  # zeros have no direction
        rows = rows[:, :10]
    with pytest.warns(UserWarning, match=f"k-means initialises 64 codes from {rows.shape[1]} rows"):
        vq(x, freeze_codebook=True)
    assert off(vq, rows[0]) < 1e-3
    if cosine:
        assert (vq.codebook.norm(dim=-1) - 1).abs().max() < 1e-5


def test_a_cosine_start_waits_for_rows_that_have_a_direction():
    vq = FastVQ(DIM, 4, use_cosine_sim=True, kmeans_init=True)
    assert vq(torch.zeros(1, 20, DIM), freeze_codebook=True)[1].eq(0).all() and not vq._codebook.initted
    vq(torch.randn(1, 20, DIM), freeze_codebook=True)
    assert vq._codebook.initted and (vq.codebook.norm(dim=-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("length", [0.0, 1e-40])
def test_rows_without_a_direction_become_no_codes(length):
    x = torch.randn(1, 60, DIM)
    x[:, 10:] *= length
    for options in ({"threshold_ema_dead_code": 2.0}, {"kmeans_init": True}):
        vq = FastVQ(DIM, 20, use_cosine_sim=True, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "k-means initialises")
            for _ in range(3):
                vq(x)
        assert (vq.codebook.norm(dim=-1) - 1).abs().max() < 1e-5


def test_a_cosine_centre_whose_rows_cancel_keeps_a_direction():
    row = torch.randn(1, 1, DIM)
    vq = FastVQ(DIM, 1, use_cosine_sim=True, kmeans_init=True)
    vq(torch.cat((row, -row), 1), freeze_codebook=True)
    assert vq.codebook.norm().item() == pytest.approx(1)
