"""launch/cluster: the scripts run for real, with small commands and stand-ins for Slurm; the manifests fit together."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import wait_until

from avs_dist.launch.checks.collective import free_port
from avs_dist.launch.checks.hosts import read_hostfile
from avs_dist.launch.train import parse_config

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "launch" / "cluster"
RESTART = CLUSTER / "restart.sh"
PREEMPTED = 75

# ends with the codes of a list, one after another, and counts its runs
TRY = """
echo run >> runs
sed -n "$(wc -l < runs)p" codes > code
exit "$(cat code)"
"""
# a launcher that dies at once of SIGTERM, and a rank of it that saves first
LAUNCHER = """
bash -c 'trap "sleep 0.5; echo saved > saved; exit 75" TERM; echo > ready
  for ((i = 0; i < 2000; i++)); do sleep 0.05; done' &
wait
"""
# in the place of Python: notes its rank and arguments, and ends as it is told
RANK = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > "rank-$RANK"
echo run >> "runs-$RANK"
if [[ $ENDS == signal ]]; then
  trap 'exit 75' TERM
  echo $$ > "pid-$RANK"
  for ((i = 0; i < 2000; i++)); do sleep 0.05; done
fi
exit "$ENDS"
"""
# the parent of restart.sh where nobody asks for the codes of processes whose parent has ended, as in some containers:
# they come to it and stay zombies
NO_REAPER = """
import ctypes, signal, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
process = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
sys.exit(process.wait())
"""
# a rank that goes on whatever it is told
STAYS = "trap 'exit 143' TERM; bash -c 'trap \"\" TERM; echo > ready; sleep 4' & wait"
# a rank of two: both meet, one is killed, the other waits for it; the next time both end well
MEETS_TWICE = """
import os, signal
from pathlib import Path
import torch
from avs_dist import world

world.start()
number = world.all_reduce_sum(torch.tensor(2.0 if Path("killed").exists() else 1.0)) / 2
Path(f"try-{number:.0f}-rank-{world.rank()}").touch()
world.barrier()
if number == 1:
    if world.rank() == 0:
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()
world.stop()
"""
# one process for each task; the highest exit code; the arguments that train.sbatch must give
SRUN = """#!/usr/bin/env python3
import os, subprocess, sys
options = [argument for argument in sys.argv[1:] if argument.startswith("--")][:3]
assert options == ["--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=3"], options
command = sys.argv[4:]
ranks = range(int(os.environ["SLURM_NTASKS"]))
own = [{**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in ranks]
tasks = [subprocess.Popen(command, env=env, start_new_session=True) for env in own]
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> scontrol
if [[ $1 == show ]]; then printf '127.0.0.1\\nnode-2\\n'; fi
"""
SQUEUE = """#!/usr/bin/env bash
echo "$JOB_STATE"
"""


def run_script(*command: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=200, **options)


