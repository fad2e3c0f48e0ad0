"""The training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from avs_dist import checkpoint, resuming, world
from avs_dist.config import Config
from avs_dist.damage import REPORT_FILE, DataError
from avs_dist.engine import Engine, stop
from avs_dist.interruption import Preempted
from avs_dist.loader import TrainBatches
from avs_dist.nonfinite import NonFiniteError, SkippedSteps
from avs_dist.ownership import sole_owner
from avs_dist.placement import placement
from avs_dist.run_log import RunLog
from avs_dist.saving import Saver
from avs_dist.shards.index import ShardIndex
from avs_dist.stored_audio import check_stored_audio
from avs_dist.systems import build_system
from avs_dist.tasks import build_task
from avs_dist.tasks.base import Task
from avs_dist.watchdog import phase, watching

# step, metrics and the newest whole checkpoint, which is that of the step unless it could not be written
Told = Callable[[int, dict[str, float], Path | None], None]


def train(config: Config, told: Told | None = None) -> Path:
    """Train to train.max_steps and return the folder of the last checkpoint.

    Args:
        told: called on every rank after every evaluation, and as a run is resumed with the one it goes on from.

    Raises:
        ValueError: the settings do not fit together, or train.out_dir holds a run and train.resume is off.
        RuntimeError: losses or gradients were not finite in more steps than train.max_nonfinite, or more clips than
            data.max_damaged are damaged (the steps done are in a checkpoint); or another rank is lost.
        Preempted: a signal was noted (`interruption.noted`) that asks the run to stop; it is saved.
    """
    device = world.start(config.engine.timeout_s)
    try:
        with watching(config.engine.timeout_s):
            return _train(config, device, told)
    finally:
        stop()


def _train(config: Config, device: torch.device, told: Told | None) -> Path:
    task = build_task(config)  # fails before anything expensive is built
    index = ShardIndex.load(config.data.shards)
    task.check_data(index)
    with sole_owner(config.train.out_dir):
        return _Run(config, task, index, device, told).to_the_end()


class _Run:
    """A training from where it was left; every method is collective."""

    def __init__(self, config: Config, task: Task, index: ShardIndex, device: torch.device, told: Told | None) -> None:
        self.config, self.task, self.out_dir, self.told = config, task, Path(config.train.out_dir), told
        self.previous = _previous_run(config)
        whole = self.previous or _fork(config)  # of which all is taken
        torch.manual_seed(config.seed)
        begin = whole or config.train.init_from
        system = build_system(config, load_pretrained=begin is None)
        if begin:
            checkpoint.check_classes(begin, index.classes, config.data.shards)
        learnt = _word_vectors(config, index, begin)
        facts = {"image_size": index.image_size, "classes": index.classes, "word_vectors": learnt}
        if self.previous:
            resuming.check_settings(self.previous, config, index.image_size)
        if begin:
            checkpoint.load_weights(system, begin)
        check_stored_audio(system, index)
        self.engine = Engine(system, config, device)
        self.done = resuming.restore(self.engine, whole) if whole else 0
        self.batches = TrainBatches(config, index, self.done)
        if whole and (state := checkpoint.data_state(whole)):
            self.batches.load_state(state)
        self.saver = Saver(self.engine, config, best_by=task.best_by, facts=facts, newest=self.previous)
        self.skipped = SkippedSteps(config.train.max_nonfinite, self.out_dir, self.done)
        self._tell_begin()

    def to_the_end(self) -> Path:
        """The loop; returns the last checkpoint."""
        with RunLog(self.config, first_step=self.done) as self.log:
            try:
                self._loop()
            except (DataError, NonFiniteError, Preempted) as reason:  # on all ranks alike
                self._save_at_stop(reason)
                raise
            finally:
                self.log.damage(self.done, self.batches.damage, self.task.damage)
            with phase(f"saving step {self.done}"):
                self.saver.finish()
        newest = self.saver.newest
        if self.saver.failure is not None:
            raise RuntimeError(f"the last checkpoint could not be written ({self.saver.failure}); newest: {newest}")
        if newest is None:
            raise ValueError(f"train.max_steps={self.config.train.max_steps}: nothing to train")
        if world.is_main():
            if len(self.batches.damage):
                print(f"{self.batches.damage.summary()}: see {self.out_dir / REPORT_FILE}", flush=True)
            print(f"checkpoint: {newest}", flush=True)
        return newest

    def _loop(self) -> None:
        every = self.config.train
        if self.previous:
            self.batches.recall(self.out_dir)
            if measured := checkpoint.metrics(self.previous):
                self._tell(measured)
            elif self._due(every.eval_every):
                self._evaluate()
        for micro_batches in self.batches:
            self.log.damage(self.done, self.batches.damage, self.task.damage)
            terms = self._step(micro_batches)
            self.log.step(self.done, terms, self.engine.learning_rate(self.done), self.skipped.count)
            self.done += 1
            with phase("completing a checkpoint"):
                self.saver.poll()
            if self._due(every.eval_every):
                self._evaluate()
            elif self._due(every.save_every):
                self._save({})

    def _step(self, micro_batches: list[Any]) -> dict[str, float]:
        """Terms of the step; none where all ranks had to skip it."""
        augmented = [self.task.augment(batch, self.done) for batch in micro_batches]
        try:
            with phase(f"training step {self.done}"):
                terms = self.engine.train_step(augmented, self.done)
        except NonFiniteError as error:
            self.skipped.add(error)
            self.log.skipped(error, self.skipped)
            self.skipped.check(error)
            return {}
        self.skipped.passed()
        return terms

    def _evaluate(self) -> None:
        with phase(f"evaluating step {self.done}"):
            metrics, codes = self.task.evaluate(self.engine)
        self.log.evaluation(self.done, metrics, codes)
        self._save(metrics)
        self._tell(metrics)

    def _tell(self, metrics: dict[str, float]) -> None:
        if self.told:
            with phase(f"saving step {self.done}"):
                self.saver.finish()
            self.told(self.done, metrics, self.saver.newest)

    def _save(self, metrics: dict[str, float]) -> None:
        with phase(f"saving step {self.done}"):
            self.saver.save(self.done, metrics, self.batches.state(self.done))

    def _save_at_stop(self, reason: Exception) -> None:
        """What was done is not lost.

        Raises:
            RuntimeError: it is, as it could not be saved.
        """
        if self.done:
            self._save({})
            with phase(f"saving step {self.done}"):
                self.saver.finish()
        newest = self.saver.newest
        if self.saver.failure is not None:
            unsaved = f"step {self.done} could not be saved ({self.saver.failure}), the newest checkpoint is {newest}"
            raise RuntimeError(f"{reason}; {unsaved}") from reason
        if isinstance(reason, Preempted) and world.is_main():
            saved = f"saved in {newest}" if newest else "there is nothing to save"
            print(f"{reason} after step {self.done}: {saved}; continue with --train.resume true", flush=True)

    def _due(self, every: int) -> bool:
        """Whether it is time for what is done every so many steps, and at the end."""
        return self.done == self.config.train.max_steps or (every > 0 and self.done % every == 0)

    def _tell_begin(self) -> None:
        where, previous, fork = placement(), self.previous, self.config.train.fork_from
        if world.is_main():
            print(f"{self.engine.describe()}\n{where}", flush=True)
            if fork and not previous:
                print(f"forked from {fork} after step {self.done}")
            elif self.config.train.resume:
                place = self.config.train.out_dir
                print(f"resumed from {previous}" if previous else f"no checkpoint in {place}: from step 0")


def _previous_run(config: Config) -> Path | None:
    there = checkpoint.newest_first(checkpoint.root(config.train.out_dir))
    if there and not config.train.resume:
        raise ValueError(
            f"train.out_dir={config.train.out_dir} already holds {there[0].name}: "
            "continue with --train.resume true, or choose another folder"
        )
    return resuming.newest_checkpoint(config.train.out_dir)


def _fork(config: Config) -> Path | None:
    """The checkpoint that another run goes on from with settings of its own.

    Raises:
        ValueError: it is damaged, or has the weights alone.
    """
    if config.train.fork_from is None:
        return None
    folder = checkpoint.find_checkpoint(config.train.fork_from)
    resuming.check_whole(folder)
    return folder


def _word_vectors(config: Config, index: ShardIndex, begin: Path | str | None) -> str | None:
    """Those that the run learns: of its shards, or where these have no text, of the checkpoint that it builds on.

    Raises:
        ValueError: the two differ.
    """
    queried = config.model.query.checkpoint if config.model.system == "query" else None
    learnt_by = begin or queried
    if learnt_by is None:
        return index.word_vectors
    checkpoint.check_word_vectors(learnt_by, index.word_vectors, config.data.shards)
    return index.word_vectors or checkpoint.word_vectors(learnt_by)
