"""The DDIM sampler in Triton: flat copies of the weights, tile sizes, and the one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from avs_dist.kernels import denoise_kernels, runtime
from avs_dist.kernels.reference import DDIMSteps, DenoiserWeights, skip_pairs

MAX_WIDTH = 512
RESIDENT_WIDTH = 128
RESIDENT_PAIRS = 3  # skip links of eight layers


class Tiles(NamedTuple):
    """How the work is cut."""

    rows: int  # of a program
    warps: int
    stages: int  # of the fetch of matrices
    depth: int  # inputs of a layer multiplied at a time


def flatten(weights: DenoiserWeights) -> tuple[Tensor, Tensor]:
    """Matrices [L,H,H] and float32 biases [S+L-1,H], zero-padded to one power of two.

    The first S biases are those of the first layer with the embedding of each step added, the others those of the
    layers after it.
    """
    widest = max(max(matrix.shape) for matrix in weights.matrices)
    width = max(16, triton.next_power_of_2(widest))
    matrices_LHH = weights.matrices[0].new_zeros(len(weights.matrices), width, width)
    for layer, matrix in enumerate(weights.matrices):
        matrices_LHH[layer, : matrix.shape[0], : matrix.shape[1]] = matrix
    steps, first_width = weights.step_SH.shape
    bias_RH = matrices_LHH.new_zeros(steps + len(weights.matrices) - 1, width, dtype=torch.float32)
    bias_RH[:steps, :first_width] = weights.step_SH.float() + weights.biases[0].float()
    for layer, bias in enumerate(weights.biases[1:]):
        bias_RH[steps + layer, : len(bias)] = bias
    return matrices_LHH, bias_RH


def tiles(width: int, dtype: torch.dtype, batch: int, pairs: int, backend: str) -> Tiles:
    """Small tiles while they all run at once, then larger ones, which read the weights less often.

    Both must add the products of a row in the same order, so both must run on the same tensor-core instructions: on
    Hopper those take 64 rows of 16-bit values or more; for float32, which would also take those from 64 rows on but has
    no registers for them, all tiles stay below. Sizes are the largest that fit the registers of a thread on all NVIDIA
    targets, and the 64 KiB of shared memory on AMD.
    """
    resident = is_resident(width, pairs)
    hip = backend == "hip"
    if dtype.itemsize == 2:
        if not resident:
            return Tiles(rows=64, warps=8, stages=2 if hip else 4, depth=min(64, width, 16384 // width))
        rows = 128 if batch > 8192 and width == RESIDENT_WIDTH and not pairs and not hip else 64
        return Tiles(rows, warps=8 if pairs else rows // 16, stages=2 if hip else 3, depth=width)
    rows = 32 if batch > 2048 and width < MAX_WIDTH and not (resident and pairs) and not hip else 16
    if not resident:
        return Tiles(rows, warps=8, stages=2 if hip else 3, depth=min(32, width, 8192 // width))
    warps = 8 if width == RESIDENT_WIDTH else 4
    return Tiles(rows, warps, stages=1 if hip else 3, depth=min(32, width))


def is_resident(width: int, pairs: int) -> bool:
    """Whether activations, and those that skip, fit into registers."""
    return width <= RESIDENT_WIDTH and pairs <= RESIDENT_PAIRS


def sample(
    noise_BD: Tensor,
    condition_BE: Tensor,
    flat: Sequence[Tensor],
    weights: DenoiserWeights,
    steps: DDIMSteps,
    prediction: str,
    eta: float,
    step_noise_SBD: Tensor | None,
    clip: float | None,
) -> Tensor:
    """`denoise.ddim_sample` without its checks; `flat` is what `flatten` made of the weights."""
    matrices_LHH, bias_RH = flat
    (batch, latent), condition = noise_BD.shape, condition_BE.shape[1]
    num_layers, width, _ = matrices_LHH.shape
    pairs = len(skip_pairs(num_layers)) if weights.skips else 0
    rows, warps, stages, depth = tiles(width, matrices_LHH.dtype, batch, pairs, runtime.backend())
    programs = triton.cdiv(batch, rows)
    kernel, scratch, blocks = denoise_kernels.resident_kernel, [], {}
    if not is_resident(width, pairs):
        kernel, scratch = denoise_kernels.wide_kernel, [matrices_LHH.new_empty(programs, 3 + pairs, rows, width)]
        blocks = {"BLOCK_D": _block(latent), "BLOCK_E": _block(condition)}
    out_BD = torch.empty_like(noise_BD, memory_format=torch.contiguous_format)
    runtime.launch(
        kernel,
        (programs,),
        *(out_BD, noise_BD, condition_BE, step_noise_SBD, matrices_LHH, bias_RH),
        *(steps.alpha_S.contiguous(), steps.alpha_next_S.contiguous(), *scratch),
        *noise_BD.stride(),
        *condition_BE.stride(),
        *(step_noise_SBD.stride() if step_noise_SBD is not None else (0, 0, 0)),
        *(batch, len(steps.alpha_S), eta, clip, weights.slope),
        num_warps=warps,
        LATENT=latent,
        CONDITION=condition,
        WIDTH=width,
        LAYERS=num_layers,
        PAIRS=pairs,
        PREDICTION=prediction,
        ROWS=rows,
        DEPTH=depth,
        PRECISION=runtime.dot_precision(matrices_LHH.dtype),
        STAGES=stages,
        **blocks,
    )
    return out_BD


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
