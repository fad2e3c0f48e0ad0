"""Going on from a checkpoint: which one, with which settings, and with all that the run remembered."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from avs_dist import checkpoint, world
from avs_dist.checkpoint import MANIFEST, STATE
from avs_dist.config import Config, flat, to_dict
from avs_dist.engine import Engine

# a run may be continued with other values of these; all others must be the same
_FREE_TO_CHANGE = {
    *(f"train.{name}" for name in ("out_dir", "max_steps", "eval_every", "log_every", "resume")),
    *(f"train.{name}" for name in ("init_from", "fork_from")),
    *(f"train.{name}" for name in ("save_every", "save_async", "keep_last", "max_nonfinite")),
    *(f"engine.{name}" for name in ("zero_stage", "offload", "activation_checkpointing", "timeout_s")),
    # its data go on at the very next clip, whatever the batches, and must be the same clips, wherever they are
    *("train.global_batch", "engine.grad_accumulation", "data.shards", "data.workers"),
    *("data.eval_split", "data.max_damaged", "data.video_deadline_s", "data.cache_dir", "data.cache_gb"),
}


def newest_checkpoint(out_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run whose files are all as they were written; collective.

    Damaged ones are told, and set aside as damaged-step-N, so that they are neither taken nor counted again.

    Raises:
        ValueError: there are checkpoints, and all are damaged; or one is of a newer version.
        RuntimeError: one cannot be read at present, which does not say that it is damaged.
    """
    root = checkpoint.root(out_dir)
    folders: list[Path] = world.broadcast_object(checkpoint.step_folders(root) if world.is_main() else None)
    skipped: list[tuple[Path, str]] = []
    for folder in folders:
        reason = _damage(folder)
        if reason is None:
            _set_aside(skipped)
            return folder
        skipped.append((folder, reason))
    if skipped:
        raise ValueError(
            f"all checkpoints in {root} are damaged: {'; '.join(reason for _, reason in skipped)}. "
            "Start in another train.out_dir, from the weights of another run with train.init_from"
        )
    return None


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything; the ranks share the reading."""
    damage: str | None = None
    failure: OSError | checkpoint.UnknownFormatError | None = None
    try:
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} has no {MANIFEST}")
        files = sorted(checkpoint.manifest(folder)["files"].items())
        checkpoint.verify(folder, dict(files[world.rank() :: world.world_size()]))
    except (OSError, checkpoint.UnknownFormatError) as error:
        failure = error
    except ValueError as error:
        damage = str(error)
    told = world.gather_objects((damage, failure))
    for rank, (_, failed) in enumerate(told):
        if isinstance(failed, OSError):
            raise RuntimeError(f"rank {rank} cannot read {folder} ({failed}): start again when its disk can be read")
        if failed is not None:
            raise failed
    return next((reason for reason, _ in told if reason), None)


def _set_aside(skipped: list[tuple[Path, str]]) -> None:
    for folder, reason in skipped if world.is_main() else ():
        names = (f"damaged-{folder.name}" + (f"-{again}" if again > 1 else "") for again in itertools.count(1))
        aside = next(path for path in map(folder.with_name, names) if not path.exists())
        tqdm.write(f"warning: {folder.name} is skipped, and kept as {aside.name}: {reason}", file=sys.stderr)
        os.replace(folder, aside)
    world.barrier()


def check_settings(folder: Path, config: Config, image_size: int) -> None:
    """Refuse to go on with settings that would make another run of it.

    Raises:
        ValueError: naming them.
    """
    there = {"image_size": checkpoint.image_size(folder), **_lasting(checkpoint.saved_config(folder))}
    here = {"image_size": image_size, **_lasting(config)}
    differ = [f"{key} {there[key]} there, {value} here" for key, value in here.items() if there[key] != value]
    if differ:
        raise ValueError(
            f"{folder} was saved with other settings ({'; '.join(differ)}): "
            f"continue with those in {folder / 'config.yaml'}, or start in another train.out_dir, from scratch or with "
            "all that it has by train.fork_from"
        )
    _check_state(folder)


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint of another run that has not all a run goes on from, undamaged; collective.

    Raises:
        ValueError: saying what is wrong with it.
        RuntimeError: it cannot be read at present.
    """
    _check_state(folder)
    if damage := _damage(folder):
        raise ValueError(damage)


def _check_state(folder: Path) -> None:
    if not (folder / STATE).is_dir():
        raise ValueError(
            f"{folder} has weights, but not what the optimiser remembers in a form that can be read (it is exported, "
            "or of an earlier version): start a new run from its weights with train.init_from"
        )


def restore(engine: Engine, folder: Path) -> int:
    """Give the optimiser what it remembered, whatever the ranks and ZeRO stage were; returns the steps done.

    The weights must be those of the checkpoint already.
    """
    manifest = checkpoint.manifest(folder)
    engine.load_optimizer_state([folder / name for name in manifest["files"] if Path(name).parent == Path(STATE)])
    return int(manifest["step"])


def _lasting(config: Config) -> dict[str, Any]:
    """The settings that must stay the same over a resume, by their dotted names."""
    values = to_dict(config)
    values["data"].pop("mixture")  # its keys are places
    return {key: value for key, value in flat(values).items() if key not in _FREE_TO_CHANGE}
