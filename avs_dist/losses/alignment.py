"""Audio-visual matching (AVM) losses: the visual features under the predicted mask should agree with the audio.

All published variants, as the loss of each frame [B,T]; the caller weights the frames and takes the mean over all
ranks, so that the value does not depend on the batch. The public code of ms3_kl and visual_visual sums over the frames
instead (reduction "sum"), which makes the weight of the loss grow with the batch: see SUMMED_IN_PUBLISHED_CODE.

Arguments of all: logits_BTHW, the predicted mask logits; features_BTCHW, the output of TPAVI at one stage;
audio_BTC, the audio in the same channels (`TPAVI.project_audio`); normalise, to divide the visual and the audio vector
by their length before they are compared (flag norm_fea of the public codes). All are computed in float32.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SUMMED_IN_PUBLISHED_CODE = frozenset({"ms3_kl", "visual_visual"})


def s4_cosine(logits_BTHW: Tensor, features_BTCHW: Tensor, audio_BTC: Tensor, normalise: bool = False) -> Tensor:
    """-log(relu(cos(v, a)) + 1e-6), v the mean feature where the pooled probability exceeds 0.5 (public S4 code).

    The threshold passes no gradient to the mask. A frame with an empty mask costs the constant -log(1e-6). `normalise`
    changes nothing, as the cosine is that of unit vectors in any case.
    """
    mask_BTHW = (_pool(logits_BTHW.float().sigmoid(), features_BTCHW) > 0.5).float()
    pixels_BT1 = mask_BTHW.flatten(2).sum(2, keepdim=True)
    visual_BTC = _masked_sum(features_BTCHW, mask_BTHW) / (pixels_BT1 + 1e-6)
    cosine_BT = (F.normalize(visual_BTC, dim=-1) * F.normalize(audio_BTC.float(), dim=-1)).sum(-1)
    return -(F.relu(cosine_BT) + 1e-6).log()


def ms3_kl(logits_BTHW: Tensor, features_BTCHW: Tensor, audio_BTC: Tensor, normalise: bool = False) -> Tensor:
    """KL(softmax(a) || softmax(v)) over channels (TPAVI paper eq. 6), v = mean over all positions of mask * feature."""
    visual_BTC = soft_masked_mean(logits_BTHW, features_BTCHW)
    return _kl(_compared(audio_BTC, normalise), _compared(visual_BTC, normalise))


def ms3_euclidean(logits_BTHW: Tensor, features_BTCHW: Tensor, audio_BTC: Tensor, normalise: bool = False) -> Tensor:
    """||a - v||_2 with v as in `ms3_kl` (public MS3 code, --euclidean_flag)."""
    visual_BTC = soft_masked_mean(logits_BTHW, features_BTCHW)
    return F.pairwise_distance(_compared(audio_BTC, normalise), _compared(visual_BTC, normalise))


def avss_kl(logits_BTHW: Tensor, features_BTCHW: Tensor, audio_BTC: Tensor, normalise: bool = False) -> Tensor:
    """`ms3_kl` with the hard mask logit > 0, which passes no gradient (public AVSS code; meant for labelled frames)."""
    mask_BTHW = _pool((logits_BTHW > 0).float(), features_BTCHW)
    visual_BTC = _masked_mean(features_BTCHW, mask_BTHW)
    return _kl(_compared(audio_BTC, normalise), _compared(visual_BTC, normalise))


class AudioVisualLoss(Protocol):
    def __call__(
        self, logits_BTHW: Tensor, features_BTCHW: Tensor, audio_BTC: Tensor, normalise: bool = False
    ) -> Tensor: ...


AUDIO_VISUAL: dict[str, AudioVisualLoss] = {
    "s4_cosine": s4_cosine,
    "ms3_kl": ms3_kl,
    "ms3_euclidean": ms3_euclidean,
    "avss_kl": avss_kl,
}


def visual_visual(
    visual_MC: Tensor,
    audio_MC: Tensor,
    first: int,
    all_visual_NC: Tensor,
    all_audio_NC: Tensor,
    normalise: bool = False,
) -> Tensor:
    """KL(softmax(v_j) || softmax(v_i)), j the other frame with the nearest sound (TPAVI paper, AVM-VV).

    The partner is looked for in all clips of the global batch; without the gathered arguments of other ranks the
    loss would change with the number of ranks.

    Args:
        visual_MC: `soft_masked_mean` of the M frames of this rank.
        audio_MC: their audio.
        first: index of this rank's first frame among all.
        all_visual_NC, all_audio_NC: those of the N frames of all ranks, with gradient.
        normalise: the nearest sound is then that of the nearest direction.

    Returns:
        Loss of each of the M frames; zero if there is no other frame.
    """
    if len(all_audio_NC) < 2:
        return visual_MC.sum(1) * 0.0
    distance_MN = torch.cdist(_compared(audio_MC.detach(), normalise), _compared(all_audio_NC.detach(), normalise))
    own_M = torch.arange(len(audio_MC), device=audio_MC.device)
    distance_MN[own_M, own_M + first] = torch.inf
    return _kl(_compared(all_visual_NC[distance_MN.argmin(1)], normalise), _compared(visual_MC, normalise))


def soft_masked_mean(logits_BTHW: Tensor, features_BTCHW: Tensor) -> Tensor:
    """v_BTC = mean over all positions of sigmoid(pooled logits) * feature, whatever the mask's area (published)."""
    return _masked_mean(features_BTCHW, _pool(logits_BTHW.float(), features_BTCHW).sigmoid())


def _pool(mask_BTHW: Tensor, features_BTCHW: Tensor) -> Tensor:
    height, width = features_BTCHW.shape[-2:]
    return F.adaptive_avg_pool2d(mask_BTHW, (height, width))


def _masked_sum(features_BTCHW: Tensor, mask_BTHW: Tensor) -> Tensor:
    tokens_BTPC = features_BTCHW.permute(0, 1, 3, 4, 2).flatten(2, 3).float()
    return (mask_BTHW.flatten(2)[:, :, None] @ tokens_BTPC)[:, :, 0]


def _masked_mean(features_BTCHW: Tensor, mask_BTHW: Tensor) -> Tensor:
    return _masked_sum(features_BTCHW, mask_BTHW) / mask_BTHW.shape[2:].numel()


def _compared(vector: Tensor, normalise: bool) -> Tensor:
    """float32 [...,C], of unit length if `normalise`."""
    return F.normalize(vector.float(), dim=-1) if normalise else vector.float()


def _kl(target: Tensor, value: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(value)) over the last dimension."""
    return F.kl_div(value.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)
