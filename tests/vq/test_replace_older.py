"""Quantizers built as older versions of vector_quantize_pytorch built them, and copies of the class elsewhere."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metarec_fast.vq import FastResidualVQ, FastVQ, replace_vector_quantize

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class EuclideanCodebook(nn.Module):
    """As before 1.6: flags of shape [1] in float32, no options beyond these."""

    def __init__(self, dim, codebook_size, decay, threshold_ema_dead_code):
        super().__init__()
        self.decay, self.eps, self.codebook_size = decay, 1e-5, codebook_size
        self.threshold_ema_dead_code, self.sample_codebook_temp = threshold_ema_dead_code, 0.0
        self.register_buffer("initted", torch.Tensor([True]))
        self.register_buffer("cluster_size", torch.ones(1, codebook_size))
        embed = torch.randn(1, codebook_size, dim)
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)

    def forward(self, x):
        indices = torch.cdist(x, self.embed[0]).argmin(-1)
        codes = self.embed[0][indices]
        if self.training:
            hot = F.one_hot(indices.flatten(), self.codebook_size).float()
            self.cluster_size.lerp_(hot.sum(0), 1 - self.decay)
            self.embed_avg.lerp_(hot.T @ x.detach().flatten(0, -2), 1 - self.decay)
            total = self.cluster_size.sum()
            size = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
            self.embed.copy_(self.embed_avg / size.unsqueeze(-1))
        return codes, indices


class VectorQuantize(nn.Module):
    """As before 1.6: no dim, no rotation, losses of shape [1], a straight-through gradient."""

    def __init__(self, dim, codebook_size, codebook_dim=None, commitment_weight=1.0, decay=0.8):
        super().__init__()
        inner = codebook_dim or dim
        self.heads, self.codebook_size, self.commitment_weight = 1, codebook_size, commitment_weight
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self._codebook = EuclideanCodebook(inner, codebook_size, decay, 0)
        self.accept_image_fmap = False

    def forward(self, x):
        x = self.project_in(x)
        codes, indices = self._codebook(x)
        loss = torch.zeros(1)
        if self.training:
            loss = loss + F.mse_loss(codes.detach(), x) * self.commitment_weight
            codes = x + (codes - x).detach()
        return self.project_out(codes), indices, loss


class ResidualVQ(nn.Module):
    """As before 1.9: nothing but the levels."""

    def __init__(self, dim, num_quantizers, codebook_size, **options):
        super().__init__()
        self.num_quantizers, self.quantize_dropout, self.quantize_dropout_cutoff_index = num_quantizers, False, 0
        self.layers = nn.ModuleList(VectorQuantize(dim, codebook_size, **options) for _ in range(num_quantizers))

    @property
    def codebook_dim(self):  # 1.18 to 1.26 have properties where the fast class has attributes
        return self.layers[0].no_such_attribute

    @property
    def levels(self):
        return len(self.layers)

    def forward(self, x):
        total, residual, indices, losses = 0.0, x, [], []
        for layer in self.layers:
            quantized, chosen, loss = layer(residual)
            residual, total = residual - quantized.detach(), total + quantized
            indices.append(chosen), losses.append(loss)
        return total, torch.stack(indices, -1), torch.stack(losses, -1)


def assert_same_steps(old, new, steps=5, **close):
    for seed in range(steps):
        torch.manual_seed(seed)
        x, g, found = torch.randn(3, 7, 8), torch.randn(3, 7, 8), []
        for module in (old, new):
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = module(leaf)
            ((quantized * g).sum() + loss.sum()).backward()
            found.append((quantized, indices, loss, leaf.grad, [p.grad for p in module.parameters()]))
            module.zero_grad()
        torch.testing.assert_close(found[1], found[0], **(close or CLOSE))
    theirs, ours = old.state_dict(), new.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value.float().reshape(ours[name].shape), **(close or CLOSE))


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"decay": 0.9, "commitment_weight": 0.3}])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_of_an_older_structure_trains_on_as_before(options, frozen):
    torch.manual_seed(0)
    old = VectorQuantize(8, 12, **options).requires_grad_(not frozen)
    new = replace_vector_quantize(copy.deepcopy(old), strict_upstream=True)
    assert isinstance(new, FastVQ) and isinstance(new, VectorQuantize)
    assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in old.parameters()]
    assert_same_steps(old, new)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(new.eval()(x), old.eval()(x), **CLOSE)
    torch.testing.assert_close(pickle.loads(pickle.dumps(new))(x), new(x), rtol=0, atol=0)


def test_a_residual_quantizer_of_an_older_structure_becomes_one_loop():
    torch.manual_seed(0)
    old = ResidualVQ(8, 3, 12)
    new = replace_vector_quantize(copy.deepcopy(old), strict_upstream=True)
    assert isinstance(new, FastResidualVQ) and isinstance(new, ResidualVQ)
    assert new(torch.randn(1, 4, 8))[2].shape == (1, 3)
    assert new.codebook_dim == 8 and new.levels == 3
    new = replace_vector_quantize(copy.deepcopy(old), strict_upstream=True)
    assert_same_steps(old, new)


def test_levels_with_projections_of_their_own_keep_their_loop():
    torch.manual_seed(0)
    old = ResidualVQ(8, 3, 12, codebook_dim=4)
    new = copy.deepcopy(old)
    with pytest.warns(
        UserWarning, match=r"keeps its own loop, around levels that are FastVQ: each level has projections"
    ):
        replace_vector_quantize(new, strict_upstream=True)
    assert type(new) is ResidualVQ and all(isinstance(layer, FastVQ) for layer in new.layers)
    assert_same_steps(old, new)


class CosineSimCodebook(EuclideanCodebook):
    """As before 1.6: it averages the codes themselves."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.embed_avg
        self.embed.copy_(F.normalize(self.embed, dim=-1))

    def forward(self, x):
        indices = (F.normalize(x, dim=-1) @ self.embed[0].T).argmax(-1)
        return self.embed[0][indices], indices


