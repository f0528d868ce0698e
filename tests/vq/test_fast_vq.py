import copy
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from metarec_fast.vq import FastGroupedResidualVQ, FastResidualVQ, FastVQ, quantize, verify


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


LEARNABLE = {"learnable_codebook": True, "ema_update": False}

# -- arguments


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"codebook_dim": 0}, "codebook_dim must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"kmeans_iters": 0}, "kmeans_iters must be at least 1"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"threshold_ema_dead_code": -1}, "threshold_ema_dead_code must not be negative"),
        ({"commitment_weight": -1.0}, "commitment_weight must not be negative"),
        ({"orthogonal_reg_weight": -1.0}, "orthogonal_reg_weight must not be negative"),
        ({"straight_through": True}, "straight_through and rotation_trick exclude each other"),
        ({"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True}, "needs use_cosine_sim=False"),
        ({"learnable_codebook": True}, "needs ema_update=False"),
        (
            {"learnable_codebook": True, "ema_update": False, "straight_through": True, "rotation_trick": False},
            "needs straight_through=False",
        ),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "exclude each other"),
        ({"directional_reparam": True}, "needs threshold_ema_dead_code above 0"),
        (
            {"directional_reparam": True, "threshold_ema_dead_code": 1, "rotation_trick": True},
            "rotation_trick and directional_reparam exclude each other",
        ),
        ({"directional_reparam": True, "threshold_ema_dead_code": 1, "ema_update": True}, "needs ema_update=False"),
        ({"directional_reparam": True, "threshold_ema_dead_code": 1, "use_cosine_sim": True}, "needs use_cosine_sim"),
        ({"vq_bridge": torch.nn.Identity(), "ema_update": True}, "needs ema_update=False"),
        ({"vq_bridge": torch.nn.Identity(), "learnable_codebook": False}, "vq_bridge needs learnable_codebook=True"),
        ({"sync_update_v": 0.5}, "sync_update_v=0.5 needs learnable_codebook=True"),
        ({"sync_update_v": 1.5, **LEARNABLE}, r"sync_update_v must be in \[0, 1\], got 1.5"),
        ({"affine_param": True, "use_cosine_sim": True}, "affine_param=True needs use_cosine_sim=False"),
        ({"affine_param": True, "affine_param_batch_decay": 2.0}, r"affine_param_batch_decay must be in \[0, 1\]"),
        ({"in_place_codebook_optimizer": torch.optim.SGD}, "in_place_codebook_optimizer needs learnable_codebook=True"),
        ({"codebook_diversity_loss_weight": -1.0}, "codebook_diversity_loss_weight must not be negative"),
        (
            {"orthogonal_reg_active_codes_only": True, "heads": 2, "separate_codebook_per_head": True},
            "needs separate_codebook_per_head=False",
        ),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FastVQ(**{"dim": 8, "codebook_size": 4, **options})


def test_options_without_effect_on_their_own_are_accepted():
    FastVQ(8, 4, codebook_diversity_temperature=1.0, sample_codebook_temp=0.5, manual_in_place_optimizer_update=True)


@pytest.mark.parametrize(
    "options,call,message",
    [
        ({}, {"x": torch.zeros(2, 3, 7)}, r"x must be \[B, ..., 8\], got \(2, 3, 7\)"),
        ({}, {"x": torch.zeros(8)}, r"x must be \[B, ..., 8\]"),
        ({}, {"x": torch.zeros(2, 8, dtype=torch.int64)}, "floating dtype, got torch.int64"),
        ({"channel_last": False}, {"x": torch.zeros(2, 3, 8)}, r"x must be \[B, 8, N\] or \[B, 8\]"),
        ({"accept_image_fmap": True}, {"x": torch.zeros(2, 8, 3)}, r"x must be \[B, 8, H, W\]"),
        ({"accept_3d_fmap": True}, {"x": torch.zeros(2, 8, 3, 3)}, r"x must be \[B, 8, D, H, W\]"),
        ({}, {"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must be bool \(2, 3\), got torch.bool \(2, 4\)"),
        ({}, {"mask": torch.ones(2, 3)}, r"mask must be bool \(2, 3\), got torch.float32"),
        ({}, {"lens": torch.ones(3)}, r"lens must be \[2\], got \(3,\)"),
        ({}, {"mask": torch.ones(2, 3, dtype=torch.bool), "lens": torch.ones(2)}, "mask and lens exclude each other"),
        ({}, {"x": torch.zeros(2, 8), "mask": torch.ones(2, 1, dtype=torch.bool)}, "are for sequences"),
        (
            {"accept_image_fmap": True},
            {"x": torch.zeros(2, 8, 3, 3), "mask": torch.ones(2, 9, dtype=torch.bool)},
            "are for sequences",
        ),
        ({}, {"indices": torch.zeros(2, 4, dtype=torch.int64)}, r"indices must be int64 \(2, 3\), got torch.int64"),
        ({}, {"indices": torch.zeros(2, 3)}, "indices must be int64"),
        ({}, {"topk": 0}, "topk must be at least 1, got 0"),
        ({"heads": 2}, {"topk": 2}, "topk needs heads=1, got 2"),
        ({"commitment_use_cross_entropy_loss": True}, {"topk": 2}, "topk in training needs commitment_use_cross"),
        (
            {"in_place_codebook_optimizer": torch.optim.SGD, **LEARNABLE},
            {"topk": 2},
            "topk in training needs in_place_codebook_optimizer=None",
        ),
        (
            {},
            {"codebook_transform_fn": torch.nn.Identity()},
            r"codebook_transform_fn must return \[1, B, N, 4, 8\] with B \* N = 6, got \(1, 4, 8\)",
        ),
    ],
)
def test_forward_errors(options, call, message):
    with pytest.raises(ValueError, match=message):
        FastVQ(8, 4, **options)(**{"x": torch.zeros(2, 3, 8), **call})


# -- shapes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads,separate", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("shape", [(1, 0, 8), (0, 3, 8), (1, 1, 8), (3, 8), (2, 3, 4, 8)])
def test_odd_sizes(shape, heads, separate, training):
    vq = FastVQ(8, 50, codebook_dim=4, heads=heads, separate_codebook_per_head=separate, threshold_ema_dead_code=2)
    vq.train(training)
    x = torch.randn(shape, requires_grad=True)
    quantized, indices, loss = vq(x)
    assert quantized.shape == x.shape
    assert indices.shape == (shape[:-1] if heads == 1 else (*shape[:-1], heads))
    assert indices.dtype == torch.int64 and loss.shape == ()
    (quantized.sum() + loss).backward()
    assert loss.isfinite() and all(v.isfinite().all() for v in vq.state_dict().values())


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"heads": 2}, {"heads": 2, "codebook_dim": 3}])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("form", ["last", "first", "image", "volume"])
def test_output_from_indices_is_the_forward_output(options, separate, form):
    # VectorQuantize projects channels-first codes along the wrong dimension and fails for heads that share a codebook
    shape = {"last": (2, 5, 8), "first": (2, 8, 5), "image": (2, 8, 3, 2), "volume": (2, 8, 3, 2, 2)}[form]
    vq = FastVQ(
        8,
        20,
        separate_codebook_per_head=separate,
        channel_last=form == "last",
        accept_image_fmap=form == "image",
        accept_3d_fmap=form == "volume",
        **options,
    ).eval()
    mask = torch.rand(2, 5) > 0.4 if form in ("last", "first") else None
    quantized, indices, _ = vq(torch.randn(shape), mask=mask)
    torch.testing.assert_close(vq.get_output_from_indices(indices), quantized)


