"""Small systems of queries: an untrained Uni-Code whose codes spread, as a checkpoint, and clips that have text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_system_tpavi import make_clip, make_config

from avs_dist.clip import Clip
from avs_dist.config import BackboneConfig, CodebookConfig, Config, QueryConfig, UnicodeConfig
from avs_dist.saving import seal
from avs_dist.systems import build_system
from avs_dist.systems.base import System
from avs_dist.systems.query import QuerySystem
from avs_dist.systems.unicode import UnicodeSystem

WORD = 12
UNICODE = UnicodeConfig(
    modalities=("audio", "visual", "text"),
    inputs="media",
    visual_shape=(2, 2, 8),
    text_channels=WORD,
    dim=8,
    layers=1,
    heads=2,
    dropout=0.5,
    specific=8,
    visual_specific=8,
    codebook=CodebookConfig(num_codes=256),
)


def unicode_run(folder: Path, unicode: UnicodeConfig = UNICODE) -> UnicodeSystem:
    """The system, in eval mode; its backbone is not that of the queries."""
    config = make_config(system="unicode", unicode=unicode, backbone=BackboneConfig("test_resnet"))
    torch.manual_seed(1)
    system = build_system(config, load_pretrained=False).eval()
    assert isinstance(system, UnicodeSystem)
    with torch.no_grad():
        for name, value in system.named_parameters():  # seconds and words that differ get other codes
            if any(part in name for part in ("projections", "reader", "embedding")) and "weight" in name:
                value.mul_(8)
        for name, value in system.named_buffers():
            if name.endswith(("running_mean", "running_var", "codes")):
                value.uniform_(0.5, 1.5) if name.endswith("var") else value.normal_()
    save_run(folder, config, system)
    return system


def save_run(folder: Path, config: Config, system: System) -> None:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in system.state_dict().items()}, folder / "model.safetensors")
    seal(folder, config, step=0, image_size=64, metrics={})


def query_config(folder: Path, **model: object) -> Config:
    query = QueryConfig(str(folder), "audio")
    return make_config(**{"system": "query", "unicode": UNICODE, "query": query, **model})


def build_query(config: Config, load_pretrained: bool = True) -> QuerySystem:
    """In training mode; its blocks listen from the start."""
    torch.manual_seed(0)
    system = build_system(config, load_pretrained)
    assert isinstance(system, QuerySystem)
    for block in system.trunk.blocks.values():
        torch.nn.init.normal_(block.bn_weight)
    return system.train()


def text_clip() -> Clip:
    """Two clips of three seconds that differ in pitch, with prompts of five and two words; the masks are a corner."""
    clip = make_clip()
    clip.mel_BTFM.add_(30 * torch.randn(2, 3, 1, 4).repeat_interleave(16, 3))
    clip.masks_BTHW.zero_()
    clip.masks_BTHW[:, :, :20, :30] = 1
    valid_BW = torch.arange(5) < torch.tensor([[5], [2]])
    return replace(clip, text_BWE=3 * torch.randn(2, 5, WORD) * valid_BW[..., None], text_valid_BW=valid_BW)


def one(clip: Clip, index: int, words: int) -> Clip:
    """A clip of a batch by itself, without padded words."""
    fields = ("frames_BTCHW", "mel_BTFM", "masks_BTHW", "labelled_BT", "valid_BT")
    rows = {field: getattr(clip, field)[index : index + 1] for field in fields}
    assert clip.text_BWE is not None
    assert clip.text_valid_BW is not None
    text = {"text_BWE": clip.text_BWE[index : index + 1, :words]}
    return Clip(**rows, **text, text_valid_BW=clip.text_valid_BW[index : index + 1, :words], key=clip.key[index:][:1])
