"""Queries from end to end: prompts in shards, words in batches, and the commands that train, measure and paint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from query_runs import WORD, build_query, query_config, save_run, unicode_run
from test_system_tpavi import make_config

from avs_dist.checkpoint import load_system
from avs_dist.clip import collate
from avs_dist.config import DataConfig, QueryConfig
from avs_dist.evaluate import evaluate
from avs_dist.launch import evaluate as evaluate_command
from avs_dist.launch import predict as predict_command
from avs_dist.launch import shards, synth, train
from avs_dist.loader import eval_loader
from avs_dist.predict import predict_video
from avs_dist.shards.schema import Sample
from avs_dist.systems import build_system
from avs_dist.systems.query import QuerySystem, set_query

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64


class Chain(NamedTuple):
    clips: Path
    shards: Path
    query: Path  # trained on a run of Uni-Code that is no more


def sample(name: str, seconds: int, text_WE: np.ndarray | None) -> Sample:
    return Sample(
        name,
        np.zeros((seconds, 8, 8, 3), np.uint8),
        np.zeros((seconds, 96, 64), np.float32),
        np.zeros((seconds, 8, 8), np.uint8),
        np.ones(seconds, bool),
        {},
        text_WE,
    )


def run_train(config: str, source: Path, out: Path, *more: str) -> None:
    steps = ["--train.max_steps", "2", "--train.global_batch", "4", "--data.workers", "0", "--train.eval_every", "0"]
    steps += ["--data.eval_split", "train"]  # the others have one clip
    paths = ["--config", str(ROOT / "configs" / config), "--data.shards", str(source), "--train.out_dir", str(out)]
    assert train.main([*paths, *steps, *more]) == 0


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Both demo configs, two steps each, on ten clips."""
    root = tmp_path_factory.mktemp("chain")
    size = ["--size", str(SIZE)]
    assert synth.main(["--out", str(root / "clips"), "--setting", "s4", "--clips", "10", "--seed", "2", *size]) == 0
    source = ["--source", "avsbench-s4", "--root", str(root / "clips"), "--prompts", *size]
    assert shards.main(["build", *source, "--out", str(root / "shards"), "--workers", "1"]) == 0
    run_train("demo_unicode_media.yaml", root / "shards", root / "unicode")
    uses = ["--model.query.checkpoint", str(root / "unicode"), "--train.log_every", "1"]
    run_train("demo_query.yaml", root / "shards", root / "query", *uses)
    shutil.rmtree(root / "unicode")
    return Chain(root / "clips", root / "shards", root / "query")


def test_words_of_a_batch_are_padded_and_a_batch_without_has_none():
    words = [np.full((2, 3), 1.0, np.float32), np.full((4, 3), 2.0, np.float32)]
    clip = collate([sample("a", 3, words[0]), sample("b", 2, words[1])])
    assert clip.text_BWE.tolist() == [[[1.0] * 3] * 2 + [[0.0] * 3] * 2, [[2.0] * 3] * 4]
    assert clip.text_valid_BW.tolist() == [[True, True, False, False], [True] * 4]
    there = clip.to("meta", torch.bfloat16)
    assert there.text_BWE.device.type == there.text_valid_BW.device.type == "meta"
    assert (there.text_BWE.dtype, there.text_valid_BW.dtype) == (torch.bfloat16, torch.bool)
    some = collate([sample("a", 3, words[0]), sample("b", 2, None)]).to("cpu")
    assert some.text_BWE is None
    assert some.text_valid_BW is None
    with pytest.raises(ValueError, match="clip b: word vectors have 5 numbers, others of the batch 3"):
        collate([sample("a", 3, words[0]), sample("b", 2, np.zeros((4, 5), np.float32))])


