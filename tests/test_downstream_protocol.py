"""Which clips take part, and under which names of events."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from coded_clips import EVENTS, coded_clips

from avs_dist.downstream.coded import join
from avs_dist.downstream.events import match_events, read_events, restrict
from avs_dist.downstream.protocol import divide, one_data_set, two_data_sets


def test_rows_and_join_keep_everything_together():
    clips = coded_clips(10)
    first = torch.arange(10) < 4
    again = join([clips.rows(first), clips.rows(~first)])
    assert again.names == clips.names
    assert clips.rows(~first).names == clips.names[4:]
    for name in ("codes", "valid", "labels", "labelled", "features"):
        ours, theirs = getattr(clips, name), getattr(again, name)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[m], theirs[m]) for m in ours)
        assert all(torch.equal(x[4:], getattr(clips.rows(~first), name)[m]) for m, x in ours.items())


def test_an_event_of_any_modality_happens():
    clips = coded_clips(5)
    clips.labels["visual"][2] = 0
    happens_NK = clips.happens()
    assert torch.equal(happens_NK, clips.labels["audio"].bool().any(1))
    assert happens_NK[2].any()


def test_three_splits_are_taken_as_they_are():
    splits = {name: coded_clips(5, seed) for seed, name in enumerate(("train", "val", "test"))}
    assert divide(splits) == tuple(splits.values())


def test_one_split_is_divided_by_name_and_not_by_place():
    clips = coded_clips(600)
    parts = divide({"test": clips})
    assert [len(part) / 600 for part in parts] == pytest.approx([0.5, 0.2, 0.3], abs=0.05)
    assert sorted(name for part in parts for name in part.names) == sorted(clips.names)
    some = clips.rows(torch.arange(600) % 3 == 0)
    for part, fewer in zip(parts, divide({"x": some}), strict=True):
        assert set(fewer.names) == set(part.names) & set(some.names)


def test_validation_clips_are_held_out_of_the_training_clips():
    train, test = coded_clips(400), coded_clips(5, 1)
    kept, val, other = divide({"train": train, "test": test})
    assert other is test
    assert len(val) / 400 == pytest.approx(0.2, abs=0.05)
    assert set(kept.names) | set(val.names) == set(train.names)
    assert not set(kept.names) & set(val.names)


def test_splits_without_test_are_refused():
    with pytest.raises(ValueError, match="train, val and test, or a single one, got train, val"):
        divide({"train": coded_clips(3), "val": coded_clips(3)})


def test_published_protocol_of_one_data_set():
    splits = {name: coded_clips(5, seed, prefix=name) for seed, name in enumerate(("train", "val", "test"))}
    each = one_data_set(splits, "train")
    assert each.published_train is each.published_test is each.train is splits["train"]
    assert each.own is each.test is splits["test"]
    assert not each.two_data_sets
    every = one_data_set(splits, "all")
    assert every.published_train is every.published_test
    assert len(every.published_train) == 15


def test_two_data_sets_use_the_events_they_share():
    ours = {name: coded_clips(60, seed, prefix=name) for seed, name in enumerate(("train", "val", "test"))}
    theirs = {"all": coded_clips(50, 7, events=("Rain", "dog", "BELL"), prefix="other")}
    found = two_data_sets(ours, theirs, (("bell", "BELL"), ("rain", "Rain")))
    assert found.two_data_sets
    assert found.train.events == ("bell", "rain")
    assert found.test.events == found.published_test.events == ("BELL", "Rain")
    bell_rain = torch.tensor([0, 3])
    for part, name in ((found.train, "train"), (found.val, "val"), (found.own, "test")):
        used_N = ours[name].happens()[:, bell_rain].any(1)
        assert part.names == ours[name].rows(used_N).names
        assert torch.equal(part.labels["audio"], ours[name].labels["audio"][used_N][..., bell_rain])
    used_N = theirs["all"].happens()[:, [2, 0]].any(1)
    assert torch.equal(found.test.labels["audio"], theirs["all"].labels["audio"][used_N][..., [2, 0]])
    assert 0 < len(found.test) == len(found.published_test) < 50
    assert len(found.published_train) == len(found.train) + len(found.val) + len(found.own)


def test_the_test_split_of_the_other_data_is_tested():
    ours = {name: coded_clips(40, seed) for seed, name in enumerate(("train", "val", "test"))}
    theirs = {name: coded_clips(20, 9 + seed, prefix=name) for seed, name in enumerate(("train", "val", "test"))}
    found = two_data_sets(ours, theirs, tuple((e, e) for e in EVENTS))
    assert found.test.names == theirs["test"].names
    assert len(found.published_test) == 60


def test_empty_parts_are_refused():
    splits = {name: coded_clips(5, seed) for seed, name in enumerate(("train", "val", "test"))}
    splits["val"] = splits["val"].rows(torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no clip is left for the part 'val'"):
        one_data_set(splits, "train")


def test_a_second_of_another_event_becomes_background():
    clips = coded_clips(30)
    clips.labels["audio"][:, 0] = torch.tensor([1, 1, 0, 0], dtype=torch.uint8)
    chosen = restrict(clips, ["cat"])
    assert len(chosen) == 30
    assert chosen.labels["audio"].shape[-1] == 1
    assert (chosen.labels["audio"][:, 0] == 1).all()
    assert len(restrict(dataclasses.replace(clips, labels={"audio": clips.labels["visual"]}), ["cat"])) < 30


def test_names_match_whatever_case_spaces_and_underscores():
    assert match_events(["Church bell", "Truck", "Baby_cry"], ["baby cry", "CHURCH_BELL", "x"]) == (
        ("Church bell", "CHURCH_BELL"),
        ("Baby_cry", "baby cry"),
    )


def test_events_that_do_not_match_are_listed():
    with pytest.raises(ValueError, match=r"Training: a, b\. Test: c\.") as error:
        match_events(["a", "b"], ["c"])
    assert "--events" in str(error.value)
    with pytest.raises(ValueError, match="more than once"):
        match_events(["a b", "A_B"], ["ab"])


def test_events_from_a_file(tmp_path: Path):
    path = tmp_path / "events.csv"
    path.write_text("a, x\nc,y z\n")
    assert read_events(path, ["a", "b", "c"], ["x", "y z"]) == (("a", "x"), ("c", "y z"))
    for text, message in (
        ("a,x,z\n", "expected 'name in training,name in test'"),
        ("q,x\n", "the training data have no event 'q', only a, b"),
        ("a,q\n", "the test data have no event 'q', only x"),
        ("a,x\nb,x\n", "x stands there more than once"),
        ("", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_events(path, ["a", "b"], ["x"])
