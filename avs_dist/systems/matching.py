"""The audio-visual matching (AVM) loss of a system: over its stages, frames and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.losses import alignment
from avs_dist.systems.generator import Masks, Seen
from avs_dist.systems.trunk import NUM_STAGES, Trunk
from avs_dist.world import gather_rows, global_mean, world_size


def matching_terms(config: Config, clip: Clip, masks: Masks, trunk: Trunk, seen: Seen) -> dict[str, Tensor]:
    """The weighted AVM loss as "avm", or nothing where none is configured."""
    if config.loss.avm == "none":
        return {}
    audio = partial(trunk.project_audio, seen.audio_BTD)
    return {"avm": config.loss.avm_weight * matching_loss(config, clip, masks.logits_BTHW, masks.features, audio)}


def matching_loss(
    config: Config,
    clip: Clip,
    logits_BTHW: Tensor,
    features: Sequence[Tensor],
    audio: Callable[[int], Tensor],
) -> Tensor:
    """Mean over stages and frames (published code: sum over frames for the KL variants), not weighted.

    Args:
        features: [B,T,C,h,w] of each stage, after TPAVI, as the loss gets to see them.
        audio: stage -> audio in the same channels [B,T,C].
    """
    loss = config.loss
    counted_BT = labelled(clip) if loss.avm == "avss_kl" else clip.valid_BT
    summed = config.model.compat == "published_code" and loss.avm in alignment.SUMMED_IN_PUBLISHED_CODE
    total = logits_BTHW.new_zeros(())
    for stage in loss.avm_stages:
        if loss.avm == "visual_visual":
            of_stage = (logits_BTHW, features[stage], audio(stage))
            stage_total, count = _visual_visual(*of_stage, counted_BT, loss.avm_normalise)
        else:
            compare = alignment.AUDIO_VISUAL[loss.avm]
            loss_BT = compare(logits_BTHW, features[stage], audio(stage), normalise=loss.avm_normalise)
            stage_total, count = (loss_BT * counted_BT).sum(), counted_BT.sum()
        # the engine averages gradients over ranks: times world_size is the sum over all ranks
        total = total + (stage_total * world_size() if summed else global_mean(stage_total, count))
    return total / len(loss.avm_stages)


def labelled(clip: Clip) -> Tensor:
    """Frames that exist and carry a mask, bool [B,T]."""
    return clip.labelled_BT & clip.valid_BT


def with_mask(clip: Clip) -> Tensor:
    """Frames of clips that have a mask, bool [B,T]: of the others there is no posterior."""
    return labelled(clip).any(1, keepdim=True).expand_as(clip.valid_BT)


def check_matching(config: Config) -> None:
    """Raises ValueError where the AVM loss is asked for at a stage without audio."""
    model, loss = config.model, config.loss
    if not set(loss.avm_stages) <= set(range(NUM_STAGES)):
        raise ValueError(f"loss.avm_stages: stages are 0 (finest) to 3, got {list(loss.avm_stages)}")
    if loss.avm == "none":
        return
    if not loss.avm_stages:
        raise ValueError(f"loss.avm_stages: loss.avm={loss.avm} needs at least one stage")
    if model.tpavi.key == "visual" or not set(loss.avm_stages) <= set(model.tpavi.stages):
        raise ValueError(
            f"loss.avm={loss.avm} compares with the audio of a TPAVI block: loss.avm_stages {list(loss.avm_stages)} "
            f"must be among model.tpavi.stages {list(model.tpavi.stages)}, and model.tpavi.key audio or both"
        )


def _visual_visual(
    logits_BTHW: Tensor, features_BTCHW: Tensor, audio_BTC: Tensor, counted_BT: Tensor, normalise: bool
) -> tuple[Tensor, Tensor]:
    visual_MC = alignment.soft_masked_mean(logits_BTHW, features_BTCHW)[counted_BT]
    audio_MC = audio_BTC[counted_BT]
    all_visual_NC, first = gather_rows(visual_MC)
    all_audio_NC, _ = gather_rows(audio_MC.detach())
    loss_M = alignment.visual_visual(visual_MC, audio_MC, first, all_visual_NC, all_audio_NC, normalise)
    return loss_M.sum(), counted_BT.sum()
