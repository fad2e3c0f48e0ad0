"""Streaming: planned order for any world and workers, exact resume, mixtures, other sound, damage that is replaced."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from media_files import write_ms3
from PIL import Image
from tampered_shards import edited, rewrite, with_members
from torch.utils.data import DataLoader

from avs_dist.launch import shards as command
from avs_dist.shards.build import BuildConfig, build
from avs_dist.shards.faults import DamagedClipError
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.members import encode_clip
from avs_dist.shards.pipeline import EvalStream, Loaded, TrainStream, stream_state
from avs_dist.shards.plan import StepPlan, TrainSequence, epoch_order, substitutes
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import SILENT_LOG_MEL, Sample
from avs_dist.shards.verify import verify

SHARED = Path(__file__).resolve().parents[2] / "shared"
NAMES = {**{f"train{i:02d}": "train" for i in range(11)}, **{f"val{i}": "val" for i in range(5)}, "lonely": "test"}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """11 clips for training in several shards, 5 for validation, 1 for testing."""
    root = tmp_path_factory.mktemp("raw")
    write_ms3(root, NAMES)
    out = tmp_path_factory.mktemp("shards")
    return build(BuildConfig("avsbench-ms3", root, out, size=32, shard_mb=0.8), progress=False)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Another set: 4 clips for training."""
    root, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("shards")
    write_ms3(root, {f"other{i}": "train" for i in range(4)})
    return build(BuildConfig("avsbench-ms3", root, out, size=32), progress=False)


@pytest.fixture
def copy(index: ShardIndex, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index.directory, tmp_path / "copy"))


def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


def train_stream(
    sets: ShardIndex | list[ShardIndex], weights: tuple[float, ...] = (1.0,), **changes: Any
) -> TrainStream[list[str]]:
    plan = {"start": 0, "num_steps": 5, "global_batch": 6, "accumulation": 1, "rank": 0, "world_size": 1}
    reader = ClipReader(sets, "train")
    return TrainStream(reader, StepPlan(**{**plan, **changes}), seed=5, window=6, collate=names, weights=weights)


def eval_stream(index: ShardIndex, split: str = "val", audio: Any = "real", **changes: Any) -> EvalStream[list[str]]:
    reader = ClipReader(index, split, audio)
    return EvalStream(reader, **{"batch_size": 2, "rank": 0, "world_size": 1, "collate": names, **changes})


def loaded(stream: Any, workers: int = 0) -> list[Loaded[Any]]:
    if workers == 0:
        return list(stream)
    loader = DataLoader(
        stream, batch_size=None, collate_fn=tuple, num_workers=workers, multiprocessing_context="spawn", timeout=60
    )
    return [Loaded(*parts) for parts in loader]


def batches(stream: Any, workers: int = 0) -> list[Any]:
    return [each.batch for each in loaded(stream, workers)]


def test_the_stream_follows_the_plan(index: ShardIndex):
    counts = [len(shard.clips) for shard in index.split("train")]
    assert len(counts) > 1
    clips = [clip.name for shard in index.split("train") for clip in shard.clips]
    expected = [clips[i] for epoch in range(3) for i in epoch_order(counts, 5, epoch, 6)]
    assert sum(batches(train_stream(index)), []) == expected[:30]


def test_workers_do_not_change_the_order(index: ShardIndex):
    assert batches(train_stream(index), workers=2) == batches(train_stream(index))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 1), (1, 2), (3, 2)])
def test_ranks_and_accumulation_do_not_change_the_steps(index: ShardIndex, world: int, accumulation: int):
    whole = batches(train_stream(index))
    shared = {"world_size": world, "accumulation": accumulation}
    ranks = [batches(train_stream(index, rank=rank, **shared)) for rank in range(world)]
    assert {len(each) for each in ranks} == {5 * accumulation}
    assert len(train_stream(index, **shared)) == 5 * accumulation
    for step in range(5):
        micro = range(step * accumulation, (step + 1) * accumulation)
        assert [name for a in micro for each in ranks for name in each[a]] == whole[step]


