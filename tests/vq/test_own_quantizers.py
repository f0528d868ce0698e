"""The usual quantizers that projects write themselves, with their lookup patched as docs/guides/replace.md has it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metarec_fast.ops import nearest_codeword
from metarec_fast.vq import FastVQ, replace_vector_quantize

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class EmbeddingQuantizer(nn.Module):
    """An nn.Embedding that a loss of two parts pulls: TIGER, RQ-VAE-Recommender, diffusers VQModel, Chameleon."""

    def __init__(self, codes=12, dim=6, beta=0.25):
        super().__init__()
        self.beta, self.embedding = beta, nn.Embedding(codes, dim)

    def lookup(self, rows):
        codes = self.embedding.weight
        return (rows.square().sum(1, True) - 2 * rows @ codes.T + codes.square().sum(1)).argmin(1)

    def forward(self, z):
        rows = z.movedim(1, -1)  # [B, D, H, W], as images have it
        indices = self.lookup(rows.flatten(0, -2)).view(rows.shape[:-1])
        codes = self.embedding(indices)
        loss = F.mse_loss(codes, rows.detach()) + self.beta * F.mse_loss(rows, codes.detach())
        return (rows + (codes - rows).detach()).movedim(-1, 1), indices, loss


class FactorizedQuantizer(nn.Module):
    """Few dimensions, compared by direction, between two convolutions: the descript codec (dac), snac."""

    def __init__(self, dim=10, codes=12, codebook_dim=4):
        super().__init__()
        self.in_proj, self.out_proj = nn.Conv1d(dim, codebook_dim, 1), nn.Conv1d(codebook_dim, dim, 1)
        self.codebook = nn.Embedding(codes, codebook_dim)

    def decode_latents(self, latents):
        rows = F.normalize(latents.mT.flatten(0, 1))
        codes = F.normalize(self.codebook.weight)
        distances = rows.square().sum(1, True) - 2 * rows @ codes.T + codes.square().sum(1)
        indices = distances.argmin(1).view(len(latents), -1)
        return self.codebook(indices).mT, indices

    def forward(self, z):
        latents = self.in_proj(z)
        codes, indices = self.decode_latents(latents)
        commitment = (latents - codes.detach()).square().mean((1, 2))
        to_codes = (codes - latents.detach()).square().mean((1, 2))
        return self.out_proj(latents + (codes - latents).detach()), indices, 0.25 * commitment + to_codes


class AveragedCodebook(nn.Module):
    """Buffers that moving averages set: EnCodec, Mimi."""

    def __init__(self, dim=6, codes=12, decay=0.9, eps=1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        embed = torch.randn(codes, dim)
        self.register_buffer("inited", torch.ones(1))
        self.register_buffer("cluster_size", torch.ones(codes))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def quantize(self, x):
        return (-torch.cdist(x, self.embed)).max(-1).indices

    def forward(self, x):
        rows = x.flatten(0, -2)
        indices = self.quantize(rows)
        codes = F.embedding(indices, self.embed)
        if self.training:
            hot = F.one_hot(indices, len(self.embed)).float()
            self.cluster_size.lerp_(hot.sum(0), 1 - self.decay)
            self.embed_avg.lerp_(hot.T @ rows.detach(), 1 - self.decay)
            total = self.cluster_size.sum()
            size = (self.cluster_size + self.eps) / (total + len(self.embed) * self.eps) * total
            self.embed.copy_(self.embed_avg / size.unsqueeze(-1))
        loss = F.mse_loss(rows, codes.detach())
        return (rows + (codes - rows).detach()).view_as(x), indices.view(x.shape[:-1]), loss


# -- the patches of docs/guides/replace.md


def lookup(self, rows):
    return nearest_codeword(rows, self.embedding.weight.detach(), with_margin=False).indices


def decode_latents(self, latents):
    rows, codes = F.normalize(latents.detach().mT.flatten(0, 1)), F.normalize(self.codebook.weight.detach())
    indices = nearest_codeword(rows, codes, with_margin=False).indices.view(len(latents), -1)
    return self.codebook(indices).mT, indices


def quantize(self, x):
    return nearest_codeword(x, self.embed, with_margin=False).indices


CASES = {
    "embedding": (EmbeddingQuantizer, "lookup", lookup, (3, 6, 4, 5)),
    "factorized": (FactorizedQuantizer, "decode_latents", decode_latents, (3, 10, 14)),
    "averaged": (AveragedCodebook, "quantize", quantize, (3, 14, 6)),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_patched_lookup_gives_the_same_results_losses_and_gradients(name, frozen):
    cls, method, patch, shape = CASES[name]
    torch.manual_seed(0)
    own = cls()
    if frozen:
        own.eval().requires_grad_(False)
    fast_class = type(cls.__name__, (cls,), {method: patch})
    fast = copy.deepcopy(own)
    fast.__class__ = fast_class
    trained = [m for m in (own, fast) if not frozen and list(m.parameters())]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in trained]
    for _ in range(5):
        x, g, found = torch.randn(shape), torch.randn(shape), []
        for module in (own, fast):
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = module(leaf)
            ((quantized * g).sum() + loss.sum()).backward()
            grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            found.append((quantized, indices, loss, leaf.grad, grads))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(found[1], found[0], **CLOSE)
        assert all((grad is None) == frozen for grad in found[1][4])
    torch.testing.assert_close(fast.state_dict(), own.state_dict(), **CLOSE)


@pytest.mark.parametrize("frozen", [True, False])
def test_fast_vq_in_the_place_of_an_embedding_with_beta(frozen):
    torch.manual_seed(0)
    own = EmbeddingQuantizer().requires_grad_(not frozen)
    fast = FastVQ(
        dim=6,
        codebook_size=12,
        accept_image_fmap=True,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
        commitment_weight=own.beta,
        codebook_weight=1.0,
    ).requires_grad_(not frozen)
    fast.codebook = own.embedding.weight.detach()
    optimizers = [] if frozen else [torch.optim.Adam(m.parameters(), lr=0.01) for m in (own, fast)]
    for _ in range(5):
        x, g, found = torch.randn(3, 6, 4, 5), torch.randn(3, 6, 4, 5), []
        for module in (own, fast):
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = module(leaf)
            ((quantized * g).sum() + loss).backward()
            found.append((quantized, indices, loss, leaf.grad))
        torch.testing.assert_close(found[1], found[0], **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(fast.codebook, own.embedding.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "what"),
    [("embedding", "an embedding as codebook"), ("factorized", "a factorised codebook"), ("averaged", "averages")],
)
def test_own_quantizers_are_named_where_there_is_nothing_to_replace(name, what):
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "vq": CASES[name][0]()})
    with pytest.raises(ValueError, match=rf"model holds no .*: 'vq' looks like .*{what}.*; see docs/guides/replace.md"):
        replace_vector_quantize(model)
