"""The overlays of the ablation tables of masks, their published scores, and the command that runs them."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml
from ablation_runs import CONFIGS, composed, planned, rows_of, swept, without_place

from avs_dist.config import flat, from_dict, to_dict
from avs_dist.launch import ablations
from avs_dist.launch.ablation_tables import DIFFUSION, ECMVAE
from avs_dist.launch.ablation_tables.paper import FROM_S4, FULL
from avs_dist.launch.cli import run
from avs_dist.launch.train import parse_config
from avs_dist.systems import build_system

PAPERS = {"ecmvae": ECMVAE, "diffusion": DIFFUSION}

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


# Tables III-VIII of the second version of latent diffusion, PVT: S4 mIoU and F, MS3 mIoU and F; with the numbers of the
# first version for its reading of the contrastive loss
PAPER_DIFFUSION = {
    "table3_encoder_decoder": (78.89, 0.881, 54.28, 0.648),
    "table3_cvae": (79.97, 0.888, 55.21, 0.661),
    "table3_ldm": (81.02, 0.894, 57.67, 0.698),
    "table4_none": (80.04, 0.889, 56.12, 0.671),
    "table4_audio": (80.29, 0.892, 56.59, 0.680),
    "table4_visual": (80.68, 0.892, 57.21, 0.688),
    "table5_first_version": (81.38, 0.902, 58.18, 0.709),
    FULL: (81.51, 0.903, 59.62, 0.712),
    "table6_8": (81.04, 0.892, 57.28, 0.689),
    "table6_16": (81.18, 0.895, 57.98, 0.704),
    "table6_32": (80.78, 0.891, 57.01, 0.687),
    "table7_transformer": (82.06, 0.899, 58.36, 0.693),
    "table7_diffusion": (82.79, 0.910, 59.94, 0.715),
    FROM_S4: (None, None, 61.94, None),
}
NO_CONTRAST = {"loss.diffusion.contrastive": 0.0}
TRANSFORMER = {"model.decoder.kind": "transformer"}
CHANGES_DIFFUSION = {
    "table3_encoder_decoder": {"model.system": "tpavi"},
    "table3_cvae": {**ONE_CODE, "model.system": "ecmvae", "model.latent.dim": 24, "model.latent.spatial_noise": 0.0},
    "table3_ldm": NO_CONTRAST,
    "table4_none": {**NO_CONTRAST, "model.diffusion.condition": "none"},
    "table4_audio": {**NO_CONTRAST, "model.diffusion.condition": "audio"},
    "table4_visual": {**NO_CONTRAST, "model.diffusion.condition": "visual"},
    "table5_first_version": {"loss.diffusion.trains": "condition"},
    "table6_8": {"model.diffusion.dim": 8},
    "table6_16": {"model.diffusion.dim": 16},
    "table6_32": {"model.diffusion.dim": 32},
    "table7_transformer": {**TRANSFORMER, "model.system": "tpavi"},
    "table7_diffusion": TRANSFORMER,
}

# (paper, what an overlay may follow, overlay, what it changes)
AFTER = {"ecmvae": (("ecmvae_ms3.yaml",),), "diffusion": (("diffusion_ms3.yaml",), DIFFUSION.base)}
COMPOSED = [
    (paper, base, name, changes)
    for paper, every in (("ecmvae", CHANGES), ("diffusion", CHANGES_DIFFUSION))
    for base in AFTER[paper]
    for name, changes in every.items()
]
PUBLISHED = {"ecmvae": PAPER, "diffusion": PAPER_DIFFUSION}
NOT_A_ROW = {"ecmvae": {"published_code"}, "diffusion": {"toy"}}


def overlays(paper: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / paper).glob("*.yaml"))


@pytest.mark.parametrize(("paper", "base", "name", "changes"), COMPOSED)
def test_an_overlay_changes_what_its_row_says_and_nothing_else(paper, base, name, changes):
    before, after = (flat(to_dict(composed(*base, *files))) for files in ((), (f"{paper}/{name}.yaml",)))
    assert {key: value for key, value in after.items() if value != before[key]} == changes


def test_every_overlay_is_checked_above():
    assert set(overlays("ecmvae")) == set(CHANGES)
    assert set(overlays("diffusion")) == set(CHANGES_DIFFUSION) | {"toy"}


def test_the_public_code_has_its_weights_and_mirrors():
    config = composed("ecmvae_s4.yaml", "ecmvae/published_code.yaml")
    assert config.data.mirror == 0.3
    assert config.loss.latent.orthogonality == 0.001
    assert config.model.neck.channels == 128


@pytest.mark.parametrize("paper", PAPERS)
def test_the_head_of_an_overlay_says_command_and_published_scores(paper):
    scores = PUBLISHED[paper]
    for name in set(overlays(paper)) - {"toy"}:
        head = (CONFIGS / paper / f"{name}.yaml").read_text()
        assert f"avs-dist train --config configs/{paper}_ms3.yaml --config configs/{paper}/{name}.yaml\n" in head
        if name == "table4_js_geometric":
            assert "# published: none" in head
            continue
        s4, s4_f, ms3, ms3_f = scores[FULL if name == "published_code" else name]
        parts = [f"{miou:.2f}" + (f" / {100 * f:.1f}" if f else "") for miou, f in ((s4, s4_f), (ms3, ms3_f))]
        assert f"# published: S4 {parts[0]}, MS3 {parts[1]} (mIoU" in head


@pytest.mark.parametrize("paper", PAPERS)
def test_the_rows_of_the_tables_are_those_of_the_paper(paper):
    rows = rows_of(PAPERS[paper])
    for row in rows:
        published = PUBLISHED[paper]
        assert row.config.published == ((published[row.variant][2],) if row.variant in published else ()), row
        assert row.config.settings == ({"train.init_from": f"runs/{paper}_s4"} if row.variant == FROM_S4 else {}), row
    assert {row.variant for row in rows} - {FULL, FROM_S4} == set(overlays(paper)) - NOT_A_ROW[paper]


def test_a_variant_that_stands_in_several_tables_is_one():
    variants = {number: [row.variant for row in ECMVAE.table(number).rows] for number in ECMVAE.keys}
    assert variants[2][2] == variants[3][0]  # CMVAE is one code of 16
    assert variants[3][2] == variants[4][0]  # factorised, without constraints, is KL
    assert variants[4][3] == variants[5][3] == variants[6][0] == FULL
    assert {number: len(rows) for number, rows in variants.items()} == {2: 3, 3: 5, 4: 5, 5: 4, 6: 2}
    variants = {number: [row.variant for row in DIFFUSION.table(number).rows] for number in DIFFUSION.keys}
    assert variants[3][2] == variants[4][3] == variants[5][0]  # LDM, audio-visual, without contrastive loss
    assert variants[5][2] == variants[6][2] == variants[8][0] == FULL
    assert {number: len(rows) for number, rows in variants.items()} == {3: 3, 4: 4, 5: 3, 6: 4, 7: 2, 8: 2}
    for paper, count in ((ECMVAE, 15), (DIFFUSION, 14)):
        assert len(ablations._distinct({key: paper.table(key) for key in paper.keys})) == count


TITLES = {
    "ecmvae": [
        "ECMVAE, Table 2: VAE and sound",
        "ECMVAE, Table 3: factorised codes",
        "ECMVAE, Table 4: divergence of the shared code",
        "ECMVAE, Table 5: constraints",
        "ECMVAE, Table 6: start",
    ],
    "diffusion": [
        "Contrastive latent diffusion, Table III: latent diffusion",
        "Contrastive latent diffusion, Table IV: condition of the denoiser, without L_contrastive",
        "Contrastive latent diffusion, Table V: L_contrastive",
        "Contrastive latent diffusion, Table VI: numbers in a code",
        "Contrastive latent diffusion, Table VII: transformer decoder (AVSegFormer)",
        "Contrastive latent diffusion, Table VIII: start",
    ],
}


@pytest.mark.parametrize("paper", PAPERS)
def test_the_tables_are_sweeps_that_run_on_real_shards_as_they_are(paper, ms3_shards):
    tables = {key: PAPERS[paper].table(key) for key in PAPERS[paper].keys}
    assert [table.title for table in tables.values()] == TITLES[paper]
    for key, table in tables.items():
        file = CONFIGS / "sweeps" / f"{paper}_table{key}.yaml"
        words = ["--config", str(CONFIGS / f"{paper}_ms3.yaml"), "--data.shards", str(ms3_shards)]
        plan = planned(file, *words)
        assert (plan.sweep.scheduler.name, plan.sweep.samples, plan.objective) == ("none", 1, "miou")
        assert plan.sweep.published == table.published == ("MS3 mIoU (%)",)
        assert (
            f"avs-dist sweep --config configs/{paper}_ms3.yaml --sweep configs/sweeps/{file.name} \\\n"
            in file.read_text()
        )
        for row in table.rows:
            start = ["--train.init_from", f"runs/{paper}_s4"] if row.variant == FROM_S4 else []
            files = [word for path in row.config.configs for word in ("--config", path)]
            alone = parse_config([*words[:2], *files, *words[2:], *start])
            assert without_place(plan.bases[row.label]) == without_place(alone)


@pytest.mark.parametrize("paper", PAPERS)
def test_what_starts_from_s4_says_how_that_is_trained(paper):
    head = (CONFIGS / "sweeps" / f"{paper}_table{PAPERS[paper].keys[-1]}.yaml").read_text().replace(" \\\n#   ", "")
    assert f"avs-dist train --config configs/{paper}_s4.yaml --data.shards shards/s4" in head
    assert f"--train.out_dir runs/{paper}_s4\n" in head


def test_the_toy_base_of_latent_diffusion_has_the_codes_of_the_paper_and_a_small_decoder():
    toy, paper = composed(*DIFFUSION.base).model, composed("diffusion_ms3.yaml").model
    assert toy.diffusion.dim == paper.diffusion.dim == 24
    assert (toy.decoder.queries, toy.decoder.layers, toy.decoder.heads) == (16, 2, 4)
    assert (paper.decoder.queries, paper.decoder.layers, paper.decoder.heads) == (300, 6, 8)
    assert toy.decoder.kind == paper.decoder.kind == "bilinear"


ROWS = [(paper, name) for paper in PAPERS for name in (None, *sorted(set(overlays(paper)) - NOT_A_ROW[paper]))]


@pytest.mark.parametrize(("paper", "name"), ROWS)
def test_every_row_builds_at_toy_scale(paper, name):
    files = [*PAPERS[paper].base, *([] if name is None else [f"{paper}/{name}.yaml"])]
    build_system(composed(*files), load_pretrained=False)


EPOCHS = {"s4": (3452, 15), "ms3": (296, 30), "avss": (8498, 60)}  # clips of the training split, epochs


@pytest.mark.parametrize("setting", EPOCHS)
@pytest.mark.parametrize("system", ["tpavi", "ecmvae", "diffusion"])
def test_the_configs_of_the_papers_train_for_their_epochs(system, setting):
    config = composed(f"{system}_{setting}.yaml")
    clips, epochs = EPOCHS[setting]
    assert config.train.max_steps * config.train.global_batch == clips * epochs
    assert config.train.max_steps % config.train.eval_every == 0
    assert config.model.system == system
    assert config.model.num_classes == (71 if setting == "avss" else 1)
    assert (config.loss.segmentation == "cross_entropy") == (setting == "avss")
    transformer = composed(f"{system}_{setting}.yaml", "transformer_decoder.yaml")
    assert (transformer.model.decoder.kind, transformer.model.neck.channels) == ("transformer", 256)
    assert transformer.model.neck.channels % transformer.model.decoder.heads == 0


def measured(miou: float) -> tuple[dict, list]:
    """What evaluation and training leave of a row."""
    test = {"results": {"real": {"miou": miou, "f_score": 0.25}}}
    return test, [{"phase": "eval", "step": 30, "miou": 0.9}]


def test_finished_rows_are_not_run_again_and_stand_in_every_table(tmp_path, capsys):
    """All rows of tables 4 and 5 are there, in two sweeps: the command only writes the tables."""
    out = tmp_path / "out"
    variants = list(ablations._distinct({number: ECMVAE.table(number) for number in (4, 5)}))
    done = {variant: measured(index / 10) for index, variant in enumerate(variants)}
    swept(out / "tables_4", dict(list(done.items())[:5]))
    swept(out / "tables_5_6", {**dict(list(done.items())[5:]), FULL: measured(0.99)})
    assert run("ablations", ["--tables", "5", "4", "--out", str(out), "--steps", "30", "--seed", "7"]) == 0
    text = (out / "ablations.md").read_text()
    assert text.startswith("Toy scale: ")
    assert "reported, not claimed" in text.splitlines()[0]
    assert "Paper: ECMVAE. Base of all rows: " in text
    assert text in capsys.readouterr().out
    assert re.findall(r"^## ECMVAE, Table (\d):", text, re.MULTILINE) == ["4", "5"]
    written = json.loads((out / "ablations.json").read_text())
    for number in ("4", "5"):
        for row in written["tables"][number]["rows"]:
            assert row["miou"] == variants.index(row["variant"]) / 10
            assert f"| {row['label']} | {row['miou']:.3f} | 0.250 | 2.00 | " in text
            assert f"`{row['command']}`" in text
    assert text.count("| 57.84 |") == 2
    assert "| JS, geometric (ours) | 0.400 | 0.250 | 2.00 | - |" in text
    assert "mIoU and F are those of `avs-dist evaluate`; steps/s is a median, of rows that train side by side." in text
    assert "| row | toy mIoU | toy F | steps/s | paper's MS3 mIoU (%) | command |" in text
    assert not list(out.glob("clips*"))  # nothing was made


def test_tables_of_latent_diffusion_have_roman_numbers_and_rows_that_are_run_once(tmp_path, capsys):
    out = tmp_path / "out"
    variants = ("table3_encoder_decoder", "table3_cvae", "table3_ldm", "table5_first_version", FULL)
    swept(out / "tables_3_5", {variant: measured(0.5) for variant in variants})
    assert run("ablations", ["--paper", "diffusion", "--tables", "3", "5", "--out", str(out)]) == 0
    text = (out / "ablations.md").read_text()
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [TITLES["diffusion"][0], TITLES["diffusion"][2]]
    assert [cells.split(" | ")[-2] for cells in text.splitlines() if cells.startswith("| second version")] == ["59.62"]
    assert text.count("--config configs/diffusion/table3_ldm.yaml") == 2
    assert text.count("| 57.67 |") == 2
    assert not list(out.glob("clips*"))  # nothing was made


@pytest.mark.parametrize(
    ("paper", "table", "there"), [("ecmvae", "7", "2 to 6"), ("diffusion", "2", "3 to 8"), ("ecmvae", "fig3", "2 to 6")]
)
def test_a_table_that_the_paper_does_not_have(paper, table, there, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("ablations", ["--paper", paper, "--tables", table, "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith(f"there are {there}\n")
    assert not out.exists()


@pytest.mark.parametrize("paper", PAPERS)
def test_one_sweep_trains_all_rows_as_their_commands_do(paper, ms3_shards, tmp_path):
    """All but one, which another sweep has trained."""
    out, paper = tmp_path / "out", PAPERS[paper]
    plan = ablations.Plan(
        paper.name, tuple(str(CONFIGS / name) for name in paper.base), clips=20, size=64, steps=300, seed=7
    )
    tables = {key: paper.table(key) for key in paper.keys}
    swept(out / "tables_0", {FULL: measured(0.5)})
    (out / "shards_ms3").symlink_to(ms3_shards)
    values = ablations._values(plan)
    assert values["optim.warmup_steps"] == 30
    file = tmp_path / "rows.yaml"
    file.write_text(yaml.safe_dump(ablations._sweep(out, paper, tables)))
    own = ablations._words({"data.shards": out / "shards_ms3", **values})
    sweep = planned(file, *ablations._config_words(plan), *own)
    rows = ablations._distinct(tables)
    assert (sweep.sweep.scheduler.name, sweep.sweep.resources.cpus) == ("none", 1)
    assert set(sweep.bases) == set(rows) - {FULL}
    for variant in sweep.bases:
        command = ablations._train_command(out, plan, rows[variant], values)
        alone = parse_config(command[1:])
        assert without_place(sweep.bases[variant]) == without_place(alone)
        assert (alone.seed, alone.train.max_steps, alone.train.eval_every) == (7, 300, 0)
        assert (alone.data.shards, alone.train.out_dir) == (str(out / "shards_ms3"), str(out / variant))
        assert alone.train.init_from == (str(out / "s4") if variant == FROM_S4 else None)
        assert sweep.sweep.rows[variant].published == rows[variant].config.published


def test_only_rows_that_are_trained_to_the_end_are_measured(tmp_path):
    swept(tmp_path / "tables_2", {FULL: measured(0.5), "table4_poe": measured(0.5)}, state="failed")
    swept(tmp_path / "tables_4", {FULL: measured(0.5)})
    assert ablations._runs(tmp_path) == {FULL: tmp_path / "tables_4" / "trials" / "0000"}


def test_a_folder_belongs_to_one_plan(tmp_path, capsys):
    out = tmp_path / "out"
    swept(out / "tables_6", {FULL: measured(0.5), FROM_S4: measured(0.5)})
    words = ["--tables", "6", "--out", str(out)]
    assert run("ablations", words) == 0
    assert run("ablations", [*words, "--steps", "301"]) == 2
    said = capsys.readouterr().err
    assert "holds rows of other settings (steps 150 there, 301 here)" in said
    assert said.count("\n") == 1
    assert run("ablations", ["--paper", "diffusion", "--out", str(out)]) == 2
    assert "(paper ecmvae there, diffusion here; config " in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_trains_and_evaluates_and_goes_on_where_it_stopped(tmp_path, capfd, monkeypatch):
    """Table 6, as it takes every way: two settings, and weights that another training left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    words = ["--quick", "--tables", "6", "--out", str(out)]
    assert run("ablations", words) == 0
    said = capfd.readouterr().out
    assert [line.split()[2] for line in said.splitlines() if line.startswith("$ avs-dist")] == [
        *("synth", "shards") * 2,
        *("train", "sweep", "evaluate", "evaluate"),
    ]
    rows = json.loads((out / "ablations.json").read_text())["tables"]["6"]["rows"]
    assert all(0 <= row["miou"] <= 1 and 0 <= row["f_score"] <= 1 for row in rows)
    runs = ablations._runs(out)
    for row in rows:
        trained = from_dict(yaml.safe_load((runs[row["variant"]] / "config.yaml").read_text()))
        assert without_place(trained) == without_place(parse_config(shlex.split(row["command"])[2:]))
    assert trained.train.init_from == str(out / "s4")
    (runs[FROM_S4] / "test.json").unlink()  # as if it had been stopped during the evaluation
    before = (runs[FROM_S4] / "metrics.jsonl").read_text()
    assert run("ablations", words) == 0
    said = capfd.readouterr().out
    assert said.count("$ avs-dist") == said.count("$ avs-dist evaluate") == 1
    assert json.loads((out / "ablations.json").read_text())["tables"]["6"]["rows"] == rows
    assert (runs[FROM_S4] / "metrics.jsonl").read_text() == before
