"""From what was seen and heard to masks: necks, TPAVI, latent codes (where a system has them), decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from avs_dist.clip import Clip
from avs_dist.config import ModelConfig
from avs_dist.draws import ClipDraws
from avs_dist.modules.decoder import Skips, build_decoder
from avs_dist.semantic import mask_pictures, sounding_logits
from avs_dist.systems.trunk import NUM_STAGES, Existing, Trunk, build_necks

COARSEST = NUM_STAGES - 1


class Seen(NamedTuple):
    """A batch of N existing frames before any code."""

    exist: Existing
    frames_NCHW: Tensor
    maps: list[Tensor]  # of the backbone
    audio_BTD: Tensor | None

    @property
    def audio_ND(self) -> Tensor | None:
        """For the latent encoders, which never train the audio encoder: it is frozen in the papers, and where it is
        not the losses of the codes would silence it."""
        return None if self.audio_BTD is None else self.exist.select(self.audio_BTD).detach()


class Scene(NamedTuple):
    """What a generator makes of the frames before it gets the codes."""

    features: list[Tensor]  # [B,T,C,h,w] after TPAVI; without the coarsest stage where the codes enter before TPAVI
    coarsest_NCHW: Tensor  # where the codes enter
    skips: Skips


class Masks(NamedTuple):
    """What a generator paints; zero where there is no frame."""

    logits_BTHW: Tensor  # log odds of "not background", float32
    class_logits_BTKHW: Tensor | None  # None where there is only sounding or silent
    mix_BTHW: Tensor | None  # logits of the mixing loss, at a smaller size; None where the decoder has none
    features: list[Tensor]  # [B,T,C,h,w] of each stage, as the AVM loss gets to see them


class Generator(nn.Module):
    """p(y | x, codes); TPAVI belongs to the trunk.

    Args:
        injection: brings codes [N,K] into the coarsest stage; None in a system without codes.
        after_tpavi: the codes enter after the TPAVI block of the coarsest stage.
    """

    def __init__(
        self, model: ModelConfig, trunk: Trunk, injection: nn.Module | None = None, after_tpavi: bool = True
    ) -> None:
        super().__init__()
        self.num_classes, self.after_tpavi = model.num_classes, after_tpavi
        self.necks = build_necks(model, trunk.backbone.channels)
        self.injection = injection
        sizes = (model.neck.channels, model.num_classes, model.compat, trunk.heard_channels)
        self.decoder = build_decoder(model.decoder, *sizes)

    def prepare(self, trunk: Trunk, seen: Seen) -> Scene:
        tokens = [neck(maps_NCHW) for neck, maps_NCHW in zip(self.necks, seen.maps, strict=True)]
        stages = range(NUM_STAGES if self.after_tpavi else COARSEST)
        features = [trunk.interact(stage, tokens[stage], seen.audio_BTD, seen.exist) for stage in stages]
        coarsest_NCHW = seen.exist.select_maps(features[COARSEST]) if self.after_tpavi else tokens[COARSEST]
        finer = [seen.exist.select_maps(f) for f in features[:COARSEST]]
        audio_ND = None if seen.audio_BTD is None else seen.exist.select(seen.audio_BTD)
        return Scene(features, coarsest_NCHW, self.decoder.skips(finer, audio_ND))

    def paint(
        self,
        trunk: Trunk,
        seen: Seen,
        scene: Scene,
        codes_NK: Tensor | None = None,
        noise_NKHW: Tensor | None = None,
    ) -> Masks:
        """Masks of the frames for the codes, if there are any, and noise added to these at each position."""
        coarsest_NCHW = scene.coarsest_NCHW
        if self.injection is not None:
            coarsest_NCHW = self.injection(coarsest_NCHW, codes_NK, noise_NKHW)
        features = scene.features
        if not self.after_tpavi:
            features = [*features, trunk.interact(COARSEST, coarsest_NCHW, seen.audio_BTD, seen.exist)]
            coarsest_NCHW = seen.exist.select_maps(features[COARSEST])
        height, width = seen.frames_NCHW.shape[-2:]
        painting = self.decoder.paint(coarsest_NCHW, scene.skips, (height, width))
        logits_NKHW, restore = painting.logits_NKHW.float(), seen.exist.restore
        return Masks(
            restore(sounding_logits(logits_NKHW)),
            restore(logits_NKHW) if self.num_classes > 1 else None,
            None if painting.mix_NHW is None else restore(painting.mix_NHW.float()),
            self.decoder.seen_by_losses(features),
        )


def see_and_hear(trunk: Trunk, clip: Clip, draws: ClipDraws | None = None) -> Seen:
    exist = Existing(clip.valid_BT)
    return Seen(exist, exist.select(clip.normalised_BTCHW), trunk.see(clip, exist, draws), trunk.hear(clip, exist))


def posterior_pictures(clip: Clip, seen: Seen, num_classes: int) -> Tensor:
    """`posterior_masks` of the existing frames, as pictures for an encoder [N,1 or 3,H,W]."""
    return mask_pictures(seen.exist.select(posterior_masks(clip)), num_classes, seen.frames_NCHW.dtype)


def posterior_masks(clip: Clip) -> Tensor:
    """[B,T,H,W]: each frame's own mask; one without takes that of the labelled frame before it, or else the first.

    S4 training labels the first frame only; its mask is repeated for all frames (ECMVAE section 4.1; contrastive
    diffusion AVS does not say).
    """
    frames_T = torch.arange(clip.labelled_BT.shape[1], device=clip.labelled_BT.device)
    before_BT = torch.where(clip.labelled_BT, frames_T, -1).cummax(1).values
    first_B1 = clip.labelled_BT.int().argmax(1, keepdim=True)
    source_BT = torch.where(before_BT < 0, first_B1, before_BT)
    return clip.masks_BTHW.gather(1, source_BT[:, :, None, None].expand_as(clip.masks_BTHW))
