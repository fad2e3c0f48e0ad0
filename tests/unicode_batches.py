"""Small configs and batches of Uni-Code for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from avs_dist.config import Config
from avs_dist.launch.train import parse_config
from avs_dist.sequences import Sequences

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"audio": (5,), "visual": (3, 3, 6), "text": (7,)}
STEPS = 6
SMALL = (
    *("--config", str(ROOT / "configs/demo_unicode.yaml"), "--model.unicode.visual_shape", "[3,3,6]"),
    *("--model.unicode.audio_channels", "5", "--model.unicode.text_channels", "7", "--model.unicode.dim", "8"),
    *("--model.unicode.specific", "4", "--model.unicode.visual_specific", "8", "--model.unicode.dropout", "0"),
    *("--model.unicode.codebook.num_codes", "12", "--loss.unicode.club_steps", "2"),
)


def small_config(*overrides: str) -> Config:
    return parse_config([*SMALL, *overrides])


def make_batch(clips: int = 5, modalities: tuple[str, ...] = ("audio", "visual"), ragged: bool = True) -> Sequences:
    """Random features; where `ragged`, some clips end early, each modality by itself, and one clip has one step."""
    generator = torch.Generator().manual_seed(3)
    inputs, valid = {}, {}
    for place, m in enumerate(modalities):
        lengths = [STEPS - (i + place) % 3 if ragged and i else STEPS for i in range(clips)]
        if ragged and m == modalities[0]:
            lengths[-1] = 1
        valid_BT = torch.arange(STEPS)[None] < torch.tensor(lengths)[:, None]
        x = torch.randn(clips, STEPS, *SHAPES[m], generator=generator)
        inputs[m] = x * valid_BT.view(clips, STEPS, *[1] * len(SHAPES[m]))
        valid[m] = valid_BT
    return Sequences(inputs, valid, {}, tuple(f"clip{i}" for i in range(clips)))
