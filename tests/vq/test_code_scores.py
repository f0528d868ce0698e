"""Sampling, top-k, cross-entropy and diversity without an N x K tensor: against the plain N x K computation."""

import pytest
import torch
from torch.func import grad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from metarec_fast.ops import nearest_codeword
from metarec_fast.reference.nearest_codeword import costs
from metarec_fast.vq import FastVQ
from metarec_fast.vq.parts import code_scores
from metarec_fast.vq.parts.code_scores import CodeScores
from tests.ops.test_nearest_codeword import DATA

HEADS, ROWS, CODES, DIM = 2, 30, 13, 5


def tensors(dtype=torch.float64):
    rows = torch.randn(HEADS, ROWS, DIM, dtype=dtype, requires_grad=True)
    codes = torch.randn(HEADS, CODES, DIM, dtype=dtype, requires_grad=True)
    return rows, codes


def plain_scores(rows, codes, cosine):
    return rows @ codes.mT if cosine else -(rows[:, :, None] - codes[:, None]).norm(dim=-1)


def targets():
    return torch.randint(-1, CODES, (HEADS, ROWS))


GROUPS = torch.arange(ROWS).view(6, 5)  # 6 positions of 5 rows
KEEP = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) > 0.4


def chunked(name, rows, codes, cosine, aim):
    scores = CodeScores(rows, codes, cosine=cosine)
    if name == "cross_entropy":
        return scores.cross_entropy(aim)
    if name == "straight_through":
        return scores.straight_through(aim.clamp_min(0), 0.7)
    return scores.entropy(2.0, lambda t: t.unflatten(1, (6, 5)), KEEP[GROUPS] if name == "entropy_kept" else None)


def plain(name, rows, codes, cosine, aim):
    scores = plain_scores(rows, codes, cosine)
    if name == "cross_entropy":
        return F.cross_entropy(scores.transpose(1, 2), aim, ignore_index=-1, reduction="none")
    if name == "straight_through":
        share = (scores / 0.7).softmax(-1)
        return (F.one_hot(aim.clamp_min(0), CODES) + share - share.detach()) @ codes
    share = (2.0 * scores).softmax(-1)[:, GROUPS]
    if name == "entropy_kept":
        mean = torch.stack([share[:, p, KEEP[GROUPS[p]]].mean((0, 1)) for p in range(len(GROUPS))])
    else:
        mean = share.mean((0, 2))
    return -(mean * mean.clamp_min(1e-5).log()).sum(-1)


FUNCTIONS = ("cross_entropy", "straight_through", "entropy", "entropy_kept")


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])  # less than one row, a few rows, everything
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_plain_computation(name, cosine, chunk, monkeypatch):
    monkeypatch.setattr(code_scores, "CHUNK_ELEMENTS", chunk)
    rows, codes = tensors()
    aim = targets()
    expected, actual = (f(name, rows, codes, cosine, aim) for f in (plain, chunked))
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    expected, actual = (torch.autograd.grad((v * weight).sum(), (rows, codes)) for v in (expected, actual))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name, cosine):
    rows, codes = tensors()
    aim, weight = targets(), None
    results = []
    for f in (plain, chunked):
        value = f(name, rows, codes, cosine, aim)
        weight = torch.randn_like(value) if weight is None else weight
        first = torch.autograd.grad((value * weight).sum(), (rows, codes), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (rows, codes)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_under_torch_func(name):
    rows, codes = (t.detach() for t in tensors())
    aim = targets()

    def loss(f):
        return lambda rows, codes: f(name, rows, codes, False, aim).square().sum()

    actual, expected = (grad(loss(f), argnums=(0, 1))(rows, codes) for f in (chunked, plain))
    torch.testing.assert_close(actual, expected)
    batch = torch.stack((rows, rows + 1))
    actual, expected = (torch.vmap(grad(loss(f)), in_dims=(0, None))(batch, codes) for f in (chunked, plain))
    torch.testing.assert_close(actual, expected)
    compiled = torch.compile(lambda r, c: grad(loss(chunked), argnums=(0, 1))(r, c), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rows, codes), grad(loss(plain), argnums=(0, 1))(rows, codes))


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_samples_do_not_depend_on_the_chunks_and_follow_the_softmax(chunk, monkeypatch):
    rows, codes = (t.detach().float() for t in tensors())
    torch.manual_seed(1)
    expected = CodeScores(rows, codes, cosine=False).sample(0.5)
    monkeypatch.setattr(code_scores, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(1)
    assert torch.equal(CodeScores(rows, codes, cosine=False).sample(0.5), expected)


def test_samples_follow_the_softmax():
    row, codes = torch.randn(1, 1, DIM), torch.randn(1, CODES, DIM)
    probability = (plain_scores(row, codes, False)[0, 0] / 0.5).softmax(-1)
    draws = 20_000
    counts = CodeScores(row.expand(1, draws, DIM), codes, cosine=False).sample(0.5)[0].bincount(minlength=CODES)
    spread = (draws * probability * (1 - probability)).sqrt()
    assert ((counts - draws * probability).abs() < 5 * spread + 1).all()


@pytest.mark.parametrize("cosine", [False, True])
def test_topk_is_ordered_exact_and_breaks_ties_downwards(cosine, monkeypatch):
    monkeypatch.setattr(code_scores, "CHUNK_ELEMENTS", 100)
    rows, codes = (t.detach().float() + 1000 * (not cosine) for t in tensors())  # far from the origin
    codes[:, 7] = codes[:, 3]
    scores = plain_scores(rows.double(), codes.double(), cosine)
    expected = scores.sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 4, CODES):
        assert torch.equal(CodeScores(rows, codes, cosine=cosine).topk(k), expected[..., :k])
    metric = "product" if cosine else "distance"
    assert torch.equal(expected[..., 0], nearest_codeword(rows, codes, metric=metric).indices)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("data", ["shrunk", "duplicated", "near_unit", "one_direction", "not_finite", "lattice"])