def test_resume_on_other_ranks_and_with_another_batch_gives_the_rest(index: ShardIndex):
    """2 steps of 6 on 1 rank, then 1 of 6 on 3 ranks, then 4 of 3 on 1: the 30 clips of 5 steps without a break."""
    first = batches(train_stream(index, num_steps=2))
    second = [batches(train_stream(index, start=12, num_steps=1, rank=rank, world_size=3))[0] for rank in range(3)]
    third = batches(train_stream(index, start=18, num_steps=4, global_batch=3))
    assert sum(first + second + third, []) == sum(batches(train_stream(index)), [])


def test_mixtures_draw_from_all_sets(index: ShardIndex, other: ShardIndex):
    whole = batches(train_stream([index, other], (1.0, 3.0), num_steps=20, global_batch=8), workers=2)
    sequence = TrainSequence([[len(s.clips) for s in each.split("train")] for each in (index, other)], 5, 6, (1, 3))
    clips = [clip.name for each in (index, other) for shard in each.split("train") for clip in shard.clips]
    assert sum(whole, []) == [clips[sequence[p]] for p in range(160)]
    assert 100 < sum(name.startswith("other") for name in sum(whole, [])) < 140
    other_state = stream_state(ClipReader([other, index], "train"), 0, 5, 6, (1, 3))
    assert stream_state(ClipReader([index, other], "train"), 0, 5, 6, (1, 3)) != other_state


def test_a_batch_that_cannot_be_shared_is_refused(index: ShardIndex):
    with pytest.raises(ValueError, match="multiple of 4"):
        train_stream(index, world_size=2, accumulation=2)


def test_one_shard_serves_three_ranks_equally(index: ShardIndex):
    assert len(index.split("val")) == 1
    streams = [eval_stream(index, batch_size=1, rank=rank, world_size=3) for rank in range(3)]
    assert [len(list(stream)) for stream in streams] == [len(stream) for stream in streams] == [2, 2, 2]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_evaluation_marks_padding(index: ShardIndex, workers: int, world: int):
    seen = []
    for rank in range(world):
        stream = eval_stream(index, rank=rank, world_size=world)
        for batch, positions, damages in loaded(stream, workers if rank == 0 else 0):
            assert len(batch) == len(positions) == 2
            assert not damages
            assert all(name == f"val{4 if p == -1 else p}" for name, p in zip(batch, positions, strict=True))
            seen += [p for p in positions if p != -1]
    assert sorted(seen) == [0, 1, 2, 3, 4]


def mels(index: ShardIndex, split: str, audio: Any) -> list[np.ndarray]:
    reader = ClipReader(index, split, audio)
    return [sample.mel_TFM for sample in reader.samples(range(len(reader)))]


def test_muted_and_swapped_sound(index: ShardIndex):
    real, swapped = mels(index, "val", "real"), mels(index, "val", "swapped")
    assert all((mel == np.float32(SILENT_LOG_MEL)).all() for mel in mels(index, "val", "muted"))
    for i, mel in enumerate(swapped):
        np.testing.assert_array_equal(mel, real[(i + 2) % 5])
        assert not np.array_equal(mel, real[i])
    with pytest.raises(ValueError, match="at least two clips"):
        ClipReader(index, "test", "swapped")


