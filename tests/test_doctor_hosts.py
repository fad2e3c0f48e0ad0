"""The doctor on many hosts: over ssh, and with agents on this machine that stand for hosts in trouble."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts as namespaces
import pytest

from avs_dist.launch import doctor
from avs_dist.launch.checks import cluster, hosts
from avs_dist.launch.checks.collective import free_port
from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options

ROOT = Path(__file__).resolve().parents[1]
AGENT = [sys.executable, "-m", "avs_dist.launch.checks.agent"]


@pytest.mark.slow
@pytest.mark.multinode
def test_two_hosts_and_one_whose_cable_is_pulled(ms3_shards: Path, tmp_path: Path) -> None:
    """Started on the first host, over ssh, with nothing told but the hostfile; hosts with addresses of their own."""
    if reason := namespaces.missing():
        pytest.skip(reason)
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\nnode-c slots=1\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "keys").mkdir()
    threads = f"OMP_NUM_THREADS={len(os.sched_getaffinity(0)) + 1}"  # one more than is told to be right
    (tmp_path / ".deepspeed_env").write_text(f"{threads}\n")
    command = ["env", f"HOME={tmp_path}", sys.executable, "-m", "avs_dist.launch.doctor", "--json"]
    command += ["--hosts", str(tmp_path / "hostfile")]
    command += ["--out-dir", str(tmp_path / "runs"), "--shards", str(ms3_shards), "--timeout-s", "60"]
    with namespaces.running(3, tmp_path / "keys") as (first, _, dead):
        dead.cut()
        done = subprocess.run(first.command(command, ROOT), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    (row,) = report["hosts"]["node-c"]
    assert (row["state"], row["name"]) == (FAIL, "reached")
    assert "ssh ended with code 255" in row["found"]
    for number, name in enumerate(("node-a", "node-b"), start=1):
        rows = {row["name"]: row for row in report["hosts"][name]}
        assert {row["name"] for row in rows.values() if row["state"] == FAIL} <= {"/dev/shm", "out dir room"}
        assert rows["host name"]["found"] == f"{name} is 10.88.0.{number}"
        assert "20 clips" in rows["shards"]["found"]
        assert rows["slots"]["state"] in (OK, WARN)
        assert threads in rows["processors"]["found"]  # .deepspeed_env goes along
    rows = {row["name"]: row for row in report["rows"]}
    assert {row["state"] for row in rows.values()} == {OK}
    assert "index.json of the shards" in rows["same on all hosts"]["found"]
    assert rows["master port"]["found"] == "10.88.0.1:29500 is reached by all"
    assert "2 ranks: the sum of 16 MiB is right" in rows["collective of all hosts"]["found"]
    assert "seen by all" in rows["shared out dir"]["found"]
    assert "ms apart" in rows["clocks"]["found"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_host_that_is_not_there_is_a_line_within_the_time() -> None:
    if shutil.which("ssh") is None:
        pytest.skip("no ssh here")
    begin = time.monotonic()
    named = {"203.0.113.77": 1, "198.51.100.77": 1}  # addresses that belong to nobody
    found = hosts.connect(named, None, connect_s=1)
    try:
        report = cluster.examine(found, Options("."), None, limit_s=3)
    finally:
        hosts.close(found)
    assert time.monotonic() - begin < 30
    assert [[row.name for row in rows] for rows in report.hosts.values()] == [["reached"], ["reached"]]
    assert all("ended with code 255" in row.found or "no answer" in row.found for row in report.rows())
    assert report.together == []


@pytest.fixture
def local_hosts() -> Iterator[Any]:
    """Makes connections to agents on this machine, without ssh."""
    made: list[hosts.Host] = []

    def connect(*commands: list[str]) -> list[hosts.Host]:
        made.extend(hosts.Host(f"host-{number}", 1, command) for number, command in enumerate(commands))
        return made

    yield connect
    hosts.close(made)


def test_an_agent_that_hangs_breaks_or_says_other_things(local_hosts: Any) -> None:
    banner = ["bash", "-c", f"echo welcome to this cluster; exec {sys.executable} -m avs_dist.launch.checks.agent"]
    hangs, breaks, talks = local_hosts(["sleep", "100"], ["bash", "-c", "echo no Python >&2; exit 127"], banner)
    begin = time.monotonic()
    with pytest.raises(hosts.HostError, match="no answer within 0.5 s"):
        hangs.ask("clock", 0.5)
    assert time.monotonic() - begin < 20
    for _ in range(2):
        with pytest.raises(hosts.HostError, match="the agent ended with code 127: no Python"):
            breaks.ask("clock", 30)
    assert abs(talks.ask("clock", 60) - time.time()) < 60
    with pytest.raises(hosts.HostError, match="KeyError: 'nonsense'"):
        talks.ask("nonsense", 60)
    with pytest.raises(hosts.HostError, match="FileNotFoundError|PermissionError|NotADirectoryError"):
        talks.ask("leave", 60, folder="/proc/1/nothing", token="x")
    assert abs(talks.ask("clock", 60) - time.time()) < 60


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(local_hosts: Any) -> None:
    (host,) = local_hosts(AGENT)
    host.ask("clock", 60)
    with pytest.raises(hosts.HostError, match="no answer within 0.1 s"):
        host.ask("see", 0.1, path="/no/such/file", token="x")  # it looks for 2 s
    assert abs(host.ask("clock", 60) - time.time()) < 60


def test_an_agent_that_says_no_more_and_does_not_end_is_told(local_hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "END_S", 0.5)
    (silent,) = local_hosts(["bash", "-c", "exec sleep 100 >&-"])
    with pytest.raises(hosts.HostError, match="said no more, and has not ended"):
        silent.ask("clock", 60)


def test_what_an_agent_left_goes_with_it(tmp_path: Path) -> None:
    """Its file in out_dir and its rank, when nobody asks for them any more or hears the answers."""
    pipe = subprocess.PIPE
    with subprocess.Popen(AGENT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1) as agent:
        assert agent.stdin is not None
        assert agent.stdout is not None
        other = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "RANK": "0"}
        for question in (
            {"ask": "leave", "folder": str(tmp_path), "token": "x"},
            {"ask": "join", "variables": other},  # the other rank never comes
        ):
            agent.stdin.write(json.dumps({"number": 1, **question}) + "\n")
            assert '"answer"' in agent.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 1
        [rank] = map(int, Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split())
        agent.stdout.close()
        agent.stdin.write(json.dumps({"number": 2, "ask": "clock"}) + "\n")
        assert agent.wait(timeout=60) == 1
    assert list(tmp_path.iterdir()) == []
    namespaces.wait_until(lambda: not alive(rank), "its rank ends", 30)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("variables", [{}, {"DS_ENV_FILE": "other"}])
def test_variables_go_along_as_the_launcher_sends_them(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PYTHONX": "a b",
        "UCX_TLS": "tcp",
        "OMP_X": "stays",
        "PYTHONPATH": "/more",
        **variables,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("WHICH=usual\nTWICE=$UCX_TLS-2\n")
    (tmp_path / "other").write_text("WHICH=other\n")
    *ssh, command = hosts.ssh_command("node-1", None, 5)
    assert ssh[-1] == "node-1"
    exports = command.partition("cd ")[0]
    shown = "echo $PYTHONX,$UCX_TLS,$OMP_X,$PYTHONPATH,$WHICH,$TWICE"
    said = subprocess.run(["env", "-i", "bash", "-c", f"{exports} {shown}"], capture_output=True, text=True).stdout
    which, twice = ("other", "") if variables else ("usual", "tcp-2")
    assert said == f"a b,tcp,,{tmp_path}:/more,{which},{twice}\n"


def test_without_ssh_the_rest_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "hostfile").write_text("node-1 slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main(["--hosts", str(tmp_path / "hostfile"), "--json"]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["ssh"]["state"], rows["ssh"]["found"]) == (FAIL, "not found")


def test_clocks_apart_are_told(local_hosts: Any) -> None:
    late = "import time; now = time.time; time.time = lambda: now() - 90; "
    late += "from avs_dist.launch.checks import agent; agent.main()"
    here, there = local_hosts(AGENT, [sys.executable, "-c", late])
    assert abs(cluster.clock_offset(here, 60)) < 0.5
    assert cluster.clock_offset(there, 60) == pytest.approx(-90, abs=0.5)
    assert cluster.clocks({"a": 0.0, "b": 0.2}).state == OK
    row = cluster.clocks({"a": 0.1, "b": -90.0})
    assert row.state == FAIL
    assert "90.1 s apart: a +0.1 s, b -90.0 s" in row.found


def test_an_out_dir_that_is_not_shared_is_told(local_hosts: Any, tmp_path: Path) -> None:
    """The second host has another file system there: a mount of its own."""
    other = f"mount -t tmpfs none {tmp_path} && exec {' '.join(AGENT)}"
    unshared = ["unshare", "--mount", "bash", "-c", other]
    if subprocess.run([*unshared[:3], "-c", f"mount -t tmpfs none {tmp_path}"], capture_output=True).returncode:
        pytest.skip("no mount of its own for a process here (needs root)")
    first, same, different = local_hosts(AGENT, AGENT, unshared)
    row = cluster.shared_folder([first, same], str(tmp_path / "runs"))
    assert (row.state, row.name) == (OK, "shared out dir")
    row = cluster.shared_folder([first, same, different], str(tmp_path / "runs"))
    assert row.state == FAIL
    assert row.found.endswith("is not there on host-2")
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_not_reached_is_told(local_hosts: Any) -> None:
    first, second = local_hosts(AGENT, AGENT)
    port = free_port()
    assert cluster.port_reached([first, second], "127.0.0.1", port).state == OK
    row = cluster.port_reached([first, second], "::1", port)
    assert row.state == FAIL
    assert "host-1: " in row.found
    assert first.ask("listen", 60, port=port)
    row = cluster.port_reached([second, first], "127.0.0.1", port)
    assert row.state == FAIL
    assert "cannot listen" in row.found


def test_what_differs_between_hosts_is_told() -> None:
    facts = {"a": {"Python": "3.11.7", "torch": "2.11.0"}, "b": {"Python": "3.11.7", "torch": "2.10.0"}}
    same, other = cluster.agreement(facts)
    assert (same.state, same.found) == (OK, "Python")
    assert (other.state, other.name) == (FAIL, "same torch")
    assert other.found == "2.11.0 on a; 2.10.0 on b"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a slots=2\na slots=1\n", 2),
        ("# fine\n\na\n", 3),
        ("a slots=x\n", 1),
        ("-oProxyCommand=x slots=1\n", 1),
        ("# nothing\n", None),
    ],
)
def test_hostfiles_that_the_launcher_refuses(text: str, line: int | None, tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"hostfile{f':{line}' if line else ''}: "):
        hosts.read_hostfile(str(file))
    file.write_text("# comment\n\nnode-1 slots=8\n  node-2   slots=4 # four\n")
    assert hosts.read_hostfile(str(file)) == {"node-1": 8, "node-2": 4}


def test_slots_are_compared_with_gpus() -> None:
    host = hosts.Host("a", 4, ["true"])
    host.close()
    assert [cluster.slots(host, gpus)[0].state for gpus in (0, 2, 4, 8)] == [OK, FAIL, OK, WARN]
