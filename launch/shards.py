"""Build tar shards from raw clips, add the output of a frozen audio encoder, check them, describe them.

Shards are plain tar files plus an index.json; training, evaluation and prediction read them by byte ranges.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch

from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser
from avs_dist.launch.shards_embed import embed_command, embed_parser
from avs_dist.shards.build import build
from avs_dist.shards.build_config import SENTENCE, BuildConfig
from avs_dist.shards.check import check
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.schema import INDEX_FILE
from avs_dist.shards.verify import describe, verify

BUILD_HELP = """Turn raw clips into shards.

Sources:
  avsbench-s4    the folder Single-source/ of AVSBench (or the folder that holds it)
  avsbench-ms3   the folder Multi-sources/ of AVSBench (or the folder that holds it)
  avss           the folder avs_released/ of AVSBench-semantic (or the folder that holds it)
  vggsound       vggsound.csv (id, start, label, split) and its videos in any folders; no masks; lost ones are left out
  videos         every media file below --root, cut into windows of --clip-s seconds, without masks, split "test"
  vggsound-avel  stored features: vggsound-avel*.csv and a zip for each clip in feature/{video,audio,label}/zip/
  ave            stored features: {visual_feature,audio_feature,labels,train_order,val_order,test_order}.h5
  avvp           stored features: AVVP_eval_{visual,audio}_checked_combined.csv, zips as above without labels
  feature-list   stored features: one csv with category, video_id (and split), zips of either modality or both

For AVSBench the official visual_frames are used where they are there; else one frame a second is decoded from
raw_videos by the published rule. A clip that cannot be decoded, or hangs the decoder, is skipped and listed with its
reason in index.json. Pictures of avss are squashed to --size in val and test and cropped to the middle square in train,
as published; its masks tell the classes by colour. Stored features are converted once, their pickles read without
unpickling; shards/README.md tells the details. The build can be killed at any time: the same command goes on where
it stopped.

With --check nothing is built or written (--out is not needed): what is on disk is compared with the list of the source,
and the list with the published counts; exit 1 when something is missing.
"""


FRAMES_HELP = """raw: pixels, read without decoding but 1 MB a clip (5 x 224 x 224 with masks); png, webp: lossless,
0.33 and 0.25 MB, some 5 and 4 ms to read; jpeg: lossy, 0.12 MB, 2 ms; video: cut from the film, decoded when read"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="avs-dist shards", description=__doc__)
    verify_help = "check checksums, offsets and every member; exit 1 on damage"
    info_help = "print what a folder of shards holds"
    actions = (
        ("build", _build_parser(), "turn raw clips into shards"),
        ("embed", embed_parser(), "copy shards with the output of a frozen audio encoder"),
        ("verify", _folder_parser(verify_help), verify_help),
        ("info", _folder_parser(info_help), info_help),
    )
    parser.add_commands("action", actions, operands={"verify": "DIR", "info": "DIR"})
    arguments = parser.parse_args(argv)
    options = arguments[arguments.action]
    if arguments.action == "build":
        return _build(options)
    if arguments.action == "embed":
        return embed_command(options)
    index = ShardIndex.load(options.directory)
    if arguments.action == "info":
        print(describe(index))
        return 0
    return _verify(index)


def _build_parser() -> Parser:
    parser = Parser(description=BUILD_HELP)
    clips = Literal["avsbench-s4", "avsbench-ms3", "avss", "vggsound", "videos"]
    features = Literal["vggsound-avel", "ave", "avvp", "feature-list"]
    add = parser.add_argument
    add("--source", type=Literal[clips, features], required=True, help="layout of the raw clips, see above")
    add("--root", type=Path, required=True, help="folder of the raw clips")
    add("--out", type=Path | None, help="folder of the shards; a build that was interrupted goes on")
    add("--check", action="store_true", help="only tell what is missing on disk and what is not listed")
    add("--size", type=int, default=224, help="side of frames and masks; aspect not kept, but in train of avss")
    add("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes")
    add("--shard-mb", type=float, default=128.0, help="a shard ends when it has reached this size in MB")
    add("--max-skipped", type=float, default=0.01, help="the build fails when a larger fraction of clips is unusable")
    add("--deadline-s", type=float, default=60.0, help="longest time for decoding one clip")
    add("--frames", type=Literal["raw", "png", "webp", "jpeg", "video"], default="raw", help=FRAMES_HELP)
    add("--decode-video", action="store_true", help="AVSBench: decode raw_videos although visual_frames are there")
    add("--stored-mel", action="store_true", help="AVSBench: take the log-mel from audio_log_mel, not from the sound")
    add("--clip-s", type=int | None, help="longest clip in seconds (default: 10; 5 for avsbench and videos)")
    add("--features", type=Literal["float16", "float32"], default="float16", help="features: type of the stored values")
    add("--word-vectors", type=Path | None, help="safetensors or GloVe file (default: vectors made from the words)")
    prompts_help = "avsbench-s4: add prompts, from a csv with label and prompt or, without one, sentences"
    add("--prompts", type=str | None, nargs="?", const=SENTENCE, metavar="CSV", help=prompts_help)
    return parser


def _folder_parser(description: str) -> Parser:
    parser = Parser(description=description)
    parser.add_argument("directory", type=str, help="folder of the shards, or its URL (info)")
    return parser


def _build(options: Any) -> int:
    settings = dict(vars(options))
    if settings.pop("check"):
        report = check(BuildConfig(**{**settings, "out": options.root}))  # it writes nothing
        print(report)
        return 1 if report.missing else 0
    if options.out is None:
        raise ValueError("--out, the folder of the shards, is missing (only --check needs none)")
    torch.set_num_threads(1)  # the clips are what runs in parallel
    finished_before = (options.out / INDEX_FILE).is_file()
    index = build(BuildConfig(**settings))
    if finished_before:
        print(f"{options.out} was already built: nothing done")
    print(describe(index))
    return 0


def _verify(index: ShardIndex) -> int:
    problems = verify(index)
    for problem in problems:
        print(f"DAMAGED {problem}")
    clips = sum(len(shard.clips) for shard in index.shards)
    state = f"{len(problems)} problems" if problems else "all well"
    print(f"{index.place}: {len(index.shards)} shards, {clips} clips: {state}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(run("shards"))
