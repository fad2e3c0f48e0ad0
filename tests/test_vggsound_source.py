"""VGGSound: a csv without a header, videos under any of their names, and those that have gone from the web."""

from __future__ import annotations

from pathlib import Path

import pytest
from media_files import tone, write_video

from avs_dist.launch import shards as command
from avs_dist.shards.build_config import BuildConfig
from avs_dist.shards.check import check
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.read import ClipReader
from avs_dist.shards.sources.vggsound import list_clips

LINES = """---g-f_I2yQ,1,people marching,test
--0PQM4-hqg,30,waterfall burbling,train
-0_a1B2c3D4,0,"bird chirping, tweeting",train
abc_1_2345x,150,"playing violin, fiddle",train
gone_-_gone,20,dog barking,train
"""
NAMES = {
    "---g-f_I2yQ_000001": "videos/---g-f_I2yQ_000001.mp4",
    "--0PQM4-hqg_000030": "train/waterfall burbling/--0PQM4-hqg_30.MP4",
    "-0_a1B2c3D4_000000": "-0_a1B2c3D4_0_10000.mkv",
    "abc_1_2345x_000150": "a/b/c/abc_1_2345x_150000_160000.mp4",
}


def write_list(root: Path, text: str = LINES) -> Path:
    root.mkdir(exist_ok=True)
    (root / "vggsound.csv").write_text(text)
    for file in NAMES.values():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"film")
    return root


def test_videos_are_found_under_every_name(tmp_path: Path):
    root = write_list(tmp_path / "in")
    (root / "a/b/c/d").mkdir()
    (root / "a/b/c/d/gone_-_gone_000020.mp4").write_bytes(b"too deep")
    (root / "gone_-_gone_20.txt").write_bytes(b"no film")
    (root / "gone_-_gone_000021.mp4").write_bytes(b"another start")
    jobs = {job.name: job for job in list_clips(root, 10)}
    assert [job.split for job in jobs.values()] == ["train"] * 4 + ["test"]
    found = {name: job.meta.get("file") for name, job in jobs.items()}
    assert found == {**NAMES, "gone_-_gone_000020": None}
    bird = jobs["-0_a1B2c3D4_000000"]
    assert bird.meta["category"] == "bird chirping, tweeting"
    assert bird.video == bird.sound == root / "-0_a1B2c3D4_0_10000.mkv"
    assert (bird.seconds, bird.start_s, bird.masks, bird.problem) == (10, 0.0, (), None)
    assert jobs["gone_-_gone_000020"].problem == "no file gone_-_gone_000020.mp4"


def test_the_published_name_comes_first_and_linked_folders_count(tmp_path: Path):
    root = write_list(tmp_path / "in")
    (root / "---g-f_I2yQ_1.mp4").write_bytes(b"other")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/gone_-_gone_20.mp4").write_bytes(b"film")
    (root / "video").symlink_to(tmp_path / "far")
    (root / "again").symlink_to(root)
    files = {job.name: job.meta.get("file") for job in list_clips(root, 10)}
    assert files["---g-f_I2yQ_000001"] == NAMES["---g-f_I2yQ_000001"]
    assert files["gone_-_gone_000020"] == "video/gone_-_gone_20.mp4"


def test_check_tells_every_video_that_is_not_listed(tmp_path: Path):
    root = write_list(tmp_path / "in")
    more = ("outside.webm", "videos/other_000001.mp4", "videos/deep/er/other_2.MKV")
    for name in more:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"film")
    report = check(BuildConfig("vggsound", root, tmp_path / "out"), progress=False)
    assert sorted(place for _, place in report.extra) == sorted(more)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,b,dog,train", "expected id, whole start in seconds, label, split"),
        ("a,1.5,dog,train", "expected id"),
        ("a,-1,dog,train", "expected id"),
        ("a,1,,train", "expected id"),
        ("a,1,dog", "expected id"),
        ("a,1,dog,train,x", "expected id"),
        ("a,1,bird, tweeting,train", "expected id"),
        ("a,1,dog,dev", "clip a_000001: split 'dev' is none of"),
        ("../a,1,dog,train", "expected a plain file name"),
        ("--0PQM4-hqg,30,dog,test", "clip --0PQM4-hqg_000030 is listed twice"),
    ],
)
def test_lists_that_cannot_be_understood(tmp_path: Path, line: str, message: str):
    root = write_list(tmp_path / "in", f"{LINES}{line}\n")
    with pytest.raises(ValueError, match=rf"vggsound\.csv: .*{message}"):
        list_clips(root, 10)


def test_a_folder_without_the_list_or_without_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(FileNotFoundError, match=r"no vggsound\.csv in it"):
        list_clips(tmp_path, 10)
    (tmp_path / "vggsound.csv").write_text(LINES)
    arguments = ["build", "--source", "vggsound", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(FileNotFoundError, match="none of the 5 listed videos is below it"):
        command.main(arguments)


def test_lost_videos_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = tmp_path / "in"
    write_video(root / "video/---g-f_I2yQ_000001.mp4", 75, sound=tone(3.0, 48_000))
    write_video(root / "video/--0PQM4-hqg_30.mp4", 25)
    (root / "video/-0_a1B2c3D4_0.mp4").write_bytes(b"no film")
    (root / "vggsound.csv").write_text(LINES)
    out = tmp_path / "out"
    arguments = ["build", "--source", "vggsound", "--root", str(root), "--out", str(out), "--size", "32"]
    with pytest.raises(RuntimeError, match="1 of 3 clips cannot be used"):  # broken, not lost
        command.main([*arguments, "--workers", "1"])
    assert command.main([*arguments, "--workers", "1", "--max-skipped", "0.4"]) == 0
    assert "2 of 5 listed videos are not there and left out: abc_1_2345x_000150, gone_" in capsys.readouterr().err
    index = ShardIndex.load(out)
    assert index.settings["absent"] == {"clips": 2, "first": ["abc_1_2345x_000150", "gone_-_gone_000020"]}
    assert index.settings["clip_seconds"] == 10
    assert [clip["name"] for clip in index.skipped] == ["-0_a1B2c3D4_000000"]
    train, test = ClipReader(index, "train"), ClipReader(index, "test")
    (march,) = test.samples([0])
    (water,) = train.samples([0])
    assert (march.name, march.seconds, march.meta["category"]) == ("---g-f_I2yQ_000001", 3, "people marching")
    assert (water.name, water.seconds, water.meta["sound"]) == ("--0PQM4-hqg_000030", 1, "none")
    assert not march.labelled_T.any()
