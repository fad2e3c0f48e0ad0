"""Make a synthetic audio-visual segmentation benchmark: real media files in the AVSBench or AVSS folder layout.

Each clip shows two or three moving objects of different classes; every class has its own shape, texture and timbre.
Only what sounds is in the mask. s4: one object sounds all the time. ms3: sounds switch on and off each second.
avss: masks tell the classes apart; clips of 5 s with one source, of 5 s and of 10 s with switching ones.

Example: avs-dist synth --out data --setting ms3 --clips 400 --seed 0 --size 128
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser
from avs_dist.shards.synthetic import write_benchmark
from avs_dist.shards.synthetic_sequences import write_sequences


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="avs-dist synth", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Folder; the data go to a folder named as published")
    parser.add_argument(
        "--setting",
        type=Literal["s4", "ms3", "avss", "cmg"],
        required=True,
        help="One source, switching ones, a mix with classes",
    )
    parser.add_argument("--clips", type=int, required=True, help="Number of clips, 80/10/10 percent train/val/test")
    parser.add_argument("--seed", type=int, default=0, help="Same seed and size, same clips, whatever their number")
    parser.add_argument("--size", type=int, default=224, help="Side of the square pictures in pixels, even")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="Processes; no effect on the result"
    )
    args = parser.parse_args(argv)
    if args.setting == "cmg":
        roots = write_sequences(args.out, args.clips, args.seed)
        print(f"{args.clips} clips in each of {', '.join(map(str, roots))}")
        return 0
    root = write_benchmark(args.out, args.setting, args.clips, args.seed, args.size, args.workers)
    print(f"{args.clips} clips in {root}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run("synth"))
