import copy
import pickle
import tempfile

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from metarec_fast.ops import nearest_codeword
from metarec_fast.vq import FastResidualVQ, FastVQ
from metarec_fast.vq.parts.orthogonality import orthogonality_loss
from metarec_fast.vq.parts.sampling import draw_rows


@pytest.mark.parametrize("valid_rows,places", [(40, 7), (40, 40), (7, 40), (1, 3), (0, 3), (40, 0)])
def test_draw_rows_gives_distinct_valid_rows_to_as_many_places_as_it_can(valid_rows, places):
    rows = torch.arange(100.0)[None, :, None].expand(2, 100, 3)
    valid = torch.zeros(2, 100, dtype=torch.bool)
    vacant = torch.zeros(2, 50, dtype=torch.bool)
    for head in range(2):
        valid[head, torch.randperm(100)[:valid_rows]] = True
        vacant[head, torch.randperm(50)[:places]] = True
    drawn, distinct = draw_rows(torch.where(valid[..., None], rows, float("nan")), valid, vacant)
    assert drawn.shape == (2, 50, 3)
    assert (distinct <= vacant).all()
    assert (distinct.sum(-1) == min(valid_rows, places)).all()
    for head in range(2):
        ids = drawn[head, distinct[head], 0].tolist()
        assert len(set(ids)) == len(ids) and valid[head, torch.tensor(ids, dtype=torch.int64)].all()
    assert drawn.isfinite().all()


def test_draw_rows_is_uniform_over_rows_and_places():
    # 3000 draws of 4 of 10 rows into 4 of 6 places: each row is expected 1200 times, standard deviation below 34
    rows, valid = torch.arange(10.0).view(1, 10, 1).expand(3000, 10, 1), torch.ones(3000, 10, dtype=torch.bool)
    vacant = torch.tensor([True, False, True, True, False, True]).expand(3000, 6)
    drawn, distinct = draw_rows(rows, valid, vacant)
    counts = drawn[distinct].long().flatten().bincount(minlength=10)
    assert (counts - 1200).abs().max() < 5 * 34
    # one valid row: each of the places is as likely to get it
    one = torch.zeros(3000, 10, dtype=torch.bool)
    one[:, 3] = True
    places = draw_rows(rows, one, vacant)[1].sum(0)
    assert places[1] == places[4] == 0
    assert (places[[0, 2, 3, 5]] - 750).abs().max() < 5 * 24


def test_dead_codes_become_rows_of_the_batch_and_live_codes_stay():
    vq = FastVQ(8, 30, threshold_ema_dead_code=2, decay=0.5)
    vq._codebook.cluster_size[:, ::2] = 100
    vq._codebook.embed_avg.copy_(vq._codebook.embed * vq._codebook.cluster_size.unsqueeze(-1))
    reference = copy.deepcopy(vq)
    reference._codebook.threshold_ema_dead_code = 0
    x = torch.randn(2, 40, 8)
    vq(x), reference(x)
    dead = reference._codebook.cluster_size[0] < 2
    assert dead.any() and not dead.all()
    codebook = vq._codebook
    assert torch.equal(codebook.embed[0, ~dead], reference._codebook.embed[0, ~dead])
    assert torch.equal(codebook.embed_avg[0, ~dead], reference._codebook.embed_avg[0, ~dead])
    matches = (codebook.embed[0, dead][:, None] == x.flatten(0, 1)).all(-1)
    assert (matches.sum(-1) == 1).all() and matches.sum(0).max() == 1  # each a row, none twice
    assert (codebook.cluster_size[0, dead] == 2).all()
    assert torch.equal(codebook.embed_avg[0, dead], 2 * codebook.embed[0, dead])


