"""Heads that see the labels of one modality, measured on all: the experiment of cross-modal generalisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from tqdm import tqdm

from avs_dist.downstream.coded import CodedSplit
from avs_dist.downstream.protocol import Protocol
from avs_dist.downstream.results import Measure
from avs_dist.downstream.training import Examples, HeadTraining, count, fit, fit_best, outputs

Scores = dict[str, float]  # by metric


class Task(ABC):
    """A head, its loss and its metrics.

    metrics:   what each metric of the proper protocol means; the epoch is chosen by the first.
    published: the same of the metrics of the public code.
    """

    metrics: Mapping[str, str]
    published: Mapping[str, str]

    @abstractmethod
    def examples(self, clips: CodedSplit, modality: str) -> Examples:
        """The clips that have the modality, and what is known of it: "code", "valid", and the labels.

        Raises:
            ValueError: labels that the task cannot do with.
        """

    @abstractmethod
    def build(self, dim: int, num_events: int) -> nn.Module:
        """An untrained head for codes of `dim` numbers."""

    @abstractmethod
    def loss(self, head: nn.Module, batch: Examples) -> Tensor:
        """Of one batch, a scalar."""

    @abstractmethod
    def logits(self, head: nn.Module, batch: Examples) -> Tensor:
        """What the head says of a batch; it must not look at the labels."""

    @abstractmethod
    def scores(self, logits: Tensor, examples: Examples) -> Scores:
        """Every metric, proper and published."""

    @abstractmethod
    def constant(self, examples: Examples) -> Scores:
        """Every metric of the best answer that is the same for all."""


def transfer(task: Task, protocol: Protocol, settings: HeadTraining, train_on: Sequence[str] = ()) -> list[Measure]:
    """Train a head on each modality and measure it on each, under the proper and the published protocol.

    Proper: on test clips, the head of the epoch that was best on validation clips of the modality it was trained on.
    Published: the best score that any epoch reaches on the clips that are measured, for each modality and metric.

    Args:
        train_on: modalities to train on; empty for all that are labelled.

    Raises:
        ValueError: a modality that cannot be trained on, or no test clip that could be measured.
    """
    trained = _trained(task, protocol, train_on)
    return [*_proper(task, protocol, settings, trained), *_published(task, protocol, settings, trained)]


def _trained(task: Task, protocol: Protocol, wanted: Sequence[str]) -> list[str]:
    parts = (protocol.train, protocol.val)
    possible = [m for m in protocol.train.codes if all(count(task.examples(clips, m)) for clips in parts)]
    missing = [m for m in wanted if m not in possible]
    if missing or not possible:
        raise ValueError(
            f"--train-on {', '.join(missing) or 'any'}: the clips to train on and to choose the epoch on are labelled "
            f"and coded in {', '.join(possible) or 'no modality'}"
        )
    return list(wanted) or possible


def _tested(task: Task, clips: CodedSplit) -> dict[str, Examples]:
    each = {m: task.examples(clips, m) for m in clips.codes}
    found = {m: examples for m, examples in each.items() if count(examples)}
    if not found:
        raise ValueError("the test clips have no labels in any modality that the checkpoint knows")
    return found


def _proper(task: Task, protocol: Protocol, settings: HeadTraining, trained: Sequence[str]) -> list[Measure]:
    chosen_by = next(iter(task.metrics))
    tested = _tested(task, protocol.test)
    found: dict[str, _Found] = {}
    for m in tqdm(trained, desc="heads", leave=False):
        train, val = (task.examples(clips, m) for clips in (protocol.train, protocol.val))
        build = partial(_build, task, train, protocol.train)
        score = partial(_score, task, chosen_by, val, settings)
        head, epoch = fit_best(build, task.loss, train, settings, score)
        scores = {other: _scores(task, head, examples, settings) for other, examples in tested.items()}
        held_out = task.examples(protocol.own, m)
        labelled = _scores(task, head, held_out, settings) if count(held_out) else {}
        epochs = {other: dict.fromkeys(task.metrics, epoch) for other in tested}
        found[m] = _Found(scores, labelled, epochs)
    return _measures(task, task.metrics, found, tested)


def _published(task: Task, protocol: Protocol, settings: HeadTraining, trained: Sequence[str]) -> list[Measure]:
    tested = _tested(task, protocol.published_test)
    found: dict[str, _Found] = {}
    for m in tqdm(trained, desc="heads as published", leave=False):
        train = task.examples(protocol.published_train, m)
        best: dict[str, Scores] = {other: dict.fromkeys(task.published, -1.0) for other in tested}
        epochs: dict[str, dict[str, int]] = {other: {} for other in tested}
        heads = fit(partial(_build, task, train, protocol.train), task.loss, train, settings)
        for epoch, head in enumerate(heads, start=1):
            for other, examples in tested.items():
                now = _scores(task, head, examples, settings)
                better = [name for name in task.published if now[name] > best[other][name]]
                best[other] |= {name: now[name] for name in better}
                epochs[other] |= dict.fromkeys(better, epoch)
        found[m] = _Found(best, {} if protocol.two_data_sets else best.get(m, {}), epochs)
    return _measures(task, task.published, found, tested)


class _Found(NamedTuple):
    """Of one head: every metric by modality tested, that of the labelled modality, and the epochs."""

    scores: dict[str, Scores]
    labelled: Scores
    epochs: dict[str, dict[str, int]]


def _build(task: Task, examples: Examples, clips: CodedSplit) -> nn.Module:
    return task.build(examples["code"].shape[-1], len(clips.events))


def _score(task: Task, metric: str, examples: Examples, settings: HeadTraining, head: nn.Module) -> float:
    return _scores(task, head, examples, settings)[metric]


def _scores(task: Task, head: nn.Module, examples: Examples, settings: HeadTraining) -> Scores:
    logits = outputs(lambda batch: task.logits(head, batch), examples, settings.device)
    return task.scores(logits, examples)


def _measures(
    task: Task, names: Mapping[str, str], found: dict[str, _Found], tested: dict[str, Examples]
) -> list[Measure]:
    chance = {m: task.constant(examples) for m, examples in tested.items()}
    return [
        Measure(
            name,
            meaning,
            scores={m: {other: row[name] for other, row in each.scores.items()} for m, each in found.items()},
            labelled={m: each.labelled[name] for m, each in found.items() if each.labelled},
            chance={m: row[name] for m, row in chance.items()},
            epochs={m: {other: row[name] for other, row in each.epochs.items()} for m, each in found.items()},
        )
        for name, meaning in names.items()
    ]
