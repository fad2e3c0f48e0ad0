"""The structure of the code as rules: who may import what, and what may lie where.

`launch -> avs_dist -> shards, kernels`. An import inside a function counts like one at the top of the file.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "launch", "shards")
PACKAGES = ("avs_dist", *LINKED)
TOP_LEVEL = {*PACKAGES, "tests", "configs", "setup.py", "README.md", "Makefile", "pyproject.toml", "constraints.txt"}
TOP_LEVEL |= {"LICENSE", ".ci", ".gitignore"}

# heavy packages stand in one file each
OWNERS = {
    "accelerate": "avs_dist/engine.py",
    "deepspeed": "avs_dist/engine.py",
    "ray": "launch/sweep.py",
    "decord": "shards/decode.py",
    "torchaudio": "shards/audio.py",
    "timm": "avs_dist/modules/backbone.py",
}
KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", *sys.stdlib_module_names}
VAGUE_NAMES = {"utils.py", "misc.py", "common.py", "helpers.py"}
MAX_LINES = 400
MACHINE_PATH = re.compile(r"(?<![\w./~}$-])/(?:home|root|work|Users|mnt|scratch|opt)/")


def python_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every Python file once, under its real folder (the links inside avs_dist are not followed)."""
    for top in (*PACKAGES, "tests"):
        for folder, folders, files in os.walk(root / top):
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
            for name in sorted(files):
                if name.endswith(".py"):
                    path = Path(folder, name)
                    yield path.relative_to(root).as_posix(), path


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import; `from a import b` gives a.b, which may be a module or a name in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def broken_import_rule(path: str, name: str) -> str | None:
    """Which rule the import of `name` in the file `path` breaks."""
    folder, package = path.split("/")[0], name.split(".")[0]
    if name.startswith("."):
        return "imports are absolute: avs_dist...."
    if package in LINKED:
        return f"import avs_dist.{package}: the bare name belongs to other packages"
    if folder == "kernels" and not within(name, "avs_dist.kernels") and package not in KERNELS_MAY_IMPORT:
        return "kernels import torch, triton and numpy only"
    if folder == "shards" and package == "avs_dist" and not within(name, "avs_dist.shards"):
        return "shards import nothing of avs_dist but avs_dist.shards"
    if folder in ("avs_dist", "kernels", "shards") and within(name, "avs_dist.launch"):
        return "only launch imports launch"
    if folder in PACKAGES and OWNERS.get(package, path) != path:
        return f"{package} is imported in {OWNERS[package]} only"
    return None


def violations(root: Path) -> list[str]:
    """One line for each broken rule in the tree below `root`."""
    found = []
    for path, file in python_files(root):
        source = file.read_text(encoding="utf-8")
        num_lines = len(source.splitlines())
        if num_lines > MAX_LINES:
            found.append(f"{path}: {num_lines} lines, at most {MAX_LINES}")
        if file.name in VAGUE_NAMES:
            found.append(f"{path}: the name says nothing; name the file after what it holds")
        for line, name in imported_names(source):
            rule = broken_import_rule(path, name)
            if rule:
                found.append(f"{path}:{line}: {name}: {rule}")
    for name in LINKED:
        link = root / "avs_dist" / name
        if not link.is_symlink() or os.readlink(link) != f"../{name}" or not link.is_dir():
            found.append(f"avs_dist/{name}: must be a link to ../{name}")
    return found


def machine_paths(path: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), start=1)
    return [f"{path}:{n}: path of one machine: {line.strip()[:80]}" for n, line in lines if MACHINE_PATH.search(line)]


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [name for name in listed.split("\0") if name]


def test_project_keeps_the_rules():
    assert len(list(python_files(ROOT))) > 20
    assert violations(ROOT) == []


def test_no_machine_paths_in_tracked_text_files():
    found = []
    for name in tracked_files():
        file = ROOT / name
        if file.is_file() and not file.is_symlink() and b"\0" not in (content := file.read_bytes()):
            found += machine_paths(name, content.decode("utf-8"))
    assert found == []


