"""A small shared codebook, and its training step as loops over tokens and codes in float64: the truth of its tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from avs_dist.kernels import reference
from avs_dist.kernels.reference import CodebookState, Observed
from avs_dist.modules.codebook import MultiModalCodebook
from avs_dist.modules.codebook_average import reset_order

NAMES = ("audio", "visual", "text")
B, T, L, D = 3, 4, 13, 6
EPS, NOISE = 1e-5, 1 / 1024


class Step(NamedTuple):
    """Of each modality, in order; the state after the step."""

    quantised: list[Tensor]
    indices: list[Tensor]
    commitment: list[Tensor]
    state: CodebookState


class Settings(NamedTuple):
    decay: float = 0.99
    update: str = "joint"
    teacher: str = "cross_attention"
    beta: float = 0.25
    cross_commitment: float = 0.5
    reset_after: int = 0
    reset_rule: str = "all"
    seed: int = 0


def step(z: Sequence[Tensor], valid: Sequence[Tensor], state: CodebookState, updates: int, settings: Settings) -> Step:
    """z: float64 [B,T,D] of each modality, with gradient; state in float64 as well."""
    with torch.no_grad():
        indices = [nearest(z_BTD, valid_BT, state.codes_LD) for z_BTD, valid_BT in zip(z, valid, strict=True)]
    quantised, commitment = [], []
    for m, z_BTD in enumerate(z):
        quantised_BTD, commitment_BT = torch.zeros_like(z_BTD), torch.zeros_like(z_BTD[..., 0])
        for b, t in valid[m].nonzero().tolist():
            code_D = state.codes_LD[indices[m][b, t]]
            quantised_BTD[b, t] = z_BTD[b, t] + (code_D - z_BTD[b, t]).detach()
            others = [o for o in range(len(z)) if o != m and valid[o][b, t]]
            cross = sum(((z_BTD[b, t] - state.codes_LD[indices[o][b, t]]) ** 2).mean() for o in others)
            own = ((z_BTD[b, t] - code_D) ** 2).mean()
            commitment_BT[b, t] = settings.beta * (own + settings.cross_commitment * cross / max(len(others), 1))
        quantised.append(quantised_BTD)
        commitment.append(commitment_BT)
    with torch.no_grad():
        observed = [Observed(*one) for one in observe(z, valid, indices, settings.teacher)]
        return Step(quantised, indices, commitment, moved(state, observed, updates, settings))


def nearest(z_BTD: Tensor, valid_BT: Tensor, codes_LD: Tensor) -> Tensor:
    indices, _, _ = reference.codebook_assign(z_BTD.flatten(0, 1), codes_LD, valid_BT.flatten())
    return torch.tensor(indices).view(valid_BT.shape)


def observe(z: Sequence[Tensor], valid: Sequence[Tensor], indices: Sequence[Tensor], teacher: str) -> list[list]:
    """Tokens, teachers and codes of each modality, one row a token."""
    rows = []
    for m, z_BTD in enumerate(z):
        teachers_BTD = torch.full_like(z_BTD, torch.nan)
        for b in range(len(z_BTD)):
            for t in range(z_BTD.shape[1]):
                said = [heard(z_BTD[b, t], z[o][b], valid[o][b], t, teacher) for o in range(len(z)) if o != m]
                said = [one for one in said if one is not None]
                if said:
                    teachers_BTD[b, t] = torch.stack(said).mean(0)
        teachers_ND = None if teacher == "none" else teachers_BTD.flatten(0, 1)
        rows.append([z_BTD.flatten(0, 1), teachers_ND, indices[m].flatten()])
    return rows


def heard(z_D: Tensor, other_TD: Tensor, valid_T: Tensor, t: int, teacher: str) -> Tensor | None:
    """What another modality says at token z_D of second t; None where it has nothing to say."""
    if teacher == "time_aligned":
        return other_TD[t] if valid_T[t] else None
    places = valid_T.nonzero()[:, 0].tolist()
    if not places:
        return None
    weights = [torch.exp((z_D * other_TD[s]).sum() / len(z_D) ** 0.5) for s in places]
    return sum(w * other_TD[s] for w, s in zip(weights, places, strict=True)) / sum(weights)


def moved(state: CodebookState, observed: list[Observed], updates: int, settings: Settings) -> CodebookState:
    """The average: over all modalities at once, or one modality after the other; then the reset over all."""
    reset_after = settings.reset_after or None
    order_L = reset_order(len(state.codes_LD), settings.seed, torch.tensor(updates))
    reset = (reset_after, order_L, settings.reset_rule, NOISE)
    if settings.update == "joint":
        return reference.codebook_update(state, observed, settings.decay, EPS, *reset)
    counts = state.idle_ML
    for m, one in enumerate(observed):
        alone = state._replace(idle_ML=counts[m : m + 1])
        state = reference.codebook_update(alone, [one], settings.decay, EPS, None, None, "all", NOISE)
    # decay 1: nothing but the idle counters and the reset
    return reference.codebook_update(state._replace(idle_ML=counts), observed, 1.0, EPS, *reset)


def make(modalities: int = 2, **settings: object) -> MultiModalCodebook:
    """Codes spread out, so that tokens choose different ones."""
    module = MultiModalCodebook(L, D, modalities=NAMES[:modalities], **settings)
    generator = torch.Generator().manual_seed(5)
    module.codes.normal_(generator=generator)
    module.count.uniform_(0.5, 2.0, generator=generator)
    module.sum.copy_(module.codes * module.count[:, None])
    return module


def tokens(modalities: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(B, T, D).to(dtype).requires_grad_() for name in NAMES[:modalities]}


def masks(modalities: int) -> dict[str, Tensor]:
    """Ragged; clip 1 has no text, and clip 2 nothing but sound."""
    valid = {name: torch.rand(B, T) < 0.7 for name in NAMES[:modalities]}
    valid["audio"][2] = True
    for name in NAMES[1:modalities]:
        valid[name][2] = False
    if modalities == 3:
        valid["text"][1] = False
    return valid


def copy_of(module: MultiModalCodebook) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a: MultiModalCodebook, b: MultiModalCodebook) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