def test_lens_is_a_mask_also_with_channels_first():
    # VectorQuantize takes the channels for the length when channels come first
    vq = FastVQ(8, 20, channel_last=False).eval()
    x, lens = torch.randn(3, 8, 5), torch.tensor([5, 0, 2])
    mask = torch.arange(5) < lens[:, None]
    for actual, expected in zip(vq(x, lens=lens), vq(x, mask=mask), strict=True):
        assert torch.equal(actual, expected)


def test_codebook_can_be_assigned():
    for options in ({}, {"heads": 2, "separate_codebook_per_head": True}, {"orthogonal_reg_weight": 1.0}):
        vq = FastVQ(8, 4, **options)
        codes = torch.randn_like(vq.codebook)
        vq.codebook = codes
        assert torch.equal(vq.codebook, codes)
        assert vq._codebook.embed.requires_grad == ("orthogonal_reg_weight" in options)


# -- what it promises beyond the peer; each test names the defect of VectorQuantize 1.32.0 that it guards against


def test_loss_is_never_a_buffer_and_may_be_added_to():
    """VectorQuantize returns its buffer `zero` as the loss in eval, so `loss += y` shows in the next call."""
    vq = FastVQ(8, 4)
    for module in (vq.eval(), FastVQ(8, 4, commitment_weight=0.0)):
        x = torch.randn(2, 3, 8, requires_grad=True)
        for part in (0, 1):
            loss = module(x)[2] if part == 0 else module(x, return_loss_breakdown=True)[3].commitment
            loss += 5.0
        assert module(x)[2].item() == 0
        assert module(x)[2].requires_grad == module.training
    vq.train()(x)
    assert not vq.eval()(x)[2].requires_grad


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("codebook_dim", [8, 4])
@pytest.mark.parametrize("heads,separate", [(1, False), (2, False), (2, True)])
def test_masked_step_is_the_step_on_the_rows_that_are_kept(heads, separate, codebook_dim, cosine):
    """VectorQuantize raises for mask with projections or heads, and compares normalised codes with raw input."""
    masked = FastVQ(
        8, 20, codebook_dim, heads=heads, separate_codebook_per_head=separate, use_cosine_sim=cosine, decay=0.5
    )
    plain = copy.deepcopy(masked)
    mask = torch.rand(3, 7) > 0.4
    x = torch.randn(3, 7, 8).masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()  # padding is never read
    kept = x.detach()[mask].unsqueeze(0).requires_grad_()
    quantized, indices, loss = masked(x, mask=mask)
    expected, expected_indices, expected_loss = plain(kept)
    assert torch.equal(indices[mask], expected_indices[0])
    assert (indices[~mask] == -1).all() and not quantized[~mask].any()
    torch.testing.assert_close((quantized[mask], loss), (expected[0], expected_loss))
    torch.testing.assert_close(state(masked), state(plain))
    (quantized.square().sum() + loss).backward()
    (expected.square().sum() + expected_loss).backward()
    torch.testing.assert_close(x.grad[mask], kept.grad[0])
    assert not x.grad[~mask].any()
    torch.testing.assert_close([p.grad for p in masked.parameters()], [p.grad for p in plain.parameters()])


