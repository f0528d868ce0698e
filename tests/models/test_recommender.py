import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from metarec_fast import reference
from metarec_fast.config import MetaConfig, ModelConfig
from metarec_fast.data import Sequences, leave_one_out, synthetic
from metarec_fast.meta import Source, outer_step
from metarec_fast.models.recommender import Recommender
from metarec_fast.models.scorer import ModelScorer, pack_recent
from metarec_fast.sampling import PackedBatch, Sampler
from metarec_fast.statistics.descriptors import item_descriptors
from metarec_fast.statistics.spectral import moments

SMALL = ModelConfig(dim=8, codebook_heads=2, codebook_size=16, dropout=0.0, max_length=6)
CATALOGUES = {"a": 30, "b": 40, "t": 20}


def sequences(items, users=12, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(rng.integers(2, 9, users))))
    return Sequences(offsets, rng.integers(items, size=offsets[-1]).astype(np.int32), items)


def world(config=SMALL, dtype=torch.float64):
    model = Recommender(config, CATALOGUES)
    model.init_codebook(list(CATALOGUES), seed=0)
    batches = {n: Sampler(sequences(v), batch_size=5, max_length=6).batch(0) for n, v in CATALOGUES.items()}
    return model.to(dtype), batches


@pytest.mark.parametrize("encoder", ["lru", "sasrec"])
@pytest.mark.parametrize("vq", ["residual", "quantized", "none"])
def test_loss_equals_a_plain_forward_for_each_user(encoder, vq):
    model, batches = world(dataclasses.replace(SMALL, encoder=encoder, vq=vq))
    batch, table, shared = batches["a"], model.table("a"), model.shared
    total, rows, errors = 0.0, 0, []
    for begin, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        z = F.layer_norm(table.weight[batch.items[begin:end]], (8,), table.norm.weight, table.norm.bias)
        read = z
        if vq != "none":
            q = torch.cat(
                [c[torch.cdist(part, c).argmin(1)] for part, c in zip(z.split(4, 1), shared.codebook, strict=True)], 1
            )
            errors.append((q - z).square())
            read = q if vq == "quantized" else z + q
        states = shared.encoder(shared.norm(read), torch.tensor([0, end - begin]))
        logits = states @ table.weight.T + table.bias
        total = total + F.cross_entropy(logits, batch.targets[begin:end], reduction="sum")
        rows += end - begin
    expected = total / rows
    if errors:
        expected = expected + (1 + SMALL.commitment_weight) * torch.cat(errors).mean()
    got = model.loss(model.shared_parameters(), model.private_parameters("a"), batch)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("encoder", ["lru", "sasrec"])
