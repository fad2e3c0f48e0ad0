"""`avs-dist report codes`: the use of the codes of a checkpoint, as a picture and as numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from untrained import small_model, write_checkpoint

from avs_dist.checkpoint import load_system
from avs_dist.code_usage_figure import measure_use
from avs_dist.config import CodebookConfig, ModelConfig, UnicodeConfig
from avs_dist.launch import shards, synth
from avs_dist.launch.cli import run
from avs_dist.loader import eval_loader
from avs_dist.saving import seal
from avs_dist.systems.unicode import UnicodeSystem

CODES, CLIPS = 24, 40
UNICODE = UnicodeConfig(
    visual_shape=(3, 3, 24),
    audio_channels=16,
    dim=16,
    layers=1,
    specific=8,
    visual_specific=8,
    codebook=CodebookConfig(num_codes=CODES),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system that was never trained, and shards of features."""
    out = tmp_path_factory.mktemp("cmg")
    assert synth.main(["--out", str(out), "--setting", "cmg", "--clips", str(CLIPS), "--seed", "2"]) == 0
    source = ["--source", "vggsound-avel", "--root", str(out / "VGGSound-AVEL")]
    assert shards.main(["build", *source, "--out", str(out / "shards")]) == 0
    folder = write_checkpoint(out / "run", ModelConfig(system="unicode", unicode=UNICODE), out / "shards")
    seal(folder, load_system(folder)[1], step=0, image_size=0, metrics={})  # features have no frames
    return folder


def counted(checkpoint: Path, split: str) -> tuple[dict[str, list[int]], float]:
    """Tokens of each code by modality, and the agreement, of one clip after the other."""
    system, config = load_system(checkpoint)
    assert isinstance(system, UnicodeSystem)
    tokens = {m: [0] * CODES for m in ("audio", "visual")}
    same, seconds = 0, 0
    for clip, positions in eval_loader(config, split, batch_size=1):
        assert list(positions) != [-1]
        encoded = system.encode(clip.to("cpu"))
        for m, counts in tokens.items():
            for code in encoded[m].indices_BT[0].tolist():
                counts[code] += 1
        same += int((encoded["audio"].indices_BT == encoded["visual"].indices_BT).sum())
        seconds += encoded["audio"].indices_BT.numel()
    return tokens, same / seconds


@pytest.mark.parametrize(("options", "split"), [([], "test"), (["--split", "train"], "train")])
def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options, split) -> None:
    """4 clips of the test split fill a quarter of a batch; those that fill it up are not counted."""
    out = tmp_path / "new folder" / "codes.png"
    assert run("report", ["codes", "--checkpoint", str(checkpoint), "--out", str(out), *options]) == 0
    written = json.loads(out.with_suffix(".json").read_text())
    tokens, agreement = counted(checkpoint, split)
    assert written["tokens"] == tokens
    assert written["codes/agreement"] == pytest.approx(agreement)
    assert (written["split"], written["checkpoint"]) == (split, str(checkpoint))
    used = [(a, v) for a, v in zip(tokens["audio"], tokens["visual"], strict=True) if a + v]
    assert written["codes/used"] == pytest.approx(len(used) / CODES)
    assert written["codes/mostly_audio"] == pytest.approx(sum(5 * a > 4 * (a + v) for a, v in used) / len(used))
    shared = sum(0.2 <= a / (a + v) <= 0.8 for a, v in used)
    assert written["codes/shared"] == pytest.approx(shared / len(used))
    assert min(Image.open(out).size) > 500
    printed = capsys.readouterr().out
    assert f"codes/shared             {written['codes/shared']:.4f}\n" in printed
    assert f"written to {out} and {out.with_suffix('.json')}" in printed


def test_clips_that_fill_a_batch_are_not_counted(checkpoint: Path) -> None:
    system, config = load_system(checkpoint)
    batches = [each for size in (1, 3) for each in eval_loader(config, "test", batch_size=size)]
    assert any(-1 in positions for _, positions in batches)
    whole, parts = (measure_use(system, chosen) for chosen in (batches, batches[:4]))
    assert torch.equal(whole.counts_ML, 2 * parts.counts_ML)
    assert (whole.same, whole.compared) == (2 * parts.same, 2 * parts.compared)


def test_errors_are_one_line(
    checkpoint: Path, ms3_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tpavi = write_checkpoint(tmp_path / "tpavi", small_model(), ms3_shards)
    for run_folder, options, message in (
        (tpavi, [], "TPAVISystem has no codebook"),
        (checkpoint, ["--out", "codes.json"], "--out codes.json: must end in .png"),
        (checkpoint, ["--split", "nope"], "nope"),
        (checkpoint, ["--shards", str(ms3_shards)], "was trained on features"),
    ):
        assert run("report", ["codes", "--checkpoint", str(run_folder), *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("avs-dist report: error: ")
        assert message in error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("report", ["codes", "--help"])
    assert stopped.value.code == 0
    assert "avs-dist report codes --checkpoint" in capsys.readouterr().out
