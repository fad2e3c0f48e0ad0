"""The doctor on this machine, whole and with real faults."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_server import serving

from avs_dist.launch import doctor
from avs_dist.launch.checks import cgroup, collective, machine, network, software, storage
from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options, Row, findings, one_line, size, table
from avs_dist.shards.schema import INDEX_FILE

ROOT = Path(__file__).resolve().parents[1]
# what a small container may well lack, whatever the code does
OF_THE_MACHINE = {"/dev/shm", "out dir room"}


def examined(*arguments: object, limits: str = "") -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and rows by name of a doctor in a process of its own, under the limits of `ulimit`."""
    command = f'{limits} exec "$0" -m avs_dist.launch.doctor --json "$@"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    rows = json.loads(done.stdout)["rows"]
    return done.returncode, {row["name"]: row for row in rows}


def failing(rows: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, row in rows.items() if row["state"] == FAIL} - OF_THE_MACHINE


def test_a_machine_that_is_well(ms3_shards: Path, tmp_path: Path) -> None:
    code, rows = examined("--out-dir", tmp_path / "a" / "b", "--shards", ms3_shards, "--ranks", 2)
    assert failing(rows) == set()
    assert code == int(any(rows[name]["state"] == FAIL for name in OF_THE_MACHINE))
    assert list(tmp_path.iterdir()) == []  # nothing is left, not even a folder
    assert "2 ranks: the sum of 16 MiB is right" in rows["collective"]["found"]
    assert "GB/s" in rows["collective"]["found"]
    assert "20 clips in 3 shards" in rows["shards"]["found"]
    assert str(tmp_path) in rows["out dir"]["found"]
    assert f"torch {software.version('torch')}" in rows["packages"]["found"]


def test_faults_are_told_together_and_end_with_1(tmp_path: Path) -> None:
    """Few open files, a bound on file sizes, no shards: each is a line, and the others are still there."""
    missing = tmp_path / "nowhere"
    code, rows = examined("--out-dir", tmp_path, "--shards", missing, limits="ulimit -n 200; ulimit -f 2048;")
    assert code == 1
    assert failing(rows) == {"ulimit -n (open files)", "out dir", "shards"}
    assert rows["ulimit -n (open files)"]["found"] == "200"
    assert "File too large" in rows["out dir"]["found"]
    assert f"no {INDEX_FILE} in {missing}" in rows["shards"]["found"]
    assert all(rows[name]["advice"] for name in ("ulimit -n (open files)", "out dir", "shards"))


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "avs-dist doctor --hosts hostfile" in told
    assert "--ranks N" in told


def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["--rank", "2"], ["--timeout-s", "-3"], ["--timeout-s", "nan"], ["--ranks", "0"]):
        with pytest.raises(SystemExit) as ended:
            doctor.main(arguments)
        assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "nearest known key: ranks" in told
    assert "expected seconds, more than 0 and at most 86400, got '-3'" in told


def test_table_is_aligned_and_has_colour_only_where_asked() -> None:
    rows = [Row(OK, "a", "well"), Row(FAIL, "longer", "bad", "mend it")]
    assert table(rows, colour=False) == "ok    a       well\nfail  longer  bad  -> mend it"
    assert "\033[31mfail\033[0m  longer" in table(rows, colour=True)


def test_a_check_that_breaks_is_a_row() -> None:
    def breaks(options: Options) -> Row:
        raise RuntimeError("two\nlines")

    rows = findings({"first": breaks, "second": lambda options: Row(OK, "second", "")}, Options("."))
    assert [(row.state, row.name) for row in rows] == [(FAIL, "first"), (OK, "second")]
    assert rows[0].found == one_line(RuntimeError("two lines"))


@pytest.mark.parametrize(
    ("number", "told"), [(5, "5 B"), (2**20, "1 MiB"), (1023 * 2**30, "1023 GiB"), (2**40, "1 TiB")]
)
def test_sizes(number: int, told: str) -> None:
    assert size(number) == told


# shards


def copied(shards: Path, folder: Path) -> Path:
    return Path(shutil.copytree(shards, folder / "copy"))


def shards_row(place: str | Path, **options: Any) -> Row:
    return storage.shards(Options(".", shards=str(place), **options))[0]


