"""What `bench loader` is compared with: a literal AVSBench loader, plain webdataset, and raw decord.

Each gives batches without end.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

from avs_dist.clip import IMAGENET_MEAN, IMAGENET_STD
from avs_dist.launch.benchmarks.loader_sets import FRAMES, LOG_MELS, MASKS, MEMBERS
from avs_dist.shards.decode import open_decord
from avs_dist.shards.images import resize_bilinear


class LiteralClips(Dataset[tuple[Tensor, Tensor, Tensor, str]]):
    """AVSBench MS3 as the public code reads it: one PNG file for each frame and mask, a pickled log-mel.

    An item: float frames [T,3,H,W], ImageNet-normalised; float log-mel [T,1,96,64]; float masks [T,1,H,W]; name.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names = sorted(path.name for path in (root / FRAMES).iterdir())
        self._frame_transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )
        self._mask_transform = transforms.ToTensor()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, str]:
        name = self._names[number]
        with (self._root / LOG_MELS / f"{name}.pkl").open("rb") as file:
            mel_T1FM = pickle.load(file)  # this benchmark wrote it itself, a moment ago; data from elsewhere never is
        frames = [self._frame_transform(_picture(self._root / FRAMES / name, t, "RGB")) for t in range(len(mel_T1FM))]
        masks = [self._mask_transform(_picture(self._root / MASKS / name, t, "L")) for t in range(len(mel_T1FM))]
        return torch.stack(frames), mel_T1FM, torch.stack(masks), name


def literal_batches(root: Path, batch: int) -> Iterator[list[Any]]:
    """Batches of `LiteralClips`, in random order."""
    loader = DataLoader(LiteralClips(root), batch_size=batch, shuffle=True)
    while True:
        yield from loader


def webdataset_batches(folder: Path, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]:
    """Batches of raw shards in the order of their files.

    A batch: uint8 frames [B,T,3,H,W] (a view of what is stored, as ours are), float log-mel [B,T,96,64], uint8 masks
    [B,T,H,W], names.
    """
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    while True:
        clips = webdataset.WebDataset(shards, shardshuffle=False).decode()
        clips = clips.to_tuple("frames.npy", "mel.npy", "masks.npy", "__key__")
        for frames, mel, masks, names in clips.batched(batch, collation_fn=default_collate, partial=False):
            yield frames.permute(0, 1, 4, 2, 3), mel, masks, names


def decord_clips(folder: Path) -> Iterator[np.ndarray]:
    """uint8 RGB [T,size,size,3] of each clip that `loader_sets.write_film_set` left as a film of its own."""
    facts = [json.loads(path.read_text()) for path in sorted((folder / MEMBERS).glob("*.json"))]
    while True:
        for clip in facts:
            open_decord.cache_clear()
            reader = open_decord(str(folder / MEMBERS / clip["film"]))
            yield np.stack([resize_bilinear(f, clip["size"]) for f in reader.get_batch(clip["frames"]).asnumpy()])


def _picture(folder: Path, t: int, mode: str) -> Image.Image:
    return Image.open(folder / f"{t}.png").convert(mode)
