"""Hosts of a cluster on one machine: each a network namespace with its own address, name, processes and sshd.

All namespaces hang on processes that die with the tests (also of SIGKILL), and go with them: no interface, mount, file
outside the given folder or process is left, and nothing of the machine's own network is touched. The file system is
common to all hosts, as a cluster's shared one is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "nsenter", "pdsh", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"  # sshd and ip often lie beside a user's PATH
TIED = ("setpriv", "--pdeathsig", "KILL", "unshare")
OWN = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

# the first process of a host: what it changes is seen by this host alone
BOOT = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
exec "$(command -v sshd)" -D -e -f {folder}/sshd_config
"""
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
"""
SSH = """
Host *
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    BatchMode yes
    ConnectTimeout 5
    ServerAliveInterval 2
    ServerAliveCountMax 2
"""


@dataclass(frozen=True)
class Host:
    """One host: `link` is its cable's end at the switch."""

    name: str
    address: str
    link: str
    namespaces: subprocess.Popen[bytes]
    switch: subprocess.Popen[bytes]

    def command(self, command: Sequence[str], folder: Path = Path("/")) -> list[str]:
        """`command` as run on this host in `folder`."""
        pid = str(self.namespaces.pid)
        inside = f"--pid=/proc/{pid}/ns/pid_for_children"
        return ["nsenter", "--target", pid, "--net", "--uts", "--mount", inside, f"--wdns={folder}", *command]

    def processes(self, containing: str) -> list[int]:
        """Process ids, as this machine counts them, of the host's processes with that text in their command line."""
        own, found = os.readlink(f"/proc/{self.namespaces.pid}/ns/pid_for_children"), []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == own:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found += [int(entry.name)] if containing in command else []
            except OSError:  # it has just ended
                continue
        return found

    def cut(self) -> None:
        """Pull the cable: packets are lost, and neither side is told."""
        _run(_at(self.switch), "ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        _run(_at(self.switch), "ip", "link", "set", self.link, "up")


def missing() -> str | None:
    """Why this machine cannot have such hosts."""
    if os.geteuid() != 0:
        return "not root: no network namespaces"
    if absent := [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]:
        return f"not installed: {', '.join(absent)} (apt-get install openssh-server pdsh iproute2 util-linux)"
    probe = (
        "mount -t tmpfs tmpfs /run && ip link add probe0 type bridge && ip link add probe1 type veth peer name probe2"
    )
    tried = subprocess.run([*TIED, *OWN, "sh", "-c", probe], env={"PATH": PATH}, capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


@contextmanager
def running(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` hosts node-a, node-b, ... at 10.88.0.1, .2, ... on one switch, reachable from each other by ssh.

    Keys, configuration and `NAME.log` of each sshd lie in `folder`.
    """
    names = [f"node-{chr(ord('a') + number)}" for number in range(count)]
    addresses = [f"10.88.0.{number + 1}" for number in range(count)]
    _write_settings(folder, names, addresses)
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(switch := _start(["--net", "sleep", "infinity"]))
        _run(_at(switch), "ip", "link", "add", "switch", "type", "bridge")
        _run(_at(switch), "ip", "link", "set", "switch", "up")
        hosts = []
        for name, address in zip(names, addresses, strict=True):
            boot = ["sh", "-ec", BOOT.format(name=name, folder=folder)]
            started.append(namespaces := _start([*OWN, *boot], folder / f"{name}.log"))
            hosts.append(Host(name, address, f"to-{name}", namespaces, switch))
            _plug_in(hosts[-1])
        for host in hosts:
            _wait_for_ssh(hosts[0], host, folder)
        yield hosts
    finally:
        for process in reversed(started):
            _end(process)


def _write_settings(folder: Path, names: list[str], addresses: list[str]) -> None:
    for key in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / key)]
        subprocess.run(keygen, check=True, timeout=30)
    key = (folder / "host_key.pub").read_text().strip()
    (folder / "known_hosts").write_text("".join(f"{name} {key}\n" for name in names))
    lines = [f"{address} {name}\n" for name, address in zip(names, addresses, strict=True)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))


def _start(command: list[str], log: Path | None = None) -> subprocess.Popen[bytes]:
    """A process in the namespaces that `command` begins with; returns when it is in them."""
    with open(log or os.devnull, "wb") as out:
        process = subprocess.Popen(
            [*TIED, *command],
            env={**os.environ, "PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # a Ctrl-C of the tests ends it through `running`
        )
    ours = os.readlink("/proc/self/ns/net")
    wait_until(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != ours, "namespaces are made", 30, log)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """With a host's first process, a child of the one that made its namespaces, the kernel ends all others of it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    if not children:
        process.kill()
    process.wait()


def _plug_in(host: Host) -> None:
    pid = str(host.namespaces.pid)
    _run(_at(host.switch), "ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", pid)
    _run(_at(host.switch), "ip", "link", "set", host.link, "master", "switch", "up")
    _run(_at(host.namespaces), "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    _run(_at(host.namespaces), "ip", "link", "set", "eth0", "up")


def _at(process: subprocess.Popen[bytes]) -> list[str]:
    """Enters the network of `process`, and nothing else of it."""
    return ["nsenter", "--target", str(process.pid), "--net"]


def _run(prefix: Sequence[str], *command: str) -> None:
    done = subprocess.run(
        [*prefix, *command], env={**os.environ, "PATH": PATH}, capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _wait_for_ssh(first: Host, host: Host, folder: Path) -> None:
    def answers() -> bool:
        return (
            subprocess.run(first.command(["ssh", host.name, "true"]), capture_output=True, timeout=30).returncode == 0
        )

    wait_until(answers, f"{host.name} answers by ssh", 30, folder / f"{host.name}.log")


def wait_until(true: Callable[[], bool], what: str, deadline_s: float, log: Path | None = None) -> None:
    """Raises:
    TimeoutError: after `deadline_s`, with the end of `log`.
    """
    end = time.monotonic() + deadline_s
    while not true():
        if time.monotonic() > end:
            told = f": {log.read_text(errors='replace')[-4000:]}" if log else ""
            raise TimeoutError(f"not within {deadline_s} s: {what}{told}")
        time.sleep(0.02)
