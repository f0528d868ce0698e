"""Which arguments of FastVQ go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError for constructor arguments out of range or at odds; ``given`` has defaults resolved."""
    _check_ranges(given)
    routes = [name for name in ("straight_through", "rotation_trick", "directional_reparam") if given[name]]
    if len(routes) > 1:
        hint = "; pass rotation_trick=False as well" if "rotation_trick" in routes else ""
        raise ValueError(f"{' and '.join(routes)} exclude each other{hint}")
    if given["directional_reparam"] and not given["threshold_ema_dead_code"]:
        raise ValueError("directional_reparam=True needs threshold_ema_dead_code above 0: unused codes get no gradient")
    if given["learnable_codebook"]:
        for name, why in (
            ("use_cosine_sim", ""),
            ("straight_through", ""),
            ("ema_update", ": one of the two moves the codes"),
        ):
            if given[name]:
                raise ValueError(f"learnable_codebook=True needs {name}=False{why}")
    elif given["vq_bridge"] is not None:
        raise ValueError("vq_bridge needs learnable_codebook=True, got False")
    elif given["sync_update_v"] > 0:
        raise ValueError(f"sync_update_v={given['sync_update_v']} needs learnable_codebook=True and ema_update=False")
    elif given["in_place_codebook_optimizer"] is not None and not given["orthogonal_reg_weight"]:
        raise ValueError("in_place_codebook_optimizer needs learnable_codebook=True and ema_update=False")
    if given["codebook_weight"] is not None:
        if given["codebook_weight"] < 0:
            raise ValueError(f"codebook_weight must not be negative, got {given['codebook_weight']}")
        if not given["learnable_codebook"]:
            raise ValueError("codebook_weight needs learnable_codebook=True and ema_update=False")
        if given["commitment_use_cross_entropy_loss"]:
            raise ValueError("codebook_weight needs commitment_use_cross_entropy_loss=False")
    if given["affine_param"] and given["use_cosine_sim"]:
        raise ValueError("affine_param=True needs use_cosine_sim=False")
    if given["accept_image_fmap"] and given["accept_3d_fmap"]:
        raise ValueError("accept_image_fmap and accept_3d_fmap exclude each other")
    if given["orthogonal_reg_active_codes_only"] and given["separate_codebook_per_head"] and given["heads"] > 1:
        raise ValueError("orthogonal_reg_active_codes_only=True needs separate_codebook_per_head=False")


def _check_ranges(given: Mapping[str, Any]) -> None:
    for name in ("dim", "codebook_size", "codebook_dim", "heads", "kmeans_iters"):
        if given[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {given[name]}")
    for name in ("decay", "affine_param_batch_decay", "affine_param_codebook_decay", "sync_update_v"):
        if not 0 <= given[name] <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {given[name]}")
    for name in (
        "eps",
        "threshold_ema_dead_code",
        "commitment_weight",
        "orthogonal_reg_weight",
        "codebook_diversity_loss_weight",
        "directional_reparam_variance",
    ):
        if given[name] < 0:
            raise ValueError(f"{name} must not be negative, got {given[name]}")