def test_mask_without_a_single_row_gives_loss_zero():
    vq = FastVQ(8, 4, threshold_ema_dead_code=2)
    _, indices, loss = vq(torch.randn(2, 3, 8), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert loss.item() == 0 and (indices == -1).all()
    assert all(v.isfinite().all() for v in vq.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_stay_float32_when_the_module_is_cast(dtype):
    """VectorQuantize.bfloat16() averages with an 8-bit mantissa."""
    vq = FastVQ(8, 4, codebook_dim=4)
    before = state(vq)
    vq.to(dtype)
    for name in ("embed", "embed_avg", "cluster_size"):
        assert torch.equal(vq.state_dict()[f"_codebook.{name}"], before[f"_codebook.{name}"])
        assert vq.state_dict()[f"_codebook.{name}"].dtype == torch.float32
    quantized, indices, loss = vq(torch.randn(2, 3, 8).to(dtype))
    assert quantized.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert vq.get_codes_from_indices(indices).dtype == vq.get_output_from_indices(indices).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"stochastic_sample_codes": True},
        {"commitment_use_cross_entropy_loss": True},
        {"codebook_diversity_loss_weight": 1.0},
        {"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False},
        {"affine_param": True},
        {"directional_reparam": True, "threshold_ema_dead_code": 1.0},
        {"vq_bridge": torch.nn.Linear(8, 8)},
        {"in_place_codebook_optimizer": torch.optim.SGD, **LEARNABLE},
        {"sync_update_v": 0.5, **LEARNABLE},
        {"call": {"topk": 2}},
        {"call": {"indices": torch.zeros(2, 3, dtype=torch.int64)}},
        {"call": {"codebook_transform_fn": lambda codes: codes[:, None, None].expand(-1, 2, 3, -1, -1)}},
    ],
)
def test_types_of_results(options, dtype):
    options = dict(options)
    call = options.pop("call", {})
    vq, x = FastVQ(8, 20, **options), torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    quantized, *_, loss = vq(x, **call)
    assert quantized.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (quantized.sum() + loss.sum()).backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    assert vq._codebook.embed.dtype == vq._codebook.embed_avg.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 2.0}, {"kmeans_init": True}])
def test_bad_rows_never_reach_the_codebook(options, bad):
    """One NaN in the input of VectorQuantize makes its codebook NaN."""
    vq, x = FastVQ(8, 10, **options), torch.randn(4, 10, 8)
    x[1, 3, 2] = x[2, 5, 0] = bad
    for _ in range(3):
        _, indices, _ = vq(x)
        assert indices.min() >= 0 and indices.max() < 10
    assert all(v.isfinite().all() for v in vq.state_dict().values())


