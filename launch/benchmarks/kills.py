"""Kill a training again and again at random moments, and compare what it comes to with the uninterrupted training.

    avs-dist bench kills                                50 kills of one process; about 4 minutes on 2 CPU cores
    avs-dist bench kills --ranks 2 --zero-stage 3       the deepspeed launcher; of all processes or one rank
    avs-dist bench kills --async --system ecmvae        files are written while the training goes on

A small run saves every 2 steps and is evaluated every 4. It is started with --train.resume true, killed (SIGKILL) in
its start, a step, an evaluation or a save, looked at, and started again. After each kill all that passes for a
checkpoint must be whole, the newest must not be older than before, and no more than the steps since the last save may
be lost; when a single rank is killed the launcher must end the others in time. In the end weights, buffers, state of
the optimiser, log and pointers must be those of the uninterrupted run: the same bits with one rank, within
--tolerance with more. The exit code is 1 where anything of this does not hold.
"""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from avs_dist.launch.benchmarks import report
from avs_dist.launch.benchmarks.command import Parser, save
from avs_dist.launch.benchmarks.kills_checks import Difference, check_checkpoints, check_start, compare, left_over
from avs_dist.launch.benchmarks.kills_life import PHASES, SAVE_EVERY, START, Life, Moment, usual_seconds
from avs_dist.launch.benchmarks.parity_cases import CONFIGS, SYSTEMS, trained_as
from avs_dist.launch.benchmarks.ranks import device
from avs_dist.launch.benchmarks.small_shards import make_shards

# so that the run lasts for all kills; should it end before, it begins anew and goes on being killed
STEPS_FOR_A_KILL = 4


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if args.kills < 1:
        raise ValueError(f"--kills {args.kills}: at least 1")
    if args.out and args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} holds something already: choose a new folder")
    with ExitStack() as stack:
        folder = args.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-kills-"))
        found = Trial(Path(folder), args).run()
    found = {"facts": _facts(f"avs-dist bench kills {shlex.join(argv)}".strip(), args), **found}
    tables = markdown(found)
    save(args, found, tables)
    print(tables)
    if found["wrong"]:
        raise RuntimeError("; ".join(found["wrong"]))
    return 0


