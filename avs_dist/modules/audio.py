"""Audio encoders: the log-mel example of each second -> one vector of 128 numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.modules.norm import WorldBatchNorm2d
from avs_dist.modules.weights import channels_last, read_state_dict

AUDIO_CHANNELS = 128
_VGGISH_LAYERS = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M")


class VGGish(nn.Module):
    """VGGish without its PCA post-processing: mel_NFM [N,96,64] -> [N,128], not negative (final ReLU).

    Frozen: always in eval mode and outside autograd. State-dict names are those of the public PyTorch checkpoint
    (features.N, embeddings.N).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in _VGGISH_LAYERS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 4 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, AUDIO_CHANNELS),
            nn.ReLU(inplace=True),
        )
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VGGish:
        return super().train(False)

    @torch.no_grad()
    def forward(self, mel_NFM: Tensor) -> Tensor:
        features_NCFM = self.features(mel_NFM[:, None])
        return self.embeddings(features_NCFM.permute(0, 2, 3, 1).flatten(1))


class LogMelCNN(nn.Module):
    """Small convolutional encoder that trains from scratch: mel_NFM [N,96,64] -> [N,128]."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                WorldBatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.embedding = nn.Linear(widths[-1] * 4, AUDIO_CHANNELS)
        channels_last(self)

    def forward(self, mel_NFM: Tensor) -> Tensor:
        x_NCFM = ((mel_NFM + 2.0) / 2.0)[:, None].contiguous(memory_format=torch.channels_last)
        pooled_NCM = self.features(x_NCFM).mean(2)  # over time; the four pitch bands stay apart
        return F.relu(self.embedding(pooled_NCM.flatten(1)))


def build_audio_encoder(
    kind: Literal["vggish", "logmel_cnn"], weights: str | None, load: bool = True, key: str = "model.audio.weights"
) -> nn.Module:
    """The encoder of model.audio; `load=False` leaves VGGish without its weights, for a checkpoint to fill.

    Args:
        key: names the weights in errors.

    Raises:
        ValueError: VGGish without weights, or with weights that do not fit.
        FileNotFoundError: the weights file does not exist.
    """
    if kind == "logmel_cnn":
        return LogMelCNN()
    encoder = VGGish()
    if not load:
        return encoder
    if weights is None:
        raise ValueError(
            "model.audio.weights: VGGish is frozen and needs its AudioSet weights: download vggish-10086976.pth from "
            "https://github.com/harritaylor/torchvggish/releases and set model.audio.weights to that file, or set "
            "model.audio.kind=logmel_cnn to train a small encoder from scratch"
        )
    result: Any = encoder.load_state_dict(read_state_dict(Path(weights), key), strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(
            f"{key}: {weights} is not VGGish: missing {result.missing_keys[:4]}, "
            f"unexpected {result.unexpected_keys[:4]}"
        )
    return encoder
