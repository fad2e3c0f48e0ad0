"""The contrastive loss between latent codes and their conditions, over the clips of all ranks."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from avs_dist.config import DiffusionLossConfig
from avs_dist.losses.information import cosine_scores, info_nce
from avs_dist.world import gather_rows, global_mean, rank

MAX_CLIPS = 2**20  # of a rank


class Contrast(NamedTuple):
    """This rank's shares of the means over all ranks."""

    loss: Tensor  # not weighted
    positive: Tensor  # cosine of a condition with its own code
    negative: Tensor  # with those of other clips


def contrast(config: DiffusionLossConfig, code_MD: Tensor, condition_MD: Tensor, clip_M: Tensor) -> Contrast:
    """InfoNCE of cosines: the code of a condition among those of all other clips (eq. 11).

    Frames of one clip are no negatives of each other: they are alike, and in S4 training have the same mask. Equal
    masks of other clips, such as empty ones, do count as negatives, as in the paper ("all the samples except z_0").

    Args:
        clip_M: which clip of this rank each row belongs to.
    """
    if config.trains == "condition":
        code_MD = code_MD.detach()
    all_codes_ND, first = gather_rows(code_MD)
    all_clips_N, _ = gather_rows(clip_M.double() + rank() * MAX_CLIPS)
    own_M = torch.arange(first, first + len(code_MD), device=code_MD.device)
    same_MN = all_clips_N[own_M][:, None] == all_clips_N
    scores_MN = cosine_scores(condition_MD, all_codes_ND)
    compare = partial(info_nce, positive_M=own_M, temperature=config.temperature, excluded_MN=same_MN)
    loss_M = compare(scores_MN)
    if config.symmetric:
        all_conditions_ND, _ = gather_rows(condition_MD)
        loss_M = (loss_M + compare(cosine_scores(code_MD, all_conditions_ND))) / 2
    count, negative_MN = loss_M.new_full((), float(len(loss_M))), ~same_MN
    return Contrast(
        global_mean(loss_M.sum(), count),
        global_mean(scores_MN.gather(1, own_M[:, None]).detach().sum(), count),
        global_mean(scores_MN.detach()[negative_MN].sum(), negative_MN.sum().to(loss_M.dtype)),
    )