def test_replacement_needs_training_keeps_to_the_mask_and_follows_the_seed():
    x, mask = torch.randn(2, 40, 8), torch.rand(2, 40) > 0.5
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        vq = FastVQ(8, 30, threshold_ema_dead_code=1000, use_cosine_sim=True)
        vq.eval()(x, mask=mask)
        assert torch.equal(vq._codebook.cluster_size, torch.ones(1, 30))
        vq.train()(x, mask=mask)
        results.append(vq.codebook.clone())
    assert torch.equal(*results)
    directions = F.normalize(x[mask], dim=-1)
    assert torch.cdist(results[0], directions).amin(-1).max() < 1e-3


def test_codes_that_fall_out_of_use_are_replaced_not_drawn_to_the_origin():
    """With threshold 0, as VectorQuantize has by default, unused codes shrink to 0; a threshold prevents it."""
    x = torch.randn(1, 400, 8) + 20
    vq = FastVQ(8, 64, threshold_ema_dead_code=1)
    for _ in range(100):
        vq(x)
    assert vq.codebook.norm(dim=-1).min() > 20
    assert len(vq(x)[1].unique()) > 60


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_kmeans_start_finds_the_clusters(cosine, separate):
    heads = 2 if separate else 1
    centres = 5 * F.normalize(torch.randn(6, 8 * heads), dim=-1) * (8 * heads) ** 0.5
    x = centres.repeat(50, 1) + 0.01 * torch.randn(300, 8 * heads)
    vq = FastVQ(
        8 * heads,
        6,
        codebook_dim=8,
        heads=heads,
        separate_codebook_per_head=separate,
        kmeans_init=True,
        kmeans_iters=20,
        use_cosine_sim=cosine,
    )
    assert not vq._codebook.initted and not vq.codebook.any()
    vq.eval()(x[None])
    assert vq._codebook.initted and (vq._codebook.cluster_size.sum(-1) == 300).all()
    rows = vq._rows(x)
    start = (rows - rows.mean(1, keepdim=True)).square().sum()
    error = rows - vq._codebook.embed.gather(
        1, nearest_codeword(rows, vq._codebook.embed).indices[..., None].expand_as(rows)
    )
    assert error.square().sum() < 0.6 * start  # Lloyd may stop at a poor optimum, never at no structure
    before = vq.codebook.clone()
    vq.eval()(torch.randn(1, 40, 8 * heads))
    assert torch.equal(vq.codebook, before)


def test_kmeans_is_lloyds_algorithm():
    x = torch.randn(1, 90, 4)
    vq = FastVQ(4, 5, kmeans_init=True, kmeans_iters=50)
    vq.eval()(x)
    embed = vq.codebook
    indices = nearest_codeword(x[0], embed).indices
    means = torch.stack([x[0][indices == k].mean(0) for k in range(5)])
    # a fixed point of Lloyd's step, up to the smoothing by eps that the moving average applies
    torch.testing.assert_close(embed, means, rtol=1e-4, atol=1e-4)


def test_kmeans_with_fewer_rows_than_codes_warns_and_stays_finite():
    vq = FastVQ(4, 20, kmeans_init=True)
    with pytest.warns(UserWarning, match="k-means initialises 20 codes from 6 rows"):
        quantized, _, _ = vq(torch.randn(1, 6, 4))
    assert quantized.isfinite().all() and vq.codebook.isfinite().all()


def test_checkpoint_tells_whether_kmeans_is_done():
    trained = FastVQ(4, 5, kmeans_init=True)
    trained(torch.randn(1, 50, 4))
    fresh = FastVQ(4, 5, kmeans_init=True)
    fresh.load_state_dict(trained.state_dict())
    fresh.eval()(torch.randn(1, 50, 4))
    assert torch.equal(fresh.codebook, trained.codebook)
    undone = FastVQ(4, 5)
    undone.load_state_dict(FastVQ(4, 5, kmeans_init=True).state_dict())
    undone.eval()(torch.randn(1, 50, 4))
    assert undone.codebook.any()
    with torch.device("meta"):
        meta = FastVQ(4, 5, kmeans_init=True)
    meta.load_state_dict(trained.state_dict(), assign=True)
    meta.eval()(torch.randn(1, 50, 4))
    assert torch.equal(meta.codebook, trained.codebook)


