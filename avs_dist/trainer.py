"""The training loop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from avs_dist import checkpoint, resuming, world
from avs_dist.config import Config, to_dict
from avs_dist.damage import REPORT_FILE, DamageLog, DataError, save_report
from avs_dist.engine import Engine, stop
from avs_dist.loader import TrainBatches
from avs_dist.placement import placement
from avs_dist.saving import Saver
from avs_dist.shards.files import write_text
from avs_dist.shards.index import ShardIndex
from avs_dist.stored_audio import check_stored_audio
from avs_dist.systems import build_system
from avs_dist.tasks import build_task


def train(config: Config) -> Path:
    """Train to train.max_steps and return the folder of the last checkpoint.

    Raises:
        ValueError: the settings do not fit together, or train.out_dir holds a run and train.resume is off.
        RuntimeError: the loss became NaN or infinite (the last checkpoint is whole), or more clips than
            data.max_damaged are damaged (the steps done are in a checkpoint).
    """
    device = world.start(config.engine.timeout_s)
    try:
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

    def evaluate() -> None:
        metrics, codes = task.evaluate(engine)
        log.evaluation(done, metrics, codes)
        saver.save(done, metrics, batches.state(done))

    with RunLog(config, first_step=done) as log:
        try:
            if previous:
                batches.recall(Path(config.train.out_dir))
                if _due(done, config.train.eval_every, config) and not checkpoint.is_measured(previous):
                    evaluate()
            for micro_batches in batches:
                log.damage(done, batches.damage, task.damage)
                augmented = [task.augment(batch, done) for batch in micro_batches]
                log.step(done, engine.train_step(augmented, done), engine.learning_rate(done))
                done += 1
                saver.poll()
                if _due(done, config.train.eval_every, config):
                    evaluate()
                elif _due(done, config.train.save_every, config):
                    saver.save(done, {}, batches.state(done))
        except DataError:  # on all ranks alike
            if done:
                saver.save(done, {}, batches.state(done))
            raise
        finally:
            log.damage(done, batches.damage, task.damage)
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


class RunLog:
    """Progress bar, TensorBoard and metrics.jsonl; everything on rank 0 only."""

    def __init__(self, config: Config, first_step: int) -> None:
        self._config = config
        self._first_step = first_step
        self._main = world.is_main()
        self._damaged = 0

    def __enter__(self) -> RunLog:
        if self._main:
            out_dir = Path(self._config.train.out_dir)
            self._damaged = -1 if (out_dir / REPORT_FILE).is_file() else 0  # an old report is written anew
            write_text(out_dir / "config.yaml", yaml.safe_dump(to_dict(self._config), sort_keys=False))
            self._records = _open_records(out_dir / "metrics.jsonl", self._first_step)
            self._board = SummaryWriter(out_dir / "tensorboard", purge_step=self._first_step)
            self._bar = tqdm(total=self._config.train.max_steps, initial=self._first_step, desc="train", unit="step")
            self._since = time.monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._main:
            self._bar.close()
            self._board.close()
            self._records.close()

    def step(self, step: int, terms: dict[str, float], lr: float) -> None:
        if not self._main:
            return
        self._bar.update()
        self._bar.set_postfix({k: f"{v:.4f}" for k, v in terms.items()}, refresh=False)
        if (step + 1) % self._config.train.log_every == 0:
            seconds = (time.monotonic() - self._since) / self._config.train.log_every
            self._write("train", step + 1, {**terms, "lr": lr, "seconds_per_step": seconds})
            self._since = time.monotonic()

    def damage(self, step: int, *logs: DamageLog | None) -> None:
        """The damaged clips so far, where there are more than the last time."""
        there = [log for log in logs if log is not None]
        count = sum(map(len, there))
        if self._main and count > self._damaged:
            self._damaged = count
            self._board.add_scalar("data/damaged_clips", count, step)
            save_report(Path(self._config.train.out_dir), there)

    def evaluation(self, step: int, metrics: dict[str, float], codes: dict[str, float]) -> None:
        if self._main:
            self._bar.write(f"step {step}: " + "  ".join(f"{k}={v:.4f}" for k, v in metrics.items()))
            self._write("eval", step, metrics)
            if codes:
                self._write("codes", step, codes)
            self._since = time.monotonic()

    def _write(self, phase: str, step: int, values: dict[str, Any]) -> None:
        self._records.write(json.dumps({"phase": phase, "step": step, **values}) + "\n")
        self._records.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{phase}/{name}", value, step)


def _open_records(path: Path, first_step: int) -> TextIO:
    """metrics.jsonl for appending; what a crashed run logged after its last checkpoint is dropped, as it is redone,
    and so is a line torn by a crash."""
    old = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= first_step]
    write_text(path, "".join(f"{line}\n" for line in kept))
    return open(path, "a")
