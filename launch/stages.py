"""Commands that are made of other commands."""

from __future__ import annotations

import shlex
import subprocess
import sys


def stage(command: str, *arguments: object) -> None:
    """Print a public command and run it in a process of its own; its progress goes to this terminal.

    Raises:
        RuntimeError: it failed; its message is on the terminal.
    """
    words = [command, *map(str, arguments)]
    print(f"\n$ {shown(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "avs_dist.launch.cli", *words])
    if done.returncode:
        raise RuntimeError(f"'avs-dist {command}' ended with exit code {done.returncode}; its message is above")


def shown(words: list[str]) -> str:
    """The command as a person would type it."""
    return f"avs-dist {shlex.join(words)}"