def test_all_rows_bad():
    vq, x = FastVQ(8, 10, kmeans_init=True, threshold_ema_dead_code=2), torch.full((2, 3, 8), float("nan"))
    vq(x)
    assert not vq._codebook.initted  # k-means waits for rows
    assert all(v.isfinite().all() for v in vq.state_dict().values())
    vq(torch.randn(2, 30, 8))
    assert vq._codebook.initted


def test_indices_do_not_depend_on_the_rest_of_the_batch():
    vq = FastVQ(8, 300).eval()
    x = torch.randn(1, 200, 8)
    indices = vq(x)[1]
    assert torch.equal(torch.cat([vq(part)[1] for part in x.split(7, 1)], 1), indices)
    padded = torch.cat((torch.randn(1, 50, 8), x), 1)
    mask = torch.arange(250)[None] >= 50
    assert torch.equal(vq(padded, mask=mask)[1][:, 50:], indices)


def test_indices_are_nearest_by_float64_distance():
    """The float32 distances of VectorQuantize take the second nearest code at near ties."""
    vq = FastVQ(8, 300).eval()
    codes = vq.codebook.double()
    x = torch.cat((torch.randn(300, 8), (vq.codebook + vq.codebook.roll(1, 0)) / 2))  # midpoints nearly tie
    assert torch.equal(vq(x)[1], (x.double()[:, None] - codes).square().sum(-1).argmin(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook_dim": 4},
        {"use_cosine_sim": True},
        {"stochastic_sample_codes": True},
        {"commitment_use_cross_entropy_loss": True, "codebook_diversity_loss_weight": 1.0},
        {"affine_param": True},
        {"vq_bridge": torch.nn.Linear(8, 8)},
        {"call": {"topk": 3}},
    ],
)
def test_autocast_changes_nothing(options, training, dtype):
    options = dict(options)
    call = options.pop("call", {})
    plain = FastVQ(8, 200, **options).train(training)
    cast = copy.deepcopy(plain)
    x = torch.randn(4, 50, 8)
    torch.manual_seed(0)
    expected = plain(x, **call)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        actual = cast(x, **call)
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[2], expected[2])
    assert actual[0].dtype == x.dtype
    torch.testing.assert_close(state(cast), state(plain), rtol=0, atol=0)


def test_indices_that_mark_padding_do_not_count_as_code_zero():
    """VectorQuantize.update_indices counts -1 as a use of code 0."""
    vq = FastVQ(8, 4, decay=0.0)
    vq.update_indices(torch.randn(1, 3, 8), torch.tensor([[-1, 2, -1]]))
    assert vq._codebook.cluster_size.tolist() == [[0, 0, 1, 0]]


# -- strict_upstream: each choice, and what it is without


def pair(**options):
    """The same module by default and strict."""
    torch.manual_seed(0)
    default = FastVQ(8, 20, **copy.deepcopy(options))
    torch.manual_seed(0)
    return default, FastVQ(8, 20, **copy.deepcopy(options), strict_upstream=True)


