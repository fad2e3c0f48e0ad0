"""Which events happen in each second of a clip (AVVP, AVE to AVVP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.downstream.coded import CodedSplit
from avs_dist.downstream.heads import SecondHead
from avs_dist.downstream.metrics import (
    constant_f1,
    constant_precision,
    harmonic_mean,
    published_precision_recall,
    segment_f1,
)
from avs_dist.downstream.training import Examples
from avs_dist.downstream.transfer import Task


class Localisation(Task):
    """Any number of events in each second; only modalities that are labelled for themselves take part."""

    metrics = {
        "segment_f1": "micro F1 over the seconds and events of the test clips, without the background, after the epoch "
        "with the best F1 on validation clips of the labelled modality"
    }
    published = {
        "accuracy_published": "what the paper calls accuracy on AVVP: micro precision with the background as an event, "
        "mean over batches of 80 clips, of the best epoch on the clips that are measured; within one data set the head "
        "was trained on the same clips, in the other modality",
        "f1_published": "what the paper calls F1 on AVE to AVVP: of mean precision and mean recall over batches of 80 "
        "clips, otherwise as accuracy_published",
    }

    def examples(self, clips: CodedSplit, modality: str) -> Examples:
        """ "code" [N,T,D], "valid" [N,T], "target" float [N,T,K+1], the background last."""
        used_N = clips.valid[modality].any(1) & clips.labelled[modality]
        return {
            "code": clips.codes[modality][used_N],
            "valid": clips.valid[modality][used_N],
            "target": with_background(clips.labels[modality][used_N]),
        }

    def build(self, dim: int, num_events: int) -> nn.Module:
        return SecondHead(dim, num_events)

    def loss(self, head: nn.Module, batch: Examples) -> Tensor:
        """Binary cross entropy and `exp_log_loss`, over the seconds that exist."""
        assert isinstance(head, SecondHead)
        logits_MC = head(batch["code"])[batch["valid"]]
        target_MC = batch["target"][batch["valid"]]
        return F.binary_cross_entropy_with_logits(logits_MC, target_MC) + exp_log_loss(
            logits_MC, target_MC, head.alpha_K
        )

    def logits(self, head: nn.Module, batch: Examples) -> Tensor:
        return head(batch["code"])

    def scores(self, logits: Tensor, examples: Examples) -> dict[str, float]:
        said_NTC, true_NTC, valid_NT = logits > 0, examples["target"] > 0, examples["valid"]
        precision, recall = published_precision_recall(said_NTC, true_NTC, valid_NT)
        return {
            "segment_f1": segment_f1(said_NTC[..., :-1], true_NTC[..., :-1], valid_NT),
            "accuracy_published": precision,
            "f1_published": harmonic_mean(precision, recall),
        }

    def constant(self, examples: Examples) -> dict[str, float]:
        true_NTC, valid_NT = examples["target"] > 0, examples["valid"]
        return {
            "segment_f1": constant_f1(true_NTC[..., :-1], valid_NT),
            "accuracy_published": constant_precision(true_NTC, valid_NT),
            "f1_published": constant_f1(true_NTC, valid_NT),
        }


def with_background(labels_NTK: Tensor) -> Tensor:
    """Labels as float with the background as last event, which is where there is no other; [N,T,K+1]."""
    background_NT1 = 1 - labels_NTK.amax(-1, keepdim=True)
    return torch.cat([labels_NTK, background_NT1], -1).float()


def exp_log_loss(logits_MC: Tensor, target_MC: Tensor, alpha_C: Tensor) -> Tensor:
    """-mean over M of the sum over C of t log softmax(logits) exp(-alpha) (public code of Uni-Code, "ExpLog").

    The exponents are trained along with the head, and nothing holds them: they grow, and the loss fades.
    """
    return -(target_MC * logits_MC.log_softmax(1) * (-alpha_C).exp()).sum(1).mean()
