"""`shards embed`: a copy of the shards, equal but for what an encoder makes of the sound of each clip."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avs_dist.launch import shards as command
from avs_dist.modules.audio import VGGish
from avs_dist.shards.embed import AudioEncoder, embed
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.read import ClipReader
from avs_dist.shards.records import locked
from avs_dist.shards.schema import SILENT_LOG_MEL
from avs_dist.shards.segment import tar_segment
from avs_dist.shards.verify import verify
from avs_dist.shards.write import ShardWriter
from avs_dist.stored_audio import weights_sha256

SHA256 = "0123456789abcdef" * 4
SKIPPED = {"name": "gone", "split": "test", "path": "gone.mp4", "reason": "no such file"}


class Bands:
    """An encoder whose numbers can be read off a log-mel: its first 96 time steps, then 32 zeros; counts its work."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.seconds, self._fails_after = 0, fails_after

    def __call__(self, mel_NFM: np.ndarray) -> np.ndarray:
        self.seconds += len(mel_NFM)
        if self._fails_after is not None and self.seconds > self._fails_after:
            raise KeyboardInterrupt
        return np.pad(mel_NFM[:, :, 7], ((0, 0), (0, 32)))

    def encoder(self, sha256: str = SHA256) -> AudioEncoder:
        return AudioEncoder("vggish", sha256, self)


