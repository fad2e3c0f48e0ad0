"""Coded clips for tests: in each clip one event happens for some seconds, and every modality has a code for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from avs_dist.downstream.coded import CodedSplit

STEPS, DIM = 6, 12
EVENTS = ("bell", "cat", "drum", "rain")


def coded_clips(
    count: int,
    seed: int = 0,
    modalities: Sequence[str] = ("audio", "visual"),
    apart: bool = False,
    noise: float = 0.05,
    prefix: str = "clip",
    events: Sequence[str] = EVENTS,
) -> CodedSplit:
    """Clips whose events have one code for all modalities, or, where they are `apart`, a code for each.

    Also features of sound, which tell the event by another code.
    """
    generator = torch.Generator().manual_seed(seed)
    prototypes_KD = torch.randn(9 * len(events), DIM, generator=torch.Generator().manual_seed(99))
    category_N = torch.randint(len(events), (count,), generator=generator)
    start_N = torch.randint(STEPS - 2, (count,), generator=generator)
    place_T = torch.arange(STEPS)
    on_NT = (place_T >= start_N[:, None]) & (place_T < start_N[:, None] + 3)
    labels_NTK = torch.nn.functional.one_hot(category_N, len(events))[:, None] * on_NT[..., None]
    codes = {}
    for i, m in enumerate((*modalities, "sound itself")):
        shift = len(events) * (8 if m == "sound itself" else (1 + i) * apart)
        quiet_D, loud_ND = prototypes_KD[shift - 1], prototypes_KD[shift + category_N]
        codes[m] = torch.where(on_NT[..., None], loud_ND[:, None], quiet_D)
        codes[m] = codes[m] + noise * torch.randn(codes[m].shape, generator=generator)
    return CodedSplit(
        codes={m: codes[m] for m in modalities},
        valid={m: torch.ones(count, STEPS, dtype=torch.bool) for m in (*modalities, "audio")},
        labels={m: labels_NTK.to(torch.uint8) for m in (*modalities, "audio")},
        labelled={m: torch.ones(count, dtype=torch.bool) for m in (*modalities, "audio")},
        features={"audio": codes["sound itself"].half()},
        names=tuple(f"{prefix}{i}" for i in range(count)),
        events=tuple(events),
    )


def with_labels_of_other_clips(clips: CodedSplit) -> CodedSplit:
    """The same clips with each other's labels."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(clips, labels={m: labels[order] for m, labels in clips.labels.items()})
