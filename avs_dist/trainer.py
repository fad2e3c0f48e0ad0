"""The training loop."""

from __future__ import annotations

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
from avs_dist.placement import placement
from avs_dist.run_log import RunLog
from avs_dist.saving import Saver
from avs_dist.shards.index import ShardIndex
from avs_dist.stored_audio import check_stored_audio
from avs_dist.systems import build_system
from avs_dist.tasks import build_task
from avs_dist.watchdog import phase, watching


def train(config: Config) -> Path:
    """Train to train.max_steps and return the folder of the last checkpoint.

    Raises:
        ValueError: the settings do not fit together, or train.out_dir holds a run and train.resume is off.
        RuntimeError: losses or gradients were not finite in more steps than train.max_nonfinite, or more clips than
            data.max_damaged are damaged (the steps done are in a checkpoint); or another rank is lost.
        Preempted: a signal was noted (`interruption.noted`) that asks the run to stop; it is saved.
    """
    device = world.start(config.engine.timeout_s)
    try:
        with watching(config.engine.timeout_s):
            return _train(config, device)
    finally:
        stop()


def _train(config: Config, device: torch.device) -> Path:
    task = build_task(config)  # fails before anything expensive is built
    index = ShardIndex.load(config.data.shards)
    task.check_data(index)
    previous = _previous_run(config)
    torch.manual_seed(config.seed)
    begin = previous or config.train.init_from
    system = build_system(config, load_pretrained=begin is None)
    if begin:
        checkpoint.check_classes(begin, index.classes, config.data.shards)
    learnt = _word_vectors(config, index, begin)
    facts = {"image_size": index.image_size, "classes": index.classes, "word_vectors": learnt}
    if previous:
        resuming.check_settings(previous, config, index.image_size)
    if begin:
        checkpoint.load_weights(system, begin)
    check_stored_audio(system, index)
    engine = Engine(system, config, device)
    done = resuming.restore(engine, previous) if previous else 0
    batches = TrainBatches(config, index, done)
    if previous and (state := checkpoint.data_state(previous)):
        batches.load_state(state)
    saver = Saver(engine, config, best_by=task.best_by, facts=facts, newest=previous)
    where = placement()
    if world.is_main():
        print(f"{engine.describe()}\n{where}", flush=True)
        if config.train.resume:
            print(f"resumed from {previous}" if previous else f"no checkpoint in {config.train.out_dir}: from step 0")

    def save(metrics: dict[str, float]) -> None:
        with phase(f"saving step {done}"):
            saver.save(done, metrics, batches.state(done))

    def evaluate() -> None:
        with phase(f"evaluating step {done}"):
            metrics, codes = task.evaluate(engine)
        log.evaluation(done, metrics, codes)
        save(metrics)

    def train_step(micro_batches: list[Any]) -> dict[str, float]:
        """Terms of the step; none where all ranks had to skip it."""
        augmented = [task.augment(batch, done) for batch in micro_batches]
        try:
            with phase(f"training step {done}"):
                terms = engine.train_step(augmented, done)
        except NonFiniteError as error:
            skipped.add(error)
            log.skipped(error, skipped)
            skipped.check(error)
            return {}
        skipped.passed()
        return terms

    skipped = SkippedSteps(config.train.max_nonfinite, Path(config.train.out_dir), done)
    with RunLog(config, first_step=done) as log:
        try:
            if previous:
                batches.recall(Path(config.train.out_dir))
                if _due(done, config.train.eval_every, config) and not checkpoint.is_measured(previous):
                    evaluate()
            for micro_batches in batches:
                log.damage(done, batches.damage, task.damage)
                log.step(done, train_step(micro_batches), engine.learning_rate(done), skipped.count)
                done += 1
                saver.poll()
                if _due(done, config.train.eval_every, config):
                    evaluate()
                elif _due(done, config.train.save_every, config):
                    save({})
        except (DataError, NonFiniteError, Preempted) as reason:  # on all ranks alike
            if done:
                save({})
                saver.finish()
            if isinstance(reason, Preempted):
                _tell_saved(f"{reason} after step {done}", saver)
            raise
        finally:
            log.damage(done, batches.damage, task.damage)
        with phase(f"saving step {done}"):
            saver.finish()
    if saver.failure is not None:
        raise RuntimeError(f"the last checkpoint could not be written ({saver.failure}); newest: {saver.newest}")
    if saver.newest is None:
        raise ValueError(f"train.max_steps={config.train.max_steps}: nothing to train")
    if world.is_main():
        if len(batches.damage):
            print(f"{batches.damage.summary()}: see {Path(config.train.out_dir) / REPORT_FILE}", flush=True)
        print(f"checkpoint: {saver.newest}", flush=True)
    return saver.newest


def _tell_saved(stopped: str, saver: Saver) -> None:
    saved = f"saved in {saver.newest}" if saver.newest else "there is nothing to save"
    if saver.failure is not None:
        saved = f"it could not be saved ({saver.failure}), the newest checkpoint is {saver.newest}"
    if world.is_main():
        print(f"{stopped}: {saved}; continue with --train.resume true", flush=True)


def _previous_run(config: Config) -> Path | None:
    there = checkpoint.newest_first(checkpoint.root(config.train.out_dir))
    if there and not config.train.resume:
        raise ValueError(
            f"train.out_dir={config.train.out_dir} already holds {there[0].name}: "
            "continue with --train.resume true, or choose another folder"
        )
    return resuming.newest_checkpoint(config.train.out_dir)


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


def _due(steps_done: int, every: int, config: Config) -> bool:
    """Whether it is time for what is done every so many steps, and at the end."""
    return steps_done == config.train.max_steps or (every > 0 and steps_done % every == 0)