def test_topk_where_more_codes_tie_than_are_compared_at_first(data, cosine):
    rows, codes = (torch.stack(t) for t in zip(*(DATA[data](40, 70, 5) for _ in range(2)), strict=True))
    rows[0, 0] = 0  # by products all codes tie
    expected = costs(rows, codes, "product" if cosine else "distance").sort(dim=-1, stable=True).indices
    for k in (1, 5, 40):
        assert torch.equal(CodeScores(rows, codes, cosine=cosine).topk(k), expected[..., :k])
    batched = torch.vmap(lambda r, c: CodeScores(r[None], c[None], cosine=cosine).topk(5)[0])(rows, codes)
    assert torch.equal(batched, expected[..., :5])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return out


@pytest.mark.parametrize(
    "options,call",
    [
        ({"stochastic_sample_codes": True}, {}),
        ({"commitment_use_cross_entropy_loss": True}, {}),
        ({"codebook_diversity_loss_weight": 1.0}, {}),
        ({"codebook_diversity_loss_weight": 1.0, "accept_image_fmap": True}, {}),
        ({"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False}, {}),
        ({}, {"topk": 2}),
        ({}, {"indices": torch.zeros(1, 600, dtype=torch.int64)}),
        ({}, {}),
    ],
)
def test_no_tensor_of_rows_times_codes(options, call, monkeypatch):
    monkeypatch.setattr(code_scores, "CHUNK_ELEMENTS", 10_000)
    N, K, D = 600, 500, 4
    vq = FastVQ(D, K, **options)
    x = torch.randn((1, D, 20, 30) if "accept_image_fmap" in options else (1, N, D), requires_grad=True)
    with LargestTensor() as largest:
        quantized, *_, loss = vq(x, **call)
        (quantized.sum() + loss.sum()).backward()
    # candidates of a top-k are k + 8 rows of codes
    assert largest.elements <= max(10_000, (2 + 8) * N * D) < N * K / 10


def operator_calls():
    rows, codes = (t.detach().float().mT.contiguous().mT for t in tensors())  # strided: outputs are not
    positions, weight = rows.unflatten(1, (5, 6)).transpose(1, 2), torch.ones(6, 5)
    aim, health = targets(), (torch.zeros(HEADS, CODES), torch.zeros(HEADS, CODES, dtype=torch.bool))
    return {
        "vq_topk_codes": (rows, codes, 3, False),
        "vq_code_cross_entropy": (rows, codes, aim, True),
        "vq_code_cross_entropy_grad": (rows, codes, aim, torch.randn(HEADS, ROWS), False),
        "vq_assignment_entropy": (positions, codes, weight, 2.0, False),
        "vq_assignment_entropy_grad": (positions, codes, weight, torch.randn(6), 2.0, True),
        "vq_soft_code_grad": (rows, codes, torch.randn_like(rows), 0.5, False),
        "vq_record_health_": (*health, torch.rand(HEADS, CODES), torch.rand(HEADS, CODES) > 0.5, True),
        # their outcome is random
        "vq_sample_codes": (rows, codes, 2, 0.5, False),
        "vq_init_by_kmeans_": (
            codes,
            codes.clone(),
            torch.ones(HEADS, CODES),
            torch.tensor(False),
            rows,
            torch.ones(HEADS, ROWS, dtype=torch.bool),
            *(3, 1e-5, False, False),
        ),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name):
    random = name in ("vq_sample_codes", "vq_init_by_kmeans_")
    checks = ("test_schema", "test_faketensor", *(() if random else ("test_aot_dispatch_dynamic",)))
    operator = getattr(torch.ops.metarec_fast, name).default
    torch.library.opcheck(operator, operator_calls()[name], test_utils=checks)


@pytest.mark.parametrize("rows,codes", [(0, 5), (1, 1), (3, 1)])
def test_few_rows_and_codes(rows, codes):
    for options, call in (
        ({"stochastic_sample_codes": True}, {}),
        ({"commitment_use_cross_entropy_loss": True}, {}),
        ({"codebook_diversity_loss_weight": 1.0}, {}),
        ({"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False}, {}),
        ({"affine_param": True}, {}),
        ({}, {"topk": 2}),
        ({}, {"indices": torch.zeros(1, rows, dtype=torch.int64)}),
        ({"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True}, {"topk": 2}),
    ):
        vq, x = FastVQ(4, codes, **options), torch.randn(1, rows, 4, requires_grad=True)
        quantized, *_, loss = vq(x, **call)
        (quantized.sum() + loss.sum()).backward()
        assert quantized.shape[:2] == (1, rows) and loss.isfinite().all() and x.grad.isfinite().all()
        assert all(v.isfinite().all() for v in vq.state_dict().values())
