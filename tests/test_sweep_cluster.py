"""Sweeps on a Ray cluster: joining one, the job of Slurm, the manifest; a Ray of the sweep's own is heard by no other
host."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hosts import wait_until

from avs_dist.config import Config
from avs_dist.launch.checks.collective import free_port
from avs_dist.launch.sweeps.command import build_parser

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "launch" / "cluster" / "ray"
SWEEP = (sys.executable, "launch/sweep.py", "--config", "configs/demo.yaml", "--data.workers", "0")
TINY = ("--train.max_steps", "1", "--train.eval_every", "0", "--sweep.resources.gpus", "0")
TWO = {"samples": 2, "scheduler": {"name": "none"}, "space": {"optim.lr": "loguniform(1e-3, 1e-2)"}}
DEADLINE_S = 300.0
LOOK_S = 0.3  # looking costs time that the sweep needs
# in the place of Python: a node of Ray, the wait for all nodes, or the sweep; each notes what it was given
PYTHON = f"""#!{sys.executable}
import os, signal, socket, sys, time
from pathlib import Path

words = sys.argv[1:]
token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
facts = [oct(token.stat().st_mode & 0o777), len(token.read_text()), os.environ["RAY_AUTH_MODE"],
         os.environ.get("RAY_AUTH_TOKEN"), " ".join(words)]
is_node = "ray.scripts.scripts" in words
name = "node-" + os.environ["SLURM_PROCID"] if is_node else "sweep" if "launch/sweep.py" in words else "wait"
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
if "--head" in words:
    listener = socket.create_server(("127.0.0.1", int(words[words.index("--port") + 1])))
Path(name + ".partial").write_text(repr(facts))
os.replace(name + ".partial", name)
while name == "wait" and not Path("node-1").exists():
    time.sleep(0.05)
if is_node or (name == "sweep" and os.environ["ENDS"] == "signal"):
    time.sleep(100)
