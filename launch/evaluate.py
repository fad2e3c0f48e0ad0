"""Measure a checkpoint on one split of the shards; the sound can be muted or swapped, to see what it contributes.

    avs-dist evaluate --checkpoint runs/demo/train --split test --audio all --json runs/demo/evaluate.json
    torchrun --nproc_per_node 8 launch/evaluate.py --checkpoint runs/ms3

--audio: "real" is each clip's own sound, "muted" is digital silence, "swapped" is the sound of another clip of the
split. A model that listens falls with swapped sound; one that only looks stays where it was.

Of a system that samples latent codes, the table also says how much the masks of --samples draws differ (std), and
whether they differ most where the mask is wrong (AUROC).

--query: what asks a system that segments what a query means: the sound of the clip, or the words of its prompt (shards
built with --prompts). Uni-Code's A2T is a system trained with audio, asked in text; T2A the other way round.

    avs-dist evaluate --checkpoint runs/query --query both

Of a system of several classes (AVSS) the table has the mIoU over classes: as published, without the background, over
the classes that occur, and over the whole set instead of frame by frame; the definitions stand below it. --json then
also has the scores of each class.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal

from avs_dist import world
from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser, add_max_damaged

if TYPE_CHECKING:  # heavy, see main
    import torch

    from avs_dist.config import Config
    from avs_dist.loader import AudioSource
    from avs_dist.systems.base import Query, System

AUDIO_SOURCES: tuple[AudioSource, ...] = ("real", "muted", "swapped")


def build_parser() -> Parser:
    parser = Parser(prog="avs-dist evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="checkpoint folder, or a run folder: its best checkpoint"
    )
    parser.add_argument("--shards", type=str | None, default=None, help="shard folder (default: that of the training)")
    parser.add_argument("--split", type=str, default="test", help="split of the shards")
    add_max_damaged(parser)
    parser.add_argument(
        "--audio",
        type=Literal["real", "muted", "swapped", "all"],
        default="real",
        help="sound that the model gets to hear",
    )
    parser.add_argument(
        "--query",
        type=Literal["audio", "text", "both"] | None,
        default=None,
        help="what asks a system of queries (default: what asked in its training)",
    )
    parser.add_argument("--batch", type=int, default=4, help="clips at a time on each rank; does not change the result")
    parser.add_argument(
        "--samples",
        type=int | None,
        default=None,
        help="draws that a mask averages, 1: no uncertainty (default: that of the training config)",
    )
    parser.add_argument("--json", type=str | None, default=None, help="also write the results to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: must be at least 1")
    try:
        _evaluate(args)
    finally:
        world.stop()
    return 0


def load_for_shards(
    checkpoint: str, shards: str | None, device: torch.device, max_damaged: float | None = None
) -> tuple[System, Config]:
    """The system of a checkpoint and its config, with `shards` and `max_damaged` in place of the training's if given.

    Raises:
        ValueError: frames, classes, word vectors or stored sound of the shards are not those of the training.
    """
    from avs_dist.checkpoint import check_classes, check_word_vectors, image_size, load_system
    from avs_dist.shards.index import ShardIndex
    from avs_dist.stored_audio import check_stored_audio

    system, config = load_system(checkpoint, device)
    config = with_data(config, shards=shards, max_damaged=max_damaged)
    index = ShardIndex.load(config.data.shards)
    trained, built = image_size(checkpoint), index.image_size
    if (trained == 0) != (built == 0):  # features have no frames
        words = ["features" if size == 0 else "clips" for size in (trained, built)]
        raise ValueError(f"{checkpoint} was trained on {words[0]}, {config.data.shards} holds {words[1]}")
    if trained != built:
        raise ValueError(f"trained on {trained} x {trained} frames, {config.data.shards} holds {built} x {built}")
    check_classes(checkpoint, index.classes, config.data.shards)
    check_word_vectors(checkpoint, index.word_vectors, config.data.shards)
    check_stored_audio(system, index)
    return system, config


def with_data(config: Config, **changes: Any) -> Config:
    """The config with other settings of the data, as far as they are given."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **given))


def _evaluate(args: Any) -> None:
    # after parsing, so that --help and errors come at once
    from avs_dist.checkpoint import class_names, find_checkpoint
    from avs_dist.evaluate import definitions, measure, results_table
    from avs_dist.loader import eval_loader
    from avs_dist.shards.files import write_text
    from avs_dist.systems.query import set_query
    from avs_dist.uncertainty import set_num_samples

    device = world.start()
    system, config = load_for_shards(args.checkpoint, args.shards, device, args.max_damaged)
    if args.samples is not None:
        set_num_samples(system, args.samples)
    results, classes = {}, {}
    queries: tuple[Query | None, ...] = ("audio", "text") if args.query == "both" else (args.query or system.query,)
    for name, (query, audio) in _rows(queries, args.audio).items():
        if query is not None:
            set_query(system, query)
        batches = eval_loader(config, args.split, args.batch, world.rank(), world.world_size(), audio=audio)
        measured = measure(lambda clip: system.predict(clip.to(device)), batches, label=name)
        results[name] = batches.counted(measured.metrics)
        if measured.classes is not None:
            classes[name] = measured.classes.rows(class_names(args.checkpoint))
    if not world.is_main():
        return
    facts = {
        "checkpoint": str(find_checkpoint(args.checkpoint)),
        "shards": config.data.shards,
        "split": args.split,
    }
    if system.query is not None:
        facts["trained_with"] = f"{config.model.query.modality} query"
    print("  ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    print(results_table(results, "sound" if system.query is None else "query"))
    if args.json is not None:
        written = {**facts, "results": results, "definitions": definitions(results)}
        if classes:
            written["classes"] = classes
        write_text(args.json, json.dumps(written, indent=1) + "\n")
        print(f"\nwritten to {args.json}")


def _rows(queries: tuple[Query | None, ...], audio: str) -> dict[str, tuple[Query | None, AudioSource]]:
    """What asks, if anything does, and what sounds, by the name of the row; words do not change with the sound."""
    sources = AUDIO_SOURCES if audio == "all" else tuple(source for source in AUDIO_SOURCES if source == audio)
    rows: dict[str, tuple[Query | None, AudioSource]] = {}
    for query in queries:
        for source in AUDIO_SOURCES[:1] if query == "text" else sources:
            asked = f"{query} query" + ("" if source == "real" else f", {source}")
            rows[source if query is None else asked] = (query, source)
    return rows


if __name__ == "__main__":
    raise SystemExit(run("evaluate"))
