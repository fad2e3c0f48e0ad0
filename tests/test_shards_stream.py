"""Streaming: planned order for any world and workers, audio variants, and shards that are damaged or hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import write_ms3
from PIL import Image
from torch.utils.data import DataLoader

from avs_dist.launch import shards as command
from avs_dist.shards.build import BuildConfig, build
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.members import encode_clip
from avs_dist.shards.pipeline import EvalStream, TrainStream
from avs_dist.shards.plan import epoch_order
from avs_dist.shards.read import ClipReader, DamagedClipError
from avs_dist.shards.schema import SILENT_LOG_MEL, Sample
from avs_dist.shards.verify import describe, verify

SHARED = Path(__file__).resolve().parents[2] / "shared"
NAMES = {**{f"train{i:02d}": "train" for i in range(11)}, **{f"val{i}": "val" for i in range(5)}, "lonely": "test"}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """11 clips for training in several shards, 5 for validation, 1 for testing."""
    root = tmp_path_factory.mktemp("raw")
    write_ms3(root, NAMES)
    out = tmp_path_factory.mktemp("shards")
    return build(BuildConfig("avsbench-ms3", root, out, size=32, shard_mb=0.8), progress=False)


@pytest.fixture
def copy(index: ShardIndex, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index.directory, tmp_path / "copy"))


def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


def train_stream(index: ShardIndex | Path, **changes: Any) -> TrainStream[list[str]]:
    settings: dict[str, Any] = {"seed": 5, "window": 6, "global_batch": 6, "grad_accumulation": 1, "rank": 0}
    settings |= {"world_size": 1, "start_step": 0, "num_steps": 5, "collate": names}
    return TrainStream(index, "train", **{**settings, **changes})


def loaded(stream: Any, workers: int) -> list[Any]:
    context = "spawn" if workers else None
    return list(DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=context))


def test_the_stream_follows_the_plan(index: ShardIndex):
    counts = [len(shard.clips) for shard in index.split("train")]
    assert len(counts) > 1
    clips = [clip.name for shard in index.split("train") for clip in shard.clips]
    expected = [clips[i] for epoch in range(3) for i in epoch_order(counts, 5, epoch, 6)]
    streamed = [name for batch in train_stream(index) for name in batch]
    assert streamed == expected[:30]


@pytest.mark.parametrize("workers", [2])
def test_workers_do_not_change_the_order(index: ShardIndex, workers: int):
    assert loaded(train_stream(index), workers) == list(train_stream(index))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 1), (1, 2), (3, 2)])
def test_ranks_and_accumulation_do_not_change_the_steps(index: ShardIndex, world: int, accumulation: int):
    whole = list(train_stream(index))
    shared = {"world_size": world, "grad_accumulation": accumulation}
    ranks = [list(train_stream(index, rank=rank, **shared)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {5 * accumulation}
    assert len(train_stream(index, **shared)) == 5 * accumulation
    for step in range(5):
        micro = range(step * accumulation, (step + 1) * accumulation)
        assert [name for a in micro for batches in ranks for name in batches[a]] == whole[step]


def test_resume_gives_the_rest(index: ShardIndex):
    assert list(train_stream(index, start_step=3, num_steps=2)) == list(train_stream(index))[3:]


def test_one_shard_serves_three_ranks_equally(index: ShardIndex):
    assert len(index.split("val")) == 1
    streams = [EvalStream(index, "val", batch_size=1, rank=r, world_size=3, collate=names) for r in range(3)]
    batches = [list(stream) for stream in streams]
    assert [len(b) for b in batches] == [2, 2, 2]
    assert [len(stream) for stream in streams] == [2, 2, 2]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_evaluation_marks_padding(index: ShardIndex, workers: int, world: int):
    seen = []
    for rank in range(world):
        stream = EvalStream(index, "val", batch_size=2, rank=rank, world_size=world, collate=names)
        for batch, positions in loaded(stream, workers if rank == 0 else 0):
            assert len(batch) == len(positions) == 2
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
    reader = ClipReader(rewrite(copy, lambda _: segments["jpeg"]), "val")
    error = np.abs(next(reader.samples([0])).frames_THWC.astype(int) - frames)
    assert error.mean(axis=(1, 2, 3)).max() < 2
    assert error.max() <= 24


def tar_members(segment: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(segment)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


def test_shards_are_plain_tars_in_the_documented_layout(index: ShardIndex):
    shard = index.split("val")[0]
    with tarfile.open(index.directory / shard.name) as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    per_clip = [f"frame{t}.png" for t in range(5)] + ["json"] + [f"mask{t}.png" for t in range(5)] + ["mel.npy"]
    assert [m.name for m in members] == [f"val{i}.{name}" for i in range(5) for name in per_clip]


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
    data = bytearray((copy / shard.name).read_bytes())
    # the mel is the last member of a clip, the first frame is the first
    data[clip.offset + (1500 if where == "frame" else clip.length - 2000)] ^= 1
    (copy / shard.name).write_bytes(data)
    assert command.main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"{shard.name}: the SHA-256 does not match" in out
    assert f"{shard.name}, offset {clip.offset}, clip {clip.key}" in out
    assert out.count("DAMAGED") == 2
    with pytest.raises(DamagedClipError, match=f"{shard.name}, offset {clip.offset}, clip {clip.key}: the CRC-32"):
        list(train_stream(copy))


def test_truncated_and_missing_shards_are_found(copy: Path):
    index = ShardIndex.load(copy)
    first, second = index.split("train")[:2]
    (copy / first.name).write_bytes((copy / first.name).read_bytes()[: first.clips[-1].offset + 700])
    (copy / second.name).unlink()
    problems = "\n".join(verify(index, progress=False))
    assert f"{first.name}, offset {first.clips[-1].offset}" in problems
    assert "the file ends after 700 of" in problems
    assert f"{second.name}: the file is missing" in problems


def test_a_clip_that_the_index_lost_is_found(copy: Path):
    def change(data: Any) -> None:
        del data["shards"][0]["clips"][2]
        data["shards"][0]["count"] -= 1

    problems = verify(ShardIndex.load(edited(copy, change)), progress=False)
    assert len(problems) == 1
    assert "clip train03: expected at offset" in problems[0]


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def rewrite(copy: Path, change: Any) -> ShardIndex:
    """Replace the first clip of val by `change(members of the clip) -> segment`, with a matching index."""
    index = ShardIndex.load(copy)
    shard = index.split("val")[0]
    data = (copy / shard.name).read_bytes()
    segment = change(data[: shard.clips[0].length])
    (copy / shard.name).write_bytes(segment)
    clip = replace(shard.clips[0], length=len(segment), crc32=zlib.crc32(segment))
    hostile = replace(shard, clips=(clip,), bytes=len(segment))
    changed = replace(index, shards=tuple(hostile if s is shard else s for s in index.shards))
    changed.save()
    return ShardIndex.load(copy)


def appended(segment: bytes, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return segment + info.tobuf() + data + b"\0" * (-len(data) % 512)


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth"])
def test_pickles_are_never_loaded(copy: Path, tmp_path: Path, suffix: str):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Malicious(marker))
    index = rewrite(copy, lambda segment: appended(segment, f"val0.{suffix}", evil))
    assert next(ClipReader(index, "val").samples([0])).name == "val0"
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()  # the payload works where someone unpickles it


def test_a_pickled_array_as_mel_is_refused(copy: Path, tmp_path: Path):
    marker = tmp_path / "marker"
    array = io.BytesIO()
    np.save(array, np.array([Malicious(marker)], dtype=object), allow_pickle=True)

    def change(segment: bytes) -> bytes:
        members = {**tar_members(segment), "val0.mel.npy": array.getvalue()}
        return b"".join(appended(b"", name, data) for name, data in members.items())

    with pytest.raises(DamagedClipError, match=r"allow_pickle=False"):
        list(ClipReader(rewrite(copy, change), "val").samples([0]))
    assert not marker.exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_other_strange_members_are_refused(copy: Path, kind: bytes):
    index = rewrite(copy, lambda segment: appended(segment, "val0.extra", kind=kind, link="/etc/passwd"))
    with pytest.raises(DamagedClipError, match=r"not a plain file|bad|invalid"):
        list(ClipReader(index, "val").samples([0]))


@pytest.mark.parametrize("missing", ["val0.frame2.png", "val0.mask1.png", "val0.mel.npy", "val0.json"])
def test_a_missing_member_is_named(copy: Path, missing: str):
    def change(segment: bytes) -> bytes:
        members = tar_members(segment)
        return b"".join(appended(b"", name, data) for name, data in members.items() if name != missing)

    with pytest.raises(
        DamagedClipError, match=f"offset 0, clip val0: member {missing.removeprefix('val0.')} is missing"
    ):
        list(ClipReader(rewrite(copy, change), "val").samples([0]))


def test_another_clip_at_the_offset_is_noticed(copy: Path):
    def change(segment: bytes) -> bytes:
        members = {name.replace("val0", "other"): data for name, data in tar_members(segment).items()}
        return b"".join(appended(b"", name, data) for name, data in members.items())

    with pytest.raises(DamagedClipError, match="holds clip other"):
        list(ClipReader(rewrite(copy, change), "val").samples([0]))


def edited(copy: Path, change: Any) -> Path:
    data = json.loads((copy / "index.json").read_text())
    change(data)
    (copy / "index.json").write_text(json.dumps(data))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=99), "schema version 99"),
        (lambda d: d.pop("shards"), "damaged.*shards"),
        (lambda d: d["shards"][0].update(name="pipe:rm x.tar/../x.tar"), "not a plain file name"),
        (lambda d: d["shards"][0].update(name="../x.tar"), "not a plain file name"),
        (lambda d: d["shards"][0].update(count=99), "count is 99"),
        (lambda d: d["shards"][0]["clips"][0].update(length=2**40), "outside the file or is too large"),
    ],
)
def test_a_strange_index_is_refused(copy: Path, change: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ShardIndex.load(edited(copy, change))


def test_index_errors_say_what_to_do(index: ShardIndex, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no index\.json.*avs-dist shards build"):
        ShardIndex.load(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json"):
        ShardIndex.load(tmp_path)
    with pytest.raises(ValueError, match="no split 'dev'; it has: train, val, test"):
        index.split("dev")
    with pytest.raises(ValueError, match="multiple of 4"):
        train_stream(index, world_size=2, grad_accumulation=2)
    assert "val" in describe(index)