@pytest.fixture(scope="module")
def original(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Shards of four clips, of a build that has skipped one."""
    index, out, shards = ShardIndex.load(ms3_shards), tmp_path_factory.mktemp("original"), []
    for split in index.splits:
        reader, clips = ClipReader(index, split), [clip for shard in index.split(split) for clip in shard.clips]
        for number, first in enumerate(range(0, len(clips), 4)):
            writer = ShardWriter(out, split, number)
            for clip, entry in enumerate(clips[first : first + 4], start=first):
                writer.append(entry, tar_segment(entry.name, reader.members(clip)))
            shards.append(writer.close())
    assert len(shards) > len(index.splits)
    ShardIndex(out, index.settings, tuple(shards), (SKIPPED,)).save()
    return ShardIndex.load(out)


@pytest.fixture(scope="module")
def embedded(original: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return embed(original, tmp_path_factory.mktemp("embedded"), Bands().encoder(), batch=3, progress=False)


def copy_of(index: ShardIndex, folder: Path) -> ShardIndex:
    shutil.copytree(index.directory, folder)
    return ShardIndex.load(folder)


def damage(index: ShardIndex, split: str, number: int, clips: list[int]) -> None:
    """Flip a bit of these clips of a shard."""
    shard = index.split(split)[number]
    path = Path(index.directory) / shard.name
    data = bytearray(path.read_bytes())
    for clip in clips:
        data[shard.clips[clip].offset + 700] ^= 1
    path.write_bytes(data)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_only_the_sound_of_the_encoder_is_new(original, embedded):
    assert verify(embedded, progress=False) == []
    assert embedded.splits == original.splits
    for split in original.splits:
        before, after = ClipReader(original, split), ClipReader(embedded, split)
        for clip in range(len(before)):
            old, new = before.members(clip), after.members(clip)
            assert {*new} - {*old} == {"audio.npy"}
            assert all(bytes(new[name]) == bytes(content) for name, content in old.items())
            sample = after.sample(clip)
            np.testing.assert_array_equal(sample.audio_TD, Bands()(before.sample(clip).mel_TFM))
    for old_shard, new_shard in zip(original.shards, embedded.shards, strict=True):
        assert (new_shard.name, new_shard.split) == (old_shard.name, old_shard.split)
        for old_clip, new_clip in zip(old_shard.clips, new_shard.clips, strict=True):
            assert replace(new_clip, offset=0, length=0, crc32=0) == replace(old_clip, offset=0, length=0, crc32=0)


def test_the_index_tells_the_encoder_and_what_silence_is(original, embedded):
    settings = dict(embedded.settings)
    encoder, origin = settings.pop("audio_encoder"), settings.pop("embedded_from")
    assert settings == original.settings
    assert (encoder["kind"], encoder["weights_sha256"]) == ("vggish", SHA256)
    assert encoder["silence"] == [np.float32(SILENT_LOG_MEL)] * 96 + [0.0] * 32
    assert (origin["kind"], origin["weights_sha256"]) == ("vggish", SHA256)
    assert not (Path(embedded.directory) / ".build").exists()


def test_muted_and_swapped_sound_are_those_of_the_encoder(original, embedded):
    muted, swapped = (ClipReader(embedded, "val", audio) for audio in ("muted", "swapped"))
    real = ClipReader(embedded, "val")
    for clip in range(len(real)):
        np.testing.assert_array_equal(muted.sample(clip).audio_TD, np.tile(embedded.silence_D, (5, 1)))
        other = swapped.sample(clip)
        np.testing.assert_array_equal(other.audio_TD, Bands()(other.mel_TFM))
        assert not np.array_equal(other.audio_TD, real.sample(clip).audio_TD)
        assert ClipReader(original, "val", "muted").sample(clip).audio_TD is None


def test_batches_make_no_difference_and_a_finished_folder_is_left_alone(original, embedded, tmp_path):
    embed(original, tmp_path, Bands().encoder(), batch=1000, progress=False)
    assert files(tmp_path) == files(Path(embedded.directory))
    again = Bands()
    assert embed(original, tmp_path, again.encoder(), progress=False).shards == embedded.shards
    assert again.seconds == 1  # of silence


def test_a_killed_run_leaves_no_index_and_the_next_one_goes_on(original, embedded, tmp_path):
    first = original.shards[0]
    broken = Bands(fails_after=1 + sum(clip.seconds for clip in first.clips))
    with pytest.raises(KeyboardInterrupt):
        embed(original, tmp_path, broken.encoder(), batch=3, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {first.name, ".build", ".lock"}
    with pytest.raises(FileNotFoundError):
        ShardIndex.load(tmp_path)
    (tmp_path / ".train-00007.tar.tmp").touch()  # of a run that could not clean up
    with pytest.raises(ValueError, match="holds a build with other settings: embedded_from"):
        embed(original, tmp_path, Bands().encoder("f" * 64), progress=False)
    rest = Bands()
    embed(original, tmp_path, rest.encoder(), batch=3, progress=False)
    assert files(tmp_path) == files(Path(embedded.directory))
    assert rest.seconds == 1 + sum(clip.seconds for shard in original.shards[1:] for clip in shard.clips)
    assert {path.name for path in tmp_path.iterdir()} == {*files(tmp_path), ".lock"}


def test_a_shard_that_was_lost_is_made_again(original, embedded, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(original, tmp_path, Bands(fails_after=60).encoder(), batch=3, progress=False)
    (tmp_path / original.shards[0].name).unlink()
    embed(original, tmp_path, Bands().encoder(), batch=3, progress=False)
    assert files(tmp_path) == files(Path(embedded.directory))


def test_one_run_at_a_time(original, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another build is writing into"):
        embed(original, tmp_path, Bands().encoder(), progress=False)


def test_another_encoder_or_other_shards_need_another_folder(original, embedded, tmp_path):
    copy = copy_of(embedded, tmp_path / "copy")
    with pytest.raises(ValueError, match="embedded_from .*; use another --out"):
        embed(original, Path(copy.directory), Bands().encoder("f" * 64), progress=False)
    with pytest.raises(ValueError, match="other settings: embedded_from"):
        embed(original, Path(original.directory), Bands().encoder(), progress=False)
    assert not ShardIndex.load(original.directory).audio_encoder
    with pytest.raises(ValueError, match="other settings: embedded_from"):
        embed(replace(original, shards=original.shards[1:]), Path(copy.directory), Bands().encoder(), progress=False)
    # what was embedded once can be embedded again with another encoder
    other = AudioEncoder("vggish", "f" * 64, lambda mel: -Bands()(mel))
    new = embed(copy, tmp_path / "new", other, progress=False)
    assert embed(copy, tmp_path / "new", other, progress=False).settings == new.settings
    assert new.audio_encoder["weights_sha256"] == "f" * 64
    np.testing.assert_array_equal(
        ClipReader(new, "val").sample(0).audio_TD, -ClipReader(copy, "val").sample(0).audio_TD
    )


def test_damaged_clips_are_left_out_and_listed(original, tmp_path, capsys):
    copy = copy_of(original, tmp_path / "copy")
    damage(copy, "train", 1, [2])
    name = copy.split("train")[1].clips[2].name
    with pytest.raises(RuntimeError, match=f"1 of 20 clips cannot be used, --max-skipped allows 1.00%.*{name}"):
        embed(copy, tmp_path / "few", Bands().encoder(), progress=False)
    index = embed(copy, tmp_path / "out", Bands().encoder(), batch=2, max_skipped=0.1, progress=False)
    before, skipped = index.skipped
    assert before == SKIPPED
    assert (skipped["name"], skipped["split"], skipped["path"]) == (name, "train", "train-00001.tar")
    assert "CRC-32" in skipped["reason"]
    assert f"skipped {name}" in capsys.readouterr().err
    kept = [clip.name for shard in index.shards for clip in shard.clips]
    assert kept == [clip.name for shard in original.shards for clip in shard.clips if clip.name != name]
    assert verify(index, progress=False) == []


def test_a_shard_without_a_whole_clip_is_left_out(original, tmp_path):
    copy = copy_of(original, tmp_path / "copy")
    damage(copy, "train", 0, [*range(4)])
    index = embed(copy, tmp_path / "out", Bands().encoder(), max_skipped=0.2, progress=False)
    assert [s.name for s in index.shards] == [s.name for s in original.shards if s.name != "train-00000.tar"]
    assert sorted(files(tmp_path / "out")) == ["index.json", *sorted(s.name for s in index.shards)]


def test_features_and_broken_weights_are_refused(original, cmg_shards, tmp_path):
    with pytest.raises(ValueError, match="holds features, not clips whose log-mel could be encoded"):
        embed(ShardIndex.load(cmg_shards), tmp_path, Bands().encoder(), progress=False)
    broken = AudioEncoder("vggish", SHA256, lambda mel: np.full((len(mel), 128), np.nan, np.float32))
    with pytest.raises(ValueError, match="its weights are damaged"):
        embed(original, tmp_path, broken, progress=False)


def test_command(original, tmp_path, capsys):
    torch.manual_seed(0)
    network, weights = VGGish(), tmp_path / "vggish.pth"
    torch.save(network.state_dict(), weights)
    arguments = ["embed", "--shards", str(original.directory), "--weights", str(weights), "--device", "cpu"]
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"MB in {tmp_path / 'out'}, where " in told
    assert "skipped: 1" in told
    index = ShardIndex.load(tmp_path / "out")
    assert index.audio_encoder["weights_sha256"] == weights_sha256(network)
    sample = ClipReader(index, "val").sample(1)
    with torch.no_grad():
        heard_TD = network(torch.from_numpy(sample.mel_TFM)).numpy()
    np.testing.assert_allclose(sample.audio_TD, heard_TD, rtol=1e-4, atol=1e-6)
    assert heard_TD.std(0).max() > 0
    with pytest.raises(FileNotFoundError, match="--weights: no such file: gone.pth"):
        command.main([*arguments[:3], "--weights", "gone.pth", "--out", str(tmp_path / "other")])
    with pytest.raises(ValueError, match="--batch 0: must be at least 1"):
        command.main([*arguments, "--out", str(tmp_path / "other"), "--batch", "0"])
