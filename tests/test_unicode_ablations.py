"""The configs of Uni-Code's tables, their published scores, and the command that runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from ablation_runs import CONFIGS, composed, planned, rows_of, swept, without_place

from avs_dist.config import flat, to_dict
from avs_dist.launch import ablations
from avs_dist.launch.ablation_tables import PAPERS, UNICODE
from avs_dist.launch.ablation_tables.experiment import Plan
from avs_dist.launch.ablation_tables.paper import FULL
from avs_dist.launch.ablation_tables.writing import write_tables
from avs_dist.launch.cli import run
from avs_dist.launch.train import parse_config
from avs_dist.systems import build_system

BASES = ("unicode.yaml", "demo_unicode.yaml")
FILES = sorted(path.stem for path in (CONFIGS / "unicode").glob("*.yaml"))
VARIANTS = list(dict.fromkeys(row.variant for row in rows_of(UNICODE)))

BOOK, LOSS = "model.unicode.codebook.", "loss.unicode."
NO_CLUB, NO_CPC = {f"{LOSS}club": 0.0}, {f"{LOSS}cpc": 0.0}
NO_MM_EMA = {f"{BOOK}teacher": "none", f"{BOOK}cross_commitment": 0.0}
NO_RESET, NO_CMCM = {f"{BOOK}reset_after": 0}, {f"{LOSS}align": "none"}
AVT = {"model.unicode.modalities": ["audio", "visual", "text"]}
BARE = {**NO_CLUB, **NO_CPC, **NO_MM_EMA, **NO_RESET}
SMIT, CODIS, TURN = ({f"{LOSS}align": kind} for kind in ("margin", "transport", "cross_reconstruction"))
MST = {f"{LOSS}align": "contrast", "model.unicode.shared_encoder": True}

# of each variant: what it changes, and Tables 1 to 3: AVE V->A and A->V with 24K and with 40K
PAPER = {
    FULL: ({}, 44.0, 49.7, 47.7, 52.3),
    "baseline": ({**BARE, **NO_CMCM}, 4.4, 5.9, 5.5, 5.4),
    "baseline+smit": ({**BARE, **SMIT}, 12.7, 16.9, 14.4, 15.9),
    "baseline+mst": ({**BARE, **MST}, 13.3, 19.0, 19.5, 23.1),
    "baseline+codis": ({**BARE, **CODIS}, 18.5, 22.0, 20.8, 26.4),
    "baseline+turn": ({**BARE, **TURN}, 17.7, 21.0, 19.1, 24.3),
    "baseline+cmcm": (BARE, 28.9, 35.9, 32.7, 36.8),
    "no_mm_ema+smit": ({**NO_MM_EMA, **SMIT}, 28.1, 32.3, 32.2, 34.0),
    "no_mm_ema+mst": ({**NO_MM_EMA, **MST}, 31.2, 35.0, 34.9, 37.8),
    "no_mm_ema+codis": ({**NO_MM_EMA, **CODIS}, 33.4, 36.0, 36.7, 41.0),
    "no_mm_ema+turn": ({**NO_MM_EMA, **TURN}, 29.4, 35.3, 29.7, 36.9),
    "no_mm_ema": (NO_MM_EMA, 34.1, 38.8, 36.4, 42.9),
    "no_club": (NO_CLUB, 34.9, 35.1, 37.2, 40.3),
    "no_cpc": (NO_CPC, 4.6, 5.8, 5.2, 7.1),
    "no_club+no_cpc": ({**NO_CLUB, **NO_CPC}, 29.8, 34.6, 35.2, 36.9),
    "no_reset": (NO_RESET, 37.8, 41.2, 38.9, 40.3),
    "no_cmcm": (NO_CMCM, 39.7, 42.6, 41.3, 46.0),
    "no_mm_ema+no_reset": ({**NO_MM_EMA, **NO_RESET}, 28.2, 30.9, 31.5, 33.8),
    "avt+no_club": ({**AVT, **NO_CLUB}, None, None, 50.2, 51.8),
    "avt+no_cpc": ({**AVT, **NO_CPC}, None, None, 43.8, 49.2),
    "avt+no_mm_ema": ({**AVT, **NO_MM_EMA}, None, None, 52.9, 49.9),
    "avt+no_mm_ema+no_reset": ({**AVT, **NO_MM_EMA, **NO_RESET}, None, None, 33.0, 35.5),
    "avt+no_reset": ({**AVT, **NO_RESET}, None, None, 50.8, 47.8),
    "avt+no_cmcm": ({**AVT, **NO_CMCM}, None, None, 52.4, 54.5),
    "avt": (AVT, None, None, None, None),
    **{f"codes_{size}": ({f"{BOOK}num_codes": size}, None, None, None, None) for size in (64, 128, 256, 512, 1024)},
}


def files_of(variant: str) -> list[str]:
    """Below configs/."""
    return [] if variant == FULL else [f"unicode/{name}.yaml" for name in variant.split("+")]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_the_base_with_what_its_row_says(base, variant):
    before, after = (to_dict(composed(base, *files)) for files in ((), files_of(variant)))
    assert flat(after) == {**flat(before), **PAPER[variant][0]}


def test_every_file_is_part_of_a_row():
    assert set(VARIANTS) == set(PAPER)
    used = {name for variant in VARIANTS for name in variant.split("+")} - {FULL}
    assert used | {"published_code"} == set(FILES)


def test_rows_that_stand_in_several_tables_are_one():
    assert UNICODE.keys == [1, 2, 3, "fig3", "transfer"]
    rows = {key: [row.variant for row in UNICODE.table(key).rows] for key in UNICODE.keys}
    assert {key: len(variants) for key, variants in rows.items()} == {1: 12, 2: 8, 3: 7, "fig3": 5, "transfer": 4}
    assert rows[1][10] == rows[2][3] == "no_mm_ema"
    assert rows[1][-1] == rows[2][-1] == FULL
    assert rows["transfer"] == ["baseline", "no_cpc", "no_mm_ema", FULL]
    assert len(ablations._distinct({key: UNICODE.table(key) for key in UNICODE.keys})) == len(VARIANTS) == 30


def test_the_rows_quote_the_paper():
    for row in rows_of(UNICODE):
        *_, v_to_a, a_to_v = PAPER[row.variant]
        assert row.config.published == (() if v_to_a is None else (v_to_a, a_to_v)), row
        assert row.config.settings == {}


TITLES = {
    1: "Uni-Code, Table 1: other methods",
    2: "Uni-Code, Table 2: audio and visual, without",
    3: "Uni-Code, Table 3: audio, visual and text, without",
    "fig3": "Uni-Code, Fig. 3: size of the codebook (sizes of ours)",
    "transfer": "Uni-Code, what transfers, of Tables 1 and 2",
}


@pytest.mark.parametrize("key", TITLES)
def test_the_tables_are_sweeps_as_they_are(key, cmg_shards):
    table, name = UNICODE.table(key), key if isinstance(key, str) else f"table{key}"
    file = CONFIGS / "sweeps" / f"unicode_{name}.yaml"
    head = file.read_text().replace("\\\n#", "")
    words = ["--config", str(CONFIGS / "demo_unicode.yaml"), "--data.shards", str(cmg_shards)]
    plan = planned(file, *words)
    assert (plan.sweep.scheduler.name, plan.sweep.samples, plan.objective) == ("none", 1, "pairing")
    assert plan.sweep.title == TITLES[key] == table.title
    scores = ("AVE V->A (%)", "AVE A->V (%)")
    assert plan.sweep.published == table.published == (() if key == "fig3" else scores)
    for row in table.rows:
        files = [word for path in row.config.configs for word in ("--config", path)]
        assert without_place(plan.bases[row.label]) == without_place(parse_config([*words[:2], *files, *words[2:]]))
    command = re.search(r"^# command: +avs-dist sweep (.*)$", head, re.MULTILINE)
    assert command
    assert f"--config configs/unicode.yaml --sweep configs/sweeps/{file.name} " in command[1]
    # the scores it quotes are those of 40K
    assert ("--train.max_steps 3000 --data.eval_split train" in command[1]) == (key != "fig3")


@pytest.mark.parametrize("name", FILES)
def test_the_head_of_a_file_says_command_and_published_scores(name):
    head = (CONFIGS / "unicode" / f"{name}.yaml").read_text().replace("\\\n#", "")
    command = re.search(r"^# command: +avs-dist train (.*)$", head, re.MULTILINE)
    assert command
    words = command[1].split()
    assert words[1] == "configs/unicode.yaml"
    assert words[-1] == f"configs/unicode/{name}.yaml"
    variant = "+".join(Path(word).stem for word in words[3::2])
    *_, v24, a24, v40, a40 = PAPER[FULL if name == "published_code" else variant]
    if v40 is None:
        assert "AVE" not in head
    else:
        assert f"# published: AVE V->A / A->V {v24} / {a24} (24K), {v40} / {a40} (40K); not measured here\n" in head


@pytest.mark.parametrize("variant", [v for v in PAPER if v.startswith(("avt+", "no_mm_ema+")) or v == "no_club+no_cpc"])
def test_the_scores_of_composed_rows_stand_in_one_of_their_files(variant):
    _, v24, a24, v40, a40 = PAPER[variant]
    heads = "\n".join((CONFIGS / name).read_text() for name in files_of(variant))
    assert f"{v40} / {a40} (40K)" in heads
    assert v24 is None or f"{v24} / {a24} (24K), {v40}" in heads


def test_the_published_sizes_and_the_published_run():
    config = composed("unicode.yaml")
    unicode, losses = config.model.unicode, config.loss.unicode
    assert unicode.shapes == {"audio": (128,), "visual": (7, 7, 512)}
    assert (unicode.text_channels, unicode.dim, unicode.specific, unicode.visual_specific) == (768, 256, 256, 2048)
    assert (unicode.codebook.num_codes, unicode.codebook.reset_after) == (400, 300)
    assert (losses.commitment, losses.club, losses.cpc, losses.align_weight) == (0.25, 1.0, 1.0, 1.0)
    assert (config.optim.name, config.optim.lr, config.optim.clip_norm) == ("adam", 4e-4, 0.5)
    assert config.train.global_batch == 80
    assert config.train.max_steps * 80 == 6 * 24_000
    assert config.train.max_steps == 6 * config.train.eval_every
    assert "--train.max_steps 3000" in (CONFIGS / "unicode.yaml").read_text()  # 6 epochs of 40,000


@pytest.mark.parametrize("base", BASES)
def test_the_public_code_has_its_weights_and_rules(base):
    before, after = (flat(to_dict(composed(base, *files))) for files in ((), ("unicode/published_code.yaml",)))
    assert {key: value for key, value in after.items() if value != before[key] or key.endswith("reset_after")} == {
        "model.unicode.context_layers": 2,
        f"{BOOK}update": "sequential",
        f"{BOOK}teacher": "time_aligned",
        f"{BOOK}reset_rule": "any",
        f"{BOOK}reset_after": 300,
        f"{LOSS}commitment": 0.5,
        f"{LOSS}club_estimate": "sampled",
        f"{LOSS}club_input": "quantised",
        f"{LOSS}cpc_self": 0.1,
        f"{LOSS}align_weight": 0.5,
    }
    # what it shares with the paper, whatever the defaults become
    assert (after[f"{BOOK}cross_commitment"], after["model.unicode.predict_steps"]) == (0.5, 1)
    assert (after[f"{LOSS}club_steps"], after[f"{LOSS}club_lr"], after[f"{LOSS}align"]) == (5, 1e-3, "code_matching")


@pytest.mark.parametrize("variant", [*VARIANTS, "published_code", "avt+published_code"])
def test_every_row_builds_at_toy_scale(variant):
    build_system(composed("demo_unicode.yaml", *files_of(variant)), load_pretrained=False)


@pytest.mark.parametrize("variant", [FULL, "avt+published_code"])
def test_the_published_size_builds(variant):
    with torch.device("meta"):
        system = build_system(composed("unicode.yaml", *files_of(variant)), load_pretrained=False)
    assert sum(parameter.numel() for parameter in system.parameters()) > 50e6


def measured(v_to_a: float) -> tuple[dict, list]:
    """What `avs-dist downstream classify` and the training leave of a row."""
    own = {"audio": {"audio": 0.75, "visual": 0.5}, "visual": {"audio": v_to_a, "visual": 1.0}}
    other = {"audio": {"audio": 0.0, "visual": 0.0}, "visual": {"audio": 0.0, "visual": 0.0}}
    results = [{"name": "accuracy_published", "scores": other}, {"name": "accuracy", "scores": own}]
    codes = [{"phase": "eval", "step": 30, "codes/agreement": x, "codes/shared": x / 2} for x in (0.9, 0.5)]
    return {"results": results}, codes


def test_finished_rows_are_not_run_again_and_stand_in_every_table(tmp_path, capsys):
    out = tmp_path / "out"
    rows = [*UNICODE.table(2).rows, *UNICODE.table("fig3").rows]
    swept(out / "tables_2_fig3", {row.variant: measured(index / 16) for index, row in enumerate(rows)})
    words = ["--paper", "unicode", "--tables", "fig3", "2", "--out", str(out)]
    assert run("ablations", words) == 0
    text = (out / "ablations.md").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("Toy scale: 2000 synthetic clips of features, a tenth of them the test split, and 600 steps")
    assert re.findall(r"^## Uni-Code, (.*):", text, re.MULTILINE) == ["Table 2", "Fig. 3"]
    assert "| V->V | " not in text
    columns = "| row | toy V->A | toy A->V | toy V->V | toy A->A | same code | shared codes | steps/s | "
    assert f"{columns}paper's AVE V->A (%) | paper's AVE A->V (%) | command |\n" in text
    assert f"{columns}command |\n" in text  # of the figure the paper gives no scores
    assert "| CLUB | 0.000 | 0.500 | 1.000 | 0.750 | 50.0% | 25.0% | 2.00 | 37.2 | 40.3 | `avs-dist train " in text
    assert "| L = 64 | 0.500 | 0.500 | 1.000 | 0.750 | 50.0% | 25.0% | 2.00 | `avs-dist train " in text
    written = json.loads((out / "ablations.json").read_text())
    assert (written["paper"], written["size"], written["clips"], written["steps"]) == ("unicode", None, 2000, 600)
    row = written["tables"]["fig3"]["rows"][1]
    assert (row["visual_to_audio"], row["shared"], row["published"]) == (9 / 16, 0.25, [])
    assert "--config configs/unicode/codes_128.yaml" in row["command"]
    assert not list(out.glob("clips*"))  # nothing was made


PLAN = Plan("unicode", (str(CONFIGS / "demo_unicode.yaml"),), clips=20, size=None, steps=30, seed=7)


def test_rows_that_are_not_done_are_dashes(tmp_path):
    tables = {1: UNICODE.table(1), 3: UNICODE.table(3)}
    write_tables(tmp_path, PLAN, UNICODE, tables, {}, lambda row: row.variant)
    text = (tmp_path / "ablations.md").read_text()
    assert "| S-MiT | - | - | - | - | - | - | - | 14.4 | 15.9 | `baseline+smit` |" in text
    assert "| nothing | - | - | - | - | - | - | - | - | - | `avt` |" in text


def test_the_command_of_a_row_composes_its_files(tmp_path):
    row = next(row for row in rows_of(UNICODE) if row.variant == "avt+no_mm_ema+no_reset")
    config = parse_config(ablations._train_command(tmp_path, PLAN, row, ablations._values(PLAN))[1:])
    assert config.data.shards == str(tmp_path / "shards_cmg")
    assert config.model.unicode.modalities == ("audio", "visual", "text")
    assert (config.model.unicode.codebook.teacher, config.model.unicode.codebook.reset_after) == ("none", 0)
    assert (config.seed, config.train.max_steps, config.train.eval_every) == (7, 30, 0)
    assert config.train.out_dir == str(tmp_path / "avt+no_mm_ema+no_reset")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tables", "5"], "--tables 5: of Uni-Code there are 1 to 3, fig3, transfer"),
        (["--tables", "1", "fig4"], "--tables fig4: of Uni-Code there are 1 to 3, fig3, transfer"),
        (["--size", "64"], "--size 64: Uni-Code trains on features, which have no size in pixels"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert run("ablations", ["--paper", "unicode", "--out", str(out), *options]) == 2
    assert capsys.readouterr().err == f"avs-dist ablations: error: {message}\n"
    assert not out.exists()


def test_every_paper_can_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        run("ablations", ["--help"])
    assert f"--paper {{{','.join(PAPERS)}}}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_row_is_trained_and_measured_and_the_tables_go_on_where_they_stopped(tmp_path, capfd, monkeypatch):
    """One row of Fig. 3; the others are there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    rows = UNICODE.table("fig3").rows
    swept(out / "tables_0", {row.variant: measured(0.5) for row in rows[1:]})
    words = ["--paper", "unicode", "--quick", "--tables", "fig3", "--out", str(out)]
    assert run("ablations", words) == 0
    said = capfd.readouterr().out
    assert said.count("$ avs-dist sweep") == said.count("$ avs-dist downstream classify") == 1
    found, *others = json.loads((out / "ablations.json").read_text())["tables"]["fig3"]["rows"]
    place = out / "tables_fig3" / "trials" / "0000"
    assert yaml.safe_load((place / "config.yaml").read_text())["model"]["unicode"]["codebook"]["num_codes"] == 64
    measure = json.loads((place / "test.json").read_text())["results"][0]
    assert measure["name"] == "accuracy"
    assert found["visual_to_audio"] == measure["scores"]["visual"]["audio"]
    assert found["audio_to_audio"] == measure["scores"]["audio"]["audio"]
    assert 0 <= found["agreement"] <= 1
    assert 0 <= found["shared"] <= 1
    assert [row["visual_to_audio"] for row in others] == [0.5] * 4
    assert run("ablations", words) == 0
    assert "$ avs-dist" not in capfd.readouterr().out
    before = (place / "metrics.jsonl").read_text()
    (out / "tables_fig3" / "trials.csv").unlink()  # as if it had been stopped before the sweep told that all is done
    assert run("ablations", words) == 0
    assert capfd.readouterr().out.count("$ avs-dist") == 1
    assert (place / "metrics.jsonl").read_text() == before
