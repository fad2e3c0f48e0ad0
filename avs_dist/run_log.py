"""What a run tells while it goes on: progress bar, TensorBoard and metrics.jsonl."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from avs_dist import world
from avs_dist.config import Config, to_dict
from avs_dist.damage import REPORT_FILE, DamageLog, save_report
from avs_dist.nonfinite import NonFiniteError, SkippedSteps
from avs_dist.shards.files import write_text


class RunLog:
    """Everything on rank 0 only. What cannot be written later, as on a full disk, is told once and does not end the
    run; a run whose log cannot even be opened is ended on all ranks."""

    def __init__(self, config: Config, first_step: int) -> None:
        self._config = config
        self._first_step = first_step
        self._main = world.is_main()
        self._damaged = 0
        self._warned = False

    def __enter__(self) -> RunLog:
        if self._main:
            out_dir = Path(self._config.train.out_dir)
            self._damaged = -1 if (out_dir / REPORT_FILE).is_file() else 0  # an old report is written anew
            self._board: SummaryWriter | None = None
        if failure := world.on_main(self._open):
            raise RuntimeError(f"the log in {self._config.train.out_dir} cannot be written: {failure}")
        if self._main:
            self._bar = tqdm(total=self._config.train.max_steps, initial=self._first_step, desc="train", unit="step")
            self._since = time.monotonic()
        return self

    def _open(self) -> None:
        out_dir = Path(self._config.train.out_dir)
        write_text(out_dir / "config.yaml", yaml.safe_dump(to_dict(self._config), sort_keys=False))
        self._records = _open_records(out_dir / "metrics.jsonl", self._first_step)
        self._board = self._open_board(self._first_step)

    def __exit__(self, *exc: object) -> None:
        if self._main:
            self._bar.close()
            self._try(self._close_board)
            self._try(self._records.close)

    def step(self, step: int, terms: dict[str, float], lr: float, skipped: int = 0) -> None:
        """Note a step that was made, or where `terms` is empty skipped.

        Args:
            skipped: steps of the run that were skipped so far.
        """
        if not self._main:
            return
        self._bar.update()
        self._bar.set_postfix({k: f"{v:.4f}" for k, v in terms.items()}, refresh=False)
        if (step + 1) % self._config.train.log_every == 0:
            seconds = (time.monotonic() - self._since) / self._config.train.log_every
            there = {"skipped": skipped} if skipped else {}
            self._write("train", step + 1, {**terms, "lr": lr, "seconds_per_step": seconds, **there})
            self._since = time.monotonic()

    def skipped(self, error: NonFiniteError, steps: SkippedSteps) -> None:
        """Tell of a step that was skipped; the first of several in a row."""
        if self._main:
            if steps.in_a_row == 1 and not steps.are_too_many:
                self._bar.write(f"skipped: {error}", file=sys.stderr)
            self._try(steps.save_report)

    def damage(self, step: int, *logs: DamageLog | None) -> None:
        """The damaged clips so far, where there are more than the last time."""
        there = [log for log in logs if log is not None]
        count = sum(map(len, there))
        if (
            self._main
            and count > self._damaged
            and self._try(lambda: save_report(Path(self._config.train.out_dir), there))
        ):
            self._damaged = count
            self._draw("data/damaged_clips", count, step)

    def evaluation(self, step: int, metrics: dict[str, float], codes: dict[str, float]) -> None:
        if self._main:
            if self._board is None:  # there may be room again
                self._try(lambda: setattr(self, "_board", self._open_board(None)))
            self._bar.write(f"step {step}: " + "  ".join(f"{k}={v:.4f}" for k, v in metrics.items()))
            self._write("eval", step, metrics)
            if codes:
                self._write("codes", step, codes)
            if self._board is not None:
                self._try(self._board.flush)  # the process may be ended once this is known
            self._since = time.monotonic()

    def _write(self, phase: str, step: int, values: dict[str, Any]) -> None:
        self._try(lambda: self._append(json.dumps({"phase": phase, "step": step, **values}) + "\n"))
        for name, value in values.items():
            self._draw(f"{phase}/{name}", value, step)

    def _append(self, line: str) -> None:
        """A whole line of metrics.jsonl, or nothing of it."""
        data, end = line.encode(), self._records.seek(0, os.SEEK_END)
        try:
            if self._records.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._records.truncate(end)
            raise

    def _draw(self, name: str, value: float, step: int) -> None:
        """A point on TensorBoard, whose writer never recovers from an error."""
        if self._board is not None and not self._try(lambda: self._board.add_scalar(name, value, step)):  # type: ignore[union-attr]
            self._board = None

    def _open_board(self, purge_step: int | None) -> SummaryWriter:
        return SummaryWriter(Path(self._config.train.out_dir) / "tensorboard", purge_step=purge_step)

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()

    def _try(self, write: Callable[[], Any]) -> bool:
        """Whether something could be written."""
        try:
            write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                text = (
                    f"warning: the log in {self._config.train.out_dir} has gaps ({error}): make room; training goes on"
                )
                tqdm.write(text, file=sys.stderr)
            return False
        return True


def _open_records(path: Path, first_step: int) -> FileIO:
    """metrics.jsonl for appending; what a crashed run logged after its last checkpoint is dropped, as it is redone,
    and so is a line torn by a crash or a power cut."""
    old = path.read_text(errors="replace").splitlines() if path.is_file() else []
    kept = [line for line in old if (step := _step_of(line)) is not None and step <= first_step]
    write_text(path, "".join(f"{line}\n" for line in kept))
    return FileIO(path, "a")


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