def test_unused_codes_stay_where_they_are_or_shrink_to_the_origin():
    default, strict = pair()
    x = torch.randn(1, 200, 8) + 20
    apart = None
    for step in range(120):
        default(x), strict(x)
        if step == 20:  # until codes are held, the two are one
            torch.testing.assert_close(state(default), state(strict), rtol=0, atol=0)
        if step == 60:
            apart = default.codebook.clone()
    used = default(x)[1].unique()
    unused = [k for k in range(20) if k not in used]
    assert unused and torch.equal(used, strict(x)[1].unique())
    assert strict.codebook[unused].norm(dim=-1).max() < 1e-4
    torch.testing.assert_close(default.codebook[unused], apart[unused], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(default.codebook[used], strict.codebook[used], rtol=1e-3, atol=1e-3)


def test_masked_cosine_loss_compares_directions_or_lengths():
    default, strict = pair(use_cosine_sim=True, freeze_codebook=True)
    x = 3 * torch.randn(2, 5, 8)
    everything = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(default(x, mask=everything)[2], default(x)[2])
    codes = default.get_codes_from_indices(default(x)[1])
    torch.testing.assert_close(strict(x, mask=everything)[2], (x - codes).square().mean())
    torch.testing.assert_close(strict(x)[2], default(x)[2])


def test_with_indices_the_codes_have_the_form_of_the_input_or_of_the_codebook():
    default, strict = pair(codebook_dim=4, channel_last=False)
    default.eval(), strict.eval()
    x, indices = torch.randn(2, 8, 5), torch.randint(20, (2, 5))
    quantized, loss = default(x, indices=indices)
    torch.testing.assert_close(quantized, default(x)[0])
    raw, same_loss = strict(x, indices=indices)
    assert raw.shape == (2, 5, 4)
    torch.testing.assert_close((raw, same_loss), (default.get_codes_from_indices(default(x)[1]).mT, loss))


def test_cross_entropy_to_indices_leaves_out_what_is_masked():
    vq = FastVQ(8, 20, freeze_codebook=True)
    x, indices, mask = torch.randn(2, 5, 8), torch.randint(20, (2, 5)), torch.rand(2, 5) > 0.4
    expected = vq(x, indices=indices.masked_fill(~mask, -1))[1]
    torch.testing.assert_close(vq(x, indices=indices, mask=mask)[1], expected)
    assert vq(x, indices=torch.full((2, 5), -1))[1] == 0


@pytest.mark.parametrize("options", [{"affine_param": True}, {"vq_bridge": torch.nn.Linear(8, 8)}])
def test_codes_from_indices_are_the_codes_of_forward_or_those_stored(options):
    default, strict = pair(**options)
    x = torch.randn(2, 50, 8) * 2 + 5
    for vq in (default.eval(), strict.eval()):
        quantized, indices, _ = vq(x)
        of_forward = torch.allclose(vq.get_codes_from_indices(indices), quantized, atol=1e-5)
        assert of_forward == (vq is default)
    assert torch.equal(strict.get_codes_from_indices(indices), strict.codebook[indices])


# -- options of VectorQuantize that it fails on, served here


@pytest.mark.parametrize("form", ["image", "single_token"])
def test_cross_entropy_commitment_beyond_sequences(form):
    vq = FastVQ(8, 20, commitment_use_cross_entropy_loss=True, accept_image_fmap=form == "image", freeze_codebook=True)
    x = torch.randn((2, 8, 3, 4) if form == "image" else (6, 8))
    tokens = x.movedim(1, -1) if form == "image" else x
    distances = (tokens.unsqueeze(-2) - vq.codebook).norm(dim=-1)
    expected = -(-distances).log_softmax(-1).amax(-1).mean()
    torch.testing.assert_close(vq(x)[2], expected)
    torch.testing.assert_close(vq(x, indices=vq(x)[1])[1], expected)


def test_topk_of_a_gumbel_straight_through_module():
    vq = FastVQ(8, 20, straight_through=True, rotation_trick=False)
    quantized, indices, loss = vq(torch.randn(2, 5, 8), topk=3)
    assert quantized.shape == (2, 5, 3, 8) and indices.shape == loss.shape == (2, 5, 3)


def test_affine_codes_move_with_the_input_from_the_first_call_on_in_eval_too():
    """Before training VectorQuantize reads statistics of its codes that it has never written."""
    vq = FastVQ(8, 200, affine_param=True, affine_param_batch_decay=0.0).eval()
    x = torch.randn(1, 500, 8) * 3 + 40
    quantized = vq(x)[0]
    assert (quantized - x).square().mean() < 9 < (vq.codebook.mean() - 40).abs()
    assert vq._codebook.codebook_mean_needs_init  # a guess from the codes as they are, not a step of their average


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_never_reach_affine_statistics(bad):
    vq, x = FastVQ(8, 10, affine_param=True), torch.randn(4, 10, 8)
    x[1, 3, 2] = bad
    for _ in range(3):
        vq(x)
    assert all(v.isfinite().all() for v in vq.state_dict().values())


def test_ema_weight_zero_accumulation_and_manual_updates_work_together():
    vq = FastVQ(8, 10, manual_ema_update=True)
    plain = FastVQ(8, 10)
    plain.load_state_dict(vq.state_dict())
    x, y, before = torch.randn(1, 50, 8), torch.randn(1, 30, 8), vq.codebook.clone()
    vq(x, accum_ema_update=True), vq(y)
    assert torch.equal(vq.codebook, before)
    vq._codebook.update_ema()
    plain(torch.cat((x, y), 1))
    torch.testing.assert_close(state(vq), state(plain))


def test_cosine_codes_off_the_unit_sphere_are_compared_by_inner_product():
    vq = FastVQ(8, 200, use_cosine_sim=True, orthogonal_reg_weight=1.0).eval()
    with torch.no_grad():
        vq._codebook.embed *= 0.8 + 0.4 * torch.rand(1, 200, 1)
    x = torch.randn(3, 300, 8)
    products = torch.nn.functional.normalize(x, dim=-1, eps=1e-6).double() @ vq.codebook.double().mT
    indices = vq(x)[1]
    assert not torch.equal(indices, torch.cdist(x / x.norm(dim=-1, keepdim=True), vq.codebook).argmin(-1))
    chosen = products.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    assert (products.amax(-1) - chosen).max() < 1e-7


# -- health


def test_stats_count_what_a_pass_chose():
    vq = FastVQ(2, 4, heads=2, codebook_dim=1, separate_codebook_per_head=True, threshold_ema_dead_code=0.9, decay=0.5)
    vq._codebook.embed.copy_(torch.arange(4.0).view(1, 4, 1))
    x = torch.tensor([[[0.0, 3.0], [1.0, 3.0], [0.0, 3.0], [1.0, 3.0]]])
    vq(x)
    # head 0 chose codes 0 and 1 alike, head 1 code 3 alone; unchosen codes fell from 1 to 0.5
    # row 0 lies at 0 and 3 of the codes 0..3, on a code with the next one 1 away
    assert vq.stats() == pytest.approx((3 / 8, 1.5, 2.5, 1.0, 0.0))
    assert vq._codebook.health.perplexity.tolist() == pytest.approx([2.0, 1.0])
    before = vq.stats()
    vq.eval()(x + 1), vq.train()(x + 1, freeze_codebook=True)
    assert vq.stats() == pytest.approx(before)  # of training passes alone
    assert not any("health" in name for name in vq.state_dict())


def test_stats_count_rows_that_near_ties_make_slow():
    vq = FastVQ(32, 50)
    codes = torch.ones(50, 32)
    codes[torch.arange(1, 50), torch.arange(1, 50) % 32] = -1
    vq.codebook = codes
    vq(torch.zeros(2, 50, 32))  # as far from every code
    assert vq.stats().recheck_rate == 1 and vq.stats().margin == 0
    vq(10 * torch.randn(2, 500, 32))
    assert vq.stats().recheck_rate < 0.5 and vq.stats().margin > 0


@pytest.mark.parametrize("options", [{}, LEARNABLE, {"call": {"accum_ema_update": True}}, {"manual_ema_update": True}])
def test_stats_with_every_way_to_learn(options):
    options = dict(options)
    call = options.pop("call", {})
    vq, mask = FastVQ(8, 20, **options), torch.rand(2, 50) > 0.5
    _, indices, _ = vq(torch.randn(2, 50, 8), mask=mask, **call)
    share = indices[mask].bincount(minlength=20) / mask.sum()
    assert vq.stats().usage == pytest.approx(float((share > 0).float().mean()))
    assert vq.stats().perplexity == pytest.approx(float(torch.special.entr(share).sum().exp()))
    assert vq.bfloat16().stats().perplexity == pytest.approx(float(torch.special.entr(share).sum().exp()))


# -- import


def test_import_brings_in_neither_triton_nor_polars_nor_the_compiler():
    heavy = ("triton", "polars", "torch._dynamo", "vector_quantize_pytorch")
    code = f"import sys; from metarec_fast import FastVQ; sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "[]"


# -- precision of statistics, whatever made or loaded them

EXTRAS = {
    "plain": {},
    "affine": {"affine_param": True},
    "orthogonal": {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "dead_codes": {"threshold_ema_dead_code": 2, "codebook_dim": 4},
    "diversity": {"codebook_diversity_loss_weight": 1.0},
}


def _made_under(dtype, options):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return FastVQ(8, 20, **options)
    finally:
        torch.set_default_dtype(before)


def _assigned(dtype, options):
    vq, source = FastVQ(8, 20, **options), FastVQ(8, 20, **options)
    source(torch.randn(2, 9, 8))
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.state_dict().items()}
    vq.load_state_dict(state, assign=True)
    assert all(v.dtype in (dtype, torch.bool) for v in state.values())  # the caller's own stay
    return vq


@pytest.mark.parametrize("make", [_made_under, _assigned])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", EXTRAS)
def test_statistics_are_float32_whatever_made_or_loaded_them(name, dtype, make):
    vq = make(dtype, EXTRAS[name])
    for x in (torch.randn(2, 9, 8), torch.randn(2, 9, 8, dtype=dtype)):
        quantized, indices, loss = vq(x.requires_grad_())
        (quantized.sum() + loss).backward()
        assert quantized.dtype == x.grad.dtype == x.dtype
        assert vq.get_output_from_indices(indices).isfinite().all()
    tensors = {k: v.dtype for k, v in vq._codebook.state_dict().items() if v.is_floating_point()}
    assert set(tensors.values()) == {torch.float32}, tensors
    assert {b.dtype for b in vq._codebook.health.buffers()} == {torch.float32, torch.bool}


def test_a_module_without_storage_gets_it_by_loading_or_by_to_empty():
    trained = FastVQ(8, 20, codebook_dim=4)
    trained(torch.randn(2, 9, 8))
    x = torch.randn(2, 9, 8)
    for materialise in (lambda vq: vq, lambda vq: vq.to_empty(device="cpu")):
        with torch.device("meta"):
            vq = FastVQ(8, 20, codebook_dim=4)
        vq = materialise(vq)
        vq.load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)
        assert not any(b.is_meta for b in vq._codebook.buffers())
        assert vq.stats().usage == 0 and math.isnan(vq.stats().margin)
        torch.testing.assert_close(vq.eval()(x), trained.eval()(x), rtol=0, atol=0)
        vq.train()(x), trained.train()(x)
        assert vq.stats() == trained.stats()