class Trial:
    """The uninterrupted run and those that are killed.

    Args:
        folder: for shards, runs and what they print; must not hold any yet.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._args = folder, args
        self._rng = Random(args.seed)
        self._settings = self._common()
        self._lives = 0
        self.kills: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def run(self) -> dict[str, Any]:
        """All figures, and under "wrong" what does not hold."""
        whole = self._folder / "uninterrupted"
        life = self._life(whole)
        try:
            seconds = usual_seconds(life, self._args.limit_s)
        finally:
            life.end()
        if life.process.returncode != 0:
            raise RuntimeError(f"the uninterrupted run failed: {life.last_words()}")
        differences: list[Difference] = []
        with tqdm(total=self._args.kills, desc="kills", unit="kill") as bar:
            while len(self.kills) < self._args.kills and not self.wrong:
                out = self._folder / f"killed-{len(differences)}"
                self._kill_until_done(out, seconds, bar)
                if not self.wrong:
                    difference, wrong = compare(whole, out)
                    differences.append(difference)
                    self.wrong += [*wrong, *self._too_far(difference)]
                    self.wrong += [f"{name} was left in {out.name}" for name in left_over(out)]
        return self._figures(seconds, differences)

    def _kill_until_done(self, out: Path, seconds: dict[str, float], bar: tqdm) -> None:
        """Start the run again after each kill, and let it end after the last one, or when something is wrong."""
        code, newest = -1, 0
        while code != 0 and not self.wrong:
            life = self._life(out)
            try:
                if len(self.kills) < self._args.kills:
                    code = self._kill(life, seconds, bar)
                else:
                    code = life.wait(self._args.limit_s)
                    self._fail(code != 0, f"it ended with code {code}: {life.last_words()}")
            except TimeoutError as error:
                self.wrong.append(str(error))
            finally:
                life.end()
            started = check_start(life.log, out, newest)
            self._fail(started is not None, str(started))
            newest = self._check(life, newest)

    def _kill(self, life: Life, seconds: dict[str, float], bar: tqdm) -> int:
        """Exit code of a life that is to be killed; 0 where it had come to its end before."""
        moment = Moment.drawn(self._rng, seconds, self._args.ranks)
        reached = life.reach(moment, self._args.limit_s)
        seconds[START] = life.start_s or seconds[START]  # a start takes longer where other programs run
        if not reached:
            code = life.process.wait()
            self._fail(code != 0, f"it ended by itself, with code {code}: {life.last_words()}")
            return code
        phase, others_s = life.kill(moment.victim, self._args.deadline_s)
        code = life.process.wait()
        if code != 0:
            victim = "all" if others_s is None else f"rank {moment.victim}"
            self.kills.append({"phase": phase, "victim": victim, "others_s": others_s, "steps": life.steps()})
            bar.update()
        return code

    def _check(self, life: Life, before: int) -> int:
        """Step of the newest checkpoint."""
        newest, wrong = check_checkpoints(life.out, self._args.ranks)
        self.wrong += [f"after kill {len(self.kills)}: {each}" for each in wrong]
        self._fail(newest < before, f"the newest checkpoint is of step {newest}, it was of step {before}")
        lost = life.first + life.steps() - newest
        pending = 2 if self._args.save_async else 1
        self._fail(lost > SAVE_EVERY * pending, f"{lost} steps are lost behind step {newest}")
        if self.kills:
            self.kills[-1].setdefault("lost", max(lost, 0))
        return newest

    def _fail(self, broken: bool, text: str) -> None:
        if broken:
            self.wrong.append(f"after kill {len(self.kills)}: {text}")

    def _too_far(self, difference: Difference) -> list[str]:
        limit = 0.0 if self._args.ranks == 1 else self._args.tolerance
        far = not difference.relative <= limit
        return [f"the results are {difference.relative:.1e} apart, at most {limit:g} expected"] if far else []

    def _life(self, out: Path) -> Life:
        self._lives += 1
        return Life(self._settings, self._args.ranks, out, self._folder / f"life-{self._lives:03d}.log")

    def _common(self) -> list[str]:
        args, trained = self._args, trained_as(self._args.system)
        shards = args.shards or make_shards(self._folder, trained.data)
        return [
            *(word for name in trained.files for word in ("--config", str(CONFIGS / name))),
            *(*trained.words, "--data.shards", shards, "--data.workers", "0"),
            *("--train.max_steps", str(args.steps or STEPS_FOR_A_KILL * args.kills)),
            *("--engine.zero_stage", str(args.zero_stage), "--engine.timeout_s", str(args.deadline_s)),
            *("--train.save_async", "true" if args.save_async else "false"),
        ]

    def _figures(self, seconds: dict[str, float], differences: list[Difference]) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "starts": self._lives - 1,
            "runs": len(differences),
            "usual_seconds": seconds,
            "differences": [difference._asdict() for difference in differences],
            "wrong": self.wrong,
        }


def markdown(found: dict[str, Any]) -> str:
    kills, facts = found["kills"], "; ".join(f"{name}: {value}" for name, value in found["facts"].items())
    phases = Counter(kill["phase"] for kill in kills)
    waits = [kill["others_s"] for kill in kills if kill["others_s"] is not None]
    lost = [kill["lost"] for kill in kills if "lost" in kill]
    rows = [
        ["kills", f"{len(kills)}, {len(waits)} of them of one rank"],
        *([f"- in {phase}", str(phases[phase])] for phase in PHASES if phases[phase]),
        ["starts", str(found["starts"])],
        ["steps redone after a kill", f"{sum(lost) / max(len(lost), 1):.1f}, at most {max(lost, default=0)}"],
    ]
    if waits:
        rows.append(["seconds until the launcher had ended the others", f"at most {max(waits):.1f}"])
    for each in found["differences"]:
        rows += [
            [f"{name}: relative, largest difference", f"{each[key]:.1e}, {each[f'{key}_most']:.1e}"]
            for name, key in {"weights and buffers": "weights", "optimiser": "state"}.items()
        ]
        rows.append(["log: largest relative difference", f"{each['log']:.1e}"])
    rows.append(["wrong", str(len(found["wrong"]))])
    return f"{facts}.\n\n{report.table([['', ''], *rows])}\n"


def _facts(command: str, args: argparse.Namespace) -> dict[str, Any]:
    told = {"system": args.system, "ranks": args.ranks, "ZeRO": args.zero_stage, "async": args.save_async}
    return {**report.facts(device(), command), "threads": 1, "cores": os.cpu_count(), **told}


def _parser() -> Parser:
    parser = Parser(
        "bench kills",
        description=__doc__,
    )
    parser.add_argument("--kills", type=int, default=50, help="that must hit a live run (default 50)")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=1, help="2: by the deepspeed launcher")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    parser.add_argument("--system", choices=list(SYSTEMS), default="unicode", help="default: unicode, of most state")
    parser.add_argument("--async", dest="save_async", action="store_true", help="with train.save_async")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; they also depend on the machine's speed")
    parser.add_argument("--steps", type=int, help=f"of the run (default: {STEPS_FOR_A_KILL} for each kill)")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of several ranks (default 1e-6)")
    parser.add_argument("--deadline-s", type=float, default=60.0, help="for the launcher (default 60)")
    parser.add_argument("--limit-s", type=float, default=600.0, help="longest time for one start (default 600)")
    parser.add_argument("--shards", help="train on these (default: makes small synthetic ones)")
    parser.add_argument("--out", type=Path, help="keep runs and logs in this new folder")
    parser.add_results()
    return parser