def flip(folder: Path, split: str, number: int, offset: int = 700) -> ShardIndex:
    """Flip a bit in a clip of the first shard of a split."""
    shard = ShardIndex.load(folder).split(split)[0]
    data = bytearray((folder / shard.name).read_bytes())
    data[shard.clips[number].offset + offset] ^= 1
    (folder / shard.name).write_bytes(data)
    return ShardIndex.load(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_clip_is_replaced_in_training_and_told(copy: Path, index: ShardIndex, workers: int):
    damaged = flip(copy, "train", 1)
    clips = [clip.name for shard in index.split("train") for clip in shard.clips]
    stand_in = clips[next(iter(substitutes(1, 11)))]
    expected = [[stand_in if name == clips[1] else name for name in batch] for batch in batches(train_stream(index))]
    streamed = loaded(train_stream(damaged), workers)
    assert [each.batch for each in streamed] == expected
    for each, batch in zip(streamed, batches(train_stream(index)), strict=True):
        assert [damage.name for damage in each.damages] == [clips[1]] * batch.count(clips[1])
        assert [clips[clip] for clip in each.clips] == each.batch
    damage = next(damage for each in streamed for damage in each.damages)
    shard = damaged.split("train")[0]
    assert damage[:6] == ("train", 1, clips[1], f"{copy}/{shard.name}", shard.clips[1].offset, "checksum")
    assert "CRC-32" in str(damage)


def test_a_substitute_comes_from_the_same_set(copy: Path, other: ShardIndex):
    """All of `other` but one clip is damaged: that clip takes all its places in a mixture."""
    folder = Path(shutil.copytree(other.directory, copy.parent / "other"))
    for number in (0, 1, 3):
        broken = flip(folder, "train", number)
    drawn = sum(batches(train_stream([ShardIndex.load(copy), broken], (1.0, 1.0), num_steps=10)), [])
    assert {name for name in drawn if name.startswith("other")} == {"other2"}
    healthy = sum(batches(train_stream([ShardIndex.load(copy), other], (1.0, 1.0), num_steps=10)), [])
    assert [n.startswith("other") for n in drawn] == [n.startswith("other") for n in healthy]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_of_damaged_clips_only_ends_the_stream(copy: Path, other: ShardIndex, workers: int):
    folder = Path(shutil.copytree(other.directory, copy.parent / "other"))
    for number in range(4):
        broken = flip(folder, "train", number)
    [last] = loaded(train_stream(broken), workers)
    assert (last.batch, last.clips) == (None, [])
    assert sorted(damage.clip for damage in last.damages) == [0, 1, 2, 3]
    reader = ClipReader(broken, "train")
    [last] = loaded(EvalStream(reader, batch_size=2, rank=0, world_size=1, collate=names), workers)
    assert last.batch is None
    assert {damage.clip for damage in last.damages} == {0, 1, 2, 3}


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2)])
def test_a_damaged_clip_is_left_out_of_an_evaluation_and_told_once(copy: Path, world: int, workers: int):
    """Clips 2 and 4 are damaged; 4 is also what fills the last batch."""
    flip(copy, "val", 2)
    damaged = flip(copy, "val", 4)
    seen, told = [], []
    for rank in range(world):
        for batch, positions, damages in loaded(eval_stream(damaged, rank=rank, world_size=world), workers):
            assert all(name == f"val{p}" for name, p in zip(batch, positions, strict=True) if p != -1)
            seen += [p for p in positions if p != -1]
            told += [damage.clip for damage in damages]
    assert (sorted(seen), sorted(told)) == ([0, 1, 3], [2, 4])


def test_a_clip_whose_donor_is_damaged_gets_another_sound(copy: Path, index: ShardIndex):
    """With swapped sound clip i gets that of i + 2, clip 0 here that of 3; so all rows are of the same clips."""
    real, damaged = mels(index, "val", "real"), flip(copy, "val", 2)
    results = loaded(eval_stream(damaged, audio="swapped"))
    assert sorted(p for each in results for p in each.clips if p != -1) == [0, 1, 3, 4]
    assert [damage.name for each in results for damage in each.damages] == ["val2"]
    np.testing.assert_array_equal(ClipReader(damaged, "val", "swapped").sample(0).mel_TFM, real[3])
    for number in (0, 1, 3):
        damaged = flip(copy, "val", number)
    [*_, last] = loaded(eval_stream(damaged, batch_size=5, audio="swapped"))
    assert last.clips == [-1] * 5
    assert {damage.clip for damage in last.damages} == {0, 1, 2, 3, 4}
    assert "no other clip has a sound that can be read" in last.damages[-1].reason


@pytest.mark.parametrize("film", ["bigbuckbunny", "friday"])
def test_jpeg_frames_keep_the_stated_bound(copy: Path, film: str):
    """README: on natural frames less than 2 grey levels in the mean of a frame, 24 for one value, half the bytes."""
    folder = SHARED / "data/annotated" / film / "visual_frames"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    frames = np.stack([np.asarray(Image.open(folder / f"{film}_{t + 1}.png").convert("RGB")) for t in range(5)])
    mel, masks = np.zeros((5, 96, 64), np.float32), np.zeros((5, 224, 224), np.uint8)
    sample = Sample("val0", frames, mel, masks, np.zeros(5, bool), {"sound": "ok"})
    segments = {form: encode_clip(sample, form) for form in ("png", "jpeg")}
    pictures = {form: len(segment) - mel.nbytes for form, segment in segments.items()}
    assert pictures["jpeg"] < pictures["png"] / 2
    edited(copy, lambda data: data["settings"].update(image_size=224))
    reader = ClipReader(rewrite(copy, lambda _: segments["jpeg"]), "val")
    error = np.abs(reader.sample(0).frames_THWC.astype(int) - frames)
    assert error.mean(axis=(1, 2, 3)).max() < 2
    assert error.max() <= 24


