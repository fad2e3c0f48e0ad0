"""Which clips a head is trained on, chosen on and tested on: as it should be, and as published."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from avs_dist.downstream.coded import CodedSplit, join
from avs_dist.downstream.events import Pairs, restrict

TRAIN_SHARE, VAL_SHARE = 0.5, 0.2  # of the clips of data that come in one split


@dataclass(frozen=True)
class Protocol:
    """Clips of an experiment.

    train:           the head learns from these.
    val:             and the epoch is chosen on these, in the labelled modality alone.
    test:            it is tested on these, in every modality.
    own:             the clips of the training data that are held out; `test` itself where there is one data set; may be
                     none where there are two.
    published_train: the public code learns from these.
    published_test:  measures every epoch on these, and reports the best.
    """

    train: CodedSplit
    val: CodedSplit
    test: CodedSplit
    own: CodedSplit
    published_train: CodedSplit
    published_test: CodedSplit

    @property
    def two_data_sets(self) -> bool:
        return self.own is not self.test

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            if not len(getattr(self, name)):
                raise ValueError(f"no clip is left for the part '{name}' of the experiment: the data are too few")


def one_data_set(splits: dict[str, CodedSplit], published: Literal["train", "all"]) -> Protocol:
    """An experiment within one data set.

    Args:
        splits: every split of the shards, by name.
        published: the public code trains and measures on the same clips, those of the "train" split (AVE), or "all"
            (AVVP); only the modality differs.

    Raises:
        ValueError: a part is empty.
    """
    train, val, test = divide(splits)
    everything = train if published == "train" else join([train, val, test])
    return Protocol(train, val, test, test, everything, everything)


def two_data_sets(train_splits: dict[str, CodedSplit], test_splits: dict[str, CodedSplit], pairs: Pairs) -> Protocol:
    """Trained on one data set, tested on the split "test" of another, or on all its clips where it has one split.

    Only clips with an event of `pairs` take part. The public code trains on all of one data set and measures on all of
    the other.

    Raises:
        ValueError: a part is empty.
    """
    ours = {name: restrict(clips, [one for one, _ in pairs]) for name, clips in train_splits.items()}
    theirs = {name: restrict(clips, [other for _, other in pairs]) for name, clips in test_splits.items()}
    train, val, own = divide(ours)
    every = join(list(theirs.values()))
    return Protocol(train, val, theirs.get("test", every), own, join(list(ours.values())), every)


def divide(splits: dict[str, CodedSplit]) -> tuple[CodedSplit, CodedSplit, CodedSplit]:
    """Training, validation and test clips: the splits of these names, or, of data in one split, 50/20/30 by name.

    Without validation clips a part of the training clips is held out, again by name, so that a clip falls on the same
    side in every run and whatever other clips there are.

    Raises:
        ValueError: there are several splits, but not train and test.
    """
    if len(splits) == 1:
        (clips,) = splits.values()
        place_N = _places(clips)
        until_val = TRAIN_SHARE + VAL_SHARE
        val_N = (place_N >= TRAIN_SHARE) & (place_N < until_val)
        return clips.rows(place_N < TRAIN_SHARE), clips.rows(val_N), clips.rows(place_N >= until_val)
    if not {"train", "test"} <= set(splits):
        raise ValueError(f"expected the splits train, val and test, or a single one, got {', '.join(splits)}")
    if "val" in splits:
        return splits["train"], splits["val"], splits["test"]
    place_N = _places(splits["train"])
    return splits["train"].rows(place_N >= VAL_SHARE), splits["train"].rows(place_N < VAL_SHARE), splits["test"]


def _places(clips: CodedSplit) -> torch.Tensor:
    """A number from 0 to 1 for each clip, that depends on its name alone; float64 [N]."""
    digests = [hashlib.sha256(name.encode()).digest() for name in clips.names]
    return torch.tensor([int.from_bytes(digest[:6], "big") / 2**48 for digest in digests], dtype=torch.float64)
