"""Codes of words hold for the word vectors they were learnt from: shards and prompts of others are refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from query_runs import WORD, build_query, query_config, save_run, unicode_run
from test_unicode_training import config as unicode_config

from avs_dist import trainer
from avs_dist.checkpoint import MANIFEST, check_word_vectors, find_checkpoint, manifest, sealed_manifest, word_vectors
from avs_dist.config import Config, DataConfig, TrainConfig
from avs_dist.launch import downstream
from avs_dist.launch import predict as predict_command
from avs_dist.launch.evaluate import load_for_shards
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.schema import INDEX_FILE
from avs_dist.systems import build_system

TEXT = ("--model.unicode.modalities", "[visual,text]")
CPU = torch.device("cpu")


def set_words(index: Path, name: str | None) -> None:
    """Have an index.json say which word vectors its shards were built with; None: no text."""
    data = json.loads(index.read_text())
    data["settings"].pop("word_vectors", None)
    data["settings"] |= {} if name is None else {"word_vectors": name}
    index.write_text(json.dumps(data))


def with_words(shards: Path, folder: Path, name: str | None) -> Path:
    """A copy of shards that were built with other word vectors."""
    shutil.copytree(shards, folder)
    set_words(folder / INDEX_FILE, name)
    return folder


def record(run: Path, **facts: object) -> Path:
    """A checkpoint whose manifest says so."""
    folder = find_checkpoint(run)
    (folder / MANIFEST).write_text(sealed_manifest(manifest(folder) | facts))
    return run


def refused(checkpoint: Path, shards: Path, learnt: str = "hashed", there: str = "other") -> str:
    """The error, as a pattern."""
    said = (
        f"was trained with word vectors {learnt}, those in {shards} are {there}: build the shards with the "
        "--word-vectors file of the pre-training's shards"
    )
    return f"{re.escape(str(checkpoint))}.* {re.escape(said)}"


@pytest.fixture(scope="module")
def text_run(cmg_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uni-Code of pictures and words, one step."""
    out = tmp_path_factory.mktemp("runs") / "vt"
    trainer.train(unicode_config(cmg_shards, out, 1, *TEXT))
    return out


