"""The segmentation loss of a system: over frames and ranks, with the mixing loss of the transformer decoder."""

from __future__ import annotations

from torch import Tensor

from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.losses import ecmvae_code
from avs_dist.losses.segmentation import SEGMENTATION, cross_entropy, mixing_loss
from avs_dist.systems.generator import Masks
from avs_dist.systems.matching import labelled
from avs_dist.world import global_mean


def segmentation_terms(config: Config, clip: Clip, masks: Masks) -> dict[str, Tensor]:
    """Mean over the labelled frames of all ranks: the loss under its name, and "mix" where the decoder has it."""
    kind, counted_BT = config.loss.segmentation, labelled(clip)
    if masks.class_logits_BTKHW is not None:
        total, count = cross_entropy(masks.class_logits_BTKHW, clip.masks_BTHW, counted_BT)
    elif kind == "structure" and config.model.compat == "published_code":
        total, count = ecmvae_code.structure_loss(masks.logits_BTHW, clip.masks_BTHW, counted_BT)
    else:
        total, count = SEGMENTATION[kind](masks.logits_BTHW, clip.masks_BTHW, counted_BT)
    terms: dict[str, Tensor] = {kind: global_mean(total, count)}
    if masks.mix_BTHW is not None:
        terms["mix"] = config.loss.mix * global_mean(*mixing_loss(masks.mix_BTHW, clip.masks_BTHW, counted_BT))
    return terms


def check_segmentation(config: Config) -> None:
    """Raises ValueError where loss and number of classes do not fit."""
    kind, num_classes = config.loss.segmentation, config.model.num_classes
    if (kind == "cross_entropy") != (num_classes > 1):
        raise ValueError(
            f"loss.segmentation={kind} does not fit model.num_classes={num_classes}: cross_entropy is for several "
            "classes (AVSS), the others for one"
        )