def test_top_level_is_fixed():
    assert {name.split("/")[0] for name in tracked_files()} - TOP_LEVEL == set()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project that keeps every rule."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
    for name in LINKED:
        (tmp_path / "avs_dist" / name).symlink_to(f"../{name}")
    good = {
        "kernels/tpavi.py": "import math\nimport triton.language as tl\nfrom avs_dist.kernels import runtime",
        "shards/audio.py": "import torchaudio\nfrom avs_dist.shards.schema import Sample",
        "avs_dist/engine.py": "def f():\n    import deepspeed\n    from accelerate import Accelerator",
        "avs_dist/clip.py": "from avs_dist.shards.schema import Sample\nfrom avs_dist import world",
        "launch/train.py": "from avs_dist.launch.cli import run\nfrom avs_dist.trainer import train",
    }
    for path, source in good.items():
        (tmp_path / path).write_text(source)
    return tmp_path


def test_good_tree_passes(tree):
    assert violations(tree) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("kernels/tpavi.py", "import einops", "torch, triton and numpy only"),
        ("kernels/tpavi.py", "from avs_dist.clip import Clip", "torch, triton and numpy only"),
        ("kernels/tpavi.py", "def f():\n    import timm", "torch, triton and numpy only"),
        ("kernels/tpavi.py", "from . import runtime", "imports are absolute"),
        ("shards/plan.py", "from avs_dist.clip import Clip", "nothing of avs_dist but avs_dist.shards"),
        ("shards/plan.py", "from avs_dist import world", "nothing of avs_dist but avs_dist.shards"),
        ("shards/sources/s4.py", "import avs_dist.modules.neck", "nothing of avs_dist but avs_dist.shards"),
        ("avs_dist/trainer.py", "from avs_dist.launch.cli import run", "only launch imports launch"),
        ("avs_dist/trainer.py", "from avs_dist import launch", "only launch imports launch"),
        ("avs_dist/trainer.py", "import importlib\nimportlib.import_module('avs_dist.launch.cli')", "only launch"),
        ("avs_dist/trainer.py", "from kernels import tpavi", "import avs_dist.kernels"),
        ("tests/test_x.py", "import shards.plan", "import avs_dist.shards"),
        ("launch/train.py", "from launch import cli", "import avs_dist.launch"),
        ("avs_dist/trainer.py", "import deepspeed", "avs_dist/engine.py only"),
        ("launch/train.py", "def f():\n    from accelerate.utils import x", "avs_dist/engine.py only"),
        ("avs_dist/sweep.py", "from ray import tune", "launch/sweep.py only"),
        ("shards/plan.py", "import decord", "shards/decode.py only"),
        ("avs_dist/clip.py", "import torchaudio.functional", "shards/audio.py only"),
        ("avs_dist/modules/neck.py", "import timm", "avs_dist/modules/backbone.py only"),
        ("avs_dist/long.py", "x = 1\n" * 401, "401 lines, at most 400"),
        ("avs_dist/modules/utils.py", "", "the name says nothing"),
    ],
)
def test_each_rule_can_fail(tree, path, source, message):
    file = tree / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    found = violations(tree)
    assert len(found) == 1, found
    assert found[0].startswith(path)
    assert message in found[0]


@pytest.mark.parametrize("kind", ["missing", "elsewhere", "absolute", "folder"])
def test_links_are_checked(tree, kind):
    link = tree / "avs_dist" / "shards"
    link.unlink()
    if kind == "elsewhere":
        link.symlink_to("../kernels")
    elif kind == "absolute":
        link.symlink_to(tree / "shards")
    elif kind == "folder":
        link.mkdir()
    assert violations(tree) == ["avs_dist/shards: must be a link to ../shards"]


def test_machine_paths_are_found_and_others_are_not():
    for home in ("home", "root", "Users", "work", "mnt"):
        assert machine_paths("a.md", f"first\nsee /{home}/anna/data")[0].startswith("a.md:2:")
    for fine in ("#!/usr/bin/env python3", "https://host.org/home/x", "../shared/mnt/x", "/dev/shm", "$HOME/mnt/x"):
        assert machine_paths("a.md", fine) == []
