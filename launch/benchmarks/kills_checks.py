"""What must hold of a training that was killed: after each kill of its checkpoints, and at the end of its results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from avs_dist import checkpoint
from avs_dist.checkpoint import MANIFEST, STATE, WEIGHTS
from avs_dist.launch.benchmarks.kills_life import KEEP_LAST

_SETTINGS_FILE = "config.yaml"
_TIMES = ("seconds_per_step",)  # of the log; they alone may differ


class Checked(NamedTuple):
    """The checkpoints of a run: the newest whole one (step 0 where there is none) and what is wrong with any."""

    newest: int
    wrong: list[str]


def check_checkpoints(out: Path, ranks: int) -> Checked:
    """Look at everything that passes for a checkpoint or a pointer to one."""
    root = checkpoint.root(out)
    whole, wrong = {}, []
    for folder in checkpoint.newest_first(root):
        if reason := _torn(folder, ranks):
            wrong.append(reason)
        else:
            whole[folder.name] = int(checkpoint.manifest(folder)["step"])
    wrong += [f"{path.name} was taken for damaged" for path in root.glob("damaged-*")]
    for pointer in (root / "last.json", root / "best.json"):
        try:
            named = json.loads(pointer.read_text())["folder"] if pointer.exists() else None
        except (ValueError, KeyError) as error:
            wrong.append(f"{pointer.name} is torn: {error}")
            continue
        if named is not None and named not in whole:
            wrong.append(f"{pointer.name} names {named}, which is not whole")
    return Checked(max(whole.values(), default=0), wrong)


def _torn(folder: Path, ranks: int) -> str | None:
    """What keeps a folder with a manifest from being a whole checkpoint."""
    states = {f"{STATE}/rank-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    try:
        manifest = checkpoint.manifest(folder)
        checkpoint.verify(folder, manifest["files"])
    except (ValueError, OSError) as error:
        return str(error)
    expected = {_SETTINGS_FILE, WEIGHTS, *states}
    for name, found in {"its manifest lists": set(manifest["files"]), "it holds": there - {MANIFEST}}.items():
        if found != expected:
            return f"{folder.name}: {name} {sorted(found)}, expected {sorted(expected)}"
    step = int(folder.name.removeprefix("step-"))
    return None if manifest["step"] == step else f"{folder.name} is of step {manifest['step']}"


def check_start(log: Path, out: Path, newest: int) -> str | None:
    """Whether a life has gone on from the newest whole checkpoint; nothing is said of one that did not get so far."""
    for line in log.read_text(errors="replace").splitlines():
        if "resumed from" in line and Path(line.split("resumed from")[1].strip()).name != f"step-{newest:06d}":
            return f"{out.name} was at step {newest} and {line.strip()}"
        if "no checkpoint in" in line and newest:
            return f"{out.name} was at step {newest} and began anew"
        if "is skipped, and kept as" in line:
            return line.strip()
    return None


def left_over(out: Path) -> list[str]:
    """What a run that has come to its end should not have left beside its checkpoints."""
    root = checkpoint.root(out)
    whole = checkpoint.newest_first(root)
    kept = {*whole[:KEEP_LAST], checkpoint.pointed(root / "best.json")}
    known = {"last.json", "best.json", *(folder.name for folder in kept if folder)}
    return sorted(path.name for path in root.iterdir() if path.name not in known)


class Difference(NamedTuple):
    """Between the results of two runs: norm of the difference over the norm, of the worst tensor, and the largest of
    any element.

    state: of what the optimiser remembers.
    log:   relative, of the worst logged figure.
    """

    weights: float
    weights_most: float
    state: float
    state_most: float
    log: float

    @property
    def relative(self) -> float:
        return max(self.weights, self.state, self.log)


def compare(one: Path, other: Path) -> tuple[Difference, list[str]]:
    """How far two finished runs are apart, and what of them cannot differ by rounding but does."""
    folders = [checkpoint.newest_first(checkpoint.root(out))[0] for out in (one, other)]
    wrong: list[str] = []
    if folders[0].name != folders[1].name:
        wrong.append(f"{one.name} ended with {folders[0].name}, {other.name} with {folders[1].name}")
    facts = [checkpoint.manifest(folder) for folder in folders]
    wrong += [f"{key}: {facts[0][key]}, {facts[1][key]}" for key in ("data", "step") if facts[0][key] != facts[1][key]]
    for pointer in ("last.json", "best.json"):
        there = [checkpoint.pointed(folder.parent / pointer) for folder in folders]
        names = [folder.name if folder else "nothing" for folder in there]
        if names[0] != names[1]:
            wrong.append(f"{pointer} names {names[0]} in {one.name}, {names[1]} in {other.name}")
    weights = _apart(load_file(folders[0] / WEIGHTS), load_file(folders[1] / WEIGHTS), wrong)
    state = _apart(_state(folders[0]), _state(folders[1]), wrong)
    return Difference(*weights, *state, _log_apart(one, other, wrong)), wrong


def _state(folder: Path) -> dict[str, Tensor]:
    """What all ranks have stored, by file and name."""
    files = sorted((folder / STATE).iterdir())
    return {f"{path.name}:{name}": value for path in files for name, value in load_file(path).items()}


def _apart(one: dict[str, Tensor], other: dict[str, Tensor], wrong: list[str]) -> tuple[float, float]:
    if one.keys() != other.keys():
        wrong.append(f"only one has {min(one.keys() ^ other.keys())}")
        return math.inf, math.inf
    worst, most = 0.0, 0.0
    for name, value in one.items():
        first, second = value.double(), other[name].double()
        difference = first - second
        worst = _larger(worst, (difference.norm() / (first.norm() if first.any() else 1.0)).item())
        most = _larger(most, difference.abs().max().item() if difference.numel() else 0.0)
    return worst, most


def _larger(one: float, other: float) -> float:
    """NaN is larger than anything."""
    return max(one, other) if not math.isnan(other) else math.inf


def _log_apart(one: Path, other: Path, wrong: list[str]) -> float:
    lines = [list(_logged(out)) for out in (one, other)]
    if [line[:3] for line in lines[0]] != [line[:3] for line in lines[1]]:
        wrong.append(f"{one.name} logged {len(lines[0])} figures, {other.name} {len(lines[1])}, or others")
        return math.inf
    pairs = [(first[3], second[3]) for first, second in zip(*lines, strict=True)]
    different = [(a, b) for a, b in pairs if a != b and not (math.isnan(a) and math.isnan(b))]
    return max((_larger(0.0, abs(a - b) / max(abs(a), abs(b))) for a, b in different), default=0.0)


def _logged(out: Path) -> Iterator[tuple[str, int, str, Any]]:
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in ("phase", "step", *_TIMES):
                yield record["phase"], record["step"], name, value