def test_damaged_index_is_told(ms3_shards: Path, tmp_path: Path) -> None:
    folder = copied(ms3_shards, tmp_path)
    (folder / INDEX_FILE).write_text((folder / INDEX_FILE).read_text().replace('"schema_version":', '"schema":'))
    row = shards_row(folder)
    assert row.state == FAIL
    assert "schema_version" in row.found


def test_short_lost_and_altered_shards_are_told(ms3_shards: Path, tmp_path: Path) -> None:
    folder = copied(ms3_shards, tmp_path)
    shard, other = sorted(folder.glob("*.tar"))[:2]
    whole = shard.read_bytes()
    shard.unlink()
    assert f"{shard}: No such file" in shards_row(folder).found
    shard.write_bytes(whole[:-512])
    row = shards_row(folder)
    assert row.state == FAIL
    assert row.found == f"{shard}: {len(whole) - 512} bytes, the index says {len(whole)}"
    other.unlink()
    assert "(and 1 more)" in shards_row(folder).found
    shutil.copy(ms3_shards / other.name, other)
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert "is not what the index says" in shards_row(folder).found


def test_shards_at_a_url_are_reached(ms3_shards: Path, tmp_path: Path) -> None:
    folder = copied(ms3_shards, tmp_path)
    with serving(folder) as server:
        rows = storage.shards(Options(".", shards=server.url, cache_dir=str(tmp_path / "cache")))
        assert [(row.state, row.name) for row in rows] == [(OK, "shards"), (OK, "shard cache")]
        assert storage.index_hash(server.url) == storage.index_hash(str(ms3_shards))
        sorted(folder.glob("*.tar"))[0].unlink()
        row = shards_row(server.url)
    assert row.state == FAIL
    assert "no such file (status 404)" in row.found


def test_hash_of_an_index_that_is_not_there_says_why(tmp_path: Path) -> None:
    assert "No such file" in storage.index_hash(str(tmp_path))


# the machine


def test_out_dir_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (row,) = storage.out_dir(Options(str(tmp_path / "file" / "runs")))
    assert row.state == FAIL
    assert "is no folder" in row.found


def test_small_stack_is_told() -> None:
    program = "from avs_dist.launch.checks import machine, rows; print(machine.limits(rows.Options('.')))"
    command = ["bash", "-c", 'ulimit -s 512; exec "$0" -c "$1"', sys.executable, program]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert "state='fail', name='ulimit -s (stack)', found='512 KiB'" in told


def test_more_threads_than_processors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert machine.processors(Options(".")).state == WARN


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_a_control_group_grants_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job within a container: its own group is wide, and the one above it bounds."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    limit, used, cache = cgroup.VERSION_1 if version == 1 else cgroup.VERSION_2
    (tmp_path / "own").write_text("4:cpu,memory:/job/step\n5:pids:/job\n" if version == 1 else "0::/job/step\n")
    job = tmp_path / "memory" / "job" if version == 1 else tmp_path / "job"
    for folder, bound in {job: 3 * 2**30, job / "step": 2**63 - 4096 if version == 1 else "max"}.items():
        folder.mkdir(parents=True)
        (folder / limit).write_text(f"{bound}\n")
        (folder / used).write_text(f"{2 * 2**30}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cache} {2**29}\n")
    assert cgroup.memory() == (3 * 2**30, 1.5 * 2**30)
    row = machine.memory(Options("."))
    assert row.state == WARN
    assert row.found.endswith("; 1.5 GiB free of the 3 GiB that its container or job may use")
    (tmp_path / "own").write_text("0::/\n")
    assert cgroup.memory() is None


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, timeout=60)


def test_changes_that_differ_are_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "code")
    clean = software.facts()["code"]
    assert "with changes" not in clean
    codes = []
    for text in (b"a = 2\n", b"a = \xff\n", b"a = 2\n"):
        (tmp_path / "code.py").write_bytes(text)
        codes.append(software.facts()["code"])
    assert codes[0] == codes[2] != codes[1]
    assert all(code.startswith(f"{clean} with changes ") for code in codes)


def metadata(folder: Path, name: str, version: str, *asked: str) -> None:
    """A package as pip leaves it, without its code."""
    where = folder / f"{name}-{version}.dist-info"
    where.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.9"]
    (where / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in asked)]) + "\n")


