"""What one trial does, whoever starts it and how often: it goes on from what is in its folder, or from another trial.

<folder>/            an ordinary run: config.yaml, metrics.jsonl, checkpoints/, tensorboard/
<folder>/trial.json  its present settings, and where it was forked from other trials (population based training)
<folder>/fork-1/     the checkpoint of the other trial that it went on from last, by the number of its fork
<folder>/log.txt     what it printed
"""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avs_dist import checkpoint
from avs_dist.config import Config, from_dict
from avs_dist.launch.sweeps.outcome import Fork
from avs_dist.shards.files import write_text

OUT_OF_MEMORY = "out_of_memory.txt"  # in the folder of a trial that had not enough
REFUSED = "refused.txt"  # likewise of one that cannot train with its settings or data, however often it is tried
_FACTS = "trial.json"


@dataclass(frozen=True)
class Job:
    """A trial as it was drawn.

    number:   Of the study.
    folder:   Its run.
    config:   Its config without the settings.
    settings: By dotted config key.
    """

    number: int
    folder: str
    config: dict[str, Any]
    settings: dict[str, Any]


def folder_of(sweep: Path, number: int) -> Path:
    """The run of a trial in the folder of its sweep."""
    return sweep / "trials" / f"{number:04d}"


def settings_of(folder: Path) -> dict[str, Any] | None:
    """Its present ones; None where it never was started."""
    facts = _facts(folder)
    return facts["settings"] if facts else None


def forks_of(folder: Path) -> tuple[Fork, ...]:
    facts = _facts(folder)
    return tuple(Fork(**each) for each in facts["forks"]) if facts else ()


def prepare(job: Job, origin: str | None) -> Config:
    """The config to train with now; call it once at each start, before any rank trains.

    Args:
        origin: the checkpoint that the scheduler wants the trial to go on from: of its own run, or of another trial's;
            None at its first start.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for note in (OUT_OF_MEMORY, REFUSED):
        (folder / note).unlink(missing_ok=True)
    facts = _facts(folder) or {"settings": job.settings, "forks": [], "origin": "", "pending": False}
    if origin and not Path(origin).is_relative_to(folder) and facts["origin"] != origin:
        facts = _fork(job, facts, origin)
    if facts["pending"]:
        shutil.rmtree(checkpoint.root(folder), ignore_errors=True)
    _write_facts(folder, {**facts, "pending": False})
    train = {"train.out_dir": str(folder), "train.resume": True}
    if facts["forks"]:
        (place,) = _place(folder, len(facts["forks"])).iterdir()
        train |= {"train.fork_from": str(place), "train.init_from": None}
    return from_dict(merged(job.config, {**facts["settings"], **train}))


def reported(folder: Path) -> None:
    """Note that the scheduler has heard of an own checkpoint: when it asks for the same origin again, it means it."""
    facts = _facts(folder)
    if facts and facts["origin"]:
        _write_facts(folder, {**facts, "origin": ""})


def merged(config: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The nested config with values of dotted keys put in."""
    found = json.loads(json.dumps(config))
    for key, value in settings.items():
        *path, last = key.split(".")
        place = found
        for name in path:
            place = place[name]
        place[last] = value
    return found


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Within the block errors that come again at each try leave a note, by which the sweep tells them from faults."""
    import torch

    try:
        yield
    except ValueError as error:
        _note(folder / REFUSED, error)
        raise
    except (MemoryError, RuntimeError) as error:
        # what torch says of a GPU, and of the host
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            _note(folder / OUT_OF_MEMORY, error)
        raise


def _note(path: Path, error: Exception) -> None:
    text = str(error)
    write_text(path, f"{type(error).__name__}: {text.splitlines()[0] if text else ''}\n")


def told(folder: Path, note: str) -> str:
    """What an error said that left a note; empty where there was none."""
    path = folder / note
    return path.read_text().strip() if path.is_file() else ""


@contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Within the block all that this process prints goes to the end of a file, with the error that ends the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.dup(1), os.dup(2)
    with open(path, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise
    finally:
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)
            os.close(old)


def _fork(job: Job, facts: dict[str, Any], origin: str) -> dict[str, Any]:
    """Written down once the other's state is here; unchanged where the other has come to its end."""
    folder, source = Path(job.folder), _whole(Path(origin))
    step = int(checkpoint.manifest(source)["step"])
    if step >= merged(job.config, job.settings)["train"]["max_steps"]:
        return facts
    number = len(facts["forks"]) + 1
    _copy(source, _place(folder, number))
    fork = {"step": step, "source": int(Path(origin).parents[1].name), "settings": job.settings}
    facts = {"settings": job.settings, "forks": [*facts["forks"], fork], "origin": origin, "pending": True}
    _write_facts(folder, facts)
    shutil.rmtree(_place(folder, number - 1), ignore_errors=True)
    return facts


def _place(folder: Path, fork: int) -> Path:
    return folder / f"fork-{fork}"


def _whole(origin: Path) -> Path:
    """The checkpoint, or the newest of its run where that has removed it."""
    there = [origin, *checkpoint.newest_first(origin.parent)]
    source = next((each for each in there if (each / checkpoint.MANIFEST).is_file()), None)
    if source is None:
        raise RuntimeError(f"there is no checkpoint to go on from in {origin.parent}")
    return source


def _copy(source: Path, place: Path) -> None:
    """A copy of a checkpoint that stays when the run it is of removes its own; by links where the disk has them."""
    staged = place.with_name(".fork.partial")
    for left_over in (staged, place):
        shutil.rmtree(left_over, ignore_errors=True)
    shutil.copytree(source, staged / source.name, copy_function=_link)  # an error where it is removed at this moment
    os.replace(staged, place)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _facts(folder: Path) -> dict[str, Any] | None:
    path = folder / _FACTS
    return json.loads(path.read_text()) if path.is_file() else None


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    write_text(folder / _FACTS, json.dumps(facts, indent=1) + "\n")
