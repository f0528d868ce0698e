"""Fast modules that go on from the state of others: same tensors, same projections, same settings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metarec_fast.vq.fast_vq import FastVQ
from metarec_fast.vq.parts.codebook import Codebook
from metarec_fast.vq.parts.implicit_codebook import ImplicitCodebook
from metarec_fast.vq.parts.layout import Layout
from metarec_fast.vq.residual_vq import FastGroupedResidualVQ, FastResidualVQ

# what a VectorQuantize does that was written before it had the attribute
_LAYER_DEFAULTS = {
    "separate_codebook_per_head": False,
    "eps": 1e-5,
    "freeze_codebook": False,
    "channel_last": True,
    "accept_image_fmap": False,
    "accept_3d_fmap": False,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "rotation_trick": False,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "learnable_codebook": False,
    "manual_in_place_optimizer_update": False,
    "sync_update_v": 0.0,
    "return_zeros_for_masked_padding": True,
    "route_gradients_to_input": True,
}
_CODEBOOK_DEFAULTS = {
    "decay": 0.8,
    "kmeans_iters": 10,
    "threshold_ema_dead_code": 0,
    "ema_update": True,
    "manual_ema_update": False,
    "vq_bridge": None,
    "affine_param": False,
}


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """The arguments of FastVQ that do what ``layer`` does. Raises ValueError if there are none."""
    old = layer._codebook
    sampling = getattr(getattr(old, "gumbel_sample", None), "keywords", {})
    temperature = getattr(old, "sample_codebook_temp", 1.0)
    if sampling.get("reinmax"):
        raise ValueError("reinmax=True is not served")
    settings = {name: getattr(layer, name, default) for name, default in _LAYER_DEFAULTS.items()}
    settings |= {name: getattr(old, name, default) for name, default in _CODEBOOK_DEFAULTS.items()}
    # before 1.6 a layer drew codes wherever its temperature was above 0
    stochastic = sampling.get("stochastic", not sampling and temperature > 0)
    if old.embed.dim() == 2:
        raise ValueError("its codebook has no dimension of heads, as before 0.10")
    if settings["affine_param"]:
        names = ("affine_param_batch_decay", "affine_param_codebook_decay", "sync_affine_param")
        settings |= {name: getattr(old, name) for name in names}
    optimizer = getattr(layer, "in_place_codebook_optimizer", None)
    return settings | {
        "dim": getattr(layer, "dim", None) or _width(layer),
        "codebook_size": layer.codebook_size,
        "codebook_dim": old.embed.shape[-1],
        "heads": layer.heads,
        "commitment_weight": float(layer.commitment_weight),
        "use_cosine_sim": _compares_directions(layer),
        "layernorm_after_project_in": isinstance(layer.project_in, nn.Sequential),
        "kmeans_init": not old.initted.is_meta and not bool(old.initted),
        "sample_codebook_temp": temperature,
        "stochastic_sample_codes": stochastic,
        "straight_through": sampling.get("straight_through", False),
        "in_place_codebook_optimizer": None if optimizer is None else lambda parameters: optimizer,
    }


def _compares_directions(layer: nn.Module) -> bool:
    for module in (layer, layer._codebook):
        if hasattr(module, "use_cosine_sim"):
            return bool(module.use_cosine_sim)
    return "Cosine" in type(layer._codebook).__name__


def _projects(layer: nn.Module) -> bool:
    return not isinstance(layer.project_in, nn.Identity)


def _width(layer: nn.Module) -> int:
    if _projects(layer):
        first = layer.project_in[0] if isinstance(layer.project_in, nn.Sequential) else layer.project_in
        return first.in_features
    return layer._codebook.embed.shape[-1] * layer.heads


def loss_has_axis(layer: nn.Module) -> bool:
    """Whether ``layer`` is of a version (before 1.27) whose losses have shape [1]."""
    return layer._codebook.initted.dim() == 1


def converted(layer: nn.Module, codebooks: dict[nn.Module, Codebook], overrides: dict[str, Any]) -> FastVQ:
    """A FastVQ with the settings, projections and tensors of ``layer``. codebooks: those converted before, by old one.

    Raises ValueError for settings that FastVQ does not have.
    """
    old = layer._codebook
    with torch.random.fork_rng(devices=()):  # the initial weights are thrown away
        fast = FastVQ(**settings_of(layer) | overrides).to(old.embed.device)
    dtype = old.cluster_size.dtype
    fast.project_in, fast.project_out = layer.project_in, layer.project_out
    if _projects(layer):
        weight = getattr(layer.project_out, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            dtype = weight.dtype
    fast._module_dtype = fast._module_dtype.to(dtype)
    if old not in codebooks:
        _take_tensors(fast._codebook, old)
        codebooks[old] = fast._codebook
    fast._codebook = codebooks[old]
    return fast


@torch.no_grad()
def _take_tensors(new: Codebook, old: nn.Module) -> None:
    """Parameters stay the same objects, buffers too unless they are not float32."""
    embed = old.embed
    embed_avg = getattr(old, "embed_avg", None)
    if embed_avg is None:  # cosine codebooks before 1.6 average the codes themselves
        embed_avg = embed * old.cluster_size.unsqueeze(-1)
    tensors = {"embed": embed, "embed_avg": embed_avg, "cluster_size": old.cluster_size}
    for name in ("codebook_mean", "codebook_variance", "batch_mean", "batch_variance"):
        if name in new._buffers and getattr(old, name) is not None:  # before its first call it has no batch_*
            tensors[name] = getattr(old, name)
            if name + "_needs_init" in new._buffers:
                new._buffers[name + "_needs_init"] = _flag(getattr(old, name + "_needs_init"))
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            if tensor.dtype != torch.float32:
                grad, tensor.grad = tensor.grad, None
                tensor.data = tensor.data.float()
                tensor.grad = None if grad is None else grad.float()
            new._buffers.pop(name, None)
            new._parameters[name] = tensor
        else:
            other = tensor is not None and tensor.dtype != torch.float32
            new._parameters.pop(name, None)
            new._buffers[name] = tensor.float() if other else tensor
    new._buffers["initted"] = _flag(old.initted)
    new.training = old.training


def _flag(flag: Tensor) -> Tensor:
    return flag.bool().reshape(())  # float32 [1] before 1.27


def converted_residual(residual: nn.Module, layers: list[FastVQ]) -> FastResidualVQ:
    """A FastResidualVQ of these ``layers``, which stand for those of ``residual``, with its settings and projections.

    Raises ValueError if its levels differ in more than their size, or project for themselves.
    """
    first, olds = layers[0], list(residual.layers)
    if any(layer.has_projections for layer in layers):
        raise ValueError("each level has projections of its own, as before 1.9")
    if any(_common(old) != _common(olds[0]) for old in olds):
        raise ValueError("its levels differ in their settings")
    L, width = len(layers), first.dim
    projects = not isinstance(getattr(residual, "project_in", nn.Identity()), nn.Identity)
    sizes = tuple(layer.codebook_size for layer in layers)
    shared = len({id(old._codebook) for old in olds}) == 1 and L > 1
    if shared and not first._codebook.manual_ema_update:
        raise ValueError("its shared codebook moves at every level, as before 1.18")
    weights = getattr(residual, "beam_score_weights", None)
    mlps = getattr(residual, "mlps", None)
    mlps = mlps if isinstance(mlps, nn.ModuleList) else None
    fast = FastResidualVQ(
        dim=residual.project_in.in_features if projects else width,
        codebook_dim=width,
        num_quantizers=L,
        codebook_size=1,  # levels are exchanged below
        quantize_dropout=bool(residual.quantize_dropout),
        quantize_dropout_cutoff_index=getattr(residual, "quantize_dropout_cutoff_index", 0),
        quantize_dropout_multiple_of=getattr(residual, "quantize_dropout_multiple_of", 1),
        accept_image_fmap=olds[0].accept_image_fmap if hasattr(olds[0], "accept_image_fmap") else False,
        beam_size=getattr(residual, "beam_size", None),
        eval_beam_size=getattr(residual, "eval_beam_size", None) if getattr(residual, "beam_size", None) else None,
        beam_score_quantizer_weights=None if weights is None or weights.is_meta else weights.tolist(),
        quant_grad_frac=getattr(residual, "quant_grad_frac", 0.0),
        return_zeros_for_masked_padding=first.return_zeros_for_masked_padding,
        channel_last=getattr(olds[0], "channel_last", True),
        accept_3d_fmap=getattr(olds[0], "accept_3d_fmap", False),
    )
    plain = Layout(width, heads=1, separate=False, channel_last=True, image=False, volume=False)
    for layer in layers:
        layer._layout = plain
        layer.channel_last, layer.accept_image_fmap, layer.accept_3d_fmap = True, False, False
    fast.codebook_sizes, fast.uniform_codebook_size = sizes, len(set(sizes)) == 1
    fast.diveq, fast.shared_codebook = getattr(residual, "diveq", False), shared
    fast.layers = residual.layers
    for name in ("project_in", "project_out"):
        setattr(fast, name, getattr(residual, name, nn.Identity()))
    fast.implicit_neural_codebook = mlps is not None
    if mlps is not None:
        fast.mlps = mlps
    return fast


def converted_mlp(mlp: nn.Module) -> ImplicitCodebook:
    """An ImplicitCodebook with the layers of an ``MLP`` of vector_quantize_pytorch."""
    fast = ImplicitCodebook(1, depth=0, l2norm_output=getattr(mlp, "l2norm_output", False))
    fast.proj_in, fast.layers = mlp.proj_in, mlp.layers
    return fast


def converted_grouped(grouped: nn.Module) -> FastGroupedResidualVQ:
    """A FastGroupedResidualVQ of the same residual quantizers."""
    fast = FastGroupedResidualVQ(dim=1, groups=1, num_quantizers=1, codebook_size=1)
    fast.dim, fast.groups = grouped.dim, grouped.groups
    fast.accept_image_fmap = getattr(grouped, "accept_image_fmap", False)
    fast.rvqs = grouped.rvqs
    return fast


def _common(layer: nn.Module) -> dict[str, Any]:
    own = ("codebook_size", "in_place_codebook_optimizer", "vq_bridge", "kmeans_init")
    settings = {name: value for name, value in settings_of(layer).items() if name not in own}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in settings.items()}
