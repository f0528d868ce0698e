"""What needs a row's score with every code (sampling, top-k, cross-entropy, diversity), a few rows at a time.

The score of a row with a code is minus their distance, or their inner product for cosine similarity. No N x K tensor
exists: each function walks over chunks of rows, and its gradient computes the chunks again from rows and codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from metarec_fast.ops.codebook_checks import batched_lookup
from metarec_fast.ops.exact_costs import exact_costs
from metarec_fast.ops.portable_lookup import leaves_python, stable_order
from metarec_fast.ops.register import define, traced_transform

CHUNK_ELEMENTS = 1 << 20  # scores in memory at a time
_LEAST_SQUARED_DISTANCE = 1e-8
_LEAST_PROBABILITY = 1e-5  # below it the logarithm in an entropy is constant
_SPARE_CANDIDATES = 8  # codes beyond k that a top-k compares by the definition


class CodeScores:
    """Scores of rows [H, N, D] with codes [H, K, D] that all rows of a head share.

    ``TokenCodes`` has the same methods for codes that differ from row to row.
    """

    def __init__(self, rows: Tensor, codes: Tensor, *, cosine: bool) -> None:
        self.rows, self.codes, self.cosine = rows, codes.to(rows.dtype), cosine

    def gather(self, indices: Tensor) -> Tensor:
        """Codes [H, N, D] at indices [H, N], or [H, N, k, D] at [H, N, k]."""
        return _gather(self.codes, indices)

    def sample(self, temperature: float) -> Tensor:
        """Indices [H, N] drawn with probability softmax(scores / temperature)."""
        return _sample(self.rows.detach(), self.codes.detach(), 1, float(temperature), self.cosine).squeeze(-1)

    def topk(self, k: int, temperature: float | None = None) -> Tensor:
        """Indices [H, N, k], best first; with a temperature, k draws without replacement."""
        rows, codes = self.rows.detach(), self.codes.detach()
        if temperature is not None:
            return _sample(rows, codes, k, float(temperature), self.cosine)
        return (_portable_topk if leaves_python() else topk_codes)(rows, codes, k, self.cosine)

    def cross_entropy(self, targets: Tensor) -> Tensor:
        """-log softmax(scores) [H, N] at targets [H, N]; 0 where the target is -1."""
        if leaves_python() or traced_transform():
            return _cross_entropy.__wrapped__(self.rows, self.codes, targets, self.cosine)
        return _CrossEntropy.apply(self.rows, self.codes, targets, self.cosine)

    def entropy(self, temperature: float, by_position: Callable[[Tensor], Tensor], keep: Tensor | None) -> Tensor:
        """Entropy [P] of each position's mean distribution softmax(temperature * scores).

        by_position: from rows [H, N, ...] to [H, P, R, ...], the rows of each position; the mean is over them and
        over heads. keep: bool [P, R], None for all.
        """
        rows = by_position(self.rows)
        weight = rows.new_ones(rows.shape[1:3]) if keep is None else keep.to(rows.dtype)
        if traced_transform():
            return _entropy.__wrapped__(rows, self.codes, weight, float(temperature), self.cosine)
        return _Entropy.apply(rows, self.codes, weight, float(temperature), self.cosine)

    def straight_through(self, indices: Tensor, temperature: float) -> Tensor:
        """Codes at ``indices``, with the gradient of the mean code under softmax(scores / temperature) besides."""
        if traced_transform():
            return self.gather(indices) + _soft_code(self.rows, self.codes, float(temperature), self.cosine)
        return self.gather(indices) + _SoftCode.apply(self.rows, self.codes, float(temperature), self.cosine)


# -- scores and their gradient, one chunk


def _scores(rows: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """[H, n, D] and [H, K, D] -> [H, n, K]."""
    if cosine:
        return rows @ codes.transpose(1, 2)
    return -_squared_distances(rows, codes).clamp_min(_LEAST_SQUARED_DISTANCE).sqrt()


def _squared_distances(rows: Tensor, codes: Tensor) -> Tensor:
    centre = codes.detach().mean(1, keepdim=True)  # a common offset would only cost digits
    rows, codes = rows - centre, codes - centre
    square = rows.square().sum(-1).unsqueeze(-1) + codes.square().sum(-1).unsqueeze(-2)
    return square - 2 * (rows @ codes.transpose(1, 2))


def _pull_back(grad: Tensor, scores: Tensor, rows: Tensor, codes: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """Gradients to rows [H, n, D] and codes [H, K, D] of ``grad`` [H, n, K] to the scores."""
    if cosine:
        return grad @ codes, grad.mT @ rows
    # d(-|x - c|)/dx = (c - x) / |x - c|; where the distance is clamped there is no gradient
    pull = torch.where(scores < -(_LEAST_SQUARED_DISTANCE**0.5), grad / -scores, 0)
    to_rows = pull @ codes - rows * pull.sum(-1).unsqueeze(-1)
    return to_rows, pull.mT @ rows - codes * pull.sum(-2).unsqueeze(-1)


def _chunks(rows: Tensor, codes: Tensor) -> Iterator[slice]:
    if leaves_python():  # a program that serves any number of rows has one chunk
        return iter((slice(None),))
    H, N, _ = rows.shape
    step = max(1, CHUNK_ELEMENTS // max(1, H * codes.shape[1]))
    return (slice(start, start + step) for start in range(0, max(1, N), step))


def _gather(codes: Tensor, indices: Tensor) -> Tensor:
    """Codes [H, K, D] at indices [H, ...]: [H, ..., D]."""
    H, _, D = codes.shape
    return codes.gather(1, indices.reshape(H, -1, 1).expand(-1, -1, D)).view(*indices.shape, D)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


def _as_operator(schema: str, fake: Callable) -> Callable:
    """The function as one operator to a compiler, so that the number of chunks is not part of the trace."""

    def register(function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            out = function(*args)  # laid out as `fake` says, whatever the layout of the input
            return out.contiguous() if isinstance(out, Tensor) else tuple(t.contiguous() for t in out)

        operator = define(schema, cpu=run, cuda=run, fake=fake)

        @wraps(function)  # what it wraps is differentiable, the operator is not
        def call(*args: Any) -> Any:
            return (operator if torch.compiler.is_compiling() and not leaves_python() else function)(*args)

        return call

    return register


# -- indices


@_as_operator(
    "vq_sample_codes(Tensor rows, Tensor codes, SymInt k, float temperature, bool cosine) -> Tensor",
    lambda rows, codes, k, temperature, cosine: rows.new_empty((*rows.shape[:2], k), dtype=torch.int64),
)
def _sample(rows: Tensor, codes: Tensor, k: int, temperature: float, cosine: bool) -> Tensor:
    # Gumbel's trick. Head by head, so that noise is drawn in the order of an [H, N, K] tensor.
    heads = []
    for head_rows, head_codes in zip(rows.unbind(0), codes.unbind(0), strict=True):
        of_head = []
        for part in _chunks(head_rows[None], head_codes[None]):
            scores = _scores(head_rows[None, part], head_codes[None], cosine)[0]
            noisy = (scores / temperature + gumbel_noise(scores)).nan_to_num(nan=-torch.inf)
            of_head.append(noisy.topk(k, -1).indices if k > 1 else noisy.argmax(-1, keepdim=True))
        heads.append(torch.cat(of_head))
    return torch.stack(heads)


def _topk(rows: Tensor, codes: Tensor, k: int, cosine: bool) -> Tensor:
    """By the lookup's definition, ties to the lower index: the first is the nearest code."""
    metric = "product" if cosine else "distance"
    candidates = min(codes.shape[1], k + _SPARE_CANDIDATES)
    codes = codes.double()
    best_of_chunks = []
    for part in _chunks(rows, codes):
        chunk = rows[:, part].double()
        near = _float64_scores(chunk, codes, cosine=cosine).topk(candidates, -1)
        at = near.indices.sort(-1).values
        of_row = _gather(codes, at).flatten(0, 1)
        cost = exact_costs(chunk.flatten(0, 1).unsqueeze(1), of_row, metric).view(at.shape)
        best = at.gather(-1, cost.sort(dim=-1, stable=True).indices[..., :k])
        if candidates < codes.shape[1]:
            gap = near.values[..., k - 1] - near.values[..., -1]
            for h, open_n in enumerate(~(gap > 2 * _score_error(chunk, codes, cosine=cosine))):
                which = open_n.nonzero()[:, 0]
                for row in which.split(max(1, CHUNK_ELEMENTS // codes.shape[1])):
                    cost = exact_costs(chunk[h : h + 1, row], codes[h : h + 1], metric)
                    best[h, row] = cost[0].sort(dim=-1, stable=True).indices[:, :k]
        best_of_chunks.append(best)
    return torch.cat(best_of_chunks, 1)


def _float64_scores(rows: Tensor, codes: Tensor, *, cosine: bool) -> Tensor:
    scores = rows @ codes.transpose(1, 2) if cosine else -_squared_distances(rows, codes)
    return scores.nan_to_num(nan=-torch.inf)


def _portable_topk(rows: Tensor, codes: Tensor, k: int, cosine: bool) -> Tensor:
    """`_topk` in torch's own operators: candidates alone are compared, and more codes than these may tie in float64."""
    rows, codes = rows.double(), codes.double()
    candidates = min(codes.shape[1], k + _SPARE_CANDIDATES)
    at = stable_order(-_float64_scores(rows, codes, cosine=cosine))[..., :candidates].sort(-1).values
    of_row = _gather(codes, at)
    terms = -(rows.unsqueeze(-2) * of_row) if cosine else (rows.unsqueeze(-2) - of_row).square()
    return at.gather(-1, stable_order(terms.cumsum(-1)[..., -1])[..., :k])


def _score_error(rows: Tensor, codes: Tensor, *, cosine: bool) -> Tensor:
    """[H, n]: by how much a float64 score of any order, and the definition's, may differ from the real one at most."""
    length, longest = (torch.linalg.vector_norm(t, dim=-1) for t in (rows, codes))
    longest = longest.amax(-1, keepdim=True)
    # what distances are centred by is no longer than the longest code
    size = length * longest if cosine else (length + 2 * longest).square()
    return 4 * (rows.shape[-1] + 8) * 2.0**-53 * size


def _topk_vmap(info: Any, in_dims: tuple, rows: Tensor, codes: Tensor, k: int, cosine: bool) -> tuple[Tensor, int]:
    (indices,), (dim,) = batched_lookup(info, in_dims, rows, codes, lambda *pair: (topk_codes(*pair, k, cosine),))
    return indices, dim


# how many rows need every code by the definition depends on the data: always an operator
topk_codes = define(
    "vq_topk_codes(Tensor rows, Tensor codes, SymInt k, bool cosine) -> Tensor",
    cpu=_topk,
    cuda=_topk,
    fake=lambda rows, codes, k, cosine: rows.new_empty((*rows.shape[:2], k), dtype=torch.int64),
    vmap=_topk_vmap,
)


def gumbel_noise(like: Tensor) -> Tensor:
    uniform = torch.zeros_like(like).uniform_(0, 1)
    return -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()


# -- cross-entropy


@_as_operator(
    "vq_code_cross_entropy(Tensor rows, Tensor codes, Tensor targets, bool cosine) -> Tensor",
    lambda rows, codes, targets, cosine: rows.new_empty(rows.shape[:2]),
)
def _cross_entropy(rows: Tensor, codes: Tensor, targets: Tensor, cosine: bool) -> Tensor:
    return torch.cat(
        [score_cross_entropy(_scores(rows[:, part], codes, cosine), targets[:, part]) for part in _chunks(rows, codes)],
        1,
    )


def score_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(scores [..., K]) at targets [...]; 0 where the target is -1."""
    at_target = scores.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets >= 0, scores.logsumexp(-1) - at_target, 0)


@_as_operator(
    "vq_code_cross_entropy_grad(Tensor rows, Tensor codes, Tensor targets, Tensor grad, bool cosine) "
    "-> (Tensor, Tensor)",
    lambda rows, codes, targets, grad, cosine: _like(rows, codes),
)
def _cross_entropy_grad(
    rows: Tensor, codes: Tensor, targets: Tensor, grad: Tensor, cosine: bool
) -> tuple[Tensor, Tensor]:
    grad = torch.where(targets >= 0, grad, 0).unsqueeze(-1)
    to_rows, to_codes = [], torch.zeros_like(codes)
    for part in _chunks(rows, codes):
        scores = _scores(rows[:, part], codes, cosine)
        hit = targets[:, part, None] == torch.arange(codes.shape[1], device=codes.device)
        to_scores = grad[:, part] * (scores.softmax(-1) - hit.to(scores.dtype))
        of_rows, of_codes = _pull_back(to_scores, scores, rows[:, part], codes, cosine)
        to_rows.append(of_rows)
        to_codes = to_codes + of_codes
    return torch.cat(to_rows, 1), to_codes


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, codes: Tensor, targets: Tensor, cosine: bool) -> Tensor:
        return _cross_entropy(rows, codes, targets, cosine)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        rows, codes, targets, ctx.cosine = inputs
        ctx.save_for_backward(rows, codes, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, codes, targets = ctx.saved_tensors
        return *_cross_entropy_grad(rows, codes, targets, grad, ctx.cosine), None, None


# -- entropy of the mean distribution


def _position_chunks(rows: Tensor, codes: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Positions of rows [H, P, R, D], and for each stretch of them the rows that fit into one chunk."""
    H, P, R, _ = rows.shape
    per_row = max(1, H * codes.shape[1])
    positions = max(1, CHUNK_ELEMENTS // (per_row * max(1, R)))
    step = max(1, CHUNK_ELEMENTS // (per_row * positions))
    inner = [slice(start, start + step) for start in range(0, max(1, R), step)]
    return ((slice(start, start + positions), inner) for start in range(0, max(1, P), positions))


def _soft_assignment(rows: Tensor, codes: Tensor, temperature: float, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Flattened rows [H, p * r, D], their scores, and softmax(temperature * scores) as [H, p, r, K]."""
    flat = rows.flatten(1, 2)
    scores = _scores(flat, codes, cosine)
    return flat, scores, (scores * temperature).softmax(-1).unflatten(1, rows.shape[1:3])


def _mean_assignment(
    rows: Tensor, codes: Tensor, weight: Tensor, temperature: float, cosine: bool, inner: list[slice]
) -> tuple[Tensor, Tensor]:
    """Mean distribution [p, K] of rows [H, p, R, D], and the number of rows [p, 1] that it is the mean of."""
    number = (rows.shape[0] * weight.sum(-1, keepdim=True)).clamp_min(1)
    total = rows.new_zeros(rows.shape[1], codes.shape[1])
    for part in inner:
        share = _soft_assignment(rows[:, :, part], codes, temperature, cosine)[2]
        total = total + (share * weight[:, part, None]).sum((0, 2))
    return total / number, number


@_as_operator(
    "vq_assignment_entropy(Tensor rows, Tensor codes, Tensor weight, float temperature, bool cosine) -> Tensor",
    lambda rows, codes, weight, temperature, cosine: rows.new_empty(rows.shape[1]),
)
def _entropy(rows: Tensor, codes: Tensor, weight: Tensor, temperature: float, cosine: bool) -> Tensor:
    return torch.cat(
        [
            entropy(_mean_assignment(rows[:, part], codes, weight[part], temperature, cosine, inner)[0])
            for part, inner in _position_chunks(rows, codes)
        ]
    )


def entropy(probability: Tensor) -> Tensor:
    """Entropy over the last dimension in nats."""
    return -(probability * probability.clamp_min(_LEAST_PROBABILITY).log()).sum(-1)


@_as_operator(
    "vq_assignment_entropy_grad(Tensor rows, Tensor codes, Tensor weight, Tensor grad, float temperature, "
    "bool cosine) -> (Tensor, Tensor)",
    lambda rows, codes, weight, grad, temperature, cosine: _like(rows, codes),
)
def _entropy_grad(
    rows: Tensor, codes: Tensor, weight: Tensor, grad: Tensor, temperature: float, cosine: bool
) -> tuple[Tensor, Tensor]:
    to_rows, to_codes = [], torch.zeros_like(codes)
    for part, inner in _position_chunks(rows, codes):
        mean, number = _mean_assignment(rows[:, part], codes, weight[part], temperature, cosine, inner)
        slope = -(mean.clamp_min(_LEAST_PROBABILITY).log() + (mean >= _LEAST_PROBABILITY))
        to_share = (grad[part, None] * slope / number).unsqueeze(-2)
        of_part = []
        for rows_in in inner:
            block = rows[:, part, rows_in]
            flat, scores, share = _soft_assignment(block, codes, temperature, cosine)
            weighted = to_share * weight[part, rows_in, None]
            to_scores = temperature * share * (weighted - (share * weighted).sum(-1, keepdim=True))
            of_rows, of_codes = _pull_back(to_scores.flatten(1, 2), scores, flat, codes, cosine)
            of_part.append(of_rows.view(block.shape))
            to_codes = to_codes + of_codes
        to_rows.append(torch.cat(of_part, 2))
    return torch.cat(to_rows, 1), to_codes


class _Entropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, codes: Tensor, weight: Tensor, temperature: float, cosine: bool) -> Tensor:
        return _entropy(rows, codes, weight, temperature, cosine)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        rows, codes, weight, ctx.temperature, ctx.cosine = inputs
        ctx.save_for_backward(rows, codes, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, codes, weight = ctx.saved_tensors
        return *_entropy_grad(rows, codes, weight, grad, ctx.temperature, ctx.cosine), None, None, None


# -- the gradient of the mean code under the softmax of the scores


def _soft_code(rows: Tensor, codes: Tensor, temperature: float, cosine: bool) -> Tensor:
    """Zero in value, [H, N, D]; the mean code's gradient with regard to its probabilities."""
    soft = []
    for part in _chunks(rows, codes):
        share = (_scores(rows[:, part], codes, cosine) / temperature).softmax(-1)
        soft.append((share - share.detach()) @ codes)
    return torch.cat(soft, 1)


@_as_operator(
    "vq_soft_code_grad(Tensor rows, Tensor codes, Tensor grad, float temperature, bool cosine) -> (Tensor, Tensor)",
    lambda rows, codes, grad, temperature, cosine: _like(rows, codes),
)
def _soft_code_grad(
    rows: Tensor, codes: Tensor, grad: Tensor, temperature: float, cosine: bool
) -> tuple[Tensor, Tensor]:
    to_rows, to_codes = [], torch.zeros_like(codes)
    for part in _chunks(rows, codes):
        scores = _scores(rows[:, part], codes, cosine)
        share = (scores / temperature).softmax(-1)
        to_share = grad[:, part] @ codes.mT
        to_scores = share * (to_share - (share * to_share).sum(-1, keepdim=True)) / temperature
        of_rows, of_codes = _pull_back(to_scores, scores, rows[:, part], codes, cosine)
        to_rows.append(of_rows)
        to_codes = to_codes + of_codes
        if torch.is_grad_enabled():
            to_codes = to_codes + (share - share.detach()).mT @ grad[:, part]  # 0, but not its derivative
    return torch.cat(to_rows, 1), to_codes


class _SoftCode(torch.autograd.Function):
    """`_soft_code` without its chunks in memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, codes: Tensor, temperature: float, cosine: bool) -> Tensor:
        return torch.zeros_like(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        rows, codes, ctx.temperature, ctx.cosine = inputs
        ctx.save_for_backward(rows, codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_soft_code_grad(*ctx.saved_tensors, grad, ctx.temperature, ctx.cosine), None, None
