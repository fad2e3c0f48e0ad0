"""Calls of the public functions whose launches are built ahead of time: every op, type and representative size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from avs_dist.kernels.codebook import codebook_assign, codebook_update, initial_state
from avs_dist.kernels.denoise import ddim_sample
from avs_dist.kernels.reference import DDIMSteps, DenoiserWeights, Observed, Running, TPAVIWeights
from avs_dist.kernels.tpavi import tpavi

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """A call to record; in a main case no kernel may spill."""

    name: str
    call: Callable[[], object]
    main: bool = False


def all_cases() -> list[Case]:
    """Main ones first: of equal launches the first names the row of the table."""
    cases = [*_tpavi_cases(), *_ddim_cases(), *_codebook_cases()]
    return sorted(cases, key=lambda case: not case.main)


def _tpavi_cases() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        for channels in (256, 128):
            yield Case(f"tpavi {_short(dtype)} T=5 C={channels}", partial(_tpavi, dtype, 5, channels), main=True)
    for dtype, frames, channels in (
        *((FP32, 5, 64), (FP32, 5, 512), (FP32, 10, 256), (FP32, 32, 256)),
        *((BF16, 5, 64), (BF16, 5, 512), (BF16, 10, 256), (BF16, 32, 256), (FP16, 5, 256), (FP16, 32, 512)),
    ):
        yield Case(f"tpavi {_short(dtype)} T={frames} C={channels}", partial(_tpavi, dtype, frames, channels))
    variants = (
        (FP32, "masked"),
        (BF16, "masked"),
        (FP32, "evaluated"),
        (BF16, "l2_normalise"),
        (BF16, "channels_first"),
    )
    for dtype, variant in variants:
        call = partial(_tpavi, dtype, 5, 256, **{variant: True})
        yield Case(f"tpavi {_short(dtype)} T=5 C=256 {variant}", call)


def _tpavi(
    dtype: torch.dtype,
    frames: int,
    channels: int,
    masked: bool = False,
    evaluated: bool = False,
    l2_normalise: bool = False,
    channels_first: bool = False,
) -> None:
    """Forward and backward; masked ones are time-aligned too; channels first are tokens and gradient [B,T,C,P]."""
    inner = channels // 2
    shapes = [(inner, channels), (inner,)] * 3 + [(channels, inner)] + [(channels,)] * 5
    weights = TPAVIWeights(*(torch.zeros(shape, requires_grad=True) for shape in shapes))
    x_BTPC = torch.zeros(2, frames, 56 * 56, channels, dtype=dtype)
    if channels_first:
        x_BTPC = x_BTPC.mT.contiguous().mT
    x_BTPC.requires_grad_()
    out_BTPC, _ = tpavi(
        x_BTPC,
        torch.zeros(2, frames, channels, dtype=dtype, requires_grad=True),
        weights,
        alignment=torch.zeros(2 * frames - 1, requires_grad=True) if masked else None,
        valid_BT=torch.ones(2, frames, dtype=torch.bool) if masked else None,
        running=Running(torch.zeros(channels), torch.ones(channels)) if evaluated else None,
        l2_normalise=l2_normalise,
    )
    out_BTPC.backward(torch.zeros_like(x_BTPC))


def _ddim_cases() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        for width in (64, 128, 256):
            for batch in (1024, 65536):
                call = partial(_ddim, dtype, width, batch)
                yield Case(f"ddim {_short(dtype)} H={width} B={batch}", call, main=True)
    yield Case("ddim fp16 H=128 B=1024", partial(_ddim, FP16, 128, 1024))
    for dtype in (FP32, BF16):
        yield Case(f"ddim {_short(dtype)} H=512 B=1024", partial(_ddim, dtype, 512, 1024))
        for width in (128, 256):
            call = partial(_ddim, dtype, width, 1024, skips=True, prediction="v", eta=1.0)
            yield Case(f"ddim {_short(dtype)} H={width} B=1024 skips, v, eta=1", call)
    yield Case("ddim bf16 H=128 B=1024 x0, clip", partial(_ddim, BF16, 128, 1024, prediction="x0", clip=1.0))


def _ddim(
    dtype: torch.dtype,
    width: int,
    batch: int,
    skips: bool = False,
    prediction: str = "eps",
    eta: float = 0.0,
    clip: float | None = None,
) -> None:
    """Ten steps of eight layers, latent and condition of 24."""
    widths, steps = [48, *[width] * 7, 24], 10
    matrices = tuple(torch.zeros(o, i, dtype=dtype) for i, o in zip(widths[:-1], widths[1:], strict=True))
    biases = tuple(torch.zeros(o, dtype=dtype) for o in widths[1:])
    ddim_sample(
        torch.zeros(batch, 24),
        torch.zeros(batch, 24, dtype=dtype),
        DenoiserWeights(matrices, biases, torch.zeros(steps, width, dtype=dtype), skips),
        DDIMSteps(torch.full((steps,), 0.5), torch.full((steps,), 0.6)),
        prediction=prediction,  # type: ignore[arg-type]
        eta=eta,
        step_noise_SBD=torch.zeros(steps, batch, 24) if eta else None,
        clip=clip,
    )


def _codebook_cases() -> Iterator[Case]:
    for tokens, codes in ((2560, 400), (16384, 1024)):
        yield Case(f"codebook fp32 N={tokens} L={codes} D=256", partial(_codebook, FP32, tokens, codes, 256), main=True)
    for precision in ("tf32", "half"):
        call = partial(_codebook, FP32, 16384, 1024, 256, precision)
        yield Case(f"codebook fp32 N=16384 L=1024 D=256 {precision}", call)
    for tokens, codes, dims in ((2560, 400, 64), (2560, 400, 512), (16384, 16384, 256)):
        yield Case(f"codebook fp32 N={tokens} L={codes} D={dims}", partial(_codebook, FP32, tokens, codes, dims))
    for dtype in (FP16, BF16):
        yield Case(f"codebook {_short(dtype)} N=16384 L=1024 D=256", partial(_codebook, dtype, 16384, 1024, 256))
        call = partial(_codebook, dtype, 2560, 400, 256, "half")
        yield Case(f"codebook {_short(dtype)} N=2560 L=400 D=256 half", call)


def _codebook(dtype: torch.dtype, tokens: int, codes: int, dims: int, precision: str = "fp32") -> None:
    """Two modalities, the first with a mask, then update and reset."""
    state = initial_state(torch.zeros(codes, dims), 2)
    values_ND = torch.zeros(tokens, dims, dtype=dtype)
    for valid_N in (torch.ones(tokens, dtype=torch.bool), None):
        codebook_assign(values_ND, state.codes_LD, valid_N=valid_N, precision=precision)  # type: ignore[arg-type]
    observed = Observed(values_ND, values_ND, torch.zeros(tokens, dtype=torch.int64))
    codebook_update(state, [observed] * 2, decay=0.99, reset_after=300, permutation_L=torch.arange(codes))


def _short(dtype: torch.dtype) -> str:
    return {FP32: "fp32", FP16: "fp16", BF16: "bf16"}[dtype]