def test_weight_zero_holds_a_code_still():
    vq = FastVQ(8, 10)
    vq(torch.randn(1, 50, 8))
    before, weight = copy.deepcopy(vq._codebook), torch.ones(10)
    weight[3] = 0
    vq(torch.randn(1, 50, 8), ema_update_weight=weight)
    assert torch.equal(vq._codebook.embed_avg[0, 3], before.embed_avg[0, 3])
    assert vq._codebook.cluster_size[0, 3] == before.cluster_size[0, 3]
    assert not torch.equal(vq._codebook.embed_avg[0, 4], before.embed_avg[0, 4])


@pytest.mark.parametrize("shape", [(1, 5, 30), (2, 30, 5)])
def test_orthogonality_loss_is_the_mean_squared_cosine(shape):
    codebook = torch.randn(shape, dtype=torch.float64)
    H, K, _ = shape
    cosines = F.cosine_similarity(codebook[:, :, None], codebook[:, None], dim=-1)
    torch.testing.assert_close(orthogonality_loss(codebook), cosines.square().sum() / (H * K**2) - 1 / K)
    if H == 1:
        used = torch.tensor([[0, 3, 3, -1, 4]])
        torch.testing.assert_close(
            orthogonality_loss(codebook, used=used), orthogonality_loss(codebook[:, [0, 3, 4]]), check_dtype=False
        )
        limited = orthogonality_loss(codebook, used=used, max_codes=2)
        pairs = [orthogonality_loss(codebook[:, ids]) for ids in ([0, 3], [0, 4], [3, 4])]
        assert min((limited - p).abs() for p in pairs) < 1e-6


def test_orthogonality_loss_of_some_codes():
    codebook = torch.randn(1, 9, 4)
    torch.manual_seed(3)
    limited = orthogonality_loss(codebook, max_codes=4)
    torch.manual_seed(3)
    torch.testing.assert_close(limited, orthogonality_loss(codebook[:, torch.randperm(9)[:4]]))


# -- `initted` decides whether k-means runs, whatever wrote it


def _by_averaging(trained, fresh):
    averaged = AveragedModel(fresh)
    averaged.update_parameters(trained)
    return averaged.module


def _by_copying(trained, fresh):
    with torch.no_grad():
        for mine, theirs in zip(fresh.state_dict().values(), trained.state_dict().values(), strict=True):
            mine.copy_(theirs)
    return fresh


def _by_data(trained, fresh):
    for mine, theirs in zip(fresh.state_dict().values(), trained.state_dict().values(), strict=True):
        mine.data.copy_(theirs)
    codebook = fresh._codebook if isinstance(fresh, FastVQ) else fresh.layers[0]._codebook
    codebook.initted.data = torch.tensor(True)
    return fresh


def _by_setting_buffers(trained, fresh):
    """As from_pretrained of other libraries does."""
    for mine, theirs in zip(fresh.modules(), trained.modules(), strict=True):
        for name, buffer in theirs._buffers.items():
            if name not in mine._non_persistent_buffers_set:
                mine._buffers[name] = buffer.clone()
    return fresh


def _by_distributed_checkpoint(trained, fresh):
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(trained.state_dict(), checkpoint_id=folder, no_dist=True)
        dcp.load(fresh.state_dict(), checkpoint_id=folder, no_dist=True)
    return fresh


def _by_safetensors(trained, fresh):
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_model(trained, f"{folder}/model.safetensors")
        safetensors.torch.load_model(fresh, f"{folder}/model.safetensors")
    return fresh


def _by_pickling(trained, fresh):
    return pickle.loads(pickle.dumps(_by_copying(trained, fresh)))


def _by_to_empty(trained, fresh):
    return _by_copying(trained, fresh.to("meta").to_empty(device="cpu"))


