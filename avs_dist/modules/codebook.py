"""The codebook that modalities share: assignment, straight-through codes, commitment, moving average, reset.

Uni-Code (Cross-Modal Generalization, section 4.3). One step, everywhere with the codes as they were before the update:

    e_m = nearest code of z_m          quantised_m = e_m, with the gradient of z_m
    commitment_m = beta |z_m - sg e_m|^2 / D + beta c mean over the others o of |z_m - sg e_o|^2 / D        (eq. 8)
    r_m = mean over the others of what they say at a token (`teacher`); the codes move towards (z_m + r_m) / 2 (eq. 7)

The numbers of the update are float32 and outside of autograd and autocast. Nothing waits for the device. Like the
kernels, this file needs torch, triton and numpy only: the benchmark runs it on a bare host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from avs_dist.kernels import runtime
from avs_dist.kernels.codebook import (
    RULES,
    CodebookState,
    Observed,
    codebook_apply,
    codebook_assign,
    codebook_sums,
    initial_state,
)
from avs_dist.modules.codebook_average import TEACHERS, Teacher, reset_order, sequential_sums, teachers
from avs_dist.modules.full_precision import Float32Buffers

Update = Literal["joint", "sequential"]
UPDATES: tuple[Update, ...] = ("joint", "sequential")


class CodebookOutput(NamedTuple):
    """Of each modality that was given; B clips of T tokens."""

    quantised: dict[str, Tensor]  # [B,T,D] in the type of z; 0 where not valid
    indices: dict[str, Tensor]  # int64 [B,T]; -1 where not valid, or where the token is not finite
    commitment: dict[str, Tensor]  # float32 [B,T]; 0 where not valid, NaN where a token of that clip's t is not finite
    valid: dict[str, Tensor]  # bool [B,T]
    codes_LD: Tensor  # a copy of the codes that the tokens were compared with

    @property
    def commitment_loss(self) -> Tensor:
        """Mean over the valid tokens of each modality, 0 where there is none; summed over modalities."""
        means = [self.commitment[name].sum() / valid_BT.sum().clamp_min(1) for name, valid_BT in self.valid.items()]
        return torch.stack(means).sum()


class MultiModalCodebook(Float32Buffers):
    """Codes that learn by a moving average over the tokens of all modalities, not by gradient.

    In training every forward is one step of the average: it takes all modalities. In eval mode nothing moves and no
    rank waits for another; some of the modalities are enough.

    Buffers: codes [L,D], count [L], sum [L,D] (float32 whatever the model is cast to), idle [M,L] (int32: steps since
    each modality last chose each code) and updates (int64), so that a run continues from its state_dict bit for bit.

    Args:
        num_codes: L; the codes start uniform in [-1/L, 1/L] (public code), each with the weight of one token.
        dim: D.
        decay: of the moving average (gamma), above 0.
        modalities: names, in the order of a sequential update.
        update: "joint": one average over the tokens of all modalities (eq. 7); "sequential": one modality after the
            other, so that the later ones weigh more and the effective decay is decay^M (public code).
        teacher: what a token says to the others: "cross_attention": softmax(z_m z_o^T / sqrt(D)) z_o over the tokens of
            the clip (paper; without parameters, as no gradient reaches the average); "time_aligned": z_o of the same t
            (public code); "none". A token that no other modality accompanies stands alone.
        beta: weight of the commitment.
        cross_commitment: weight of the codes of the others in it, relative to the own (c).
        reset_after: steps after which an unused code becomes a clone of a used one (N_re); 0 = never.
        reset_rule: a code is in use while every modality chooses it ("all", paper), or while any does ("any", code).
        reduce: sums a float32 buffer over ranks; called once in each training step. None for one process.
        seed: of the first codes and of the order of the clones; the same on all ranks.

    Raises:
        ValueError: a setting that is not one of those above.
    """

    codes: Tensor
    count: Tensor
    sum: Tensor
    idle: Tensor
    updates: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        decay: float = 0.99,
        *,
        modalities: Sequence[str] = ("audio", "visual"),
        update: Update = "joint",
        teacher: Teacher = "cross_attention",
        beta: float = 0.25,
        cross_commitment: float = 0.5,
        reset_after: int = 300,
        reset_rule: Literal["all", "any"] = "all",
        reduce: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value, known in (("update", update, UPDATES), ("teacher", teacher, TEACHERS)):
            if value not in known:
                raise ValueError(f"codebook: {key} must be one of {', '.join(known)}, got '{value}'")
        if reset_rule not in RULES or reset_after < 0:
            raise ValueError(
                f"codebook: reset_rule must be one of {', '.join(RULES)} and reset_after at least 0, got "
                f"'{reset_rule}' and {reset_after}"
            )
        if not 0.0 < decay <= 1.0 or num_codes < 1 or dim < 1:
            raise ValueError(
                f"codebook: decay must be above 0 and at most 1, num_codes and dim at least 1, got {decay}, "
                f"{num_codes} and {dim}"
            )
        if not modalities or len(set(modalities)) < len(modalities):
            raise ValueError(f"codebook: modalities must be different names, got {list(modalities)}")
        self.decay, self.update, self.teacher = decay, update, teacher
        self.beta, self.cross_commitment = beta, cross_commitment
        self.reset_after, self.reset_rule = reset_after, reset_rule
        self.modalities, self.reduce, self.seed = tuple(modalities), reduce, seed
        generator = torch.Generator().manual_seed(seed)
        codes_LD = (2.0 * torch.rand(num_codes, dim, generator=generator) - 1.0) / num_codes
        state = initial_state(codes_LD, len(self.modalities))
        for name, buffer in zip(("codes", "count", "sum", "idle"), state, strict=True):
            self.register_buffer(name, buffer)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def state(self) -> CodebookState:
        """The buffers themselves, as the kernels take them."""
        return CodebookState(self.codes, self.count, self.sum, self.idle)

    def forward(self, z: Mapping[str, Tensor], valid: Mapping[str, Tensor] | None = None) -> CodebookOutput:
        """Quantise, and in training move the codes.

        Args:
            z: [B,T,D] of any floating type, the same B and T for all modalities; looked up in float32.
            valid: bool [B,T]; a modality that is not named is valid everywhere. What is not valid is not looked at.

        Raises:
            ValueError: modalities or shapes do not fit; in training, a modality is missing.
        """
        names = self._names(z, valid or {})
        valid_MBT = None if valid is None else _stacked_masks(z, valid, names)
        z_MBTD = torch.stack([z[name].float() for name in names])
        if valid_MBT is None:
            valid_MBT = z_MBTD.new_ones(z_MBTD.shape[:3], dtype=torch.bool)
        else:
            z_MBTD = torch.where(valid_MBT[..., None], z_MBTD, 0.0)
        with torch.no_grad(), runtime.no_autocast(z_MBTD):
            indices_MBT, chosen_MBTD, codes_LD = self._assign(z_MBTD.detach(), valid_MBT)
            if self.training:
                self._move(z_MBTD.detach(), indices_MBT)
        weights = (self.beta, self.cross_commitment)
        quantised_MBTD, commitment_MBT = _Quantise.apply(z_MBTD, chosen_MBTD, valid_MBT, *weights)
        return CodebookOutput(
            quantised={name: quantised_MBTD[m].to(z[name].dtype) for m, name in enumerate(names)},
            indices=dict(zip(names, indices_MBT, strict=True)),
            commitment=dict(zip(names, commitment_MBT, strict=True)),
            valid=dict(zip(names, valid_MBT, strict=True)),
            codes_LD=codes_LD,
        )

    def _names(self, z: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> list[str]:
        """The modalities given, in the order of `modalities`."""
        names = [name for name in self.modalities if name in z]
        unknown = sorted((set(z) | set(valid)) - set(names))
        if unknown or not names or (self.training and len(names) < len(self.modalities)):
            raise ValueError(
                f"codebook: expected tokens of {'all' if self.training else 'some'} of {list(self.modalities)}, got "
                f"{list(z)} with masks {list(valid)}"
            )
        first = z[names[0]]
        for name in names:
            shape, known = list(z[name].shape), list(valid[name].shape) if name in valid else None
            if z[name].shape != first.shape or first.ndim != 3 or shape[2] != self.codes.shape[1]:
                expected = [*first.shape[:2], self.codes.shape[1]]
                raise ValueError(f"codebook: z['{name}'] must be [B,T,D] = {expected}, got {shape}")
            if known is not None and known != shape[:2]:
                raise ValueError(f"codebook: valid['{name}'] must be [B,T] = {shape[:2]}, got {known}")
        return names

    def _assign(self, z_MBTD: Tensor, valid_MBT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, the codes they name (0 for a token that is not valid, NaN for one that is not finite), all codes."""
        num_codes = len(self.codes)
        found = codebook_assign(z_MBTD.flatten(0, 2), self.codes, valid_N=valid_MBT.flatten())
        indices_MBT = found.indices_N.view(valid_MBT.shape)
        table_LD = F.pad(self.codes, (0, 0, 0, 2))
        table_LD[num_codes + 1] = torch.nan
        row_MBT = torch.where(indices_MBT >= 0, indices_MBT, num_codes + valid_MBT.long())
        return indices_MBT, F.embedding(row_MBT, table_LD), table_LD[:num_codes]

    def _move(self, z_MBTD: Tensor, indices_MBT: Tensor) -> None:
        """One step of the average and of the reset, in place."""
        teachers_MBTD = None if self.teacher == "none" else teachers(z_MBTD, indices_MBT >= 0, self.teacher)
        observed = [
            Observed(
                z_MBTD[m].flatten(0, 1),
                None if teachers_MBTD is None else teachers_MBTD[m].flatten(0, 1),
                indices_MBT[m].flatten(),
            )
            for m in range(len(z_MBTD))
        ]
        num_codes, joint = len(self.codes), self.update == "joint"
        flat = codebook_sums(observed, num_codes) if joint else sequential_sums(observed, num_codes, self.decay)
        codebook_apply(
            self.state,
            flat if self.reduce is None else self.reduce(flat),
            decay=self.decay if joint else self.decay ** len(observed),
            reset_after=self.reset_after or None,
            permutation_L=reset_order(num_codes, self.seed, self.updates) if self.reset_after else None,
            reset_rule=self.reset_rule,
        )
        self.updates.add_(1)