sys.exit(int(os.environ["ENDS"]) if name == "sweep" else 0)
"""
SRUN = """#!/usr/bin/env bash
[[ "$1 $2 $3" == "--kill-on-bad-exit=0 --gpu-bind=none --cpus-per-task=3" ]] || exit 9
shift 3
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
trap 'kill $first $second' TERM
wait; wait
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> scontrol
if [[ $1 == show ]]; then printf '127.0.0.1\\nnode-2\\n'; fi
"""
SQUEUE = """#!/usr/bin/env bash
echo "$JOB_STATE"
"""


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    return {**own, "OMP_NUM_THREADS": "1", **more}


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], cwd: Path = ROOT) -> Iterator[psutil.Popen]:
    """A process whose output is one text; it and all that it has started are gone at the end."""
    process = psutil.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        for each in family(process):
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.communicate()


def family(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


@dataclass(frozen=True)
class Head:
    """The head of a cluster of this host alone, with a token."""

    process: psutil.Popen
    port: int
    token: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's paths are too long for Ray's sockets
        token, port = Path(folder, "token"), free_port()
        token.touch(mode=0o600)
        token.write_text("0123456789abcdef" * 4)
        # the last: a cluster on loopback, as a sweep's own is
        env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--port", str(port), "--num-cpus", "2", "--num-gpus", "0", "--include-dashboard", "false"]
        with running([*command, "--temp-dir", folder], env) as process:
            wait_until(lambda: any("ray::" in " ".join(one.cmdline()) for one in family(process)), "Ray is up", 120)
            yield Head(process, port, token, env)


def sweep_of(shards: Path, out: Path, *more: str) -> list[str]:
    out.with_suffix(".yaml").write_text(yaml.safe_dump(TWO))
    files = ["--sweep", str(out.with_suffix(".yaml")), "--out", str(out), "--data.shards", str(shards)]
    return [*SWEEP, *TINY, *files, *more]


@pytest.mark.slow
def test_sweep_runs_in_the_cluster_that_it_is_told(head: Head, ms3_shards: Path, tmp_path: Path) -> None:
    command = sweep_of(ms3_shards, tmp_path / "sweep", "--address", f"127.0.0.1:{head.port}")
    wrote: set[str] = set()
    with running(command, head.env) as process:
        while process.poll() is None:
            for each in family(head.process):
                with contextlib.suppress(psutil.Error):
                    wrote |= {file.path for file in each.open_files() if file.path.startswith(str(tmp_path))}
            time.sleep(LOOK_S)
        told, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, told[-4000:]
    assert "2 complete" in told
    assert {str(tmp_path / f"sweep/trials/000{number}/log.txt") for number in range(2)} <= wrote


@pytest.mark.slow
def test_cluster_that_cannot_be_joined_is_told_in_one_line(head: Head, ms3_shards: Path, tmp_path: Path) -> None:
    there, nowhere = f"127.0.0.1:{head.port}", f"127.0.0.1:{free_port()}"
    without = {name: value for name, value in head.env.items() if not name.startswith("RAY_AUTH")}
    cases = {
        "wrong": (there, {**head.env, "RAY_AUTH_TOKEN": "f" * 64}, "not the token of the cluster (RAY_AUTH_MODE=token"),
        "absent": (there, without, "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file of its token"),
        "nowhere": (nowhere, head.env, "nothing answers there"),
    }
    with contextlib.ExitStack() as stack:
        started = {
            name: stack.enter_context(
                running(sweep_of(ms3_shards, tmp_path / name, "--address", address), {**env, "HOME": str(tmp_path)})
            )
            for name, (address, env, _) in cases.items()
        }
        told = {name: process.communicate(timeout=120)[0] for name, process in started.items()}
    for name, (address, _, expected) in cases.items():
        *before, line = told[name].splitlines()
        assert line.startswith(f"avs-dist sweep: failed: --address {address}: "), told[name]
        assert expected in line
        assert len(before) <= 1, told[name]  # Ray's own word, of its only try
        assert all("gcs_client.cc" in other for other in before), told[name]
        assert started[name].returncode == 1
        assert not (tmp_path / name).exists()  # the next try needs no --resume


def named_outside(folder: Path) -> list[str]:
    """Runs a command where this host's name leads to an address that others reach, as on most hosts; nothing changes
    where this machine has no such address, or does not let names be changed."""
    found = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET]
    outer = [address for address in found if not address.startswith("127.")]
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{''.join(outer[:1])} outside\n")
    script = f'mount --bind {folder}/hosts /etc/hosts && hostname outside && exec "$@"'
    command = ["unshare", "--mount", "--uts", "sh", "-c", script, "sh"]
    try:
        works = bool(outer) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        works = False
    return command if works else []


@pytest.mark.slow
def test_ray_of_its_own_is_heard_by_this_host_alone(ms3_shards: Path, tmp_path: Path) -> None:
    """Also the two workers of a trial; and its token is in no file."""
    command = sweep_of(ms3_shards, tmp_path / "sweep", "--sweep.samples", "1", "--sweep.resources.workers", "2")
    heard: dict[str, set[str]] = {}
    env = environment(HOME=str(tmp_path), RAY_ADDRESS="127.0.0.1:1")  # not asked for
    with running([*named_outside(tmp_path), *command], env) as process:
        while process.poll() is None:
            pids = {each.pid: each for each in family(process)}
            for one in psutil.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN and one.pid in pids:
                    with contextlib.suppress(psutil.Error):
                        heard.setdefault(one.laddr.ip, set()).add(" ".join(pids[one.pid].cmdline()))
            time.sleep(LOOK_S)
        told, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, told[-4000:]
    assert set(heard) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, heard
    listened = " ".join(text for texts in heard.values() for text in texts)
    assert all(part in listened for part in ("gcs_server", "raylet", "RayTrainWorker")), listened
    assert not (tmp_path / ".ray").exists()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Any]:
    """Starts sweep.sbatch with stand-ins for Slurm's commands and for Python, as a job of two nodes."""
    commands, folder = tmp_path / "commands", tmp_path / "checkout"
    commands.mkdir()
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "python": PYTHON}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def start(ends: str, state: str = "RUNNING") -> psutil.Popen:
        job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "4712", "SLURM_JOB_NODELIST": "node-[1-2]"}
        job |= {"SLURM_CPUS_PER_TASK": "3", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NUM_NODES": "2", "JOB_STATE": state}
        job |= {"ENDS": ends, "RAY_AUTH_TOKEN": "another", "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", str(CLUSTER / "sweep.sbatch"), "--config", "a config.yaml"]
        return jobs.enter_context(running(command, environment(**job), tmp_path))

    with contextlib.ExitStack() as jobs:
        yield start


@pytest.mark.parametrize(
    ("ends", "state", "code"),
    [("signal", "RUNNING", 75), ("signal", "COMPLETING", 75), ("0", "RUNNING", 0), ("1", "RUNNING", 1)],
)
def test_slurm_job_starts_a_cluster_and_goes_back_into_the_queue(
    ends: str, state: str, code: int, slurm: Any, tmp_path: Path
) -> None:
    job, folder = slurm(ends, state), tmp_path / "checkout"
    wait_until((folder / "sweep").exists, "the sweep runs", 60)
    if ends == "signal":
        job.send_signal(signal.SIGTERM)  # --signal=B:TERM@300
    told, _ = job.communicate(timeout=60)
    assert job.returncode == code, told
    start = "-m ray.scripts.scripts start --block --disable-usage-stats --num-cpus 3 --num-gpus 4"
    given = {
        "node-0": f"{start} --head --port 24712 --ray-client-server-port 34712 --include-dashboard false",
        "node-1": f"{start} --address 127.0.0.1:24712",
        "sweep": "-u launch/sweep.py --config a config.yaml --resume --address 127.0.0.1:24712",
    }
    for name, words in given.items():
        assert (folder / name).read_text() == repr(["0o600", 64, "token", None, words])
    assert (folder / "wait").read_text().endswith("127.0.0.1:24712 2']")
    assert not list(folder.glob(".ray-token*"))
    asked = (folder / "scontrol").read_text().splitlines()
    back = ends == "signal" and state == "RUNNING"
    assert asked == ["show hostnames node-[1-2]", *(["requeue 4712"] if back else [])]


def test_manifest_is_a_sweep_that_can_be_taken_up() -> None:
    job = yaml.safe_load((CLUSTER / "sweep.yaml").read_text())["spec"]
    cluster = job["rayClusterSpec"]
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == pinned
    assert cluster["authOptions"] == {"mode": "token"}
    assert job["backoffLimit"] > 0
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    places = []
    for pod in pods:
        (container,) = pod["containers"]
        places.append({mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]})
        assert set(places[-1].values()) == {volume["name"] for volume in pod["volumes"]}
        assert container["image"] == pods[0]["containers"][0]["image"]
    assert all(place == places[0] for place in places)  # the same paths on all
    words = [word.replace("configs/", f"{ROOT}/configs/") for word in shlex.split(job["entrypoint"])]
    parser = build_parser()
    args = parser.parse_args(words[2:])
    values = parser.instantiate_classes(args)
    assert (args["address"], args["resume"]) == ("auto", True)
    mounted = [path for word in words for path in re.findall(r"(?:^|=)(/\w+)/", word) if str(ROOT) not in word]
    assert set(mounted) == set(places[0])
    assert str(args["out"]).startswith("/runs/")
    config = Config(**{name: values[name] for name in Config.__dataclass_fields__})
    assert 0 < config.train.eval_every < config.train.max_steps
    resources = values["sweep"].resources
    (worker,) = cluster["workerGroupSpecs"]
    has = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(has["cpu"]) == int(has["nvidia.com/gpu"]) * resources.cpus  # as many trials as GPUs
    assert worker["minReplicas"] >= 1  # a trial must fit in at the start