WAYS = [
    _by_averaging,
    _by_copying,
    _by_data,
    _by_setting_buffers,
    _by_distributed_checkpoint,
    _by_safetensors,
    _by_pickling,
    _by_to_empty,
    lambda trained, fresh: copy.deepcopy(_by_copying(trained, fresh)),
]


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("residual", [False, True])
def test_codes_that_came_by_any_way_are_not_started_again(way, residual):
    def build():
        if residual:
            return FastResidualVQ(dim=8, codebook_size=16, num_quantizers=2, kmeans_init=True)
        return FastVQ(8, 16, kmeans_init=True)

    trained = build()
    trained(torch.randn(4, 64, 8))
    module = way(trained, build()).eval()
    x = torch.randn(2, 50, 8) * 50
    torch.testing.assert_close(module(x), trained.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(dict(module.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)
    # and the other way: what says that it has no codes gets some
    codebook = (module.layers[0] if residual else module)._codebook
    codebook.initted.copy_(torch.tensor(False))
    module(x)
    assert codebook.initted
    assert not torch.equal(codebook.embed, (trained.layers[0] if residual else trained)._codebook.embed)


def test_compiled_code_looks_at_initted_until_it_was_true():
    trained, x = FastVQ(8, 16, kmeans_init=True), torch.randn(2, 50, 8)
    trained(torch.randn(4, 64, 8))
    torch._dynamo.reset()
    module = _by_copying(trained, FastVQ(8, 16, kmeans_init=True)).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    trained.eval()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), trained(x), rtol=0, atol=0)
    assert torch.equal(module.codebook, trained.codebook)


def test_stacked_modules_under_vmap_keep_their_codes():
    models = [FastVQ(4, 5).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 1, 9, 4)
    results = torch.vmap(lambda p, b, x: torch.func.functional_call(models[0], (p, b), (x,))[0])(parameters, buffers, x)
    torch.testing.assert_close(results, torch.stack([m(part)[0] for m, part in zip(models, x, strict=True)]))


def test_the_in_place_optimizer_follows_the_codes_that_a_load_assigns():
    options = {"learnable_codebook": True, "ema_update": False}
    vq = FastVQ(8, 16, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5), **options)
    x = torch.randn(2, 30, 8)
    vq(x)
    moved = copy.deepcopy(vq)
    vq.load_state_dict({k: v.clone() for k, v in vq.state_dict().items()}, assign=True)
    vq(x), moved(x)
    torch.testing.assert_close(vq.codebook, moved.codebook, rtol=0, atol=0)
    assert vq.in_place_codebook_optimizer.param_groups[0]["params"][0] is vq._codebook.embed
    vq.in_place_codebook_optimizer.param_groups[0]["params"].append(torch.zeros(3, requires_grad=True))
    vq._codebook.embed = nn.Parameter(vq._codebook.embed.detach().clone())
    with pytest.raises(RuntimeError, match=r"in_place_codebook_optimizer holds 2 parameters, .* codebook has 1: make"):
        vq(x)


def test_averages_of_the_input_are_tensors_that_other_modules_can_follow():
    vq, x = FastVQ(8, 16, affine_param=True), torch.randn(2, 30, 8)
    assert not any("batch_" in key for key in vq.state_dict())
    averaged = AveragedModel(vq)
    indices = torch.arange(16)
    torch.testing.assert_close(vq.get_codes_from_indices(indices), vq.codebook)
    vq(x + 3)
    assert {"_codebook.batch_mean", "_codebook.batch_variance"} <= set(vq.state_dict())
    averaged.update_parameters(vq)
    copied = averaged.module
    torch.testing.assert_close(dict(copied.state_dict()), dict(vq.state_dict()))
    torch.testing.assert_close(copied.get_codes_from_indices(indices), vq.get_codes_from_indices(indices))
    copied.load_state_dict(FastVQ(8, 16, affine_param=True).state_dict())
    assert copied._codebook.batch_mean.isnan().all()
    torch.testing.assert_close(copied.eval()(x)[2], copied(x)[2])