def test_cosine_codes_without_averages_start_them_from_the_cluster_sizes():
    old = VectorQuantize(8, 12)
    old._codebook = CosineSimCodebook(8, 12, 0.8, 0)
    old._codebook.cluster_size.copy_(torch.arange(12) + 1.0)
    x, codes = torch.randn(2, 5, 8), old._codebook.embed.clone()
    expected = old.eval()(x)
    type(old).__module__, module = "vector_quantize_pytorch.vector_quantize_pytorch", type(old).__module__
    CosineSimCodebook.__module__ = VectorQuantize.__module__
    try:
        with pytest.warns(UserWarning, match="trains by today's rule for cosine codes"):
            replace_vector_quantize(old)
    finally:
        VectorQuantize.__module__ = CosineSimCodebook.__module__ = module
    torch.testing.assert_close(old(x)[:2], expected[:2])
    averages = old._codebook.embed_avg
    torch.testing.assert_close(averages, codes * (torch.arange(12) + 1.0).unsqueeze(-1))
    old._codebook.update_ema()
    torch.testing.assert_close(old._codebook.embed, codes, **CLOSE)


class ReturnsADict(VectorQuantize):
    def forward(self, x):
        quantized, indices, loss = super().forward(x)
        return {"quantized": quantized, "indices": indices, "loss": loss}


class LargerLoss(VectorQuantize):
    def forward(self, x):
        quantized, indices, loss = super().forward(x)
        return quantized, indices, loss * 2


class FarthestCode(VectorQuantize):
    def forward(self, x):
        indices = torch.cdist(x, self._codebook.embed[0]).argmax(-1)
        return self._codebook.embed[0][indices], indices, torch.zeros(1)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (ReturnsADict, "form of results in eval mode"),
        (LargerLoss, "loss in training"),
        (FarthestCode, "quantized in eval mode"),
    ],
)
def test_copies_that_compute_something_else_stay_and_are_named(changed, what):
    model = nn.ModuleDict({"own": changed(8, 12), "plain": VectorQuantize(8, 12)})
    state = copy.deepcopy(model["own"].state_dict())
    with pytest.warns(
        UserWarning, match=rf"'own' \({changed.__name__}\) stays as it is: a copy .* whose {what} differs"
    ):
        replace_vector_quantize(model)
    assert type(model["own"]) is changed and isinstance(model["plain"], FastVQ)
    torch.testing.assert_close(model["own"].state_dict(), state, rtol=0, atol=0)
    with pytest.raises(ValueError, match=what):
        replace_vector_quantize(changed(8, 12))


def test_the_trial_of_copies_draws_nothing_from_the_generator():
    state = torch.get_rng_state()
    model = VectorQuantize.__new__(VectorQuantize)
    with torch.random.fork_rng():
        model.__init__(8, 12)
    replace_vector_quantize(model)
    assert torch.equal(torch.get_rng_state(), state)
