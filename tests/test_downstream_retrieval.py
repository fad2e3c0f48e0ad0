"""Retrieval through sound: what is trained, what transfers, and how recall is counted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from coded_clips import DIM, coded_clips
from torch import nn

from avs_dist.config import UnicodeConfig
from avs_dist.downstream.coded import CodedSplit
from avs_dist.downstream.retrieval import (
    TEMPERATURE,
    Retrieval,
    SoundHead,
    contrast,
    pair_examples,
    retrieval_through_audio,
    retrieve,
    table,
)
from avs_dist.downstream.training import HeadTraining

NETWORK = UnicodeConfig(modalities=("visual", "text"), dim=DIM, layers=1, heads=2, dropout=0.1)
QUICK = HeadTraining(epochs=8, lr=5e-3, batch=16)


def splits(apart: bool = False) -> dict[str, CodedSplit]:
    sizes = {"train": 80, "val": 30, "test": 40}
    return {
        name: coded_clips(size, seed, ("visual", "text"), apart=apart, prefix=name)
        for seed, (name, size) in enumerate(sizes.items())
    }


def by_case(results: list[Retrieval]) -> dict[tuple[str, str, str], Retrieval]:
    return {(r.trained, r.tested, r.direction): r for r in results}


def test_shared_codes_are_found_with_the_modality_that_was_never_paired():
    together = by_case(retrieval_through_audio(splits(), NETWORK, QUICK))
    apart = by_case(retrieval_through_audio(splits(apart=True), NETWORK, QUICK))
    assert len(together) == 8
    for one, other in (("visual", "text"), ("text", "visual")):
        for direction in ("to audio", "from audio"):
            found = together[one, other, direction]
            assert found.event_recall[1] > 0.9
            assert found.recall[10] > 2 * found.chance[10]
            assert together[one, one, direction].event_recall[1] > 0.9
            assert apart[one, one, direction].event_recall[1] > 0.9
            assert apart[one, other, direction].event_recall[1] < 0.7


def test_contrast_by_hand():
    torch.manual_seed(2)
    batch = pair_examples(coded_clips(6, modalities=("text",)), "text")
    batch["query"][4] = batch["query"][1]  # the same prompt
    head = SoundHead(DIM, DIM, 1, 2, 0.0)
    sound = head(batch["sound"], batch["valid"]).detach().double().numpy()
    query = batch["query"].double().numpy()
    total = 0.0
    for queries, gallery in ((query, sound), (sound, query)):
        for i in range(6):
            others = [j for j in range(6) if j == i or {i, j} != {1, 4}]
            scores = {j: math.exp(queries[i] @ gallery[j] / TEMPERATURE) for j in others}
            total -= math.log(scores[i] / sum(scores.values())) / 12
    assert contrast(head, batch).item() == pytest.approx(total, rel=1e-4)


def test_examples_are_unit_mean_codes_of_the_seconds_that_exist():
    clips = coded_clips(5, modalities=("text",))
    clips.valid["text"][0, 2:] = False
    clips.valid["text"][1] = False  # no prompt
    clips.valid["audio"][2] = False  # no sound
    clips.valid["audio"][3, 4:] = False
    examples = pair_examples(clips, "text")
    kept = [0, 3, 4]
    for row, n in enumerate(kept):
        mean = clips.codes["text"][n, clips.valid["text"][n]].mean(0).numpy()
        np.testing.assert_allclose(examples["query"][row].numpy(), mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
    assert torch.equal(examples["sound"], clips.features["audio"][kept].float())
    assert examples["sound"].dtype == torch.float32
    assert torch.equal(examples["valid"], clips.valid["audio"][kept])


def test_sound_is_the_mean_over_the_seconds_that_exist():
    head = SoundHead(3, 4, 1, 2, 0.0).eval()
    sound_BTC, valid_BT = torch.randn(1, 5, 3), torch.tensor([[True, True, True, False, False]])
    short = head(sound_BTC[:, :3], valid_BT[:, :3])
    torch.testing.assert_close(head(sound_BTC * valid_BT[..., None], valid_BT), short)
    assert short.norm().item() == pytest.approx(1.0)


class Known(nn.Module):
    """Sound whose vectors are given by its first second."""

    def forward(self, sound_BTC: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        return sound_BTC[:, 0]


def test_recall_by_hand(monkeypatch):
    monkeypatch.setattr("avs_dist.downstream.retrieval.CHUNK", 7)
    clips = coded_clips(30, 3, modalities=("text",), noise=1.0)
    found = {r.direction: r for r in retrieve(Known(), "text", "text", clips, 4, "cpu")}
    query = pair_examples(clips, "text")["query"].numpy()
    sound = clips.features["audio"][:, 0].float().numpy()
    event = clips.happens().int().argmax(1).numpy()
    for direction, (queries, gallery) in {"to audio": (query, sound), "from audio": (sound, query)}.items():
        ranked = [np.argsort(-(gallery @ q)) for q in queries]
        for k in (1, 5, 10):
            own = np.mean([n in ranked[n][:k] for n in range(30)])
            same = np.mean([(event[ranked[n][:k]] == event[n]).any() for n in range(30)])
            assert found[direction].recall[k] == pytest.approx(own)
            assert found[direction].event_recall[k] == pytest.approx(same)
            assert found[direction].chance[k] == pytest.approx(k / 30)
            share = [math.comb(30 - (event == e).sum(), k) / math.comb(30, k) for e in event]
            assert found[direction].event_chance[k] == pytest.approx(1 - np.mean(share))
    assert (found["to audio"].epoch, found["to audio"].tested) == (4, "text")


def test_without_labels_there_is_no_event_recall():
    clips = coded_clips(12, modalities=("text",))
    clips = dataclasses.replace(clips, labels={m: torch.zeros_like(x) for m, x in clips.labels.items()})
    results = retrieve(Known(), "text", "text", clips, 1, "cpu")
    assert all(r.event_recall == r.event_chance == {} and len(r.recall) == 3 for r in results)
    assert "event R@1 " not in table(results).splitlines()[0]


def test_the_epoch_is_chosen_on_validation_clips_and_test_clips_are_asked_once(monkeypatch):
    asked: list[tuple[str, float]] = []

    def listen(head: nn.Module, trained: str, tested: str, clips: CodedSplit, *rest: object) -> list[Retrieval]:
        results = retrieve(head, trained, tested, clips, *rest)  # type: ignore[arg-type]
        asked.append((clips.names[0].rstrip("0123456789"), sum(sum(r.recall.values()) for r in results)))
        return results

    monkeypatch.setattr("avs_dist.downstream.retrieval.retrieve", listen)
    results = retrieval_through_audio(splits(), NETWORK, QUICK, ("text",))
    assert [name for name, _ in asked] == ["val"] * QUICK.epochs + ["test"] * 2
    values = [value for _, value in asked[: QUICK.epochs]]
    assert {r.epoch for r in results} == {1 + values.index(max(values))}


def test_a_modality_that_never_comes_with_sound_is_refused():
    parts = splits()
    parts["val"].valid["text"].zero_()
    with pytest.raises(ValueError, match="--train-on text: clips with sound have codes of visual beside it"):
        retrieval_through_audio(parts, NETWORK, QUICK, ("text",))


def test_table_names_gallery_and_chance():
    row = {1: 0.5, 5: 0.75, 10: 1.0}
    chance = dict.fromkeys(row, 0.125)
    results = [Retrieval("text", m, "to audio", row, {}, chance, {}, 3) for m in ("text", "visual")]
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table(results).splitlines()]
    assert lines[:4] == [
        ["trained on", "tested on", "direction", "R@1", "R@5", "R@10"],
        ["text", "text (own)", "to audio", "50.00", "75.00", "100.00"],
        ["text", "visual", "to audio", "50.00", "75.00", "100.00"],
        ["random order", "text", "12.50", "12.50", "12.50"],
    ]
