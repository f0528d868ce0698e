"""FastVQ in the place of vector_quantize_pytorch.VectorQuantize, in models that exist."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from metarec_fast.vq.fast_vq import FastVQ


def replace_vector_quantize(model: nn.Module, **overrides: Any) -> nn.Module:
    """Swap every ``VectorQuantize`` of vector_quantize_pytorch inside ``model`` for a FastVQ that goes on from it.

    model: any module; ResidualVQ, GroupedResidualVQ, RandomProjectionQuantizer, HierarchicalVQ and models that hold
        them or VectorQuantize itself. Changed in place.
    overrides: arguments of FastVQ in place of what a layer was built with, such as strict_upstream=True.

    Settings, state, training mode, device and dtype are kept. Parameters stay the same objects, so that an optimizer
    made before goes on; codebooks that layers share stay shared. Only the class VectorQuantize is replaced, not
    classes derived from it, and hooks on the layers are not carried over. Ranks share statistics whenever
    torch.distributed is running, unless sync_codebook=False is given.

    Returns ``model``, or the FastVQ if the model is itself a VectorQuantize.
    Raises ValueError if there is no VectorQuantize inside, or if it is in a vector_quantize_pytorch.Sequential, which
    knows no other classes.

    >>> rvq = replace_vector_quantize(ResidualVQ(dim=64, num_quantizers=8, codebook_size=1024))
    """
    package = sys.modules.get("vector_quantize_pytorch.vector_quantize_pytorch")
    found = [] if package is None else [m for m in model.modules() if type(m) is package.VectorQuantize]
    if not found:
        raise ValueError(f"model holds no vector_quantize_pytorch.VectorQuantize, got {type(model).__name__}")
    sequential = getattr(sys.modules.get("vector_quantize_pytorch.utils"), "Sequential", ())
    if any(isinstance(m, sequential) and any(layer in found for layer in m.fns) for m in model.modules()):
        raise ValueError(
            "model holds a VectorQuantize in a vector_quantize_pytorch.Sequential, which tells quantizers by their "
            "class: put the parts into a module of your own"
        )
    codebooks: dict[nn.Module, nn.Module] = {}
    fast = {layer: _converted(layer, codebooks, overrides) for layer in found}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in fast:
                parent._modules[name] = fast[child]
    return fast.get(model, model)


def _converted(layer: nn.Module, codebooks: dict[nn.Module, nn.Module], overrides: dict[str, Any]) -> FastVQ:
    old = layer._codebook
    weight = layer.project_out.weight if layer.has_projections else old.cluster_size
    with torch.random.fork_rng(devices=()):  # the initial weights are thrown away
        fast = FastVQ(**_settings(layer) | overrides).to(weight.device, weight.dtype)
    state = {
        name: value.float()
        if name.startswith("_codebook.") and value.dtype in (torch.float16, torch.bfloat16)
        else value
        for name, value in layer.state_dict(keep_vars=True).items()
    }
    fast.load_state_dict(state, assign=True)
    fast._codebook = codebooks.setdefault(old, fast._codebook)
    return fast.train(layer.training)


def _settings(layer: nn.Module) -> dict[str, Any]:
    """The arguments that ``layer`` was built with, as far as they matter from now on."""
    old = layer._codebook
    sampling = old.gumbel_sample.keywords
    optimizer = layer.in_place_codebook_optimizer
    settings = {
        name: getattr(layer, name)
        for name in (
            "dim",
            "codebook_size",
            "heads",
            "separate_codebook_per_head",
            "eps",
            "freeze_codebook",
            "use_cosine_sim",
            "channel_last",
            "accept_image_fmap",
            "accept_3d_fmap",
            "commitment_weight",
            "commitment_use_cross_entropy_loss",
            "orthogonal_reg_weight",
            "orthogonal_reg_active_codes_only",
            "orthogonal_reg_max_codes",
            "codebook_diversity_loss_weight",
            "codebook_diversity_temperature",
            "rotation_trick",
            "directional_reparam",
            "directional_reparam_variance",
            "learnable_codebook",
            "manual_in_place_optimizer_update",
            "sync_update_v",
            "return_zeros_for_masked_padding",
            "route_gradients_to_input",
        )
    }
    settings |= {
        name: getattr(old, name)
        for name in (
            "decay",
            "kmeans_iters",
            "threshold_ema_dead_code",
            "sample_codebook_temp",
            "ema_update",
            "manual_ema_update",
            "vq_bridge",
            "affine_param",
        )
    }
    if old.affine_param:
        names = ("affine_param_batch_decay", "affine_param_codebook_decay", "sync_affine_param")
        settings |= {name: getattr(old, name) for name in names}
    return settings | {
        "codebook_dim": old.embed.shape[-1],
        "layernorm_after_project_in": isinstance(layer.project_in, nn.Sequential),
        "kmeans_init": not bool(old.initted),
        "stochastic_sample_codes": sampling["stochastic"],
        "straight_through": sampling["straight_through"],
        "in_place_codebook_optimizer": None if optimizer is None else lambda parameters: optimizer,
    }