@contextlib.contextmanager
def started(*command: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is not left behind."""
    process = subprocess.Popen([*map(str, command)], text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # restart.sh hands it on to the group of its command
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def restarted(cwd: Path, codes: list[int], *options: object) -> tuple[int, int, str]:
    """Exit code of restart.sh, number of tries, and what it said, for a command that ends with these codes in turn.

    Its waits take no time: they are noted in a file.
    """
    sleep = cwd / "sleep"
    sleep.write_text('#!/usr/bin/env bash\necho "$1" >> waits\n')
    sleep.chmod(0o755)
    (cwd / "codes").write_text("".join(f"{code}\n" for code in codes))
    env = {**os.environ, "PATH": f"{cwd}{os.pathsep}{os.environ['PATH']}"}
    done = run_script(RESTART, *options, "bash", "-c", TRY, cwd=cwd, env=env)
    return done.returncode, len((cwd / "runs").read_text().split()), done.stderr


@pytest.mark.parametrize("script", sorted(CLUSTER.rglob("*.s[hb]*")), ids=lambda path: path.name)
def test_scripts_parse_and_may_be_run(script: Path) -> None:
    assert script.suffix in (".sh", ".sbatch")
    assert run_script("bash", "-n", script, cwd=ROOT).stderr == ""
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("codes", "options", "code", "tries"),
    [
        ([0], (), 0, 1),
        ([1, 247, 0], (), 0, 3),
        ([2, 0], (), 2, 1),
        ([127, 0], (), 127, 1),
        ([130, 0], (), 130, 1),
        ([1, 1, 3, 0], ("-n", 3), 3, 3),
        ([75, 75, 75, 75, 0], ("-n", 2), 0, 5),
        ([1, 75, 1, 0], ("-n", 2), 0, 4),
        ([75, 0], ("-p",), 75, 1),
        ([1, 0], ("-p",), 0, 2),
        ([1, 1, 1, 1, 0], ("-n", 2, "-l", 0), 0, 5),
        ([1, 1, 75, 1, 0], ("-n", 2, "-l", 0, "-m", 3), 1, 4),
        ([1, 1, 0], ("-n", "02", "-w", "09"), 1, 2),
    ],
)
def test_restart_by_exit_code(
    codes: list[int], options: tuple[object, ...], code: int, tries: int, tmp_path: Path
) -> None:
    found = restarted(tmp_path, codes, *options)
    assert found[:2] == (code, tries), found[2]


def test_restart_waits_longer_after_each_failure(tmp_path: Path) -> None:
    _, _, said = restarted(tmp_path, [1, 1, 75, 1, 0], "-w", 200)
    assert (tmp_path / "waits").read_text().split() == ["200", "300", "200", "200"]
    assert "failed with code 1 (1 of 5); starting again in 200 s" in said


@pytest.mark.parametrize("arguments", [(), ("-n", "x", "true"), ("-m", "9" * 20, "true"), ("-z", "true")])
def test_restart_refuses_what_it_does_not_know(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run_script(RESTART, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr != ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_restart_tells_all_ranks_to_stop_and_waits_until_they_have_saved(number: int, tmp_path: Path) -> None:
    with started(RESTART, "bash", "-c", LAUNCHER, cwd=tmp_path) as process:
        wait_until((tmp_path / "ready").exists, "ready", 60)
        process.send_signal(number)
        assert process.wait(timeout=60) == 143  # what its launcher died of
    assert (tmp_path / "saved").exists()


def test_restart_does_not_wait_for_ranks_that_have_ended_and_that_nobody_asks_for_their_code(tmp_path: Path) -> None:
    with started(sys.executable, "-c", NO_REAPER, RESTART, "bash", "-c", LAUNCHER, cwd=tmp_path) as process:
        wait_until((tmp_path / "ready").exists, "ready", 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists()


def test_restart_gives_up_on_ranks_that_stay(tmp_path: Path) -> None:
    with started(RESTART, "-g", 1, "bash", "-c", STAYS, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        wait_until((tmp_path / "ready").exists, "ready", 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
        assert process.stderr is not None
        said = process.stderr.readline()  # those that stay have the pipe too
    assert re.search(r"still there 1 s after the command has ended: process \d+", said)


def test_restart_stops_while_it_waits(tmp_path: Path) -> None:
    command = ("bash", "-c", "echo > ready; exit 1")
    with started(RESTART, "-w", 100, *command, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert "starting again in 100 s" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts train.sbatch with stand-ins for Slurm's commands, two tasks on one node."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "rank": RANK}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def start(*arguments: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
        own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[1-2]"}
        job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3", "JOB_STATE": "RUNNING"}
        env = {**own, **job, **variables, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
        # sbatch runs a copy of the script
        script = shutil.copy(CLUSTER / "slurm" / "train.sbatch", tmp_path)
        pipe = subprocess.PIPE
        return jobs.enter_context(started("bash", script, *arguments, env=env, stdout=pipe, stderr=pipe))

    with contextlib.ExitStack() as jobs:
        yield start


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder to submit from, with the script that train.sbatch calls."""
    folder = tmp_path / "checkout"
    shutil.copytree(CLUSTER, folder / "launch" / "cluster")
    return folder


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_slurm_job_goes_back_into_the_queue_after_a_preemption(
    state: str, requeued: bool, slurm: Callable[..., subprocess.Popen[str]], checkout: Path, tmp_path: Path
) -> None:
    variables = {"PYTHON": str(tmp_path / "commands" / "rank"), "ENDS": "signal", "JOB_STATE": state}
    job = slurm("--config", "a config.yaml", folder=checkout, **variables)
    pids = [checkout / f"pid-{rank}" for rank in range(2)]
    wait_until(lambda: all(pid.exists() and pid.read_text().strip() for pid in pids), "both ranks run", 60)
    for pid in pids:  # --signal=TERM@300 reaches all processes of the tasks, not the script
        os.killpg(os.getpgid(int(pid.read_text())), signal.SIGTERM)
    _, said = job.communicate(timeout=120)
    assert job.returncode == PREEMPTED, said
    for rank in range(2):
        port = 20000 + 4711
        told = f"{rank} {rank} 2 2 127.0.0.1 {port} -u launch/train.py --config a config.yaml --train.resume true"
        assert (checkout / f"rank-{rank}").read_text().strip() == told
    asked = (checkout / "scontrol").read_text().splitlines()
    assert asked == ["show hostnames node-[1-2]", *(["requeue 4711"] if requeued else [])]


def test_slurm_job_with_wrong_settings_ends_at_once(
    slurm: Callable[..., subprocess.Popen[str]], checkout: Path, tmp_path: Path
) -> None:
    job = slurm(folder=checkout, PYTHON=str(tmp_path / "commands" / "rank"), ENDS="2")
    job.communicate(timeout=120)
    assert job.returncode == 2
    assert (checkout / "runs-0").read_text() == "run\n"
    assert "requeue" not in (checkout / "scontrol").read_text()


@pytest.mark.slow
def test_slurm_job_trains_with_two_ranks(
    slurm: Callable[..., subprocess.Popen[str]], checkout: Path, ms3_shards: Path, tmp_path: Path
) -> None:
    for name in ("avs_dist", "configs", "kernels", "shards"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "launch" / "train.py").symlink_to(ROOT / "launch" / "train.py")
    arguments = ["--config", "configs/demo.yaml", "--data.shards", str(ms3_shards), "--data.workers", "0"]
    arguments += ["--train.max_steps", "1", "--train.eval_every", "0", "--train.out_dir", str(tmp_path / "run")]
    job = slurm(*arguments, folder=checkout, PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    stdout, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stdout[-1000:] + stderr[-3000:]
    assert "world_size=2" in stdout
    assert (tmp_path / "run" / "checkpoints").is_dir()


def launchers_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_node_of_kubernetes_starts_its_ranks_and_keeps_their_exit_code(tmp_path: Path) -> None:
    """Two nodes with one rank each, under the real deepspeed launcher."""
    program = tmp_path / "program.py"
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR"
    program.write_text(
        f"import os, sys\nfacts = ' '.join(os.environ[name] for name in '{names}'.split())\n"
        "open('rank-' + os.environ['RANK'], 'w').write(facts + ' ' + sys.argv[-1])\nsys.exit(75)\n"
    )
    shared = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    shared |= {"GPUS_PER_NODE": "1", "DS_ACCELERATOR": "cpu", "TMPDIR": str(tmp_path), "PATH": launchers_path()}
    command = [CLUSTER / "kubernetes" / "node.sh", program, "last argument"]
    with contextlib.ExitStack() as running:
        own = [{**os.environ, **shared, "PET_NODE_RANK": str(number)} for number in range(2)]
        nodes = [running.enter_context(started(*command, cwd=tmp_path, env=env)) for env in own]
        assert [node.wait(timeout=200) for node in nodes] == [PREEMPTED, PREEMPTED]
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == f"{rank} 0 2 127.0.0.1 last argument"


@pytest.mark.slow
def test_ranks_under_torchrun_meet_again_after_one_was_killed(tmp_path: Path) -> None:
    """Two hosts with one rank each, under the real torchrun; in the first try one rank dies with no word."""
    program = tmp_path / "program.py"
    program.write_text(MEETS_TWICE)
    shared = {"NNODES": "2", "RANKS_PER_NODE": "1", "MEETING": f"127.0.0.1:{free_port()}", "LOCAL_ADDR": "127.0.0.1"}
    shared |= {"RUN_ID": "twice", "PATH": launchers_path(), "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as running:
        command, env = (CLUSTER / "torchrun" / "node.sh", program), {**os.environ, **shared}
        hosts = [running.enter_context(started(*command, cwd=tmp_path, env=env)) for _ in range(2)]
        assert [host.wait(timeout=200) for host in hosts] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("try-*")) == [
        "try-1-rank-0",
        "try-1-rank-1",
        "try-2-rank-0",
        "try-2-rank-1",
    ]


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "kubernetes" / name).read_text())