def test_shards_are_plain_tars_in_the_documented_layout(index: ShardIndex):
    shard = index.split("val")[0]
    with tarfile.open(Path(index.directory) / shard.name) as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    per_clip = ["frames.npy", "json", "masks.npy", "mel.npy"]
    assert [m.name for m in members] == [f"val{i}.{name}" for i in range(5) for name in per_clip]


def test_plain_webdataset_reads_our_shards(index: ShardIndex):
    shard = index.split("val")[0]
    clips = list(webdataset.WebDataset(f"{index.directory}/{shard.name}", shardshuffle=False).decode())
    reader = ClipReader(index, "val")
    assert [clip["__key__"] for clip in clips] == [f"val{i}" for i in range(5)]
    for clip, sample in zip(clips, reader.samples(range(5)), strict=True):
        np.testing.assert_array_equal(clip["frames.npy"], sample.frames_THWC)
        np.testing.assert_array_equal(clip["mel.npy"], sample.mel_TFM)


def test_verify_and_info_of_sound_shards(index: ShardIndex, capsys: pytest.CaptureFixture[str]):
    assert command.main(["verify", str(index.directory)]) == 0
    assert "all well" in capsys.readouterr().out
    assert command.main(["info", str(index.directory)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["val", "1", "5", "25", "25", "5", "0", "0"] in [row[:8] for row in rows]


@pytest.mark.parametrize("where", ["frame", "mel"])
def test_damage_is_found_with_shard_and_offset(copy: Path, where: str, capsys: pytest.CaptureFixture[str]):
    index = ShardIndex.load(copy)
    shard = index.split("train")[0]
    clip = shard.clips[1]
    # the mel is the last member of a clip, the frames are the first
    flip(copy, "train", 1, 1500 if where == "frame" else clip.length - 2000)
    assert command.main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"{shard.name}: the SHA-256 does not match" in out
    assert f"{shard.name}, offset {clip.offset}, clip {clip.key}" in out
    assert out.count("DAMAGED") == 2
    with pytest.raises(DamagedClipError, match=f"{shard.name}, offset {clip.offset}, clip {clip.key}: the CRC-32"):
        ClipReader(index, "train").sample(1)


def test_truncated_and_missing_shards_are_found(copy: Path):
    index = ShardIndex.load(copy)
    first, second = index.split("train")[:2]
    (copy / first.name).write_bytes((copy / first.name).read_bytes()[: first.clips[-1].offset + 700])
    (copy / second.name).unlink()
    problems = "\n".join(verify(index, progress=False))
    assert f"{first.name}, offset {first.clips[-1].offset}" in problems
    assert "the file ends after 700 of" in problems
    assert f"{second.name}: cannot be read as a plain file: No such file" in problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda clips: clips.pop(2), "clip train03: expected at offset"),
        (lambda clips: clips[1].update(labelled=3), "clip train01: 5 labelled seconds and sound ok, the index says"),
        (lambda clips: clips[1].update(sound="none"), "clip train01: 5 labelled seconds and sound ok, the index says"),
    ],
)
def test_an_index_that_is_not_true_is_found(copy: Path, change: Callable[[Any], Any], problem: str):
    def changed(data: Any) -> None:
        change(data["shards"][0]["clips"])
        data["shards"][0]["count"] = len(data["shards"][0]["clips"])

    problems = verify(ShardIndex.load(edited(copy, changed)), progress=False)
    assert len(problems) == 1
    assert problem in problems[0]


def test_members_are_views_of_one_buffer(copy: Path, index: ShardIndex):
    """Raw frames are not copied on the way from the file, and no other clip shares their memory."""
    reader = ClipReader(index, "val")
    one, two = reader.sample(0), reader.sample(0)
    assert not one.frames_THWC.flags.owndata
    one.frames_THWC[:] = 0
    assert two.frames_THWC.any()
    changed = rewrite(copy, with_members(lambda members: members | {"extra.txt": b"unknown members are ignored"}))
    np.testing.assert_array_equal(ClipReader(changed, "val").sample(0).frames_THWC, two.frames_THWC)
