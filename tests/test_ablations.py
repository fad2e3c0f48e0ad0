"""The overlays of the ablation tables, their published scores, and the command that runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from avs_dist.config import Config, to_dict
from avs_dist.launch import ablations
from avs_dist.launch.ablations import FROM_S4, FULL, S4, TABLES
from avs_dist.launch.cli import run
from avs_dist.launch.train import parse_config
from avs_dist.systems import build_system

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OVERLAYS = sorted(path.stem for path in (CONFIGS / "ecmvae").glob("*.yaml"))

ONE_CODE = {"model.latent.factorise": False, "loss.latent.divergence": "kl"}
NO_SOUND = {"model.tpavi.stages": [], "loss.avm": "none"}
NO_DIFF, NO_SIC = {"loss.latent.orthogonality": 0.0}, {"loss.latent.information": 0.0}
CHANGES = {
    "table2_no_audio": {"model.system": "tpavi", "loss.segmentation": "bce", **NO_SOUND},
    "table2_cvae": {**ONE_CODE, **NO_SOUND},
    "table2_cmvae": ONE_CODE,
    "table3_vae_48": {**ONE_CODE, "model.latent.dim": 48},
    "table3_factorised": {"loss.latent.divergence": "kl", **NO_DIFF, **NO_SIC},
    "table3_ae": {"model.system": "tpavi", "loss.segmentation": "bce"},
    "table3_ae_factorised": {"model.latent.kind": "ae", **NO_DIFF, **NO_SIC},
    "table4_poe": {"model.latent.joint": "poe", "loss.latent.divergence": "kl"},
    "table4_moe": {"model.latent.joint": "moe", "loss.latent.divergence": "kl"},
    "table4_js_geometric": {"loss.latent.divergence": "js_geometric"},
    "table5_none": {**NO_DIFF, **NO_SIC},
    "table5_diff": NO_SIC,
    "table5_sic": NO_DIFF,
    "published_code": {
        "model.compat": "published_code",
        "model.neck.kind": "three_layer",
        "model.decoder.kind": "nearest",
        "model.tpavi.l2_normalise": True,
        "model.tpavi.align_audio": False,
        "model.latent.inject": "before_tpavi",
        "model.latent.spatial_noise": 0.0,
        "loss.avm_normalise": True,
        "loss.latent.beta": 0.01,
        "loss.latent.information": 0.001,
    },
}

# Tables 2-5 of the paper: S4 mIoU and F, MS3 mIoU and F
PAPER = {
    "table2_no_audio": (77.80, None, 48.20, None),
    "table2_cvae": (78.12, 0.878, 49.26, 0.643),
    "table2_cmvae": (80.05, 0.889, 54.99, 0.653),
    "table3_vae_48": (80.13, 0.890, 55.09, 0.657),
    "table3_factorised": (80.78, 0.893, 56.38, 0.676),
    "table3_ae": (78.74, 0.879, 54.00, 0.645),
    "table3_ae_factorised": (78.92, 0.881, 54.82, 0.651),
    "table4_poe": (81.38, 0.894, 57.35, 0.688),
    "table4_moe": (81.49, 0.897, 57.53, 0.694),
    FULL: (81.74, 0.901, 57.84, 0.708),
    "table5_none": (81.09, 0.895, 57.01, 0.684),
    "table5_diff": (81.51, 0.899, 57.65, 0.692),
    "table5_sic": (81.47, 0.898, 57.51, 0.694),
    FROM_S4: (None, None, 60.81, 0.729),
}


def composed(base: str, *overlays: str) -> Config:
    files = [base, *(f"ecmvae/{name}.yaml" for name in overlays)]
    return parse_config([word for name in files for word in ("--config", str(CONFIGS / name))])


def flat(values: dict, path: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_what_its_row_says_and_nothing_else(name):
    before, after = (flat(to_dict(composed("ecmvae_ms3.yaml", *names))) for names in ((), (name,)))
    assert {key: value for key, value in after.items() if value != before[key]} == CHANGES[name]


def test_the_public_code_has_its_weights_and_mirrors():
    config = composed("ecmvae_s4.yaml", "published_code")
    assert config.data.mirror == 0.3
    assert config.loss.latent.orthogonality == 0.001
    assert config.model.neck.channels == 128


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_head_of_an_overlay_says_command_and_published_scores(name):
    head = (CONFIGS / "ecmvae" / f"{name}.yaml").read_text()
    assert f"avs-dist train --config configs/ecmvae_ms3.yaml --config configs/ecmvae/{name}.yaml\n" in head
    if name == "table4_js_geometric":
        assert "# published: none" in head
        return
    s4, s4_f, ms3, ms3_f = PAPER[FULL if name == "published_code" else name]
    scores = [f"{miou:.2f}" + (f" / {100 * f:.1f}" if f else "") for miou, f in ((s4, s4_f), (ms3, ms3_f))]
    assert f"# published: S4 {scores[0]}, MS3 {scores[1]} (mIoU" in head


def test_the_rows_of_the_tables_are_those_of_the_paper():
    for table in TABLES.values():
        for row in table.rows:
            assert row.published == (PAPER[row.variant][2] if row.variant in PAPER else None), row
    named = {row.variant for table in TABLES.values() for row in table.rows}
    assert named - {FULL, FROM_S4} == set(OVERLAYS) - {"published_code"}
    variants = {number: [row.variant for row in table.rows] for number, table in TABLES.items()}
    assert variants[2][2] == variants[3][0]  # CMVAE is one code of 16
    assert variants[3][2] == variants[4][0]  # factorised, without constraints, is KL
    assert variants[4][3] == variants[5][3] == variants[6][0] == FULL
    assert [len(variants[number]) for number in (2, 3, 4, 5, 6)] == [3, 5, 5, 4, 2]


@pytest.mark.parametrize("name", [*sorted(set(OVERLAYS) - {"published_code"}), None])
def test_every_row_builds_at_toy_scale(name):
    overlays = [] if name is None else ["--config", str(CONFIGS / "ecmvae" / f"{name}.yaml")]
    base = [word for file in ablations.BASE for word in ("--config", str(CONFIGS / file))]
    build_system(parse_config([*base, *overlays]), load_pretrained=False)


def finished(out: Path, variant: str, miou: float) -> None:
    """What training and evaluation leave of a row."""
    (out / variant).mkdir(parents=True)
    test = {"results": {"real": {"miou": miou, "f_score": 0.25}}}
    (out / variant / "test.json").write_text(json.dumps(test))
    records = [{"phase": "train", "step": step, "seconds_per_step": s} for step, s in ((10, 9.0), (20, 0.5), (30, 0.4))]
    lines = [json.dumps(record) for record in [*records, {"phase": "eval", "step": 30, "miou": 0.9}]]
    (out / variant / "metrics.jsonl").write_text("\n".join(lines))


def test_finished_rows_are_not_run_again_and_stand_in_every_table(tmp_path, capsys):
    """All rows of tables 4 and 5 are there: the command only writes the tables."""
    out = tmp_path / "out"
    variants = dict.fromkeys(row.variant for number in (4, 5) for row in TABLES[number].rows)
    for index, variant in enumerate(variants):
        finished(out, variant, index / 10)
    assert run("ablations", ["--tables", "5", "4", "--out", str(out), "--steps", "30", "--seed", "7"]) == 0
    text = (out / "ablations.md").read_text()
    assert text.startswith("Toy scale: ")
    assert "reported, not claimed" in text.splitlines()[0]
    assert text in capsys.readouterr().out
    assert re.findall(r"^## Table (\d)", text, re.MULTILINE) == ["4", "5"]
    written = json.loads((out / "ablations.json").read_text())
    for number in ("4", "5"):
        for row in written["tables"][number]["rows"]:
            assert row["miou"] == list(variants).index(row["variant"]) / 10
            assert f"| {row['label']} | {row['miou']:.3f} | 0.250 | 2.00 | " in text
            assert f"`{row['command']}`" in text
    assert text.count("| 57.84 |") == 2
    assert "| JS, geometric (ours) | 0.400 | 0.250 | 2.00 | - |" in text
    assert not list(out.glob("clips*"))  # nothing was made


def test_the_command_of_a_row_is_the_command_that_ran(tmp_path):
    plan = ablations.Plan(("configs/demo.yaml", "configs/demo_ecmvae.yaml"), clips=20, size=64, steps=300, seed=7)
    for variant, data in ((FULL, "ms3"), (S4, "s4"), (FROM_S4, "ms3"), ("table4_poe", "ms3")):
        command = ablations._train_command(tmp_path, plan, variant, warmup=30)
        config = parse_config(command[1:])
        assert config.data.shards == str(tmp_path / f"shards_{data}")
        assert (config.seed, config.train.max_steps, config.optim.warmup_steps) == (7, 300, 30)
        assert config.train.out_dir == str(tmp_path / variant)
        assert config.train.init_from == (str(tmp_path / "s4") if variant == FROM_S4 else None)
        assert config.model.latent.joint == ("poe" if variant == "table4_poe" else "fused")


def test_s4_is_trained_before_what_starts_from_it():
    assert ablations._variants([6]) == [FULL, S4, FROM_S4]
    every = ablations._variants([2, 3, 4, 5, 6])
    assert len(every) == len(set(every)) == 16


def test_a_folder_belongs_to_one_plan(tmp_path, capsys):
    out = tmp_path / "out"
    for row in TABLES[6].rows:
        finished(out, row.variant, 0.5)
    finished(out, S4, 0.5)
    words = ["--tables", "6", "--out", str(out)]
    assert run("ablations", words) == 0
    assert run("ablations", [*words, "--steps", "301"]) == 2
    said = capsys.readouterr().err
    assert "holds rows of other settings (steps 150 there, 301 here)" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_the_command_trains_and_evaluates_and_goes_on_where_it_stopped(tmp_path, capfd):
    """Table 6, as it takes every way: two settings, and weights that another training left."""
    out = tmp_path / "out"
    words = ["--quick", "--tables", "6", "--out", str(out)]
    assert run("ablations", words) == 0
    said = capfd.readouterr().out
    rows = json.loads((out / "ablations.json").read_text())["tables"]["6"]["rows"]
    assert all(0 <= row["miou"] <= 1 and 0 <= row["f_score"] <= 1 for row in rows)
    for row in rows:
        assert f"$ {row['command']}\n" in said
    (out / FROM_S4 / "test.json").unlink()  # as if it had been stopped during the evaluation
    before = (out / FROM_S4 / "metrics.jsonl").read_text()
    assert run("ablations", words) == 0
    said = capfd.readouterr().out
    assert said.count("$ avs-dist train") == 1
    assert "resumed from" in said
    assert (out / FROM_S4 / "metrics.jsonl").read_text() == before
