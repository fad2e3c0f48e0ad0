"""Codes of whole splits: the frozen encoder runs once, every head is then trained on what it said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from avs_dist.config import Config
from avs_dist.loader import eval_batches
from avs_dist.sequences import Sequences, collate_features
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.plan import PADDING
from avs_dist.shards.schema import FEATURES, FeatureSample
from avs_dist.systems.base import System
from avs_dist.systems.unicode import UnicodeSystem

BATCH = 80  # clips encoded at a time; no effect on the codes
FEW_BATCHES = 20  # up to which decoding processes take longer to start than the clips to decode
TABLES = ("codes", "valid", "labels", "labelled", "features")  # of a CodedSplit, by modality


@dataclass(frozen=True)
class CodedSplit:
    """N clips of T steps as codes, on the CPU; what a clip lacks is zero, not valid, not labelled.

    codes:    float32 [N,T,D] by modality that the system knows.
    valid:    bool [N,T] by modality, also those of `features`.
    labels:   uint8 [N,T,K] by modality, 1 where an event happens.
    labelled: bool [N] by modality, which clips have labels there.
    features: as stored [N,T,...], of the modalities that were asked for.
    names:    of the clips.
    events:   names of the K events.
    """

    codes: dict[str, Tensor]
    valid: dict[str, Tensor]
    labels: dict[str, Tensor]
    labelled: dict[str, Tensor]
    features: dict[str, Tensor]
    names: tuple[str, ...]
    events: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, which_N: Tensor) -> CodedSplit:
        """The clips that a bool [N] says."""
        names = tuple(name for name, here in zip(self.names, which_N.tolist(), strict=True) if here)
        tables: dict[str, Any] = {name: {m: x[which_N] for m, x in getattr(self, name).items()} for name in TABLES}
        return replace(self, names=names, **tables)

    def happens(self) -> Tensor:
        """Which events happen in each clip, whatever the modality, bool [N,K]."""
        found_NK = torch.zeros(len(self), len(self.events), dtype=torch.bool)
        for labels_NTK in self.labels.values():
            found_NK |= labels_NTK.bool().any(1)
        return found_NK


def join(parts: Sequence[CodedSplit]) -> CodedSplit:
    """Clips of several splits of one folder of shards, in order."""
    tables: dict[str, Any] = {
        name: {m: torch.cat([getattr(part, name)[m] for part in parts]) for m in getattr(parts[0], name)}
        for name in TABLES
    }
    return replace(parts[0], names=tuple(name for part in parts for name in part.names), **tables)


def codebook_system(system: System, config: Config, index: ShardIndex) -> UnicodeSystem:
    """The system, if it can encode what the shards hold.

    Raises:
        ValueError: a system without codes, or shards without features that it knows; names both.
    """
    if not isinstance(system, UnicodeSystem):
        raise ValueError(f"--checkpoint: {config.model.system} has no codebook; train model.system=unicode")
    if config.model.unicode.inputs != "features" or index.kind != FEATURES:
        raise ValueError(
            f"{index.place} holds {index.kind} and the checkpoint was trained on {config.model.unicode.inputs}: "
            "these tasks need features on both sides"
        )
    there = index.feature_shapes
    known = config.model.unicode.shapes
    for modality, shape in known.items():
        if tuple(there.get(modality, shape)) != tuple(shape):
            raise ValueError(
                f"{modality} features in {index.place} are {list(there[modality])}, the checkpoint was trained on "
                f"{list(shape)}"
            )
    if not set(known) & set(there):
        raise ValueError(f"{index.place} holds {', '.join(there)}, the checkpoint knows only {', '.join(known)}")
    return system


def encode_split(
    system: System,
    config: Config,
    index: ShardIndex,
    split: str,
    *,
    keep: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> CodedSplit:
    """Encode every clip of a split once, in evaluation mode and without gradient.

    The public code of Uni-Code leaves dropout on while the heads train, so that a clip has other codes each time.

    Args:
        system: on `device`.
        config: of its training; gives the number of decoding processes of a long split.
        keep: modalities whose stored features are kept too, whether the system knows them or not.

    Raises:
        ValueError: see `codebook_system`; or there is no such split, or no features of a modality to keep.
    """
    encoder = codebook_system(system, config, index)
    missing = [m for m in keep if m not in index.feature_shapes]
    if missing:
        raise ValueError(f"{index.place} has no {', '.join(missing)} features, which the task needs")
    wanted = {*config.model.unicode.modalities, *keep}
    shapes = {m: shape for m, shape in index.feature_shapes.items() if m in wanted}
    num_batches = -(-sum(len(shard.clips) for shard in index.split(split)) // BATCH)
    batches = eval_batches(
        config.data,
        index,
        split,
        BATCH,
        partial(_collate, shapes=shapes, num_steps=index.clip_seconds, num_events=len(index.events)),
        workers=None if num_batches > FEW_BATCHES else 0,
    )
    parts = []
    for (batch, labelled), positions in tqdm(batches, desc=f"encode {split}", unit="batch", leave=False):
        encoded = encoder.encode(batch.to(device))
        part = CodedSplit(
            {m: each.quantised_BTD.cpu() for m, each in encoded.items()},
            batch.valid,
            batch.labels,
            labelled,
            {m: batch.inputs[m] for m in keep},
            batch.key,
            index.events,
        )
        parts.append(part.rows(torch.as_tensor(positions) != PADDING))
    return join(parts)


def _collate(
    samples: Sequence[FeatureSample], *, shapes: Mapping[str, tuple[int, ...]], num_steps: int, num_events: int
) -> tuple[Sequences, dict[str, Tensor]]:
    """A batch with labels for every modality of `shapes`, and which of its clips have labels there."""
    batch = collate_features(samples, shapes=shapes, num_steps=num_steps, num_events=num_events)
    empty = torch.zeros(len(samples), num_steps, num_events, dtype=torch.uint8)
    labelled = {m: torch.tensor([m in sample.labels for sample in samples]) for m in shapes}
    return replace(batch, labels={m: batch.labels.get(m, empty) for m in shapes}), labelled
