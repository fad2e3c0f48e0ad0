"""index.json and the files beside it: what is strange is refused before anything in it is believed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from media_files import write_ms3
from tampered_shards import edited

from avs_dist.shards.build import BuildConfig, build
from avs_dist.shards.faults import DamagedClipError
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.read import ClipReader
from avs_dist.shards.verify import describe, verify


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """4 clips for training in two shards, and one each for the rest."""
    root, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("shards")
    write_ms3(root, {**{f"train{i:02d}": "train" for i in range(4)}, "val0": "val", "lonely": "test"})
    return build(BuildConfig("avsbench-ms3", root, out, size=32, shard_mb=0.3), progress=False)


@pytest.fixture
def copy(index: ShardIndex, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index.directory, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=99), "schema version 99"),
        (lambda d: d.pop("shards"), "damaged.*shards"),
        (lambda d: d["shards"][0].update(name="pipe:rm x.tar/../x.tar"), "not a plain file name"),
        (lambda d: d["shards"][0].update(name="../x.tar"), "not a plain file name"),
        (lambda d: d["shards"][0].update(name="/etc/x.tar"), "not a plain file name"),
        (lambda d: d["shards"][0].update(name="a\0.tar"), "not a plain file name"),
        (lambda d: d["shards"][0].update(count=99), "count is 99"),
        (lambda d: d["shards"][0].update(bytes="many"), "'bytes' a number"),
        (lambda d: d["shards"][0].update(sha256="../../x"), "64 hexadecimal digits"),
        (lambda d: d["shards"][1].update(name=d["shards"][0]["name"]), "is listed twice"),
        (lambda d: d["shards"][0]["clips"][0].update(length=2**40), "outside the file or is too large"),
        (lambda d: d["shards"][0]["clips"][0].update(offset=-512), "numbers from 0 on"),
        (lambda d: d["shards"][0]["clips"][0].update(length=True), "numbers from 0 on"),
        (lambda d: d["shards"][0]["clips"][0].update(seconds=10**9), "cannot be"),
        (lambda d: d["shards"][0]["clips"][0].update(sound="loud"), "cannot be"),
        (lambda d: d["shards"][0]["clips"][0].update(key="../train00"), "expected the key of the name"),
        (lambda d: d["shards"][0]["clips"].__setitem__(1, d["shards"][0]["clips"][0]), "train00 stands twice in split"),
        (lambda d: d["settings"].update(image_size=10**6), "image_size must be a number from 1"),
        (lambda d: d["settings"].update(clip_seconds=10**9), "clip_seconds must be a number from 1"),
        (lambda d: d["settings"].update(clip_seconds="5"), "clip_seconds must be a number from 1"),
        (lambda d: d["settings"].update(clip_seconds=4), "has 5 s, settings.clip_seconds is 4"),
        (lambda d: d["settings"].pop("clip_seconds"), "damaged.*clip_seconds"),
        (lambda d: d["shards"][0].update(split="a\x1b[2J"), "printable text"),
        (lambda d: d.update(skipped=[1]), "skipped must list objects"),
        (lambda d: d.update(skipped=[{"name": 1, "split": "", "path": "", "reason": ""}]), "skipped must list objects"),
        (
            lambda d: d["settings"].update(
                audio_encoder={"kind": "vggish", "weights_sha256": "", "silence": [1e300] * 128}
            ),
            "finite numbers",
        ),
        (
            lambda d: d["settings"].update(
                audio_encoder={"kind": "vggish", "weights_sha256": "", "silence": [10**400] * 128}
            ),
            "damaged: OverflowError",
        ),
    ],
)
def test_a_strange_index_is_refused(copy: Path, change: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ShardIndex.load(edited(copy, change))


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
@pytest.mark.parametrize("name", ["index.json", "shard"])
def test_only_plain_files_are_opened(copy: Path, kind: str, name: str):
    index = ShardIndex.load(copy)
    path = copy / (index.split("val")[0].name if name == "shard" else name)
    elsewhere = path.rename(copy.parent / "elsewhere")
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    if name == "index.json":
        with pytest.raises(OSError, match=r"is a symbolic link|not a plain file"):
            ShardIndex.load(copy)
    else:
        with pytest.raises(DamagedClipError, match=r"cannot be read as a plain file") as error:
            ClipReader(index, "val").sample(0)
        assert error.value.damage.kind == "unreadable"
        assert any("cannot be read as a plain file" in problem for problem in verify(index, progress=False))


def test_index_errors_say_what_to_do(index: ShardIndex, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no index\.json.*avs-dist shards build"):
        ShardIndex.load(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json"):
        ShardIndex.load(tmp_path)
    with pytest.raises(ValueError, match="no split 'dev'; it has: train, val, test"):
        index.split("dev")
    assert "val" in describe(index)