def test_both_queries_are_measured_by_name(chain, tmp_path, capsys):
    options = ["--checkpoint", str(chain.query), "--split", "train", "--batch", "3"]
    assert (
        evaluate_command.main([*options, "--query", "both", "--audio", "all", "--json", str(tmp_path / "e.json")]) == 0
    )
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["trained_with"] == "audio query"
    assert list(written["results"]) == ["audio query", "audio query, muted", "audio query, swapped", "text query"]
    table = capsys.readouterr().out
    assert "\nquery  " in table
    assert "\ntext query  " in table
    system, config = load_system(chain.query)
    assert isinstance(system, QuerySystem)
    for row, query, audio in (("audio query", "audio", "real"), ("audio query, muted", "audio", "muted"),
                              ("text query", "text", "real")):  # fmt: skip
        set_query(system, query)
        batches = eval_loader(replace(config, data=replace(config.data, workers=0)), "train", 2, audio=audio)
        want = evaluate(lambda clip: system.predict(clip.to("cpu")), batches)
        assert written["results"][row] == pytest.approx(want, rel=1e-4)
    for asked, rows in ((("--query", "text"), ["text query"]), ((), ["audio query"])):
        assert evaluate_command.main([*options, *asked, "--json", str(tmp_path / "one.json")]) == 0
        assert list(json.loads((tmp_path / "one.json").read_text())["results"]) == rows


def test_systems_and_shards_without_queries_are_refused(chain, tmp_path):
    source = ["--source", "avsbench-s4", "--root", str(chain.clips), "--size", str(SIZE), "--workers", "1"]
    assert shards.main(["build", *source, "--out", str(tmp_path / "shards")]) == 0
    options = ["--checkpoint", str(chain.query), "--shards", str(tmp_path / "shards")]
    with pytest.raises(ValueError, match="have no text; build shards with --prompts"):
        evaluate_command.main([*options, "--query", "text"])
    assert evaluate_command.main(options) == 0
    config = replace(make_config(), data=DataConfig(shards=str(chain.shards), workers=0))
    save_run(tmp_path / "tpavi", config, build_system(config))
    with pytest.raises(ValueError, match="TPAVISystem answers no queries; train with model.system=query"):
        evaluate_command.main(["--checkpoint", str(tmp_path / "tpavi"), "--query", "both"])
    options = [str(next(chain.clips.rglob("*.mp4"))), "--out", str(tmp_path / "painted"), "--checkpoint"]
    with pytest.raises(ValueError, match="TPAVISystem answers no queries"):
        predict_command.main([*options, str(tmp_path / "tpavi"), "--prompt", "a star"])
    with pytest.raises(ValueError, match="--word-vectors words.txt: is for --prompt"):
        predict_command.main([*options, str(chain.query), "--word-vectors", "words.txt"])


def test_a_video_is_painted_for_its_sound_or_for_a_prompt(chain, tmp_path):
    """Whatever asked in training."""
    unicode_run(tmp_path / "unicode")
    config = query_config(tmp_path / "unicode", query=QueryConfig(str(tmp_path / "unicode"), "text"))
    system = build_query(config)
    save_run(tmp_path / "query", config, system)
    vectors = {word: np.random.default_rng(n).normal(0, 3, WORD) for n, word in enumerate(("star", "disc", "bright"))}
    lines = [" ".join([word, *map(str, vector)]) for word, vector in vectors.items()]
    (tmp_path / "words.txt").write_text("\n".join(lines))
    video = next((chain.clips / "Single-source/s4_data/raw_videos/test").rglob("*.mp4"))

    def painted(*options: str) -> list[float]:
        command = [str(video), "--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "query"), *options]
        assert predict_command.main([*command, "--device", "cpu"]) == 0
        summary = json.loads((tmp_path / "out" / video.stem / "summary.json").read_text())
        return [second["mean_probability"] for second in summary["seconds"]]

    def by_hand(query: str, text_WE: np.ndarray | None) -> list[float]:
        set_query(system, query)
        facts = predict_video(system, video, tmp_path / "hand", image_size=64, text_WE=text_WE, progress=False)
        return [second["mean_probability"] for second in facts["seconds"]]

    words = ["--word-vectors", str(tmp_path / "words.txt"), "--prompt"]
    found = [painted(), painted(*words, "a bright star"), painted(*words, "a bright disc")]
    star, disc = (np.stack([vectors["bright"], vectors[noun]]).astype(np.float32) for noun in ("star", "disc"))
    want = [by_hand("audio", None), by_hand("text", star), by_hand("text", disc)]
    assert len(found[0]) == 5
    for one, other in zip(found, want, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for one, other in combinations(found, 2):
        assert one != pytest.approx(other, rel=1e-4)