@pytest.fixture(scope="module")
def other(cmg_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_words(cmg_shards, tmp_path_factory.mktemp("other") / "shards", "other")


def test_a_run_records_the_word_vectors_of_its_shards(text_run, cmg_shards, ms3_shards):
    assert ShardIndex.load(cmg_shards).word_vectors == word_vectors(text_run) == "hashed"
    assert ShardIndex.load(ms3_shards).word_vectors is None  # no text
    assert find_checkpoint(text_run).name == "step-000001"


def test_only_two_known_names_can_differ(text_run, tmp_path):
    for name in ("hashed", None):
        check_word_vectors(text_run, name, "S")
    with pytest.raises(ValueError, match=refused(text_run, Path("S"), there="f00")):
        check_word_vectors(text_run, "f00", "S")
    old = shutil.copytree(find_checkpoint(text_run), tmp_path / "old")
    facts = manifest(old)
    del facts["word_vectors"]
    (old / MANIFEST).write_text(sealed_manifest(facts))
    assert word_vectors(old) is None
    check_word_vectors(old, "f00", "S")


@pytest.mark.parametrize(("system", "wrong"), [("unicode", True), ("query", True), ("tpavi", False)])
def test_only_what_reads_text_is_refused(system, wrong, tmp_path):
    """A network without words may well be trained on shards that have some."""
    config = query_config(tmp_path, system=system)
    save_run(tmp_path / "run", config, build_system(config, load_pretrained=False))
    record(tmp_path / "run", word_vectors="hashed")
    if wrong:
        with pytest.raises(ValueError, match=refused(tmp_path / "run", Path("S"))):
            check_word_vectors(tmp_path / "run", "other", "S")
    else:
        check_word_vectors(tmp_path / "run", "other", "S")


def test_a_run_goes_on_with_its_word_vectors(text_run, cmg_shards, tmp_path):
    shards = shutil.copytree(cmg_shards, tmp_path / "shards")
    trainer.train(unicode_config(shards, tmp_path / "run", 1, *TEXT))
    more = unicode_config(shards, tmp_path / "run", 2, *TEXT, "--train.resume", "true")
    set_words(shards / INDEX_FILE, "other")
    with pytest.raises(ValueError, match=refused(tmp_path / "run", shards)):
        trainer.train(more)
    set_words(shards / INDEX_FILE, None)  # built before they were recorded
    assert word_vectors(trainer.train(more)) == "hashed"


def test_weights_to_begin_with_have_the_same_word_vectors(text_run, cmg_shards, other, tmp_path):
    init = (*TEXT, "--train.init_from", str(text_run))
    with pytest.raises(ValueError, match=refused(text_run, other)):
        trainer.train(unicode_config(other, tmp_path / "run", 1, *init))
    assert word_vectors(trainer.train(unicode_config(cmg_shards, tmp_path / "run", 1, *init))) == "hashed"


def test_only_queries_look_at_the_checkpoint_of_queries(cmg_shards, tmp_path):
    trainer.train(unicode_config(cmg_shards, tmp_path / "run", 1, *TEXT, "--model.query.checkpoint", "gone"))


def test_shards_to_measure_on_have_the_same_word_vectors(text_run, cmg_shards, other, tmp_path):
    with pytest.raises(ValueError, match=refused(text_run, other)):
        load_for_shards(str(text_run), str(other), CPU)
    load_for_shards(str(text_run), str(cmg_shards), CPU)
    trainer.train(unicode_config(cmg_shards, tmp_path / "av", 1))
    load_for_shards(str(tmp_path / "av"), str(other), CPU)  # pictures and sound


@pytest.mark.parametrize("task", ["classify", "localise", "retrieve"])
def test_heads_are_trained_and_tested_on_the_same_word_vectors(task, text_run, cmg_shards, other):
    command = [task, "--checkpoint", str(text_run), "--epochs", "1", "--shards"]
    with pytest.raises(ValueError, match=refused(text_run, other)):
        downstream.main([*command, str(other)])
    if task == "classify":
        with pytest.raises(ValueError, match=refused(text_run, other)):
            downstream.main([*command, str(cmg_shards), "--test-shards", str(other)])


def query_run(unicode: Path, shards: Path, out: Path, **train: object) -> Config:
    data = DataConfig(str(shards), workers=0, eval_split="test")
    return replace(query_config(unicode), data=data, train=TrainConfig(1, 2, str(out), **train))  # type: ignore[arg-type]


def test_queries_are_learnt_with_the_word_vectors_of_the_codes(ms3_shards, tmp_path):
    unicode, shards = tmp_path / "unicode", with_words(ms3_shards, tmp_path / "other", "other")
    unicode_run(unicode)
    record(unicode, word_vectors="f00")
    with pytest.raises(ValueError, match=refused(unicode, shards, "f00")):
        trainer.train(query_run(unicode, shards, tmp_path / "query"))
    found = trainer.train(query_run(unicode, ms3_shards, tmp_path / "query"))  # no text: the words of the codes
    assert word_vectors(found) == "f00"
    with pytest.raises(ValueError, match=refused(found, shards, "f00")):
        load_for_shards(str(found), str(shards), CPU)
    load_for_shards(str(found), str(ms3_shards), CPU)
    record(unicode, word_vectors="other")  # whose weights are not read where others are given
    with pytest.raises(ValueError, match=refused(found, shards, "f00")):
        trainer.train(query_run(unicode, shards, tmp_path / "next", init_from=str(found)))
    record(unicode, word_vectors=None)  # saved before they were recorded
    assert word_vectors(trainer.train(query_run(unicode, shards, tmp_path / "next"))) == "other"


def test_a_prompt_asks_with_the_word_vectors_of_the_training(ms3_clips, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"{word} " + " ".join(["0.5"] * WORD) for word in ("star", "disc")))
    unicode_run(tmp_path / "unicode")
    run, config = tmp_path / "query", query_config(tmp_path / "unicode")
    save_run(run, config, build_query(config))
    video = next(ms3_clips.rglob("*.mp4"))
    command = [str(video), "--out", str(tmp_path / "out"), "--checkpoint", str(run), "--device", "cpu"]
    asked = [*command, "--prompt", "a star", "--word-vectors", str(words)]
    record(run, word_vectors="f00")
    with pytest.raises(ValueError, match="query was trained with word vectors f00: give that file as --word-vectors"):
        predict_command.main(asked)
    record(run, word_vectors=hashlib.sha256(words.read_bytes()).hexdigest())
    assert predict_command.main(asked) == 0
    with pytest.raises(ValueError, match=r"was trained with word vectors [0-9a-f]{64}: give"):
        predict_command.main([*command, "--prompt", "a star"])
