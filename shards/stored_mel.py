"""The log-mel that AVSBench publishes beside its sound: one pickled tensor for each clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from avs_dist.shards.schema import MEL_BANDS, MEL_FRAMES, SILENT_LOG_MEL
from avs_dist.shards.tensor_pickle import read_tensor

# no sound of 16 bits has larger values
_LOUDEST_LOG_MEL = 11.0
_TOLERANCE = 1e-3
_STANDARDISED = 1e-4


def read_stored_mel(path: Path, seconds: int) -> np.ndarray:
    """float32 [seconds,96,64], the first examples of a stored VGGish log-mel [n,1,96,64] or [n,96,64].

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is no plain tensor, of another shape, too short, not finite, or no VGGish log-mel; names it.
    """
    stored = read_tensor(path)
    values = stored[:, 0] if stored.ndim == 4 and stored.shape[1] == 1 else stored
    if values.ndim != 3 or values.shape[1:] != (MEL_FRAMES, MEL_BANDS) or values.dtype.kind != "f":
        raise ValueError(
            f"{path}: {stored.dtype} {stored.shape}, expected a log-mel of floats, [n,1,{MEL_FRAMES},{MEL_BANDS}]"
        )
    if len(values) < seconds:
        raise ValueError(f"{path}: {len(values)} examples for {seconds} s")
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: the log-mel holds infinite values or NaN")
    _check_origin(values.astype(np.float64), path)
    return values[:seconds].astype(np.float32)


def _check_origin(values: np.ndarray, path: Path) -> None:
    """Refuse features of other tools: copies with such files, of the same shape, go around."""
    lowest, highest = values.min(), values.max()
    standardised = abs(values.mean()) < _STANDARDISED and abs(values.std() - 1.0) < _STANDARDISED
    if lowest < SILENT_LOG_MEL - _TOLERANCE or highest > _LOUDEST_LOG_MEL or standardised:
        found = "mean 0 and deviation 1" if standardised else f"values from {lowest:.2f} to {highest:.2f}"
        raise ValueError(
            f"{path}: {found}: this is no VGGish log-mel, whose values begin at ln 0.01; build from the sound, without "
            "--stored-mel"
        )


def mel_flag(mel_TFM: np.ndarray) -> str:
    """ "silent" where a log-mel is that of silence, else "ok"."""
    return "silent" if float(mel_TFM.max()) <= SILENT_LOG_MEL + _TOLERANCE else "ok"
