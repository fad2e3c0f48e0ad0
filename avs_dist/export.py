"""A checkpoint as a folder to pass on: weights, config.json and a model card, without what only its training needs.

`checkpoint` reads such a folder like any other (`load_system`, train.init_from, `avs-dist evaluate`, `predict`), and
nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from avs_dist import checkpoint
from avs_dist.checkpoint import EXPORTED, WEIGHTS
from avs_dist.config import Config, to_dict
from avs_dist.evaluate import definitions
from avs_dist.pairing import pairing_score
from avs_dist.shards.files import sync_directory, write_text
from avs_dist.shards.transfer import shown

MODEL_CARD = "README.md"
_KEPT = ("image_size", "classes", "word_vectors", "step", "metrics", "torch")
_NAMES = {
    "tpavi": "TPAVI",
    "ecmvae": "ECMVAE",
    "diffusion": "contrastive latent diffusion",
    "unicode": "Uni-Code",
    "query": "query segmentation on Uni-Code",
}


def export(source: str | Path, out: str | Path) -> Path:
    """Write the folder; it is there whole or not at all.

    Args:
        source: Checkpoint or run folder (of a run: its best checkpoint).
        out: Folder that is not there yet.

    Raises:
        FileExistsError: it is.
        FileNotFoundError, ValueError: there is no checkpoint, or it is damaged.
    """
    folder, out = checkpoint.find_checkpoint(source), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already: name another folder")
    manifest = checkpoint.manifest(folder)
    weights = {WEIGHTS: manifest["files"][WEIGHTS]}
    config = _portable(to_dict(checkpoint.saved_config(folder)))
    facts = {"library": "avs_dist", "system": config["model"]["system"]}
    facts |= {key: manifest[key] for key in _KEPT if key in manifest}
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        staging.mkdir(parents=True)
        shutil.copyfile(folder / WEIGHTS, staging / WEIGHTS)
        checkpoint.verify(staging, weights)  # the copy, so that damage on either side is seen
        _check_format(staging / WEIGHTS)
        with open(staging / WEIGHTS, "rb") as copy:
            os.fsync(copy.fileno())
        write_text(staging / EXPORTED, json.dumps({**facts, "config": config, "files": weights}, indent=1) + "\n")
        write_text(staging / MODEL_CARD, model_card(checkpoint.saved_config(staging), facts))
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_directory(out.parent)
    return out


def _check_format(path: Path) -> None:
    """Refuse to pass on what a manifest lists, but is something else, such as a pickle."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a safetensors file: {error}") from error


def _portable(values: Any) -> Any:
    """Settings without what URLs may hold of credentials."""
    if isinstance(values, dict):
        return {_portable(key): _portable(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_portable(value) for value in values]
    return shown(values) if isinstance(values, str) and "://" in values else values


def model_card(config: Config, facts: dict[str, Any]) -> str:
    """What there is to know of a model before it is used, as Markdown with the head that model hubs read.

    Args:
        facts: `image_size`, `classes`, `step` and `metrics` of the checkpoint.
    """
    system, masks = config.model.system, config.model.system != "unicode"
    tags = ["audio-visual", *(["audio-visual-segmentation"] if masks else ["cross-modal", "codebook"]), system]
    head = ["license: unknown", "library_name: avs_dist"]
    head += [f"pipeline_tag: {'image-segmentation' if masks else 'feature-extraction'}", "tags:"]
    paragraphs = [
        "\n".join(["---", *head, *(f"- {tag}" for tag in tags), "---"]),
        f"# {_NAMES[system]}, {_setting(config, facts)}",
        _what_it_is(config, facts),
        "## Use",
        "Needs avs_dist and torch, but no DeepSpeed; `FOLDER` is the folder of this file.",
        f"```python\n{_code(masks)}\n```",
        f"```\n{_commands(masks)}\n```",
        "## Training",
        _training(config, facts),
        "## Measured",
        _measures(facts.get("metrics") or {}, config),
        "## Limits",
        _limits(masks, facts),
        "## License",
        "Not stated. It depends on the data and the weights this was trained from: whoever passes the model on puts it "
        "here and into the head of this file.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _setting(config: Config, facts: dict[str, Any]) -> str:
    if config.model.system == "unicode":
        return f"one codebook for {', '.join(config.model.unicode.modalities)}"
    return f"{len(facts['classes'])} classes (AVSS)" if facts.get("classes") else "sounding or silent (S4, MS3)"


def _what_it_is(config: Config, facts: dict[str, Any]) -> str:
    if config.model.system == "unicode":
        return (
            f"Gives each second of {', '.join(config.model.unicode.modalities)} one of "
            f"{config.model.unicode.codebook.num_codes} codes that all modalities share."
        )
    what = f"which pixels sound, as one of: {', '.join(facts['classes'])}" if facts.get("classes") else "which sound"
    side = facts.get("image_size", 0)
    return (
        f"Says of the pixels of a video, second by second, {what}. Frames of {side} x {side} pixels, backbone "
        f"{config.model.backbone.name}, sound through {config.model.audio.kind}."
    )


def _code(masks: bool) -> str:
    lines = ["from avs_dist.checkpoint import load_system", "", 'system, config = load_system("FOLDER", device="cpu")']
    call = "system.predict(clip).probabilities_BTHW  # clip: avs_dist.clip.Clip"
    return "\n".join([*lines, call if masks else "system.encode(batch)  # batch: avs_dist.sequences.Sequences"])


def _commands(masks: bool) -> str:
    if not masks:
        return "avs-dist downstream classify --checkpoint FOLDER --shards SHARDS"
    evaluate = "avs-dist evaluate --checkpoint FOLDER --shards SHARDS --audio all"
    return "\n".join(
        [
            "avs-dist predict --checkpoint FOLDER film.mp4 --out painted",
            evaluate,
            "avs-dist train --train.init_from FOLDER ...",
        ]
    )


def _training(config: Config, facts: dict[str, Any]) -> str:
    rows = {
        "data": ", ".join(config.data.mixture or [config.data.shards]) + f" (split {config.data.train_split})",
        "steps": facts.get("step"),
        "clips per step": config.train.global_batch,
        "optimiser": f"{config.optim.name}, learning rate {config.optim.lr:g}, {config.optim.schedule}",
        "precision": config.engine.precision,
        "seed": config.seed,
        "started from": config.train.init_from or f"backbone {config.model.backbone.weights}",
        "torch": facts.get("torch"),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *table, "", "All settings are in config.json, under `config`."])


def _measures(metrics: dict[str, float], config: Config) -> str:
    if not metrics:
        return "Not measured: the run saved this checkpoint without an evaluation."
    meanings = definitions({"": metrics})
    meanings["pairing"] = str(pairing_score.__doc__).split("\n\n")[0]
    rows = [f"| {name} | {value:.6g} | {meanings.get(name, '')} |" for name, value in metrics.items()]
    told = f"On split {config.data.eval_split} of {config.data.shards}, at the end of the training or within it:"
    return "\n".join([told, "", "| measure | value | meaning |", "|---|---|---|", *rows])


def _limits(masks: bool, facts: dict[str, Any]) -> str:
    told = "- It knows what its training data showed; other pictures and sounds were not measured."
    if not masks:
        return told + "\n- The best checkpoint was chosen by the measures above, which flatters them."
    side = facts.get("image_size", 0)
    return "\n".join(
        [
            told,
            f"- Frames are brought to {side} x {side} pixels: what is smaller than a few of them is lost.",
            "- One mask a second; what happens within a second is not told apart.",
            "- If it was the best of its run, it was chosen by the measures above, which flatters them.",
        ]
    )
