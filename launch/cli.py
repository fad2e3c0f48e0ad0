"""The `avs-dist` command: one dispatcher, and one place where user errors become one line and exit 2.

Needs the standard library only: a command imports what it needs; `bench` of the kernels no more than torch, triton and
numpy.

avs-dist <command> [options]        avs-dist <command> --help
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import linecache
import os
import re
import sys
from typing import NoReturn

from avs_dist import interruption, output

COMMANDS = {
    "synth": "make a synthetic benchmark of real media files",
    "shards": "build, embed, verify or describe tar shards",
    "train": "train a system",
    "evaluate": "measure a checkpoint, with real, muted or swapped sound",
    "downstream": "measure what codes carry over between modalities: classify, localise, retrieve",
    "predict": "paint what sounds on any video file",
    "export": "write a checkpoint as a folder to pass on: weights, config.json, model card",
    "report": "draw latent codes, the use of shared codes, or the score over denoising steps",
    "sweep": "try many settings of a training: search, early stopping, population based training",
    "ablations": "the ablation tables of the papers at toy scale",
    "demo": "all of these in a row, on synthetic clips and a real film",
    "bench": "time the hot spots against their references",
    "doctor": "look at this machine, or at all hosts of a cluster, before a training does",
}


class OneLineErrors:
    """For an argparse parser: its errors are one line that names the nearest option, and exit code 2."""

    prog: str
    _actions: list[argparse.Action]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        sys.stderr.write(f"{self.prog}: error: {text}{self._nearest_key(text)}\n")
        raise SystemExit(2)

    def _nearest_key(self, message: str) -> str:
        """Hint with the closest known option for the first unknown name in the message."""
        known = [action.dest for action in self._actions if action.dest not in ("help", "config")]
        for name in re.findall(r"(?:--|[Kk]ey '|option ')([\w.]+)", message):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                if near:
                    return f" (nearest known key: {near[0]})"
        return ""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        sys.stderr.write(f"avs-dist: error: unknown command '{command}'{hint}; known: {', '.join(COMMANDS)}\n")
        return 2
    return run(command, rest)


def run(command: str, argv: list[str] | None = None) -> int:
    """Run one command; what the user can fix is one line on stderr and exit code 2."""
    # a training saves and tells by its exit code, whether or not somebody still reads what it prints
    with output.optional(interruption.reader_gone) if command == "train" else contextlib.nullcontext():
        return _run(command, argv)


def _run(command: str, argv: list[str] | None) -> int:
    module = importlib.import_module(f"avs_dist.launch.{command}")
    try:
        return module.main(argv)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        return _fail(command, f"error: {error}", 2)
    except (ValueError, OSError, ImportError) as error:
        if not _raised_here(error):
            raise
        return _fail(command, f"error: {str(error).strip().splitlines()[-1]}", 2)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)
    except RuntimeError as error:
        if not _raised_here(error):
            raise
        return _fail(command, f"failed: {error}", 1)


def _fail(command: str, message: str, code: int) -> int:
    sys.stderr.write(f"avs-dist {command}: {message}\n")
    return code


def _raised_here(error: BaseException) -> bool:
    """Whether a raise statement of ours made it (a message for the user), not a library (a bug: show the traceback)."""
    if type(error).__module__.startswith("avs_dist."):
        return True  # also when a loader process raised it and torch raises it again
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not str(trace.tb_frame.f_globals.get("__name__", "")).startswith("avs_dist."):
        return False
    return linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).lstrip().startswith("raise ")


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"usage: avs-dist <command> [options]\n\n{rows}\n\navs-dist <command> --help explains the options."


if __name__ == "__main__":
    raise SystemExit(main())
