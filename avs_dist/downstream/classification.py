"""Which event a clip shows (AVE, VGGSound-AVEL, UCF-101 and VGGSound)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.downstream.coded import CodedSplit
from avs_dist.downstream.heads import ClipHead
from avs_dist.downstream.metrics import accuracy
from avs_dist.downstream.training import Examples
from avs_dist.downstream.transfer import Task


class Classification(Task):
    """A category for each clip, which is its one event; clips without an event are left out.

    The event counts for all modalities of the clip, also for those without labels of their own, such as text.
    """

    metrics = {
        "accuracy": "share of the test clips whose event is named, after the epoch with the best accuracy on "
        "validation clips of the labelled modality"
    }
    published = {
        "accuracy_published": "the same as the public code measures it: the best epoch on the very clips that are "
        "measured; within one data set these are the clips that the head was trained on"
    }

    def examples(self, clips: CodedSplit, modality: str) -> Examples:
        """ "code" [N,T,D], "valid" [N,T], "category" int64 [N].

        Raises:
            ValueError: a clip with several events, naming it.
        """
        happens_NK = clips.happens()
        several = happens_NK.sum(1) > 1
        if several.any():
            clip = int(several.nonzero()[0])
            names = [clips.events[k] for k in happens_NK[clip].nonzero().flatten().tolist()]
            raise ValueError(f"clip {clips.names[clip]} has the events {', '.join(names)}: to classify it needs one")
        used_N = clips.valid[modality].any(1) & happens_NK.any(1)
        return {
            "code": clips.codes[modality][used_N],
            "valid": clips.valid[modality][used_N],
            "category": happens_NK[used_N].int().argmax(1),
        }

    def build(self, dim: int, num_events: int) -> nn.Module:
        return ClipHead(dim, num_events)

    def loss(self, head: nn.Module, batch: Examples) -> Tensor:
        return F.cross_entropy(self.logits(head, batch), batch["category"])

    def logits(self, head: nn.Module, batch: Examples) -> Tensor:
        return head(batch["code"], batch["valid"])

    def scores(self, logits: Tensor, examples: Examples) -> dict[str, float]:
        value = accuracy(logits, examples["category"])
        return {"accuracy": value, "accuracy_published": value}

    def constant(self, examples: Examples) -> dict[str, float]:
        category_N = examples["category"]
        share = torch.bincount(category_N).max().item() / len(category_N)
        return {"accuracy": share, "accuracy_published": share}
