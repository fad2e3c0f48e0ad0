"""Calls of TPAVI with random inputs, in any variant, and their outputs and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kernel_checks import DEVICE
from torch import Tensor

from avs_dist.kernels import reference
from avs_dist.kernels.reference import Running, TPAVIWeights


class Case(NamedTuple):
    """Sizes (B, T, P, C) and variant of one call."""

    sizes: tuple[int, int, int, int]
    training: bool = True
    aligned: bool = False
    masked: bool = False
    l2: bool = False
    two_ranks: bool = False


class Call(NamedTuple):
    x_BTPC: Tensor
    audio_BTC: Tensor
    weights: TPAVIWeights
    alignment: Tensor | None
    valid_BT: Tensor | None
    running: Running | None

    def leaves(self) -> dict[str, Tensor]:
        rest = {} if self.alignment is None else {"alignment": self.alignment}
        return {"x": self.x_BTPC, "audio": self.audio_BTC, **self.weights._asdict(), **rest}

    def to(self, dtype: torch.dtype) -> Call:
        def cast(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach().to(dtype).requires_grad_()

        running = None if self.running is None else Running(*(value.to(dtype) for value in self.running))
        weights = TPAVIWeights(*map(cast, self.weights))
        return Call(cast(self.x_BTPC), cast(self.audio_BTC), weights, cast(self.alignment), self.valid_BT, running)


def make_call(case: Case, dtype: torch.dtype = torch.float64) -> Call:
    batch, frames, positions, channels = case.sizes
    inner = channels // 2

    def normal(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.7
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype).requires_grad_()

    projections = [normal(*shape) for _ in range(3) for shape in ((inner, channels), (inner,))]
    others = [normal(channels, inner), *(normal(channels) for _ in range(5))]
    x_BTPC = (normal(*case.sizes).detach() + 0.5).requires_grad_()
    alignment = normal(63) if case.aligned else None
    valid_BT = None
    if case.masked:
        valid_BT = torch.ones(batch, frames, dtype=torch.bool, device=DEVICE)
        valid_BT[0, frames // 2 :] = False
        valid_BT[-1, 0] = False
    running = None
    if not case.training:
        running = Running(normal(channels).detach(), normal(channels).detach().abs() + 0.5)
    weights = TPAVIWeights(*projections, *others)
    return Call(x_BTPC, normal(batch, frames, channels), weights, alignment, valid_BT, running)


def run(form, call: Call, case: Case) -> dict[str, Tensor]:
    """Output, moments, and the gradients of all inputs for a random output gradient."""
    # as if another rank held the same clips
    reduce = (lambda value: 2 * value) if case.two_ranks else None
    key = call.audio_BTC[:, :, None] if form is reference.tpavi else call.audio_BTC
    out, moments = form(
        call.x_BTPC, key, call.weights, call.alignment, call.valid_BT, call.running, reduce, l2_normalise=case.l2
    )
    torch.manual_seed(3)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out)
    leaves = call.leaves()
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    result = {"out": out.detach(), **{f"grad {name}": value for name, value in zip(leaves, grads, strict=True)}}
    return result | ({} if moments is None else {name: value.detach() for name, value in moments._asdict().items()})