def test_packages_out_of_range_and_missing_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    metadata(tmp_path, "avs_dist", "9", "numpy<1", "no-such-package>=2", "torch>=2", 'also-none; extra == "dev"')
    monkeypatch.syspath_prepend(tmp_path)
    rows = software.packages(Options("."))
    assert [row.name for row in rows if row.state == FAIL] == ["numpy", "no-such-package"]
    assert "1 of 3 as setup.py asks" in rows[0].found
    assert rows[1].found.endswith("setup.py asks for <1")
    assert rows[2].found == "not installed"


def test_releases_that_do_not_work_together_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert software.bad_pairs() == []
    metadata(tmp_path, "numpy", "2.4.1")
    metadata(tmp_path, "triton", "3.6.2")
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = software.bad_pairs()
    assert row.state == FAIL
    assert "numpy 2.4.1 with triton 3.6.2" in row.found


# the network


@pytest.fixture
def no_interface_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in network.INTERFACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("no_interface_named")
def test_a_name_that_leads_to_loopback_is_a_fault_among_many_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert network.host_name(Options(".")).state == OK
    many = Options(".", many_hosts=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert network.host_name(many).state == FAIL
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # NCCL does not take the name
    assert network.host_name(many).state == WARN
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert network.host_name(many).state == OK
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert network.host_name(Options(".")).state == FAIL


@pytest.mark.usefixtures("no_interface_named")
def test_an_interface_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lo 127.0.0.1" in network.interface_names(Options(".")).found
    for value, state in {"nosuch0": FAIL, "=nosuch0,lo": OK, "^docker": OK, "lo": OK}.items():
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
        assert network.interface_names(Options(".")).state == state, value


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("", 0)) as server:
        assert network.port(Options(".", master_port=server.getsockname()[1])).state == WARN
    assert network.port(Options(".", master_port=collective.free_port())).state == OK


def test_lines_that_the_launcher_breaks_on_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ".deepspeed_env"
    for text, state in {"A=1\nB=2=3\n": OK, "A=1\n\nB=2\n": FAIL, "# comment\n": FAIL}.items():
        file.write_text(text)
        (row,) = [row for row in network.launcher(Options(".")) if row.name == ".deepspeed_env"]
        assert row.state == state, text
    file.write_text("A=1\nB=2=3\n")
    assert network.deepspeed_env() == {"A": "1", "B": "2=3"}


def test_ranks_that_do_not_meet_are_told() -> None:
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(collective.free_port()), "RANK": "0", "WORLD_SIZE": "2"}
    answer = collective.outcome(collective.start(alone), limit_s=3)
    assert collective.row("collective", [answer]).state == FAIL
    assert "no answer within 3 s" in answer["error"]


def test_ranks_that_say_much_are_all_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds from the second rank, before the first one ends: as with NCCL_DEBUG=INFO."""
    talks = "import os; os.environ['RANK'] == '0' or os.write(2, bytes(2**20)); "
    program = talks + "from avs_dist.launch.checks import collective; raise SystemExit(collective.main())"
    whole = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[str]:
        return whole([sys.executable, "-c", program], **options)

    monkeypatch.setattr(collective.subprocess, "Popen", popen)
    (row,) = collective.local(Options(".", ranks=2, within_s=60))
    assert row.state != FAIL, row.found


def test_a_rank_that_breaks_is_told_with_its_last_line() -> None:
    command = [sys.executable, "-c", "raise RuntimeError('no route')"]
    broken = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert collective.outcome(broken, limit_s=60) == {"error": "RuntimeError: no route"}


def test_sums_are_judged() -> None:
    good = {"backend": "gloo", "ranks": 2, "seconds": 0.01, "right": True}
    assert collective.row("c", [good, good]).state == OK
    assert "1.68 GB/s" in collective.row("c", [good, good]).found  # 16 MiB in 10 ms, both ways
    assert collective.row("c", [good, {**good, "right": False}]).state == FAIL
    assert collective.row("c", [good]).state == FAIL  # another one was met
    assert collective.row("c", [good, {"error": "gone"}]).found == "rank 1: gone"
    assert collective.row("c", [{**good, "seconds": 10.0}] * 2).state == WARN
