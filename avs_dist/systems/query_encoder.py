"""What a query means: codes of a trained Uni-Code that is frozen, one vector for each second of a clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from avs_dist.clip import Clip
from avs_dist.config import Config, to_dict
from avs_dist.modules.audio import AUDIO_CHANNELS, build_audio_encoder
from avs_dist.pairing import mean_code
from avs_dist.sequences import Sequences
from avs_dist.systems.base import Query
from avs_dist.systems.trunk import Existing
from avs_dist.systems.unicode import UnicodeSystem

KEY = "model.query.checkpoint"


class QueryEncoder(nn.Module):
    """The half of Uni-Code that reads sound and words; frozen: always in eval mode, outside autograd, no collective.

    Sound gives the code of each second. Words have no second: the mean of their codes stands at every second. So one
    can take the place of the other, whatever the length of clip and prompt. (The public code repeats a query to ten
    steps, of which a linear layer over time, trained along, makes five.)

    Raises:
        ValueError: Uni-Code has not learnt sound and words, or other sound than model.audio gives; no checkpoint is
            named, or it holds something else than model.unicode says.
        FileNotFoundError: there is no checkpoint.
    """

    def __init__(self, config: Config, load_pretrained: bool) -> None:
        super().__init__()
        _check(config)
        self.text_channels = config.model.unicode.text_channels
        self.unicode = _without_picture(config)
        self.audio_encoder = None  # of media it is part of Uni-Code
        if config.model.unicode.inputs == "features":
            audio = config.model.audio
            self.audio_encoder = build_audio_encoder(audio.kind, audio.weights, load_pretrained)
        if load_pretrained:
            _read(self.unicode, config)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> QueryEncoder:
        return super().train(False)

    @torch.no_grad()
    def forward(self, clip: Clip, query: Query) -> Tensor:
        """[B,T,D] in the type of the frames; zero where there is no frame.

        Raises:
            ValueError: text is to ask, and clips have none or other word vectors.
        """
        codes_BTD = self._words(clip) if query == "text" else self._sound(clip)
        return codes_BTD.to(clip.normalised_BTCHW.dtype)

    def _sound(self, clip: Clip) -> Tensor:
        sound = clip.mel_BTFM
        if self.audio_encoder is not None and clip.audio_BTD is not None:
            sound = clip.audio_BTD
        elif self.audio_encoder is not None:
            exist = Existing(clip.valid_BT)
            sound = exist.restore(self.audio_encoder(exist.select(sound)))
        batch = Sequences({"audio": sound}, {"audio": clip.valid_BT}, {}, clip.key, clip.audio_BTD)
        return self.unicode.encode(batch)["audio"].quantised_BTD

    def _words(self, clip: Clip) -> Tensor:
        if clip.text_BWE is None or clip.text_valid_BW is None:
            raise ValueError(f"a text query: clips of {', '.join(clip.key)} have no text; build shards with --prompts")
        if clip.text_BWE.shape[2] != self.text_channels:
            raise ValueError(
                f"clip {clip.key[0]}: word vectors have {clip.text_BWE.shape[2]} numbers, Uni-Code has learnt "
                f"model.unicode.text_channels={self.text_channels}; build shards with the --word-vectors of its shards"
            )
        batch = Sequences({"text": clip.text_BWE}, {"text": clip.text_valid_BW}, {}, clip.key)
        coded = self.unicode.encode(batch)["text"]
        return mean_code(coded.quantised_BTD, coded.valid_BT)[:, None] * clip.valid_BT[..., None]


def _check(config: Config) -> None:
    unicode, audio = config.model.unicode, config.model.audio
    if not {"audio", "text"} <= set(unicode.modalities):
        raise ValueError(
            f"model.unicode.modalities={list(unicode.modalities)}: queries are sound and words; pre-train Uni-Code on "
            "audio and text, with or without visual"
        )
    if unicode.inputs == "features" and (audio.kind != "vggish" or unicode.audio_channels != AUDIO_CHANNELS):
        raise ValueError(
            f"model.audio.kind={audio.kind}, model.unicode.audio_channels={unicode.audio_channels}: with "
            f"model.unicode.inputs=features the clips' sound goes through vggish, which gives {AUDIO_CHANNELS}"
        )


def _without_picture(config: Config) -> UnicodeSystem:
    """Uni-Code as far as sound and words need it: the rest, which trains with them, would be most of the weights."""
    unicode = replace(
        config.model.unicode, modalities=tuple(m for m in config.model.unicode.modalities if m != "visual")
    )
    losses = replace(config.loss, unicode=replace(config.loss.unicode, club=0.0, cpc=0.0))
    smaller = replace(config, model=replace(config.model, unicode=unicode), loss=losses)
    return UnicodeSystem(smaller, load_pretrained=False)


def _read(unicode: UnicodeSystem, config: Config) -> None:
    """Fill the weights from model.query.checkpoint."""
    from avs_dist.checkpoint import load_system  # which imports all systems

    path = config.model.query.checkpoint
    if path is None:
        raise ValueError(f"{KEY}: name a run of Uni-Code (avs-dist train with model.system=unicode)")
    try:
        trained, there = load_system(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{KEY}: {error}") from None
    if not isinstance(trained, UnicodeSystem):
        raise ValueError(f"{KEY}: {path} was trained with model.system={there.model.system}, expected unicode")
    here, known = _settings(config), _settings(there)
    differ = [f"{key}={value} (here {here.get(key)})" for key, value in known.items() if here.get(key) != value]
    if differ:
        raise ValueError(f"{KEY}: {path} was trained with other settings; set {', '.join(differ)}")
    weights = trained.state_dict()
    # how long each modality has not chosen each code: for training alone, and the picture counts there
    weights["codebook.idle"] = unicode.codebook.idle
    unicode.load_state_dict({name: weights[name] for name in unicode.state_dict()})


def _settings(config: Config) -> dict[str, Any]:
    """What must be as in the pre-training, by dotted names."""
    unicode = to_dict(config.model.unicode)
    codebook = unicode.pop("codebook")
    found = {f"model.unicode.{key}": value for key, value in unicode.items()}
    found |= {f"model.unicode.codebook.{key}": value for key, value in codebook.items()}
    if config.model.unicode.inputs == "media":
        found["model.audio.kind"] = config.model.audio.kind
    return found
