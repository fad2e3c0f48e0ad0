"""Exported checkpoints: the same model, loaded and used where there is no DeepSpeed, told by a model card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from untrained import small_model, write_checkpoint

from avs_dist import checkpoint
from avs_dist.config import CodebookConfig, UnicodeConfig
from avs_dist.launch.cli import main as avs_dist
from avs_dist.launch.evaluate import main as evaluate

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--config", str(ROOT / "configs/demo.yaml"), "--data.workers", "0", "--train.max_steps", "2", "--optim.schedule",
    "constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert avs_dist(["train", *TINY, "--data.shards", str(ms3_shards), "--train.out_dir", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert avs_dist(["export", str(run), "--out", str(run.parent / "model")]) == 0
    return run.parent / "model"


def test_the_folder_is_complete_and_holds_no_more(run: Path, exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in run.parent.iterdir() if path.name.startswith(".")] == []
    assert {oct(path.stat().st_mode & 0o777) for path in exported.iterdir()} == {oct(0o666 & ~_umask())}
    trained = checkpoint.find_checkpoint(run)
    one, other = load_file(trained / "model.safetensors"), load_file(exported / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert checkpoint.saved_config(exported) == checkpoint.saved_config(trained)
    assert checkpoint.image_size(exported) == 64
    assert "data" not in json.loads((exported / "config.json").read_text())  # where the run was


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_the_model_card_tells_what_it_is_and_how_good(run: Path, exported: Path) -> None:
    _, head, text = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "unknown",
        "library_name": "avs_dist",
        "pipeline_tag": "image-segmentation",
        "tags": ["audio-visual", "audio-visual-segmentation", "tpavi"],
    }
    assert text.startswith("\n# TPAVI, sounding or silent (S4, MS3)\n")
    measured = checkpoint.manifest(checkpoint.find_checkpoint(run))["metrics"]
    assert f"| miou | {measured['miou']:.6g} | mean IoU of the frames at probability > 0.5;" in text
    for said in ("| steps | 2 |", "64 x 64 pixels", 'load_system("FOLDER"', "## License", "## Limits"):
        assert said in text


# what it does is printed as one line of JSON at the end
ELSEWHERE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "accelerate"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
pickles = []
sys.addaudithook(lambda event, args: pickles.append(str(args)) if event == "pickle.find_class" else None)
try:
    import deepspeed
except ImportError:
    pass
else:
    raise SystemExit("DeepSpeed is there")
from avs_dist.checkpoint import load_system
from avs_dist.launch.cli import main
model, film, out = sys.argv[1:]
system, config = load_system(model)
codes = [main(["evaluate", "--checkpoint", model, "--json", out + "/evaluate.json"])]
codes += [main(["predict", "--checkpoint", model, film, "--out", out])]
print(json.dumps({"codes": codes, "system": type(system).__name__, "pickles": pickles}))
"""


@pytest.mark.slow
def test_it_is_loaded_measured_and_painted_with_where_there_is_no_deepspeed(
    run: Path, exported: Path, ms3_clips: Path, tmp_path: Path
) -> None:
    film = next(ms3_clips.rglob("*.mp4"))
    command = [sys.executable, "-c", ELSEWHERE, str(exported), str(film), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"codes": [0, 0], "system": "TPAVISystem", "pickles": []}
    assert len(list((tmp_path / film.stem / "masks").iterdir())) == 5
    assert evaluate(["--checkpoint", str(run), "--json", str(tmp_path / "run.json")]) == 0
    results = [json.loads((tmp_path / name).read_text())["results"] for name in ("run.json", "evaluate.json")]
    assert results[0] == results[1]


def test_it_starts_another_run(exported: Path, ms3_shards: Path, tmp_path: Path) -> None:
    more = ("--data.shards", str(ms3_shards), "--train.max_steps", "1", "--optim.lr", "0", "--optim.weight_decay", "0")
    begun = ("--train.init_from", str(exported), "--train.out_dir", str(tmp_path / "run"))
    assert avs_dist(["train", *TINY, *more, *begun]) == 0
    weights = load_file(checkpoint.find_checkpoint(tmp_path / "run") / "model.safetensors")
    for name, value in load_file(exported / "model.safetensors").items():
        assert torch.equal(value, weights[name]) or "running" in name or "num_batches" in name, name


def test_what_cannot_be_exported_leaves_nothing(run: Path, exported: Path, tmp_path: Path, capsys) -> None:
    assert avs_dist(["export", str(run), "--out", str(exported)]) == 2
    assert f"{exported} is there already" in capsys.readouterr().err
    assert avs_dist(["export", str(tmp_path), "--out", str(tmp_path / "model")]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    source = write_checkpoint(tmp_path / "source", small_model())
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    assert avs_dist(["export", str(source), "--out", str(tmp_path / "model")]) == 2
    assert "model.safetensors is damaged: its sha256 differs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_codebook_and_credentials(tmp_path: Path) -> None:
    """An export of an export; urls lose what they hold of credentials."""
    shapes = {"visual_shape": (3, 3, 8), "audio_channels": 8, "specific": 8, "visual_specific": 8}
    small = UnicodeConfig(dim=16, codebook=CodebookConfig(num_codes=8), **shapes)  # type: ignore[arg-type]  # test values
    model = small_model(system="unicode", unicode=small)
    source = write_checkpoint(tmp_path / "source", model, shards="https://me:secret@host.org/set?token=secret")
    for name, place in (("one", source), ("two", tmp_path / "one")):
        assert avs_dist(["export", str(place), "--out", str(tmp_path / name)]) == 0
        text = (tmp_path / name / "config.json").read_text() + (tmp_path / name / "README.md").read_text()
        assert "secret" not in text
        assert "https://host.org/set" in text
        assert "# Uni-Code, one codebook for" in text
        assert "Not measured" in text
        system, config = checkpoint.load_system(tmp_path / name)
        assert (type(system).__name__, config.model.unicode.dim) == ("UnicodeSystem", 16)
