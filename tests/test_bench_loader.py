"""`bench loader`: what it compares reads the same clips, every part gives figures, and a failure is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from avs_dist.launch.benchmarks import loader_baselines, loader_measure, loader_parts, loader_report, loader_sets
from avs_dist.launch.benchmarks.loader import exit_code
from avs_dist.launch.benchmarks.loader_measure import BATCH, Loader
from avs_dist.launch.benchmarks.loader_parts import TINY, Bench
from avs_dist.launch.cli import run

CLIPS = 8
RATES = ("clips_per_s", "clips_per_cpu_s")
KINDS = {"ours": "raw", "literal": "literal", "webdataset": "raw"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same clips of 32 x 32 as shards and as loose files."""
    root = tmp_path_factory.mktemp("sets")
    loader_sets.write_sets(root, loader_sets.synthetic_samples(CLIPS, 32), loader_parts.PICTURES, 32)
    return root


@pytest.fixture(scope="module")
def film_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows of a film."""
    root = tmp_path_factory.mktemp("film")
    loader_sets.write_synthetic_film(root / "film.mp4", 96, 64, seconds=11, fps=5)
    loader_sets.write_film_set(root / "set", root / "film.mp4", size=32, most=16)
    return root / "set"


def by_name(frames: torch.Tensor, mel: torch.Tensor, masks: torch.Tensor, names: tuple[str, ...]) -> dict[str, tuple]:
    return {name: (frames[b], mel[b], masks[b]) for b, name in enumerate(names)}


@pytest.fixture(scope="module")
def ours(sets: Path) -> dict[str, tuple]:
    """Normalised frames, log-mel, masks and stored frames of each clip of an epoch, as training gets them."""
    found: dict[str, tuple] = {}
    for (clip,) in islice(loader_measure.train_batches(str(sets / "raw"), workers=0), CLIPS // BATCH):
        moved = clip.to("cpu")
        for name, tensors in by_name(moved.frames_BTCHW, moved.mel_BTFM, moved.masks_BTHW, clip.key).items():
            found[name] = (*tensors, clip.frames_BTCHW[clip.key.index(name)])
    assert len(found) == CLIPS
    return found


def test_the_literal_loader_reads_the_same_clips(sets: Path, ours: dict[str, tuple]):
    clips = loader_baselines.LiteralClips(sets / "literal")
    assert len(clips) == CLIPS
    for frames_T3HW, mel_T1FM, masks_T1HW, name in (clips[number] for number in range(CLIPS)):
        wanted_T3HW, wanted_TFM, wanted_THW, _ = ours[name]
        torch.testing.assert_close(frames_T3HW, wanted_T3HW, rtol=0, atol=1e-5)
        torch.testing.assert_close(mel_T1FM[:, 0], wanted_TFM)
        assert torch.equal(masks_T1HW[:, 0], wanted_THW.float())
        assert 0.01 < masks_T1HW.mean() < 0.5


def test_webdataset_reads_the_same_clips(sets: Path, ours: dict[str, tuple]):
    read: dict[str, tuple] = {}
    for batch in islice(loader_baselines.webdataset_batches(sets / "raw", BATCH), CLIPS // BATCH):
        read |= by_name(*batch)
    assert read.keys() == ours.keys()
    for name, (frames, mel, masks) in read.items():
        assert torch.equal(frames, ours[name][3])
        assert torch.equal(mel, ours[name][1])
        assert torch.equal(masks, ours[name][2])


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_loader_reads_each_clip_once_in_a_pass(sets: Path, kind: str):
    stream = loader_measure.batches(Loader(kind, str(sets / KINDS[kind])))
    for _ in range(2):
        names = [name for batch in islice(stream, CLIPS // BATCH) for name in batch]
        assert sorted(names) == [f"clip{number:05d}" for number in range(CLIPS)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_rate_counts_as_many_clips_as_asked(sets: Path, kind: str):
    """In whole batches."""
    measured = loader_measure.rate(Loader(kind, str(sets / KINDS[kind])), least_clips=18, least_seconds=0.0)
    assert measured["clips"] == 20
    assert all(measured[key] > 0 for key in RATES)


@pytest.mark.parametrize(("normalise", "dtype"), [(False, torch.uint8), (True, torch.float32)])
def test_frames_are_normalised_where_the_row_says_so(sets: Path, normalise: bool, dtype: torch.dtype):
    loader = Loader("ours", str(sets / "raw"), normalise=normalise)
    assert next(loader_measure.clips_of_training(loader)).frames_BTCHW.dtype == dtype


def test_raw_decord_reads_the_frames_of_the_video_members(film_set: Path):
    read = list(islice(loader_baselines.decord_clips(film_set), 2))
    reader = loader_measure.train_batches(str(film_set), 0)
    (clip,) = next(iter(reader))
    stored = {name: clip.frames_BTCHW[b].movedim(1, -1).numpy() for b, name in enumerate(clip.key)}
    assert sorted(stored) == ["film_0000", "film_0001"]
    assert np.abs(stored["film_0000"].astype(int) - stored["film_0001"]).mean() > 10
    for frames_THWC, name in zip(read, sorted(stored), strict=True):
        assert frames_THWC.shape == (5, 32, 32, 3)
        # another frame is 30 grey levels away
        assert np.abs(frames_THWC.astype(int) - stored[name]).mean() < 3


def test_clips_of_films_begin_at_different_places(tmp_path: Path):
    loader_sets.write_synthetic_film(tmp_path / "film.mp4", 64, 36, seconds=9, fps=10)
    loader_sets.write_smaller_film(tmp_path / "film.mp4", tmp_path / "smaller.mp4", 32, 18, seconds=7)
    assert loader_sets.film_size(tmp_path / "smaller.mp4") == (32, 18)
    samples = list(loader_sets.film_samples([tmp_path / "film.mp4", tmp_path / "smaller.mp4"], 4, 32))
    assert [sample.name for sample in samples] == [f"clip{number:05d}" for number in range(4)]
    assert all(sample.frames_THWC.shape == (5, 32, 32, 3) and sample.labelled_T.all() for sample in samples)
    assert len({sample.frames_THWC.tobytes() for sample in samples}) == 4


def test_memory_and_time_count_children_too():
    """A child that holds 64 MB and was busy for 0.4 s."""
    alone_mib, begin_s = loader_measure._resident_mib(), loader_measure._cpu_s()
    code = "import sys, time; held = bytearray(b'1' * (64 << 20))\n"
    code += "while time.process_time() < 0.4: pass\n"
    code += "print(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        assert 64 < loader_measure._resident_mib() - alone_mib < 128
        assert loader_measure._cpu_s() - begin_s > 0.35
    finally:
        child.kill()
        child.communicate(timeout=10)
    assert loader_measure._cpu_s() - begin_s > 0.35
    assert alone_mib > 64


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--clips", "6"], "--clips must be a multiple of 4"),
        (["--clips", "0"], "--clips must be a multiple of 4"),
        (["--repeats", "0"], "--repeats at least 1"),
        (["--films", "absent.mp4"], "--films absent.mp4 is not a file"),
        (["--film", "a.mp4"], "nearest known key: films"),
    ],
)
def test_wrong_options_are_one_line(option: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = run("bench", ["loader", *option])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_film_that_is_too_short_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    film = tmp_path / "short.mp4"
    loader_sets.write_synthetic_film(film, 64, 36, seconds=3, fps=5)
    assert run("bench", ["loader", "--tiny", "--films", str(film)]) == 2
    assert f"--films {film}: 3.0 s long, clips take 5 s" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_measures_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = tmp_path / "loader.json", tmp_path / "loader.md"
    assert run("bench", ["loader", "--tiny", "--json", str(paths[0]), "--markdown", str(paths[1])]) == 0
    found = json.loads(paths[0].read_text())
    rates = [row for part in ("rate", "video", "workers") for row in found[part]]
    assert len(found["rate"]) == 7
    assert [(row["frames"], row["workers"]) for row in found["workers"]] == [
        (frames, workers) for frames in ("raw", "jpeg") for workers in (0, 1)
    ]
    assert [row["kind"] for row in found["video"]] == ["ours", "decord"]
    assert all(row[key][name] > 0 for row in rates for key in RATES for name in ("p20", "p50", "p80"))
    assert all(row["clips"] == TINY.clips for part in ("rate", "workers") for row in found[part])
    assert all(row["kb"] > 100 for row in found["rate"])
    assert [row["clips"] for row in found["memory"]] == [80, 80, 8]
    assert all(len(row["resident_mib"]) == 10 and min(row["resident_mib"]) > 10 for row in found["memory"])
    assert [row["seconds"]["p50"] > 0 for row in found["start"]] == [True] * 3
    new, restored, walked = (row["first"] for row in found["start"])
    assert restored == walked != new
    assert {row["position"] for row in found["start"]} == {48}  # the middle of the third epoch, in whole batches
    table = paths[1].read_text()
    assert table in capsys.readouterr().out
    assert all(f"### {title}" in table for title in ("rate", "video", "workers", "memory", "start and resume"))
    assert "Notes" not in table
    assert found["facts"]["threads"] == 1
    assert found["facts"]["command"].startswith("avs-dist bench loader --tiny")
    assert not [path for path in os.listdir(tmp_path) if path.startswith("bench-loader")]


@pytest.mark.slow
def test_what_fails_is_told_and_the_rest_measured(sets: Path, tmp_path: Path):
    for name in (*loader_parts.PICTURES, "literal"):
        (tmp_path / name).symlink_to(sets / name)
    (tmp_path / "jpeg").unlink()
    shutil.copytree(sets / "jpeg", tmp_path / "jpeg")
    (tmp_path / "jpeg" / "index.json").unlink()
    bench = Bench(tmp_path, [], TINY, limit_s=60.0, one_process=True)
    try:
        rows = bench.rows_of("rate")
    finally:
        bench.close()
    failed = [row["label"] for row in rows if "failed" in row]
    assert failed == ["ours, jpeg"]
    assert all(row["clips_per_s"]["p50"] > 0 for row in rows if row["label"] not in failed)
    table = loader_report.markdown({"device": "some"}, "clips", {"rate": rows})
    assert "- ours, jpeg: FileNotFoundError: no index.json in" in table
    assert "| ours, raw |" in table
    with pytest.raises(RuntimeError, match=r"^ours, jpeg: FileNotFoundError: no index\.json"):
        exit_code({"rate": rows})
    assert exit_code({"rate": [row for row in rows if row["label"] not in failed]}) == 0


def test_what_takes_too_long_is_told(sets: Path):
    bench = Bench(sets, [], TINY, limit_s=0.0, one_process=False)
    endless = loader_parts._Call(loader_measure.rate, (Loader("ours", str(sets / "raw")), 10**9, 0.0))
    assert bench._rounds("rate", {"slow": endless}) == [{"label": "slow", "failed": "took more than 0 s"}]


def rate_row(label: str, rate: float) -> loader_parts.Row:
    spread = {"p20": rate - 1, "p50": rate, "p80": rate + 1}
    return {"label": label, "kb": 1003.2, "clips_per_s": spread, "clips_per_cpu_s": dict.fromkeys(spread, 5.0)}


def test_the_table_compares_with_the_baselines():
    rows = [rate_row("ours, raw", 1000), rate_row("literal AVSBench", 100)]
    rows.append(rate_row("webdataset, same raw shards", 800))
    table = loader_report.markdown({"device": "some"}, "two clips", {"rate": rows})
    assert "device: some." in table
    assert "| ours, raw | 1003 | 1,000 (999-1,001) | 10.00 | 1.25 | 5.0 (5.0-5.0) |" in table
    alone = loader_report.markdown({}, "two clips", {"rate": rows[:1]})
    assert "| ours, raw | 1003 | 1,000 (999-1,001) | - | - | 5.0 (5.0-5.0) |" in alone


def test_spreads_are_quantiles_over_repeats():
    results = [{"clips": 4, "clips_per_s": float(value)} for value in range(1, 12)]
    summary = loader_parts._summary(results)
    assert summary == {"clips": 4, "clips_per_s": {"p20": 3.0, "p50": 6.0, "p80": 9.0}}