# -- projections, indices and inputs of other kinds


class IntegerLinear(nn.Module):
    """What 8-bit layers look like: an integer weight and a scale, a floating bias."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().half())

    def forward(self, x):
        assert x.dtype == torch.float16
        return (nn.functional.linear(x.float(), self.weight * self.scale) + self.bias.float()).half()


def test_integer_projections_say_by_their_bias_what_to_compute_in():
    vq = FastVQ(16, 32, codebook_dim=8, layernorm_after_project_in=False).eval()
    x = torch.randn(2, 5, 16)
    expected = vq(x)
    vq.project_in, vq.project_out = IntegerLinear(vq.project_in), IntegerLinear(vq.project_out)
    quantized, indices, _ = vq(x)
    assert quantized.dtype == torch.float32 and (indices == expected[1]).float().mean() > 0.7
    torch.testing.assert_close(vq.get_output_from_indices(indices), quantized, check_dtype=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build",
    [
        lambda: FastVQ(16, 32, codebook_dim=8, layernorm_after_project_in=True),
        lambda: FastResidualVQ(dim=16, codebook_size=32, num_quantizers=2, codebook_dim=8),
        lambda: FastResidualVQ(dim=16, codebook_size=32, num_quantizers=2, implicit_neural_codebook=True),
    ],
)
def test_projections_with_dynamic_int8_weights(build):
    vq, x = build().eval(), torch.randn(2, 5, 16)
    fast = torch.ao.quantization.quantize_dynamic(copy.deepcopy(vq), {nn.Linear})
    assert any("quantized" in type(m).__module__ for m in fast.modules())
    quantized, indices = fast(x)[:2]
    assert (indices[..., 0] == vq(x)[1][..., 0]).float().mean() > 0.6
    torch.testing.assert_close(fast.get_output_from_indices(indices), quantized, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_indices_of_any_integer_dtype(dtype):
    vq, x = FastVQ(8, 200, heads=2, separate_codebook_per_head=True, codebook_dim=4), torch.randn(2, 9, 8)
    vq.eval()
    indices = vq(x)[1]
    small = indices.to(dtype)
    assert torch.equal(vq.get_codes_from_indices(small), vq.get_codes_from_indices(indices))
    assert torch.equal(vq.get_output_from_indices(small), vq.get_output_from_indices(indices))
    assert torch.equal(vq(x, indices=small)[1], vq(x, indices=indices)[1])
    other = copy.deepcopy(vq)
    vq.train().update_indices(x, small), other.train().update_indices(x, indices)
    assert torch.equal(vq.codebook, other.codebook)
    for module in (vq, FastResidualVQ(dim=8, codebook_size=200, num_quantizers=2)):
        with pytest.raises(ValueError, match=r"at least -1, got -56: is torch.int8 too small"):
            module.get_output_from_indices(torch.full((2, 9, 2), 200).to(torch.int8))
        with pytest.raises(ValueError, match=r"at least -1, got -2$"):
            module.get_codes_from_indices(torch.full((2, 9, 2), -2))
        with pytest.raises(TypeError, match=r"indices must be a torch.Tensor, got list: pass torch.as_tensor"):
            module.get_codes_from_indices([1, 2])


def test_what_is_no_tensor_gets_an_error_with_advice():
    x = np.zeros((2, 3, 8), np.float32)
    for module in (
        FastVQ(8, 4),
        FastResidualVQ(dim=8, codebook_size=4, num_quantizers=2),
        FastGroupedResidualVQ(dim=8, codebook_size=4, num_quantizers=2, groups=2),
    ):
        with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got numpy.ndarray: pass torch.from_numpy\(x\)"):
            module(x)
        with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list: pass torch.as_tensor\(x\)"):
            module(x.tolist())
    with pytest.raises(TypeError, match=r"mask must be a torch.Tensor, got numpy.ndarray"):
        FastVQ(8, 4)(torch.from_numpy(x), mask=np.ones((2, 3), bool))
    with pytest.raises(TypeError, match=r"lens must be a torch.Tensor, got list"):
        FastVQ(8, 4)(torch.from_numpy(x), lens=[1, 2])
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got numpy.ndarray: pass torch.from_numpy\(x\)"):
        quantize(x[0], torch.ones(4, 8))
    with pytest.raises(TypeError, match=r"codebook must be a torch.Tensor, got numpy.ndarray"):
        FastVQ(8, 4).codebook = np.ones((4, 8), np.float32)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FastVQ(8, 16, orthogonal_reg_weight=0.1),
        lambda: FastVQ(8, 16, use_cosine_sim=True, orthogonal_reg_weight=0.1, orthogonal_reg_active_codes_only=True),
        lambda: FastVQ(8, 16, **LEARNABLE, codebook_weight=0.5, threshold_ema_dead_code=5),
        lambda: partial(
            FastVQ(8, 16),
            codebook_transform_fn=lambda c: (c @ torch.ones(8, 8, requires_grad=True))[:, None, None].expand(
                1, 1, 20, 16, 8
            ),
        ),
        lambda: FastResidualVQ(
            dim=8, codebook_size=16, num_quantizers=2, implicit_neural_codebook=True, threshold_ema_dead_code=5
        ),
    ],
)
def test_backward_comes_after_the_codes_have_moved_on(build):
    vq, x = build(), torch.randn(1, 20, 8, requires_grad=True)
    total = 0
    for _ in range(2):
        quantized, _, loss = vq(x)
        total = total + quantized.square().sum() + loss.sum()
    total.backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_verify_takes_what_a_module_took_and_gave():
    vq, x = FastVQ(8, 20).eval(), torch.randn(3, 9, 8)
    indices = vq(x)[1]
    assert verify(x, vq.codebook, indices).checked == 27 and verify(x, vq.codebook, indices.to(torch.int16))
    wrong = indices.clone()
    wrong[2, 4] = (wrong[2, 4] + 1) % 20
    found = verify(x, vq.codebook, wrong)
    assert found.rows.tolist() == [[2, 4]] and found.expected.tolist() == [indices[2, 4]]
    with pytest.raises(ValueError, match=r"indices must be \[3, 9\] to match x, got \(9, 3\)"):
        verify(x, vq.codebook, indices.mT)


# -- rows that are not finite


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda **o: FastVQ(8, 20, **o),
        lambda **o: FastVQ(8, 20, heads=2, codebook_dim=3, **o),
        lambda **o: FastVQ(8, 20, stochastic_sample_codes=True, freeze_codebook=True, **o),
        lambda **o: FastResidualVQ(dim=8, codebook_size=20, num_quantizers=2, codebook_dim=4, **o),
        lambda **o: FastResidualVQ(dim=8, codebook_size=20, num_quantizers=2, beam_size=2, **o),
    ],
)
def test_rows_that_are_not_finite_have_index_0_or_count_as_masked(build, training):
    x = torch.randn(2, 9, 8)
    x[0, 3, 5], x[1, 0, 0] = torch.nan, torch.inf
    mask = x.isfinite().all(-1)
    assert FastVQ(8, 20).eval()(x)[1][0, 3] == 0
    given = build().eval()(x)[1]
    assert given.min() >= 0 and given.max() < 20
    torch.manual_seed(0)
    masking = build(mask_nonfinite=True).train(training)
    plain = copy.deepcopy(masking)
    for module in (plain, *plain.modules()):
        if hasattr(module, "mask_nonfinite"):
            module.mask_nonfinite = False
    results = []
    for module, given in ((masking, None), (plain, mask)):
        torch.manual_seed(1)
        results.append(module(x, mask=given))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    quantized, indices, loss = results[0]
    assert (indices[~mask] == -1).all() and (indices[mask] >= 0).all()
    assert not quantized[~mask].any() and quantized.isfinite().all() and loss.isfinite().all()
    torch.testing.assert_close(state(masking), state(plain), rtol=0, atol=0)


def test_pixels_that_are_not_finite():
    vq, x = FastVQ(8, 20, accept_image_fmap=True, mask_nonfinite=True), torch.randn(2, 8, 3, 4)
    x[1, 2, 0, 3] = -torch.inf
    quantized, indices, loss = vq(x)
    assert indices[1, 0, 3] == -1 and (indices >= 0).sum() == 23
    assert not quantized[1, :, 0, 3].any() and loss.isfinite()
