"""`avs-dist sweep` on Ray Tune, and for trials of several workers on Ray Train; the only file that knows them.

What does not need Ray is in launch/sweeps: the command line, the search space, the study of all trials, what one does.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import secrets
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# before ray is imported: it would write tables and logs of its own, change the folder of a trial, and tell others of it
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import PlacementGroupID, tune
from ray._private import ray_constants
from ray.tune import schedulers
from ray.tune.experiment import Trial
from ray.tune.search.search_algorithm import SearchAlgorithm
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from avs_dist.config import Config, from_dict, to_dict
from avs_dist.launch.cli import run
from avs_dist.launch.sweeps import trial as running
from avs_dist.launch.sweeps.board import Board
from avs_dist.launch.sweeps.command import build_parser
from avs_dist.launch.sweeps.joining import check_answers, other_group, why_not_joined
from avs_dist.launch.sweeps.outcome import Outcome
from avs_dist.launch.sweeps.plan import Plan, claimed, make_plan
from avs_dist.launch.sweeps.recall import recall
from avs_dist.launch.sweeps.settings import ResourcesConfig
from avs_dist.launch.sweeps.setup import Setup
from avs_dist.launch.sweeps.space import Choice, Parameter, within
from avs_dist.launch.sweeps.study import Study
from avs_dist.launch.sweeps.watch import STEP, Watch
from avs_dist.shards.files import write_text

CHECKPOINT = "checkpoint"  # in what a worker of Ray Train reports
_PLACE = "placement_group.txt"  # in the folder of a trial: what its workers hold


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(words)
    plan = make_plan(parser, args, words)
    try:
        _start_ray(args["address"], plan.sweep.resources)
        setup = Setup.of(plan, ray.cluster_resources())
        with claimed(plan, args["resume"]):  # not before, or what never began would have to be resumed
            return _conduct(plan, Study(plan.out, plan.sweep, plan.space, plan.objective, plan.fits), setup)
    finally:
        ray.shutdown()


def _start_ray(address: str | None, resources: ResourcesConfig) -> None:
    """Join a cluster, or start a Ray here that nobody else can reach: on loopback, and with a token."""
    # trials that have none would otherwise all take the first GPU
    hidden = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}} if resources.gpus == 0 else None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning", "runtime_env": hidden}
    warnings.filterwarnings("ignore", "Consider boosting PBT")  # by trials of one process after the other
    # that there is a token, that Tune has no logs of its own, how Tune would resume
    for warns in ("ray._private.authentication", "ray.tune.analysis", "ray.tune.tune"):
        logging.getLogger(warns).setLevel(logging.ERROR)
    if address:
        check_answers(address)
        ray_constants.NUM_REDIS_GET_RETRIES = 1  # each takes up to 40 s
        try:
            ray.init(address, **options)
        except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
            raise RuntimeError(why_not_joined(address, error)) from error
        return
    ray_constants.ENABLE_RAY_CLUSTER = False  # a cluster of this host alone
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would keep one in a file that all can read
    with other_group():  # "local": not a cluster that happens to be here
        ray.init("local", include_dashboard=False, num_cpus=len(os.sched_getaffinity(0)), **options)


def _conduct(plan: Plan, study: Study, setup: Setup) -> int:
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(setup.room(plan, ray.cluster_resources()))
    board = Board(plan, study)
    tuner = tune.Tuner(
        # for several workers Ray Train takes what they need, and the trial itself next to nothing
        tune.with_resources(
            tune.with_parameters(_trial, setup=setup),
            setup.bundle() if setup.resources.workers == 1 else {"memory": 1e6},
        ),
        tune_config=tune.TuneConfig(
            search_alg=_Drafts(study, lambda: setup.room(plan, ray.cluster_resources())),
            scheduler=scheduler_of(plan, study.outcomes()),
            num_samples=-1,  # until there are no more drafts
            time_budget_s=plan.sweep.hours * 3600 or None,
        ),
        run_config=tune.RunConfig(
            # a new name each time: what there is of the sweep is in its study and the folders of the trials
            name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(plan.out.absolute() / "ray"),
            failure_config=tune.FailureConfig(max_failures=plan.sweep.retries),
            callbacks=[_Watcher(setup, Watch(plan, study, board))],
            verbose=0,
        ),
    )
    # Tune ends in order at the other one
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    with board:
        tuner.fit()
    return board.finish(out_of_time=bool(plan.sweep.hours) and board.seconds >= plan.sweep.hours * 3600)


def _trial(config: dict[str, Any], setup: Setup) -> None:
    """One start of a trial, in a process of its own."""
    os.chdir(setup.cwd)
    number = int(tune.get_context().get_trial_id())
    folder = setup.folder(number)
    with running.printing_to(folder / "log.txt"):
        origin = _pointed(tune.get_checkpoint())
        job = running.Job(number, str(folder), setup.bases[config["row"]], config["settings"])
        training = running.prepare(job, origin)
        teller = _Teller(setup, folder, training.train.max_steps)
        try:
            with running.noted(folder):
                train = _train_alone if setup.resources.workers == 1 else _train_together
                train(training, folder, teller, setup)
        except Exception:
            if not any(running.told(folder, note) for note in (running.OUT_OF_MEMORY, running.REFUSED)):
                raise
            tune.report(setup.result(0, {setup.objective: math.nan}, 0.0, 0))  # and no retry


def _train_alone(training: Config, folder: Path, teller: _Teller, setup: Setup) -> None:
    from avs_dist.trainer import train

    train(training, told=teller.tell)


def _train_together(training: Config, folder: Path, teller: _Teller, setup: Setup) -> None:
    """By several workers of Ray Train, which ends them all when one is lost."""
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Empty, Queue

    reports = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"config": to_dict(training), "folder": str(folder), "cwd": setup.cwd},
        torch_config=_meeting(),
        scaling_config=train.ScalingConfig(
            num_workers=setup.resources.workers, use_gpu=bool(setup.gpus), resources_per_worker=setup.bundle()
        ),
        run_config=train.RunConfig(
            name="train",
            storage_path=str(folder / "ray"),
            failure_config=train.FailureConfig(max_failures=0),  # Tune starts the trial again, as all others
            callbacks=[_bridge(reports)],
        ),
    )
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def fit() -> None:
        try:
            trainer.fit()
            ended.put(None)
        except Exception as error:
            ended.put(error)

    # a daemon: the scheduler may end this trial in the middle
    fitting = threading.Thread(target=fit, daemon=True)
    fitting.start()
    while fitting.is_alive() or not reports.empty():
        with suppress(Empty):
            report = reports.get(timeout=0.5)
            newest = report.pop(CHECKPOINT)
            teller.tell(report.pop(STEP), report, Path(newest) if newest else None)
    if error := ended.get():
        raise error


def _meeting() -> Any:
    """For Ray Train: tells the workers where they meet, and leaves it to them, who know how long to wait, and on which
    addresses to listen."""
    from ray.train._internal.utils import get_address_and_port
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    def told(address: str, port: int) -> None:
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}

    class Teller(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(told, *worker_group.execute_single(0, get_address_and_port))

    class Meeting(TorchConfig):
        backend_cls = Teller

    return Meeting()


def _bridge(reports: Any) -> Any:
    """For Ray Train: what its workers report goes to a queue, for the trial to tell."""
    from ray.train import UserCallback

    class Bridge(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            reports.put(metrics[0])

    return Bridge()


def _rank(setting: dict[str, Any]) -> None:
    """One worker of a trial."""
    from ray import train

    from avs_dist.trainer import train as train_rank

    os.chdir(setting["cwd"])
    context = train.get_context()
    folder, rank = Path(setting["folder"]), context.get_world_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(context.get_world_size())}
    os.environ |= {"LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size())}

    def told(step: int, metrics: dict[str, float], newest: Path | None) -> None:
        train.report({**metrics, STEP: step, CHECKPOINT: str(newest) if newest else None})

    place = get_current_placement_group()
    if rank == 0 and place is not None:
        write_text(folder / _PLACE, place.id.hex())
    with running.printing_to(folder / f"log-{rank}.txt"), running.noted(folder):
        train_rank(from_dict(setting["config"]), told=told)


def _free(folder: Path) -> None:
    """Give back what the workers of a trial held that was ended from outside: Ray Train, which would, is gone then."""
    if (folder / _PLACE).is_file():
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex((folder / _PLACE).read_text())))
        (folder / _PLACE).unlink()


class _Teller:
    """Tells Tune of evaluations. A checkpoint of Tune's is the path of ours."""

    def __init__(self, setup: Setup, folder: Path, max_steps: int) -> None:
        self._setup, self._folder, self._max_steps = setup, folder, max_steps
        self._begun = time.monotonic()

    def tell(self, step: int, metrics: dict[str, float], newest: Path | None) -> None:
        told = self._setup.result(step, metrics, time.monotonic() - self._begun, self._max_steps)
        with tempfile.TemporaryDirectory() as place:
            if newest is not None:
                Path(place, "path.txt").write_text(str(newest.absolute()))
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(place) if newest is not None else None)
        running.reported(self._folder)


