"""The log-mel that AVSBench publishes, in place of the one that is computed from the sound."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media_files import write_ms3

from avs_dist.launch import shards as command
from avs_dist.shards.build import BuildConfig, build
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import SILENT_LOG_MEL
from avs_dist.shards.stored_mel import read_stored_mel

MEL = (torch.rand(5, 1, 96, 64, generator=torch.Generator().manual_seed(0)) * 5 - 4).requires_grad_()


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=2))
    return path


def built(root: Path, out: Path, **settings: Any) -> ShardIndex:
    config = BuildConfig(
        "avsbench-ms3", root, out, size=32, workers=1, deadline_s=20.0, **{"stored_mel": True, **settings}
    )
    return build(config, progress=False)


def changed(at: tuple[int, ...], value: float) -> torch.Tensor:
    mel = MEL.detach().clone()
    mel[at] = value
    return mel


@pytest.mark.parametrize("shape", [(5, 1, 96, 64), (5, 96, 64), (6, 1, 96, 64)])
def test_examples_of_a_clip(tmp_path: Path, shape: tuple[int, ...]):
    mel = MEL.detach().repeat(2, 1, 1, 1)[: shape[0]].reshape(shape)
    for value in (mel, mel.double(), mel.numpy()):
        mel_TFM = read_stored_mel(write(tmp_path / "a.pkl", value), 5)
        np.testing.assert_array_equal(mel_TFM, mel.numpy().reshape(-1, 96, 64)[:5])
        assert mel_TFM.dtype == np.float32


OTHERS = {
    "too short": (MEL[:4], "4 examples for 5 s"),
    "of another size": (torch.zeros(5, 1, 64, 96), r"float32 \(5, 1, 64, 96\), expected a log-mel"),
    "of several channels": (torch.zeros(5, 2, 96, 64), r"expected a log-mel of floats, \[n,1,96,64\]"),
    "of whole numbers": (np.zeros((5, 1, 96, 64), np.int32), "int32 .*expected a log-mel"),
    "not finite": (changed((4, 0, 95, 63), float("nan")), "infinite values or NaN"),
    "infinite": (changed((0, 0, 0, 0), float("inf")), "infinite values or NaN"),
    "below all sounds": (changed((3, 0, 1, 1), -4.7), "values from -4.70 to .* no VGGish log-mel"),
    "above all sounds": (changed((3, 0, 1, 1), 11.1), r"to 11\.10: this is no VGGish log-mel"),
    "standardised": ((MEL - MEL.mean()) / MEL.std(correction=0), "mean 0 and deviation 1: this is no VGGish"),
    "a command": (os.system, "system'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused(name: str, tmp_path: Path):
    value, message = OTHERS[name]
    with pytest.raises(ValueError, match=rf"a\.pkl: .*{message}"):
        read_stored_mel(write(tmp_path / "a.pkl", value), 5)


def write_torch_file(path: Path, mel: torch.Tensor, header_offset: int) -> None:
    """A file of torch.save whose first entry claims to lie elsewhere."""
    buffer = io.BytesIO()
    torch.save(mel, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.filelist[0].header_offset = header_offset
        archive._didModify = True  # type: ignore[attr-defined]
    path.write_bytes(buffer.getvalue())


def test_a_build_takes_the_stored_log_mel_and_needs_no_sound(tmp_path: Path):
    names = dict.fromkeys(["nested", "flat", "silent", "bad", "lost"], "train")
    data = write_ms3(tmp_path, names)
    (data / "audio_wav/train/nested.wav").write_bytes(b"not looked at")
    for name in ("flat", "silent", "bad"):
        (data / f"audio_wav/train/{name}.wav").unlink()
    write(data / "audio_log_mel/train/nested.pkl", MEL)
    write(data / "audio_log_mel/flat.PKL", MEL + 1)
    write(data / "audio_log_mel/train/silent.pkl", torch.full((5, 1, 96, 64), SILENT_LOG_MEL))
    write(data / "audio_log_mel/train/bad.pkl", MEL[:3])
    write_torch_file(data / "audio_log_mel/train/lost.pkl", MEL, header_offset=2**63)
    index = built(tmp_path, tmp_path / "out", max_skipped=0.4)
    reasons = {clip["name"]: clip["reason"] for clip in index.skipped}
    assert list(reasons) == ["bad", "lost"]
    assert "bad.pkl: 3 examples for 5 s" in reasons["bad"]
    assert "lost.pkl: " in reasons["lost"]
    assert index.settings["stored_mel"] is True
    with pytest.raises(ValueError, match=r"other settings: .*stored_mel \(there True, now None\)"):
        built(tmp_path, tmp_path / "out", max_skipped=0.4, stored_mel=False)
    reader = ClipReader(index, "train")
    found = {sample.name: sample for sample in reader.samples(range(len(reader)))}
    np.testing.assert_array_equal(found["nested"].mel_TFM, MEL.detach().numpy()[:, 0])
    np.testing.assert_array_equal(found["flat"].mel_TFM, (MEL.detach() + 1).numpy()[:, 0])
    assert {name: sample.meta["sound"] for name, sample in found.items()} == {
        **{"nested": "ok", "flat": "ok", "silent": "silent"}
    }
    assert {sample.meta["mel"] for sample in found.values()} == {"stored"}
    assert found["flat"].meta["sample_rate_hz"] == 0


def test_a_clip_without_a_log_mel_is_skipped_and_other_sources_have_none(tmp_path: Path):
    write_ms3(tmp_path, {"a": "train"})
    with pytest.raises(RuntimeError, match=r"a: no a\.pkl in .*audio_log_mel"):
        built(tmp_path, tmp_path / "out")
    arguments = ["build", "--source", "avss", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--stored-mel"]
    with pytest.raises(ValueError, match="--stored-mel is for --source avsbench-s4 and avsbench-ms3, not avss"):
        command.main(arguments)
