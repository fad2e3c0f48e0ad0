"""The hosts of a hostfile, and an agent on each of them, asked over ssh."""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from avs_dist.launch.checks import network
from avs_dist.launch.checks.agent import ANSWER

# how long a process may take to end once its connection is closed
END_S = 10.0
# a word that begins with "-" would be an option of ssh
_LINE = re.compile(r"([^\s-]\S*)\s+slots=(\d+)")


class HostError(Exception):
    """A host does not answer, or answers with an error; the message says why, without the host's name."""


def read_hostfile(path: str) -> dict[str, int]:
    """Hosts in order with their number of ranks, by the rules of the deepspeed launcher.

    Raises:
        ValueError: naming the line that the launcher would refuse.
        OSError: If it cannot be read.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"{path}:{number}: expected 'HOST slots=N', got '{line}'")
        if match[1] in hosts:
            raise ValueError(f"{path}:{number}: {match[1]} is there twice; give it all its ranks in one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"{path}: no host in it; a line is 'HOST slots=N'")
    return hosts


def ssh_command(host: str, ssh_port: int | None, connect_s: float) -> list[str]:
    """The agent on a host: same folder and Python as here, as the deepspeed launcher has it.

    PDSH_SSH_ARGS_APPEND is heeded, because the launcher's pdsh does so too. Variables are set as the launcher sets
    them, so that what the host's shell makes of them is the same.
    """
    # a connection that is cut is noticed, and nobody is asked for a password
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(connect_s))}"]
    options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
    options += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    options += ["-p", str(ssh_port)] if ssh_port else []
    exports = "".join(f"export {name}={value}; " for name, value in network.exported().items())
    agent = shlex.join([sys.executable, "-m", "avs_dist.launch.checks.agent"])
    return ["ssh", *options, host, f"{exports}cd {shlex.quote(os.getcwd())} && exec {agent}"]


class Host:
    """A connection to an agent. Close it at the end."""

    def __init__(self, name: str, slots: int, command: list[str]) -> None:
        self.name, self.slots = name, slots
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._told: list[str] = []
        self._asked = 0
        self._readers = [threading.Thread(target=each, daemon=True) for each in (self._read_answers, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                self._answers.put(line.removeprefix(ANSWER))
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._told += [line.strip() for line in self._process.stderr if line.strip()]

    def ask(self, question: str, limit_s: float, **arguments: Any) -> Any:
        """The answer to one question.

        Raises:
            HostError: If it fails, does not come within limit_s, or the connection ends.
        """
        assert self._process.stdin is not None
        self._asked += 1
        end = time.monotonic() + limit_s
        try:
            self._process.stdin.write(json.dumps({"ask": question, "number": self._asked, **arguments}) + "\n")
            values = self._next_answer(end)
            while values is not None and values["number"] != self._asked:  # came too late for its own question
                values = self._next_answer(end)
        except queue.Empty:
            raise HostError(f"no answer within {limit_s:g} s") from None
        except OSError:
            values = None
        if values is None:
            self._answers.put(None)  # for the next one who asks
            raise HostError(self._end())
        if "error" in values:
            raise HostError(values["error"])
        return values["answer"]

    def _next_answer(self, end: float) -> dict[str, Any] | None:
        """None at the end of all answers.

        Raises:
            queue.Empty: at `end`, in seconds of the monotonic clock.
        """
        answer = self._answers.get(timeout=max(0.0, end - time.monotonic()))
        try:
            return None if answer is None else json.loads(answer)
        except ValueError:
            return None  # cut in the middle

    def _end(self) -> str:
        """Why the connection ended."""
        try:
            code = self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            return f"the agent said no more, and has not ended {END_S:g} s later"
        self._readers[1].join(timeout=5)
        told = self._told[-1] if self._told else "nothing was said"
        return f"{'ssh' if code == 255 else 'the agent'} ended with code {code}: {told}"

    def close(self) -> None:
        """End the agent by the end of its questions, or ssh itself."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:
            pass
        try:
            self._process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def connect(hosts: dict[str, int], ssh_port: int | None, connect_s: float) -> list[Host]:
    return [Host(name, slots, ssh_command(name, ssh_port, connect_s)) for name, slots in hosts.items()]


def close(hosts: Iterable[Host]) -> None:
    for host in hosts:
        host.close()