class _Quantise(torch.autograd.Function):
    """The codes with the gradient of z, and eq. 8 of each token; one addition for both gradients."""

    @staticmethod
    def forward(
        ctx: Any, z_MBTD: Tensor, chosen_MBTD: Tensor, valid_MBT: Tensor, beta: float, cross: float
    ) -> tuple[Tensor, Tensor]:
        residual_MBTD = z_MBTD - chosen_MBTD
        square_MBT = _square(residual_MBTD)
        # the other modalities count where they are valid
        both = [valid_MBT & valid_MBT.roll(-shift, 0) for shift in range(1, len(z_MBTD))]
        for shift, both_MBT in enumerate(both, start=1):
            weight_MBT = cross * both_MBT / torch.stack(both).sum(0).clamp_min(1)
            apart_MBTD = z_MBTD - chosen_MBTD.roll(-shift, 0)
            square_MBT.addcmul_(weight_MBT, _square(apart_MBTD))
            residual_MBTD.addcmul_(weight_MBT[..., None], apart_MBTD)
        ctx.save_for_backward(residual_MBTD)
        ctx.scale = beta / z_MBTD.shape[3]
        return chosen_MBTD.view_as(chosen_MBTD), square_MBT.mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MBTD: Tensor, grad_MBT: Tensor) -> tuple[Tensor | None, ...]:
        (residual_MBTD,) = ctx.saved_tensors
        slope_MBTD = torch.addcmul(grad_MBTD, residual_MBTD, grad_MBT[..., None], value=2.0 * ctx.scale)
        return slope_MBTD, None, None, None, None


def _square(x_MBTD: Tensor) -> Tensor:
    """Squared length in one pass."""
    return torch.linalg.vector_norm(x_MBTD, dim=3).square_()


def _stacked_masks(z: Mapping[str, Tensor], valid: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    everywhere_BT = torch.ones_like(z[names[0]][..., 0], dtype=torch.bool)
    return torch.stack([valid.get(name, everywhere_BT) for name in names])
