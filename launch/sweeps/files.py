"""The results of a sweep in its folder: trials.csv, sweep.html, best.yaml; and its trials on TensorBoard."""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from avs_dist.launch.sweeps.charts import settings_keys
from avs_dist.launch.sweeps.outcome import Outcome, best_of
from avs_dist.launch.sweeps.page import sweep_page
from avs_dist.launch.sweeps.scales import exact
from avs_dist.launch.sweeps.summary import Summary
from avs_dist.shards.files import write_text

CSV_FILE, BEST_FILE, PAGE_FILE = "trials.csv", "best.yaml", "sweep.html"
_FIRST = ("number", "label", "state", "reason", "best", "best_step", "last", "last_step", "starts", "seconds")


def write_results(folder: Path, sweep: Summary, outcomes: list[Outcome]) -> None:
    """Write trials.csv, best.yaml and sweep.html, each at once; best.yaml is there only while a trial has a score.

    Raises:
        OSError: the folder cannot be written.
    """
    write_text(folder / CSV_FILE, _csv(folder, sweep, outcomes))
    config = _best_config(folder, sweep, best_of(outcomes))
    if config:
        write_text(folder / BEST_FILE, config)
    else:
        (folder / BEST_FILE).unlink(missing_ok=True)
    write_text(folder / PAGE_FILE, sweep_page(folder, sweep, outcomes, config is not None))


def write_hparams(outcome: Outcome, objective: str) -> None:
    """Note the settings and the best score beside the curves of a trial that has ended, for TensorBoard's HPARAMS tab.

    Raises:
        OSError: the folder of the trial cannot be written.
    """
    if not outcome.folder.is_dir():  # never started
        return
    best = {f"best/{objective}": outcome.best} if outcome.best else {}
    settings = {"state": outcome.state, **({"row": outcome.label} if outcome.label else {}), **outcome.settings}
    plain = {key: value if isinstance(value, (int, float)) else exact(value) for key, value in settings.items()}
    with SummaryWriter(str(outcome.folder / "tensorboard")) as writer:
        for record in hparams(plain, dict.fromkeys((f"eval/{objective}", *best), 0.0)):  # names; values are scalars
            writer.file_writer.add_summary(record)
        for name, (step, score) in best.items():
            writer.add_scalar(name, score, step)


def _csv(folder: Path, sweep: Summary, outcomes: Sequence[Outcome]) -> str:
    """A row for each trial; what it does not have is empty, numbers have all their digits."""
    keys, published = settings_keys(outcomes), sweep.published_columns
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*_FIRST, *keys, *published, "folder"])
    for one in outcomes:
        step, score = one.best or ("", "")
        last, last_step = (one.last, one.step) if one.scores else ("", "")
        row = [one.number, one.label, one.state, one.reason, score, step, last, last_step, one.starts, one.seconds]
        row += [exact(one.settings[key]) if key in one.settings else "" for key in keys]
        row += [*one.published, *[""] * (len(published) - len(one.published))]
        rows.writerow([*row, os.path.relpath(one.folder, folder)])
    return text.getvalue()


def _best_config(folder: Path, sweep: Summary, best: Outcome | None) -> str | None:
    """The config of the best trial, to be trained anew; None where there is no such trial, or its config is gone."""
    path = best.folder / "config.yaml" if best else None
    if best is None or best.best is None or path is None or not path.is_file():
        return None
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["train"] |= {"out_dir": str(folder / "best"), "resume": False, "fork_from": None}
    if best.forks:
        config["train"]["init_from"] = sweep.init_from  # which the forks had no need of
    step, score = best.best
    label = f" ({best.label})" if best.label else ""
    head = [
        shlex.join(["avs-dist", "train", "--config", str(folder / BEST_FILE)]),
        f"{sweep.title or 'Sweep'}: the best is trial {best.number}{label}, {sweep.objective} {score} at step {step}.",
        f"Its weights: {best.folder}",
    ]
    if best.forks:
        head.append(
            "It came to these settings in steps, each on the state of a trial before: from scratch it may differ."
        )
    comment = "".join(f"# {' '.join(line.split())}\n" for line in head)  # a title has no say in the settings below
    return comment + yaml.safe_dump(config, sort_keys=False)
