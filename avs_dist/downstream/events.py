"""Events that two data sets have in common, under the names that each gives them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from avs_dist.downstream.coded import CodedSplit
from avs_dist.shards.sources.metadata import read_table

# names in the training data and in the test data
Pairs = tuple[tuple[str, str], ...]


def match_events(train: Sequence[str], test: Sequence[str]) -> Pairs:
    """Events of the same name, whatever its case, spaces, underscores and hyphens.

    Raises:
        ValueError: none match, or a name matches several; lists them.
    """
    found = {_plain(name): name for name in test}
    for names in (train, test):
        _check_once([_plain(name) for name in names], "the names of events")
    pairs = tuple((name, found[_plain(name)]) for name in train if _plain(name) in found)
    if not pairs:
        raise ValueError(
            f"no event has the same name in both data sets; --events can say which belong together. "
            f"Training: {', '.join(train)}. Test: {', '.join(test)}."
        )
    return pairs


def read_events(path: Path, train: Sequence[str], test: Sequence[str]) -> Pairs:
    """Pairs of a csv file with lines "name in the training data,name in the test data"; no others are used.

    Raises:
        ValueError: a line without two names, a name that the data do not have, or one that stands there twice.
    """
    pairs = []
    for line in read_table(path):
        if len(line) != 2:
            raise ValueError(f"{path}: line {','.join(line)!r:.200}: expected 'name in training,name in test'")
        for name, names, where in zip(line, (train, test), ("training", "test"), strict=True):
            if name not in names:
                raise ValueError(f"{path}: the {where} data have no event {name!r}, only {', '.join(names)}")
        pairs.append((line[0], line[1]))
    for column in zip(*pairs, strict=True):
        _check_once(column, str(path))
    return tuple(pairs)


def restrict(clips: CodedSplit, names: Sequence[str]) -> CodedSplit:
    """The clips where one of these events happens, with the labels of these alone, in this order.

    A second in which only another event happens becomes background.
    """
    columns = torch.tensor([clips.events.index(name) for name in names])
    labels = {m: labels_NTK[..., columns] for m, labels_NTK in clips.labels.items()}
    chosen = dataclasses.replace(clips, labels=labels, events=tuple(names))
    return chosen.rows(chosen.happens().any(1))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _check_once(names: Sequence[str], where: str) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{where}: {', '.join(twice)} stands there more than once")
