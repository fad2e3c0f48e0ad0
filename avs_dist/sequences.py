"""The Sequences batch: paired sequences of several modalities, for codebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from avs_dist.clip import normalise_frames
from avs_dist.shards.schema import FeatureSample, Sample


@dataclass(frozen=True)
class Sequences:
    """A batch of B clips as sequences of T steps, seconds of sound and picture or words; all zero behind their end.

    Features come in the precision they are stored in; `to` makes them what a system computes with.

    inputs: float by modality: "visual" [B,T,h,w,C] features or [B,T,3,H,W] frames, "audio" [B,T,C] features or
            [B,T,96,64] log-mel, "text" [B,T,C].
    valid:  bool [B,T] by modality, which steps exist; the existing ones come first.
    labels: uint8 [B,T,K] by modality, 1 where an event happens; empty where nothing is labelled.
    key:    clip names.
    """

    inputs: dict[str, Tensor]
    valid: dict[str, Tensor]
    labels: dict[str, Tensor]
    key: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Sequences:
        """Copy on `device`; the inputs in `dtype`."""
        return replace(
            self,
            inputs={m: x.to(device, dtype, non_blocking=True) for m, x in self.inputs.items()},
            valid={m: x.to(device, non_blocking=True) for m, x in self.valid.items()},
            labels={m: x.to(device, non_blocking=True) for m, x in self.labels.items()},
        )


def collate_features(
    samples: Sequence[FeatureSample], *, shapes: Mapping[str, Sequence[int]], num_steps: int, num_events: int
) -> Sequences:
    """Batch clips of features, cut or padded to `num_steps` whatever the batch, so that no clip depends on others.

    Args:
        shapes: of one step of each modality; a modality that a clip lacks has no valid step there.
        num_events: K of the labels.

    Raises:
        ValueError: features of another shape, naming the clip.
    """
    inputs, valid, labels = {}, {}, {}
    for modality, shape in shapes.items():
        found = [sample.features.get(modality, np.zeros((0, *shape), np.float32)) for sample in samples]
        for sample, value in zip(samples, found, strict=True):
            if value.shape[1:] != tuple(shape):
                raise ValueError(f"clip {sample.name}: {modality} features are {value.shape[1:]}, expected {shape}")
        inputs[modality], valid[modality] = _padded(found, num_steps)
    for modality in dict.fromkeys(m for sample in samples for m in sample.labels):
        empty = np.zeros((0, num_events), np.uint8)
        labels[modality], _ = _padded([sample.labels.get(modality, empty) for sample in samples], num_steps)
    return Sequences(inputs, valid, labels, tuple(sample.name for sample in samples))


def collate_media(samples: Sequence[Sample], *, num_steps: int, text_channels: int | None = None) -> Sequences:
    """Batch clips of frames, log-mel and words of their prompts, cut or padded to `num_steps`.

    Args:
        text_channels: of a word; None leaves the prompts out.

    Raises:
        ValueError: a clip without a prompt, or with other word vectors, where prompts are wanted.
    """
    inputs, valid = {}, {}
    frames = [normalise_frames(sample.frames_THWC).numpy() for sample in samples]
    inputs["visual"], valid["visual"] = _padded(frames, num_steps)
    inputs["audio"], valid["audio"] = _padded([sample.mel_TFM for sample in samples], num_steps)
    if text_channels is not None:
        words = [_words(sample, text_channels) for sample in samples]
        inputs["text"], valid["text"] = _padded(words, num_steps)
    return Sequences(inputs, valid, {}, tuple(sample.name for sample in samples))


def _words(sample: Sample, channels: int) -> np.ndarray:
    if sample.text_WE is None:
        raise ValueError(f"clip {sample.name}: has no text; build the shards with --prompts")
    if sample.text_WE.shape[1] != channels:
        raise ValueError(
            f"clip {sample.name}: word vectors have {sample.text_WE.shape[1]} numbers, "
            f"model.unicode.text_channels={channels}"
        )
    return sample.text_WE


def _padded(values: Sequence[np.ndarray], num_steps: int) -> tuple[Tensor, Tensor]:
    """[B,num_steps,...] in the type of the first, and which steps exist."""
    out = np.zeros((len(values), num_steps, *values[0].shape[1:]), dtype=values[0].dtype)
    valid = np.zeros((len(values), num_steps), dtype=bool)
    for row, value in enumerate(values):
        length = min(len(value), num_steps)
        out[row, :length], valid[row, :length] = value[:length], True
    return torch.from_numpy(out), torch.from_numpy(valid)
