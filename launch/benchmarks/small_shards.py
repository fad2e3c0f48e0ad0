"""Small synthetic shards, for the benchmarks that train."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from avs_dist.launch.benchmarks.parity_cases import Data


def make_shards(root: Path, data: Data) -> str:
    """Make shards below a folder by the real commands, and tell where they are."""
    from avs_dist.launch import shards, synth

    media, out = root / f"{data}-media", root / data
    settings = {
        "clips": (["ms3", "--clips", "20", "--size", "64"], ["avsbench-ms3", "--size", "64", "--root", str(media)]),
        "sequences": (["cmg", "--clips", "80"], ["vggsound-avel", "--root", str(media / "VGGSound-AVEL")]),
    }
    made, built = settings[data]
    with contextlib.redirect_stdout(sys.stderr):
        synth.main(["--out", str(media), "--seed", "3", "--setting", *made])
        shards.main(["build", "--out", str(out), "--source", *built])
    return str(out)
