"""Triton kernels of the DDIM sampler: a program owns a few rows and takes them through all steps and layers.

resident_kernel   widths up to 128: activations and latents stay in registers (and shared memory, as operands); the loop
                  runs over the layers of all steps, so that a matrix is fetched while those before it are multiplied
wide_kernel       widths up to 512: a layer is a loop over slices of its matrix; the activations go from layer to layer
                  through memory that belongs to the program and stays in the cache

Rows know nothing of each other, and every tile size adds the products of a row in the same order, so the result of a
row does not depend on the batch it came in. Shape letters: R rows of a program, H padded width, D latent, E condition.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _leaky(y, slope):
    return tl.where(y > 0, y, y * slope)


@triton.jit
def _ddim_update(z, output, step_noise, noise_at, is_latent, alpha, alpha_next, eta, clip, PREDICTION: tl.constexpr):
    """One step of DDIM, eq. 12; there is no `step_noise` when eta is 0.

    With share = a (1 - a') / (a' (1 - a)), sigma^2 = eta^2 (1 - a') (1 - share), and 1 - a' - sigma^2 is a sum of
    positive terms: it cannot become negative by rounding.
    """
    signal, spread = tl.sqrt_rn(alpha), tl.sqrt_rn(1.0 - alpha)
    if PREDICTION == "eps":
        x0 = (z - spread * output) * tl.div_rn(1.0, signal)
        eps = output
    elif PREDICTION == "v":
        x0 = signal * z - spread * output
        eps = signal * output + spread * z
    else:
        x0 = output
        eps = (z - signal * output) * tl.div_rn(1.0, spread)
    if clip is not None:
        x0 = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))  # NaN stays NaN
    variance = 1.0 - alpha_next
    if step_noise is None:
        z = tl.sqrt_rn(alpha_next) * x0 + tl.sqrt_rn(variance) * eps
    else:
        share = tl.div_rn(alpha * variance, alpha_next * (1.0 - alpha))
        direction = tl.sqrt_rn(variance * (1.0 - eta * eta + eta * eta * share))
        sigma = eta * tl.sqrt_rn(variance * (1.0 - share))
        drawn = tl.load(step_noise + noise_at, mask=is_latent, other=0.0)
        z = tl.sqrt_rn(alpha_next) * x0 + direction * eps + sigma * drawn
    return z


@triton.jit
def _halves(a_RK):
    """Left and right half of the columns; registers are renamed, not moved."""
    HALF: tl.constexpr = a_RK.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(a_RK, [a_RK.shape[0], 2, HALF]), [0, 2, 1]))


@triton.jit
def _multiply(a_RK, w_at, y_RH, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """y + a w in `PARTS` products, so that only a part of w is in registers at a time; w_at addresses the first."""
    if PARTS == 1:
        return tl.dot(a_RK, tl.load(w_at), y_RH, input_precision=PRECISION)
    else:
        left, right = _halves(a_RK)
        y_RH = _multiply(left, w_at, y_RH, PARTS // 2, PRECISION)
        return _multiply(right, w_at + a_RK.shape[1] // 2, y_RH, PARTS // 2, PRECISION)


@triton.jit
def resident_kernel(
    out,
    noise,
    condition,
    step_noise,
    matrices,
    bias,
    alpha,
    alpha_next,
    noise_row,
    noise_column,
    condition_row,
    condition_column,
    step_stride,
    step_row,
    step_column,
    batch,
    steps,
    eta,
    clip,
    slope,
    LATENT: tl.constexpr,
    CONDITION: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    PAIRS: tl.constexpr,
    PREDICTION: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x holds latent and condition side by side, only its latent columns change; `kept` is the stack of skip links."""
    DTYPE: tl.constexpr = matrices.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, ROWS)
    h = tl.arange(0, WIDTH)
    row = (program * ROWS + r)[:, None]
    column = h.to(tl.int64)[None, :]
    is_latent = (row < batch) & (h < LATENT)[None, :]
    is_condition = (row < batch) & ((h >= LATENT) & (h < LATENT + CONDITION))[None, :]
    x_RH = tl.load(noise + row * noise_row + column * noise_column, mask=is_latent, other=0.0).to(tl.float32)
    beside = row * condition_row + (column - LATENT) * condition_column
    x_RH += tl.load(condition + beside, mask=is_condition, other=0.0).to(tl.float32)
    a_RH = x_RH.to(DTYPE)
    w_at = matrices + h[None, :] * WIDTH + tl.arange(0, DEPTH)[:, None]
    kept = (a_RH,) * PAIRS
    for turn in tl.range(0, steps * LAYERS, num_stages=STAGES):
        layer = turn % LAYERS
        step = turn // LAYERS
        bias_row = tl.where(layer == 0, step, steps + layer - 1)
        y_RH = tl.broadcast_to(tl.load(bias + bias_row * WIDTH + h)[None, :], [ROWS, WIDTH])
        y_RH = _multiply(a_RH, w_at + layer * WIDTH * WIDTH, y_RH, WIDTH // DEPTH, PRECISION)
        if layer == LAYERS - 1:
            noise_at = tl.cast(step, tl.int64) * step_stride + row * step_row + column * step_column
            a, a_next = tl.load(alpha + step), tl.load(alpha_next + step)
            z_RH = _ddim_update(x_RH, y_RH, step_noise, noise_at, is_latent, a, a_next, eta, clip, PREDICTION)
            x_RH = tl.where(is_latent, z_RH, x_RH)
            y_RH = x_RH
        else:
            y_RH = _leaky(y_RH, slope)
            if PAIRS > 0:
                # a sum inside the branch would be the natural form; Triton 3.6 cannot compile it for sm_80
                y_RH += tl.where(layer > LAYERS - 2 - PAIRS, kept[0].to(tl.float32), 0.0)
                if layer < PAIRS:
                    kept = (y_RH.to(DTYPE),) + kept[:-1]
                elif layer > LAYERS - 2 - PAIRS:
                    kept = kept[1:] + (kept[0],)
        a_RH = y_RH.to(DTYPE)
    tl.store(out + row * LATENT + h[None, :], x_RH, mask=is_latent)


@triton.jit
def _layer(a_at, w_at, bias_at, depth, DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """b + a w over the first `depth` inputs; the addresses are those of the first DEPTH."""
    y = tl.broadcast_to(tl.load(bias_at)[None, :], [a_at.shape[0], w_at.shape[1]])
    for first in tl.range(0, depth, DEPTH, num_stages=STAGES):
        y = tl.dot(tl.load(a_at + first), tl.load(w_at + first), y, input_precision=PRECISION)
    return y


@triton.jit
def wide_kernel(
    out,
    noise,
    condition,
    step_noise,
    matrices,
    bias,
    alpha,
    alpha_next,
    scratch,
    noise_row,
    noise_column,
    condition_row,
    condition_column,
    step_stride,
    step_row,
    step_column,
    batch,
    steps,
    eta,
    clip,
    slope,
    LATENT: tl.constexpr,
    CONDITION: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    PAIRS: tl.constexpr,
    PREDICTION: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The program's scratch is 3 + PAIRS tiles: input (latent, condition, zeros), two in turn, those that skip."""
    DTYPE: tl.constexpr = matrices.dtype.element_ty
    TILE: tl.constexpr = ROWS * WIDTH
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, ROWS)
    h = tl.arange(0, WIDTH)
    k = tl.arange(0, DEPTH)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    row = (program * ROWS + r)[:, None]
    column = d.to(tl.int64)[None, :]
    is_latent = (row < batch) & (d < LATENT)[None, :]
    is_condition = (row < batch) & (e < CONDITION)[None, :]
    own = scratch + program * ((3 + PAIRS) * TILE)
    tile_at = own + r[:, None] * WIDTH + h[None, :]
    a_at = own + r[:, None] * WIDTH + k[None, :]
    latent_at = own + r[:, None] * WIDTH + d[None, :]
    z_RD = tl.load(noise + row * noise_row + column * noise_column, mask=is_latent, other=0.0).to(tl.float32)
    beside = row * condition_row + e.to(tl.int64)[None, :] * condition_column
    c_RE = tl.load(condition + beside, mask=is_condition, other=0.0)
    tl.store(tile_at, tl.zeros([ROWS, WIDTH], DTYPE))
    tl.debug_barrier()
    tl.store(own + r[:, None] * WIDTH + LATENT + e[None, :], c_RE.to(DTYPE), mask=is_condition)

    for step in tl.range(0, steps, num_stages=1):
        # each barrier parts the stores of a tile from its loads, or its loads from the next stores
        tl.debug_barrier()
        tl.store(latent_at, z_RD.to(DTYPE), mask=is_latent)
        source = 0
        for layer in tl.range(0, LAYERS - 1, num_stages=1):
            tl.debug_barrier()
            bias_at = bias + tl.where(layer == 0, step, steps + layer - 1) * WIDTH + h
            w_at = matrices + layer * WIDTH * WIDTH + h[None, :] * WIDTH + k[:, None]
            depth = tl.where(layer == 0, LATENT + CONDITION, WIDTH)
            y_RH = _layer(a_at + source * TILE, w_at, bias_at, depth, DEPTH, PRECISION, STAGES)
            y_RH = _leaky(y_RH, slope)
            source = 1 + layer % 2
            if PAIRS > 0:
                if layer < PAIRS:
                    source = 3 + layer
                elif layer > LAYERS - 2 - PAIRS:
                    y_RH += tl.load(tile_at + (LAYERS + 1 - layer) * TILE).to(tl.float32)
            tl.store(tile_at + source * TILE, y_RH.to(DTYPE))
        tl.debug_barrier()
        bias_at = bias + (step if LAYERS == 1 else steps + LAYERS - 2) * WIDTH + d
        w_at = matrices + (LAYERS - 1) * WIDTH * WIDTH + d[None, :] * WIDTH + k[:, None]
        output_RD = _layer(a_at + source * TILE, w_at, bias_at, WIDTH, DEPTH, PRECISION, STAGES)
        noise_at = tl.cast(step, tl.int64) * step_stride + row * step_row + column * step_column
        a, a_next = tl.load(alpha + step), tl.load(alpha_next + step)
        z_RD = _ddim_update(z_RD, output_RD, step_noise, noise_at, is_latent, a, a_next, eta, clip, PREDICTION)
    tl.store(out + row * LATENT + d[None, :], z_RD, mask=is_latent)
