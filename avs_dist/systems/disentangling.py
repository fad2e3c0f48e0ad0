"""Dual cross-modal information disentangling (DCID; Uni-Code, section 4.2), over the clips of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from avs_dist.config import Config
from avs_dist.losses.information import club, club_sampled, cpc
from avs_dist.modules.conditional_gaussian import ConditionalGaussian
from avs_dist.modules.cross_cpc import CrossPredictor
from avs_dist.world import all_reduce_sum, counted_mean, gather_candidates, gather_flags, gather_rows

SHARES = 2**20  # a random second is a random one of so many parts of a clip, whatever its length


class Disentangled(NamedTuple):
    """Sums over the modalities of this rank's shares of the means over all ranks."""

    information: Tensor  # I(semantic; specific), an upper bound, in nats
    log_likelihood: Tensor  # of the specific vectors, as their network sees them; without gradient


def club_loss(
    config: Config,
    networks: nn.ModuleDict,
    known: Mapping[str, Tensor],
    specific: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    step: int,
    learn: bool,
) -> Disentangled:
    """What the semantic vectors tell of the specific ones (eq. 5); the networks of eq. 4 learn first.

    Args:
        networks: a ConditionalGaussian for each modality.
        known: semantic vectors, or their codes, [B,T,D] of each modality.
        specific: [B,T,S] of each modality.
        learn: let the networks take their steps, on values without gradient.
    """
    settings = config.loss.unicode
    information, likelihood = [], []
    for modality, network in networks.items():
        assert isinstance(network, ConditionalGaussian)
        x_BTD, y_BTS, counted_BT = known[modality], specific[modality], valid[modality]
        if learn:
            fitted = network.fit(
                x_BTD.flatten(0, 1), y_BTS.flatten(0, 1), settings.club_steps, counted_BT.flatten(), all_reduce_sum
            )
            likelihood.append(fitted)
        predicted = network(x_BTD)
        if settings.club_estimate == "variational":
            each_BT = club(predicted, y_BTS, counted_NT=counted_BT, reduce=all_reduce_sum)
        else:
            other_BTS, there_BT = _others(y_BTS.float(), counted_BT, config.seed, step)
            each_BT, counted_BT = club_sampled(predicted, y_BTS.float(), other_BTS), counted_BT & there_BT
        information.append(counted_mean(each_BT.flatten(), counted_BT.flatten()))
    total = torch.stack(information).sum()
    return Disentangled(total, torch.stack(likelihood).sum() if likelihood else torch.zeros_like(total))


def cpc_loss(
    config: Config, predictor: CrossPredictor, semantic: Mapping[str, Tensor], valid: Mapping[str, Tensor], step: int
) -> Tensor:
    """What each modality tells of the next seconds of the others (eq. 6), a sum over ordered pairs of modalities.

    t is as far into what the two modalities of a clip have in common for all clips of a step, which is the same second
    for clips of the same length; it depends on seed and step alone. Candidates are the clips of all ranks that both
    modalities of the pair go on long enough in.
    """
    steps, share = predictor.steps, int(np.random.default_rng([config.seed, step]).integers(SHARES))
    lengths = [torch.minimum(valid[source].sum(1), valid[target].sum(1)) for source, target in predictor.pairs]
    # t in (0, T-K]
    seen = [1 + share * (length_B - steps).clamp_min(1) // SHARES for length_B in lengths]
    total = next(iter(semantic.values())).new_zeros((), dtype=torch.float32)
    predictions = predictor(semantic, seen)
    for (source, target), seen_B, length_B, prediction_KBD in zip(
        predictor.pairs, seen, lengths, predictions, strict=True
    ):
        weight = config.loss.unicode.cpc_self if source == target else 1.0
        there_B = length_B > steps
        there_N = gather_flags(there_B)
        for k in range(steps):
            # clips that end before are looked up within their padding, and not counted
            second_B = (seen_B + k).clamp_max(semantic[target].shape[1] - 1)
            future_BD = semantic[target].gather(1, second_B[:, None, None].expand(-1, 1, prediction_KBD.shape[2]))[:, 0]
            candidates_ND, own_B = gather_candidates(future_BD.float())
            loss_B = cpc(prediction_KBD[k], candidates_ND, own_B, counted_N=there_N)
            total = total + weight / steps * counted_mean(loss_B, there_B)
    return total


def _others(y_BTS: Tensor, valid_BT: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The vectors of another clip of any rank for each clip, and which of its seconds exist."""
    all_NTS, first = gather_rows(y_BTS, equal=True)
    there_NT = gather_flags(valid_BT)
    order = np.random.default_rng([seed, step, len(all_NTS)]).permutation(len(all_NTS))
    # from each to the next of a random order: never to itself
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)
    other_B = torch.from_numpy(following[first : first + len(y_BTS)]).to(y_BTS.device, non_blocking=True)
    return all_NTS[other_B], there_NT[other_B]
