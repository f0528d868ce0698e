"""A codebook that is shifted and scaled to the mean and variance of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from metarec_fast.ops.portable_lookup import leaves_python
from metarec_fast.vq.parts.codebook import Codebook
from metarec_fast.vq.parts.sampling import sum_over_ranks

_LEAST_VARIANCE = 1e-5
_CODES, _BATCH = ("codebook_mean", "codebook_variance"), ("batch_mean", "batch_variance")


class AffineCodebook(Codebook):
    """Codes scaled and shifted from their own mean and variance to the input's, each per dimension.

    Keeps moving averages [H, 1, D] of both: of the codes in training, of the input at every call, as VectorQuantize
    does. ``batch_mean`` and ``batch_variance`` are NaN, and in no checkpoint, before the first call. A traced or
    exported program stores nothing: each of its calls starts from the averages at export. Source: arXiv 2305.08842,
    section 4.1.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        batch_decay: float = 0.99,
        codebook_decay: float = 0.9,
        sync_affine_param: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, codebook_size, **options)
        self.affine_param_batch_decay, self.affine_param_codebook_decay = batch_decay, codebook_decay
        self.sync_affine_param = sync_affine_param
        for name in _BATCH:
            not_yet = torch.full((self.num_codebooks, 1, dim), torch.nan, dtype=torch.float32)
            self.register_buffer(name, not_yet)
        for name in _CODES:
            self.register_buffer(f"{name}_needs_init", torch.tensor(True))
            self.register_buffer(name, torch.zeros(self.num_codebooks, 1, dim, dtype=torch.float32))

    @property
    def compares_other_codes(self) -> bool:
        return True

    def codes_for(self, rows: Tensor, keep: Tensor | None) -> Tensor:
        self._before_moving()
        averages = self._follow_codes() | self._follow_batch(rows.detach().float(), keep)
        return self._carry(super().codes_for(rows, keep), **averages)

    def codes_now(self) -> Tensor:
        codes, unseen = super().codes_now(), self.batch_mean.isnan()
        averages = {name: getattr(self, name) for name in _CODES}
        for of_batch, of_codes in zip(_BATCH, _CODES, strict=True):  # no NaN, not even in a gradient that is masked
            averages[of_batch] = torch.where(unseen, averages[of_codes], getattr(self, of_batch))
        return torch.where(unseen, codes, self._carry(codes, **averages))

    def rows_to_average(self, rows: Tensor) -> Tensor:
        moved = (rows - self.batch_mean) / _scale(self.batch_variance, self.codebook_variance) + self.codebook_mean
        return torch.where(self.batch_mean.isnan(), rows, moved)

    @staticmethod
    def _carry(
        codes: Tensor, codebook_mean: Tensor, codebook_variance: Tensor, batch_mean: Tensor, batch_variance: Tensor
    ) -> Tensor:
        # a copy: the average moves in place before backward
        return (codes - codebook_mean.clone()) * _scale(batch_variance, codebook_variance) + batch_mean

    @torch.no_grad()
    def _follow_codes(self) -> dict[str, Tensor]:
        embed, averages = self.embed.detach(), {}
        for name, now in zip(
            _CODES, (embed.mean(1, keepdim=True), embed.var(1, keepdim=True, correction=0)), strict=True
        ):
            average, first = getattr(self, name), getattr(self, f"{name}_needs_init")
            # before the first training step the averages are not initialised
            moved = now.lerp(average, self.affine_param_codebook_decay) if self.training else average
            averages[name] = torch.where(first, now, moved)
            if not leaves_python():
                average.copy_(averages[name])
            if self.training:
                first.fill_(False)
        return averages

    @torch.no_grad()
    def _follow_batch(self, rows: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        sync = self.sync_affine_param and self._syncs
        valid = self.valid_rows(rows, keep).unsqueeze(-1)
        rows = torch.where(valid, rows, 0)
        number = sum_over_ranks(valid.sum(1, keepdim=True).to(rows.dtype), sync=sync).clamp_min(1)
        mean = sum_over_ranks(rows.sum(1, keepdim=True), sync=sync) / number
        spread = torch.where(valid, rows - mean, 0).square().sum(1, keepdim=True)
        variance = sum_over_ranks(spread, sync=sync) / number
        averages = {}
        for name, now in zip(_BATCH, (mean, variance), strict=True):
            average = getattr(self, name)
            averages[name] = torch.where(average.isnan(), now, now.lerp(average, self.affine_param_batch_decay))
            if not leaves_python():
                average.copy_(averages[name])
        return averages

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _BATCH:  # VectorQuantize has no such tensors before its first call
            average = getattr(self, name)
            if not average.is_meta and not isinstance(average, FakeTensor) and bool(average.isnan().all()):
                del destination[prefix + name]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        for name in _BATCH:
            if prefix + name not in state_dict:
                setattr(self, name, torch.full_like(getattr(self, name), torch.nan, device=self.embed.device))
                if prefix + name in missing:
                    missing.remove(prefix + name)


def _scale(batch_variance: Tensor, codebook_variance: Tensor) -> Tensor:
    batch, codes = (v.clamp_min(_LEAST_VARIANCE).sqrt() for v in (batch_variance, codebook_variance))
    return batch / codes
