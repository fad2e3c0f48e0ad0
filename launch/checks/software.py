"""Python, packages, the code itself, and the libraries that open videos."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata as metadata
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options, Row, one_line

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "avs_dist"
# told in the table, and compared between hosts
MAIN_PACKAGES = ("torch", "deepspeed", "accelerate", "triton", "numpy", "transformers", "safetensors", "ray")
TESTED_PYTHON = "3.11"


class BadPair(NamedTuple):
    """Releases of two packages that do not work together, though each range alone allows them."""

    package: str
    releases: str
    other: str
    other_releases: str
    happens: str
    advice: str


class Library(NamedTuple):
    """Packages that load shared libraries, and the module of ours that imports them."""

    packages: tuple[str, ...]
    module: str
    advice: str


BAD_PAIRS = (BadPair("numpy", ">=2.4", "triton", "<=3.6", "interpreted kernels fail", "pip install 'numpy<2.4'"),)
LIBRARIES = {
    "video decoders": Library(
        ("decord", "av"), "avs_dist.shards.decode", "pip install --force-reinstall -c constraints.txt decord av"
    ),
    "sound": Library(
        ("torchaudio",),
        "avs_dist.shards.audio",
        "torch and torchaudio must be the same CUDA build: pip install -c constraints.txt torch torchaudio",
    ),
}


def version(package: str) -> str | None:
    """Installed release of a package, without importing it; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def python(options: Options) -> Row:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    asked = (metadata.metadata(PROJECT)["Requires-Python"] if version(PROJECT) else None) or ">=3.10"
    if not SpecifierSet(asked).contains(found):
        return Row(FAIL, "Python", f"{found}, setup.py asks for {asked}", f"use Python {TESTED_PYTHON}")
    if not found.startswith(f"{TESTED_PYTHON}."):
        return Row(WARN, "Python", found, f"the tested one is {TESTED_PYTHON}")
    return Row(OK, "Python", found)


def packages(options: Options) -> list[Row]:
    """What setup.py asks for against what is installed; one row for all that is well, one for each that is not."""
    from packaging.requirements import Requirement

    if version(PROJECT) is None:
        return [
            Row(WARN, "packages", f"{PROJECT} is not installed, so its requirements are unknown", "pip install -e .")
        ]
    asked = [Requirement(line) for line in metadata.requires(PROJECT) or []]
    asked = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    bad = []
    for one in asked:
        found = version(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            what = "not installed" if found is None else f"{found}, setup.py asks for {one.specifier}"
            bad.append(Row(FAIL, one.name, what, f"pip install -c constraints.txt '{one}'"))
    told = ", ".join(f"{name} {version(name) or 'missing'}" for name in MAIN_PACKAGES)
    return [
        Row(OK, "packages", f"{len(asked) - len(bad)} of {len(asked)} as setup.py asks: {told}"),
        *bad,
        *bad_pairs(),
    ]


def bad_pairs() -> list[Row]:
    """Installed releases that are known not to work together."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    rows = []
    for pair in BAD_PAIRS:
        found, other = version(pair.package), version(pair.other)
        # by release number: 3.6.1 is still 3.6
        if found is None or other is None or not SpecifierSet(pair.releases).contains(found, prereleases=True):
            continue
        minor = ".".join(str(part) for part in Version(other).release[:2])
        if SpecifierSet(pair.other_releases).contains(minor):
            both = f"{pair.package} {found} with {pair.other} {other}: {pair.happens}"
            rows.append(Row(FAIL, "bad pair", both, pair.advice))
    return rows


def code(options: Options) -> Row:
    found = revision()
    if found["changed"]:
        changed = f"{PROJECT} {found['version']}, commit {found['commit']} with changes"
        return Row(WARN, "code", changed, "commit them, so that a run can be repeated")
    return Row(OK, "code", f"{PROJECT} {found['version']}, commit {found['commit']}")


def revision() -> dict[str, str]:
    """Version and commit of the code that runs; "changed" is a hash of how tracked files differ from it, or empty."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    # whatever git's settings on a host are, the same changes read the same
    changes = _git("diff", "--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
    return {
        "version": version(PROJECT) or "not installed",
        "commit": commit or "unknown",
        "changed": hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else "",
    }


def _git(*arguments: str) -> str:
    try:
        # a checkout that another user owns is fine to read
        command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
        return done.stdout.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def decoders(options: Options) -> list[Row]:
    """Whether the libraries for pictures and sound load: a missing shared library shows only then."""
    rows = []
    for name, library in LIBRARIES.items():
        told = ", ".join(f"{package} {version(package) or 'missing'}" for package in library.packages)
        try:
            importlib.import_module(library.module)
        except (ImportError, OSError, AttributeError) as error:
            rows.append(Row(FAIL, name, f"{told}: {one_line(error)}", library.advice))
        else:
            rows.append(Row(OK, name, told))
    return rows


def facts() -> dict[str, str]:
    """What must be the same on all hosts, by name."""
    found = revision()
    return {
        "Python": platform.python_version(),
        **{name: version(name) or "not installed" for name in MAIN_PACKAGES},
        "code": f"{found['version']}, commit {found['commit']}"
        + (f" with changes {found['changed']}" if found["changed"] else ""),
    }
