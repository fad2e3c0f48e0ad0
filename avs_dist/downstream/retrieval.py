"""Retrieval between sound and another modality, tested with a third that was never paired with it (paper, section 5.1).

The codebook has been trained on pictures and text alone. A network of sound learns to find the codes of one of them
(first stage of the test), and is then asked for the codes of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.config import UnicodeConfig
from avs_dist.downstream.coded import CodedSplit
from avs_dist.downstream.metrics import recall_at
from avs_dist.downstream.protocol import divide
from avs_dist.downstream.results import aligned
from avs_dist.downstream.training import CHUNK, Examples, HeadTraining, count, fit_best, outputs
from avs_dist.losses.information import info_nce
from avs_dist.modules.sequence_encoders import TemporalEncoder
from avs_dist.pairing import mean_code

KS = (1, 5, 10)
TEMPERATURE = 0.07
SOUND = "audio"


@dataclass(frozen=True)
class Retrieval:
    """Recall of one head with the codes of one modality.

    trained, tested: modalities that the head has learnt to pair with sound, and whose codes it is asked for.
    direction:       "to audio": sound is looked for; "from audio": sound is the query.
    recall:          R@k by k: the clip's own counterpart is among the first k.
    event_recall:    a clip with an event of the query is among them; empty without labels.
    chance, event_chance: the same in random order.
    epoch:           after which the head was measured.
    """

    trained: str
    tested: str
    direction: str
    recall: dict[int, float]
    event_recall: dict[int, float]
    chance: dict[int, float]
    event_chance: dict[int, float]
    epoch: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SoundHead(nn.Module):
    """Sound as a unit vector in the space of the codes: transformer layers over its seconds, and their mean.

    Args:
        channels: C of the features of a second.
        dim: D of the codes.
        layers, heads, dropout: of the transformer.
    """

    def __init__(self, channels: int, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.encoder = TemporalEncoder(channels, dim, layers, heads, dropout)

    def forward(self, sound_BTC: Tensor, valid_BT: Tensor) -> Tensor:
        """[B,D]."""
        return F.normalize(mean_code(self.encoder(sound_BTC, valid_BT), valid_BT), dim=1)


def pair_examples(clips: CodedSplit, modality: str) -> Examples:
    """Clips with sound and the modality.

    "query" [N,D] unit mean codes, "sound" [N,T,C], "valid" [N,T] of the sound, "happens" [N,K].
    """
    used_N = clips.valid[modality].any(1) & clips.valid[SOUND].any(1)
    mean_ND = mean_code(clips.codes[modality][used_N], clips.valid[modality][used_N])
    return {
        "query": F.normalize(mean_ND, dim=1),
        "sound": clips.features[SOUND][used_N].float(),
        "valid": clips.valid[SOUND][used_N],
        "happens": clips.happens()[used_N].float(),
    }


def contrast(head: nn.Module, batch: Examples) -> Tensor:
    """Symmetric InfoNCE of the cosines; clips with the same codes, such as the same prompt, are no negatives."""
    query_BD, sound_BD = batch["query"], head(batch["sound"], batch["valid"])
    scores_BB = query_BD @ sound_BD.T
    own_B = torch.arange(len(query_BD), device=query_BD.device)
    same_BB = (query_BD[:, None] == query_BD).all(-1)
    both = [info_nce(s, own_B, temperature=TEMPERATURE, excluded_MN=same_BB) for s in (scores_BB, scores_BB.T)]
    return torch.stack(both).mean()


def retrieve(
    head: nn.Module, trained: str, tested: str, clips: CodedSplit, epoch: int, device: torch.device | str
) -> list[Retrieval]:
    """Recall in both directions with the codes of the modality `tested`; the gallery is every clip that has both."""
    examples = pair_examples(clips, tested)
    sound_ND = outputs(lambda batch: head(batch["sound"], batch["valid"]), examples, device)
    vectors = {"to audio": (examples["query"], sound_ND), "from audio": (sound_ND, examples["query"])}
    happens_NK = examples["happens"]
    nothing_NK = torch.zeros_like(happens_NK)
    found = []
    for direction, (query_ND, gallery_ND) in vectors.items():
        recall, chance = _recalls(query_ND, gallery_ND, nothing_NK)
        events: tuple[dict[int, float], dict[int, float]] = ({}, {})
        if happens_NK.any():
            events = _recalls(query_ND, gallery_ND, happens_NK)
        found.append(Retrieval(trained, tested, direction, recall, events[0], chance, events[1], epoch))
    return found


def _recalls(query_ND: Tensor, gallery_ND: Tensor, happens_NK: Tensor) -> tuple[dict[int, float], dict[int, float]]:
    """R@k, and that of random order; relevant are the own clip and those that share an event."""
    total = {k: torch.zeros(2, dtype=torch.float64) for k in KS}
    for start in range(0, len(query_ND), CHUNK):
        part = slice(start, start + CHUNK)
        scores_MN = query_ND[part] @ gallery_ND.T
        relevant_MN = happens_NK[part] @ happens_NK.T > 0
        relevant_MN.diagonal(start).fill_(True)
        for k in KS:
            for i, scores in enumerate((scores_MN, torch.zeros_like(scores_MN))):
                total[k][i] += recall_at(scores, relevant_MN, k).sum()
    return tuple({k: (total[k][i] / len(query_ND)).item() for k in KS} for i in (0, 1))  # type: ignore[return-value]


def retrieval_through_audio(
    splits: dict[str, CodedSplit], unicode: UnicodeConfig, settings: HeadTraining, train_on: Sequence[str] = ()
) -> list[Retrieval]:
    """Train a network of sound with each modality and test it with all, on held-out clips.

    The epoch is chosen by the mean recall to and from sound on validation clips, in the modality that was trained.

    Args:
        splits: every split of the shards, with the features of sound; see `protocol.divide`.
        unicode: the network of sound is as large as the semantic encoders of this.

    Raises:
        ValueError: a modality that no clip has beside sound.
    """
    parts = divide(splits)
    others = [m for m in parts[0].codes if m != SOUND]
    possible = [m for m in others if all(count(pair_examples(clips, m)) for clips in parts)]
    missing = [m for m in train_on if m not in possible]
    if missing or not possible:
        raise ValueError(
            f"--train-on {', '.join(missing) or 'any'}: clips with sound have codes of "
            f"{', '.join(possible) or 'nothing'} beside it in all of train, val and test"
        )
    found = []
    for m in train_on or possible:
        examples = pair_examples(parts[0], m)
        channels = examples["sound"].shape[-1]
        build = partial(SoundHead, channels, unicode.dim, unicode.layers, unicode.heads, unicode.dropout)
        score = partial(_mean_recall, modality=m, clips=parts[1], device=settings.device)
        head, epoch = fit_best(build, contrast, examples, settings, score)
        for tested in possible:
            found += retrieve(head, m, tested, parts[2], epoch, settings.device)
    return found


def table(results: Sequence[Retrieval]) -> str:
    """Results as text: a row for each head, modality and direction, and what the numbers mean."""
    events = any(result.event_recall for result in results)
    header = ["trained on", "tested on", "direction", *(f"R@{k}" for k in KS)]
    header += [f"event R@{k}" for k in KS] if events else []
    lines = [header]
    for result in results:
        tested = result.tested + (" (own)" if result.tested == result.trained else "")
        lines.append([result.trained, tested, result.direction, *_percent(result.recall, result.event_recall)])
    for tested in dict.fromkeys(result.tested for result in results):
        row = next(result for result in results if result.tested == tested)
        lines.append(["random order", tested, "", *_percent(row.chance, row.event_chance)])
    meaning = (
        "R@k        percent of the queries whose own counterpart is among the first k of the gallery\n"
        "event R@k  percent whose first k hold a clip with an event of the query\n"
        "direction  to audio: the gallery is sound, codes are the query; from audio: the other way round\n"
        "own        the modality that the head was trained with: what could be reached with the other"
    )
    return f"{aligned(lines)}\n\n{meaning}"


def _percent(*recalls: dict[int, float]) -> list[str]:
    return [f"{100 * recall[k]:.2f}" for recall in recalls for k in recall]


def _mean_recall(head: nn.Module, modality: str, clips: CodedSplit, device: torch.device | str) -> float:
    results = retrieve(head, modality, modality, clips, 0, device)
    values = [value for result in results for value in result.recall.values()]
    return sum(values) / len(values)
