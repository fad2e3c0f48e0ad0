"""Measures of the downstream tasks, and what the best constant answer would score on them."""

from __future__ import annotations

import torch
from torch import Tensor

PUBLISHED_BATCH = 80  # clips whose precision and recall the public code averages


def accuracy(logits_NK: Tensor, category_N: Tensor) -> float:
    """Share of the clips whose highest logit is that of their event."""
    return (logits_NK.argmax(1) == category_N).double().mean().item()


def segment_f1(said_NTK: Tensor, true_NTK: Tensor, valid_NT: Tensor) -> float:
    """Micro F1 over all events and seconds that exist: 2 hits / (said + true); 0 where there is neither.

    Args:
        said_NTK, true_NTK: bool, events without the background.
    """
    said_MK, true_MK = said_NTK[valid_NT], true_NTK[valid_NT]
    total = (said_MK.sum() + true_MK.sum()).item()
    return 2.0 * (said_MK & true_MK).sum().item() / total if total else 0.0


def published_precision_recall(said_NTC: Tensor, true_NTC: Tensor, valid_NT: Tensor) -> tuple[float, float]:
    """Micro precision and recall of each batch of 80 clips, averaged over the batches by their clips (public code).

    The background counts as an event. A batch where nothing is said has precision 0 and recall 0.

    Args:
        said_NTC, true_NTC: bool, events and, last, the background.
    """
    precision = recall = 0.0
    for start in range(0, len(said_NTC), PUBLISHED_BATCH):
        part = slice(start, start + PUBLISHED_BATCH)
        said_MC, true_MC = said_NTC[part][valid_NT[part]], true_NTC[part][valid_NT[part]]
        hits, said, true = ((x.sum().item()) for x in (said_MC & true_MC, said_MC, true_MC))
        share = len(said_NTC[part]) / len(said_NTC)
        precision += share * hits / max(said, 1)
        recall += share * hits / max(true, 1)
    return precision, recall


def harmonic_mean(precision: float, recall: float) -> float:
    """F1; 0 where both are 0."""
    return 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0


def constant_f1(true_NTK: Tensor, valid_NT: Tensor) -> float:
    """Highest micro F1 of saying the same set of events in every second: that of the commonest events."""
    counts_K, seconds = _counts(true_NTK, valid_NT)
    said_K = seconds * torch.arange(1, len(counts_K) + 1, dtype=torch.float64)
    return (2.0 * counts_K.cumsum(0) / (said_K + counts_K.sum()).clamp_min(1)).max().item()


def constant_precision(true_NTC: Tensor, valid_NT: Tensor) -> float:
    """Highest precision of saying the same in every second: that of the commonest event, or of the background."""
    counts_C, seconds = _counts(true_NTC, valid_NT)
    return counts_C[0].item() / max(seconds, 1)


def _counts(true_NTK: Tensor, valid_NT: Tensor) -> tuple[Tensor, int]:
    """In how many seconds each event happens, the commonest first, and the number of seconds."""
    true_MK = true_NTK[valid_NT]
    return true_MK.sum(0).double().sort(descending=True).values, len(true_MK)


def recall_at(scores_MN: Tensor, relevant_MN: Tensor, k: int) -> Tensor:
    """Probability that one of the first k candidates is relevant, where equal scores come in random order, [M] float64.

    With all scores equal it is the chance level; without ties it is 0 or 1.

    Args:
        scores_MN: of N candidates for each of M queries.
        relevant_MN: bool, at least one for each query.
    """
    best_M1 = scores_MN.masked_fill(~relevant_MN, float("-inf")).amax(1, keepdim=True)
    equal_MN = scores_MN == best_M1
    tied_M, hits_M = equal_MN.sum(1).double(), (equal_MN & relevant_MN).sum(1).double()
    places_M = (k - (scores_MN > best_M1).sum(1)).double().clamp_min(0).minimum(tied_M)
    misses_M = tied_M - hits_M
    # C(misses, places) / C(tied, places): none of the relevant ones gets a place
    log_missed_M = (
        torch.lgamma(misses_M + 1)
        - torch.lgamma((misses_M - places_M).clamp_min(0) + 1)
        - torch.lgamma(tied_M + 1)
        + torch.lgamma(tied_M - places_M + 1)
    )
    return torch.where(places_M > misses_M, 1.0, 1.0 - log_missed_M.exp()).clamp(0.0, 1.0)