def test_kubernetes_manifests_fit_together() -> None:
    runtime, job = manifest("runtime.yaml"), manifest("trainjob.yaml")
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"  # what Trainer looks for
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert (ROOT / container["command"][0]).is_file()
    for kind in ("requests", "limits"):
        gpus = job["spec"]["trainer"]["resourcesPerNode"][kind]["nvidia.com/gpu"]
        assert container["env"] == [{"name": "GPUS_PER_NODE", "value": gpus}]
    program, *arguments = job["spec"]["trainer"]["args"]
    config = parse_config(
        [str(ROOT / a) if a.startswith("configs") else a.replace("=configs", f"={ROOT}/configs") for a in arguments]
    )
    assert (ROOT / program).is_file()
    assert config.train.resume
    assert config.train.out_dir.startswith("/runs/")


def test_kubernetes_does_the_right_thing_after_each_exit_code() -> None:
    spec = manifest("runtime.yaml")["spec"]["template"]["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    action = {
        int(re.findall(r"index (\d+)\$", pattern)[0]): rule["action"]
        for rule in spec["failurePolicy"]["rules"]
        for pattern in rule["onJobFailureMessagePatterns"]
    }
    by_code = {
        code: action[n] for n, rule in enumerate(rules) for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {PREEMPTED: "RestartJobSetAndIgnoreMaxRestarts", 2: "FailJobSet"}
    assert [action[n] for n, rule in enumerate(rules) if "onPodConditions" in rule] == [by_code[PREEMPTED]]
    # Kubernetes takes such a policy only with this
    assert spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_files_of_the_deepspeed_launcher_parse() -> None:
    assert read_hostfile(str(CLUSTER / "deepspeed" / "hostfile")) == {"node-1": 8, "node-2": 8}
    # the launcher breaks on any other line, also on an empty one
    lines = (CLUSTER / "deepspeed" / "deepspeed_env").read_text().splitlines()
    assert all(re.fullmatch(r"\w+=\S+", line) for line in lines)
    if shutil.which("ssh") is None:
        pytest.skip("no ssh here")
    seen = run_script("ssh", "-G", "-F", CLUSTER / "deepspeed" / "ssh_config", "node-1", cwd=ROOT).stdout.splitlines()
    assert {"batchmode yes", "serveraliveinterval 10", "serveralivecountmax 3"} <= set(seen)


@pytest.mark.parametrize("page", sorted(CLUSTER.rglob("*.md")), ids=lambda page: page.parent.name)
def test_pages_name_files_and_settings_that_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for path in re.findall(r"(?<![\w/.])((?:launch|configs)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path