@pytest.mark.parametrize("order", [1, 2])
def test_outer_step_of_the_recommender_equals_nested_differentiation(encoder, order):
    model, batches = world(dataclasses.replace(SMALL, encoder=encoder))
    config = MetaConfig(order=order, similarity_decay=0.0)
    shared = {k: v.detach() for k, v in model.shared_parameters().items()}
    private = {n: {k: v.detach() for k, v in model.private_parameters(n).items()} for n in CATALOGUES}
    got = outer_step(
        model.loss,
        shared,
        [Source(n, private[n], [batches[n]]) for n in "ab"],
        private["t"],
        batches["t"],
        config=config,
    )
    expected = reference.meta_step(
        model.loss,
        shared,
        [(private[n], [batches[n]]) for n in "ab"],
        private["t"],
        batches["t"],
        order=order,
        inner_steps=1,
        inner_lr=config.inner_lr,
        temperature=config.temperature,
        source_loss_weight=config.source_loss_weight,
    )
    for ours, theirs in (
        (got.shared_grad, expected["shared_grad"]),
        (got.target_grad, expected["target_grad"]),
        (list(got.source_grads.values()), expected["source_grads"]),
        (got.weights, expected["weights"]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_float32_step_equals_float64():
    steps = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model, batches = world(dtype=dtype)
        sources = [Source(n, model.private_parameters(n), [batches[n]]) for n in "ab"]
        steps.append(
            outer_step(
                model.loss,
                model.shared_parameters(),
                sources,
                model.private_parameters("t"),
                batches["t"],
                config=MetaConfig(similarity_decay=0.0),
            )
        )
    for name, grad in steps[1].shared_grad.items():
        torch.testing.assert_close(steps[0].shared_grad[name].double(), grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["lru", "sasrec"])
def test_compiled_encoder_gives_the_same_loss_and_gradients(encoder):
    model, batches = world(dataclasses.replace(SMALL, encoder=encoder, layers=1))
    batches["b"] = Sampler(sequences(CATALOGUES["b"], seed=1), batch_size=4, max_length=6).batch(0)
    counter = CompileCounterWithBackend("aot_eager")
    shared, results, compilations = model.shared_parameters(), [], []
    for compiled in (False, True):
        if compiled:
            model.compile_encoder(backend=counter, fullgraph=True)
        for name in "ab":
            private = model.private_parameters(name)
            loss = model.loss(shared, private, batches[name])
            results.append((loss, *torch.autograd.grad(loss, [*shared.values(), *private.values()])))
            compilations.append(counter.frame_count)
    # compiled when first used, and not again for another packed length
    assert compilations[1] == 0 < compilations[2] == compilations[3]
    assert len(batches["a"].items) != len(batches["b"].items)
    torch.testing.assert_close(results[2:], results[:2])


def test_sampled_softmax_over_the_whole_catalogue_is_the_full_one():
    model, batches = world()
    batch, V = batches["a"], CATALOGUES["a"]
    everything = torch.arange(V)
    sampled = dataclasses.replace(batch, negatives=everything, logq=torch.full((V,), -math.log(V)))
    shared, private = model.shared_parameters(), model.private_parameters("a")
    torch.testing.assert_close(model.loss(shared, private, sampled), model.loss(shared, private, batch))


def test_relabelling_items_changes_nothing():
    model, batches = world()
    batch, order = batches["a"], torch.randperm(CATALOGUES["a"])
    shared, private = model.shared_parameters(), model.private_parameters("a")
    relabelled = {**private, "weight": private["weight"][order], "bias": private["bias"][order]}
    renamed = PackedBatch(order.argsort()[batch.items], order.argsort()[batch.targets], batch.offsets, batch.users)
    torch.testing.assert_close(model.loss(shared, relabelled, renamed), model.loss(shared, private, batch))


@pytest.mark.parametrize("init", ["random", "spectral", "aligned"])
def test_a_new_domain_has_distinct_inputs_at_first(init):
    config = ModelConfig(init=init)
    model = Recommender(config, {"old": 400, "new": 600})
    for name, seed in (("old", 0), ("new", 1)):
        if init != "random":
            model.init_table(name, sequences(model.table(name).weight.shape[0], users=800, seed=seed), seed=0)
    model.init_codebook(["old"], seed=0)
    z = F.layer_norm(model.table("new").weight, (config.dim,))
    _, indices, _ = model.shared.quantize(z)
    assert len(indices.T.unique(dim=0)) >= 0.9 * 600


def test_the_first_domain_stands_as_it_is_and_the_next_is_turned_to_it():
    trains = {name: sequences(size, users=300, seed=i) for i, (name, size) in enumerate((("old", 60), ("new", 80)))}
    spectral, aligned = (
        Recommender(ModelConfig(init=init, dim=16), {"old": 60, "new": 80}) for init in ("spectral", "aligned")
    )
    for model in (spectral, aligned):
        for name, train in trains.items():
            model.init_table(name, train, seed=0)
    assert torch.equal(aligned.table("old").weight, spectral.table("old").weight)
    before, after = (model.table("new").weight.detach() for model in (spectral, aligned))
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0, atol=1e-5)
    frame = moments(aligned.table("old").weight.detach(), item_descriptors(trains["old"]))
    agreement = [(moments(w, item_descriptors(trains["new"])) * frame).sum() for w in (before, after)]
    assert agreement[1] > agreement[0] + 0.1
    assert not hasattr(spectral.shared, "frame")
    torch.testing.assert_close(aligned.shared.frame, frame)


@pytest.mark.parametrize("seed", range(3))
def test_aligned_rows_of_a_hidden_class_stand_together_in_all_domains(seed):
    """No item is shared: that the domains' classes are the same is found from how their items are used."""
    domains = synthetic(target_users=1000, target_items=120, seed=seed)

    def share(init: str) -> float:
        every = [*domains.sources, domains.target]
        model = Recommender(ModelConfig(init=init, dim=32), {d.name: d.num_items for d in every})
        means = []
        for domain in every:
            model.init_table(domain.name, leave_one_out(domain).train, seed=0)
            rows, classes = model.table(domain.name).weight.detach(), domains.catalogues[domain.name].classes
            means.append(F.normalize(torch.stack([rows[classes == c].mean(0) for c in range(12)]), dim=1))
        same = [(mean @ means[0].T).argmax(1) == torch.arange(12) for mean in means[1:]]
        return torch.stack(same).float().mean().item()

    assert share("aligned") > 0.9 and share("spectral") < 0.6


def test_scorer_reads_the_most_recent_events():
    model, _ = world(dtype=torch.float32)
    histories = Sequences(np.array([0, 8, 8, 9]), np.arange(9, dtype=np.int32), 20)
    items, offsets = pack_recent(histories, 6)
    assert items.tolist() == [2, 3, 4, 5, 6, 7, 8] and offsets.tolist() == [0, 6, 6, 7]
    scores = ModelScorer(model.eval(), "t").prepare(histories)(0, 20)
    h, _ = model.states(model.shared_parameters(), model.private_parameters("t"), items, offsets)
    table = model.table("t")
    torch.testing.assert_close(scores[0], h[5] @ table.weight.T + table.bias)
    torch.testing.assert_close(scores[1], table.bias.expand(20).detach())
    torch.testing.assert_close(scores[2], h[6] @ table.weight.T + table.bias)


def test_clear_errors():
    with pytest.raises(ValueError, match=r"multiple of model\.codebook_heads, got dim 8 and codebook_heads 3"):
        Recommender(dataclasses.replace(SMALL, codebook_heads=3), CATALOGUES)
    with pytest.raises(ValueError, match="domain must be one of a, b, t, got 'c'"):
        world()[0].table("c")


def test_codes_of_a_catalogue_are_the_nearest_in_each_head():
    model, _ = world()
    codes = model.codes("b")
    assert codes.shape == (2, 40) and codes.dtype == torch.int64
    table = model.table("b")
    z = F.layer_norm(table.weight, (8,), table.norm.weight, table.norm.bias).view(40, 2, 4)
    for head in range(2):
        distances = torch.cdist(z[:, head], model.shared.codebook[head])
        assert torch.equal(codes[head], distances.argmin(1))
    with pytest.raises(ValueError, match="codes need a model with a codebook"):
        world(dataclasses.replace(SMALL, vq="none"))[0].codes("b")


@pytest.mark.parametrize(("domains", "codes"), [(3, 2), (7, 2), (5, 1)])
def test_more_domains_than_codes_have_a_share_of_some_head_each(domains, codes):
    names = {f"d{i}": 6 for i in range(domains)}
    model = Recommender(dataclasses.replace(SMALL, codebook_size=codes), names)
    model.init_codebook(list(names), seed=0)
    H, K, d = model.shared.codebook.shape
    taken = []
    for head in range(H):
        for code in model.shared.codebook[head]:
            rows = [F.layer_norm(model.table(name).weight, (8,))[:, head * d : (head + 1) * d] for name in names]
            taken.append([i for i, z in enumerate(rows) if (z == code).all(1).any()])
    assert taken == [[i % domains] for i in range(H * K)]