def _pointed(found: Any) -> str | None:
    """The checkpoint of ours that one of Tune's points to."""
    if found is None:
        return None
    with found.as_directory() as place:
        return Path(place, "path.txt").read_text()


class _NotKept:
    """Tune writes down copies of its parts, for a restore of its own; ours comes from the study."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Drafts(_NotKept, SearchAlgorithm):
    """Gives Tune the trials of the study, with their numbers as names."""

    def __init__(self, study: Study, room: Callable[[], int]) -> None:
        self._study, self._room = study, room
        self._live: set[str] = set()

    @property
    def total_samples(self) -> int:
        return len(self._study)

    def add_configurations(self, experiments: Any) -> None:
        self._spec = experiments[0].spec

    def next_trial(self) -> Trial | None:
        if self._finished or len(self._live) >= self._room():
            return None
        draft = self._study.next()
        if draft is None:
            self.set_finished()
            return None
        name = f"{draft.number:04d}"
        self._live.add(name)
        return Trial(
            self._spec["run"],
            config={"row": draft.row, "settings": draft.settings},
            trial_id=name,
            experiment_tag=name,
            placement_group_factory=self._spec.get("resources_per_trial"),
            checkpoint_config=self._spec["checkpoint_config"],
            max_failures=self._spec["max_failures"],
            storage=self._spec["storage"],
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._live.discard(trial_id)


class _Watcher(_NotKept, tune.Callback):
    """Passes on what Tune tells of the trials."""

    def __init__(self, setup: Setup, watch: Watch) -> None:
        self._setup, self._watch = setup, watch

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._watch.look([int(each.trial_id) for each in trials if each.status == Trial.RUNNING])

    def on_trial_result(self, iteration: int, trials: Any, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        self._watch.result(int(trial.trial_id), result)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._watch.started(int(trial.trial_id))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._freed(trial)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._freed(trial)
        self._watch.ended(int(trial.trial_id), trial.config["row"], trial.config["settings"], trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._freed(trial)
        text = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        self._watch.failed(int(trial.trial_id), text)

    def _freed(self, trial: Trial) -> None:
        _free(self._setup.folder(int(trial.trial_id)))


def scheduler_of(plan: Plan, outcomes: list[Outcome]) -> schedulers.TrialScheduler:
    """It knows what the trials of a sweep that is resumed have told before."""
    asked, objective, mode = plan.sweep.scheduler, plan.objective, plan.sweep.mode
    every = min(base.train.eval_every for base in plan.bases.values()) or 1
    common: dict[str, Any] = {"time_attr": STEP, "metric": objective, "mode": mode}
    if asked.name == "none":
        return schedulers.FIFOScheduler()
    if asked.name == "pbt":
        return schedulers.PopulationBasedTraining(
            **common,
            perturbation_interval=asked.interval_steps or every,
            hyperparam_mutations={"settings": {each.key: _domain(each) for each in plan.space}},
            quantile_fraction=asked.quantile,
            resample_probability=asked.resample,
            custom_explore_fn=lambda config: {**config, "settings": within(plan.space, config["settings"])},
            synch=asked.synchronous,
            log_config=False,
        )
    begin = asked.grace_steps or every
    if asked.name == "median":
        never: Any = math.inf  # take turns with trials that wait: each costs a start
        scheduler: schedulers.TrialScheduler = schedulers.MedianStoppingRule(
            **common, grace_period=begin, min_time_slice=never
        )
    else:
        most = max(base.train.max_steps for base in plan.bases.values())
        scheduler = schedulers.ASHAScheduler(**common, max_t=most, grace_period=begin, reduction_factor=asked.reduction)
    recall(scheduler, outcomes, objective)
    return scheduler


def _domain(parameter: Parameter) -> Any:
    """Of the search space, as Tune says it."""
    domain = parameter.domain
    if isinstance(domain, Choice):
        return list(domain.options)
    if domain.whole:
        return (tune.lograndint if domain.log else tune.randint)(int(domain.low), int(domain.high) + 1)
    return (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)


if __name__ == "__main__":
    raise SystemExit(run("sweep"))
