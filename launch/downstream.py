"""Measure how well codes carry over from one modality to another: heads on the frozen codes of a checkpoint.

    avs-dist downstream classify --checkpoint runs/cmg/train --shards shards/ave
    avs-dist downstream localise --checkpoint runs/cmg/train --shards shards/ave --test-shards shards/avvp
    avs-dist downstream retrieve --checkpoint runs/vt --shards shards/vggsound

A head learns the labels of one modality, such as the picture, and is tested on all of them, such as the sound, which it
has never met. The encoder stays as it is, in evaluation mode. Heads are trained on one process, in seconds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avs_dist.launch.cli import run
from avs_dist.launch.evaluate import with_data
from avs_dist.launch.parser import Parser, add_max_damaged

if TYPE_CHECKING:  # heavy, see _classify
    from avs_dist.config import Config
    from avs_dist.downstream.coded import CodedSplit
    from avs_dist.downstream.protocol import Protocol
    from avs_dist.downstream.training import HeadTraining
    from avs_dist.downstream.transfer import Task
    from avs_dist.systems.base import System

CLASSIFY_HELP = """Which event does a clip show? Trained on one modality, tested on each (AVE, UCF-101 and VGGSound).

    avs-dist downstream classify --checkpoint runs/cmg/train --shards shards/ave --json ave.json
    avs-dist downstream classify --checkpoint runs/cmg/train --shards shards/ucf --test-shards shards/vgg \\
        --events ucf_vgg.csv

The head: linear, maximum over the seconds, linear; cross entropy. Two metrics are printed. accuracy is measured on test
clips, and its epoch is chosen on validation clips of the labelled modality. accuracy_published is what the public code
of Uni-Code measures: on the clips that the head was trained on, at the epoch that is best there.
"""

LOCALISE_HELP = """Which events happen in each second? Trained on one modality, tested on each (AVVP, AVE to AVVP).

    avs-dist downstream localise --checkpoint runs/cmg/train --shards shards/avvp --epochs 50
    avs-dist downstream localise --checkpoint runs/cmg/train --shards shards/ave --test-shards shards/avvp

The head: linear, linear, for each second; binary cross entropy and the loss of the public code. segment_f1 is measured
on test clips, without the background. accuracy_published and f1_published are those of the public code: with the
background, mean over batches, at the epoch that is best on the test clips; within one data set these are the training
clips in the other modality. Data that come in one split are divided 50/20/30 by the names of the clips.
"""

RETRIEVE_HELP = """Find the sound that belongs to a text, having learnt it of pictures, and the other way round.

    avs-dist downstream retrieve --checkpoint runs/vt --shards shards/vggsound

The codebook was trained on text and pictures (model.unicode.modalities=[visual,text]). A network of sound learns, by
symmetric InfoNCE, to find the codes of one of the two, and is tested with the codes of the other, which it has never
met. R@k: the clip's own counterpart is among the first k of all test clips. event R@k: a clip with an event of the
query is. Prompts that many clips share count as equal, so that with text R@k stays low where event R@k need not.
"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="avs-dist downstream", description=__doc__)
    tasks = (
        ("classify", _transfer_parser(CLASSIFY_HELP, 30), "the event of a clip"),
        ("localise", _transfer_parser(LOCALISE_HELP, 50), "the events of each second"),
        ("retrieve", _parser(RETRIEVE_HELP, 30), "sound by text or picture, and the other way round"),
    )
    parser.add_commands("task", tasks)
    args = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("heads are trained on one process: run it without torchrun or deepspeed")
    {"classify": _classify, "localise": _localise, "retrieve": _retrieve}[args.task](args[args.task])
    return 0


def _transfer_parser(description: str, epochs: int) -> Parser:
    parser = _parser(description, epochs)
    add = parser.add_argument
    add("--test-shards", type=str | None, default=None, help="test on other data (default: those of --shards)")
    add("--events", type=Path | None, default=None, help="csv 'name in --shards,name in --test-shards', a line each")
    return parser


def _parser(description: str, epochs: int) -> Parser:
    """What all tasks ask."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="checkpoint folder, or a run folder: its best checkpoint")
    add("--shards", type=str | None, default=None, help="shards of features (default: those of the training)")
    add_max_damaged(parser)
    add(
        "--train-on",
        type=Literal["audio", "visual", "text"],
        nargs="+",
        default=None,
        help="modalities whose labels heads may see, one head each (default: all that have labels)",
    )
    add("--epochs", type=int, default=epochs, help="of each head; the public code halves the rate after 10, 20 and 30")
    add("--lr", type=float, default=4e-4, help="learning rate of the heads (published: 4e-4)")
    add("--batch", type=int, default=80, help="clips in a step of a head (published: 80)")
    add("--seed", type=int, default=0, help="of the heads' first weights and the order of the clips")
    add("--json", type=str | None, default=None, help="also write the results to this file")
    return parser


def _classify(args: Any) -> None:
    settings = _settings(args)
    from avs_dist.downstream.classification import Classification

    _transfer(args, settings, Classification(), "train")


def _localise(args: Any) -> None:
    settings = _settings(args)
    from avs_dist.downstream.localisation import Localisation

    _transfer(args, settings, Localisation(), "all")


def _transfer(args: Any, settings: HeadTraining, task: Task, published: Literal["train", "all"]) -> None:
    from avs_dist.downstream.results import LEGEND, table
    from avs_dist.downstream.transfer import transfer

    if args.events is not None and args.test_shards is None:
        raise ValueError("--events: joins the events of --shards and --test-shards; give --test-shards too")
    if args.events is not None and not args.events.is_file():  # found now, not when all clips are encoded
        raise FileNotFoundError(f"--events {args.events} is not a file")
    system, config = _load(args, settings)
    protocol, facts = _protocol(args, system, config, settings, published)
    measures = transfer(task, protocol, settings, args.train_on or ())
    print(_heading(args, config, facts), end="\n\n")
    print("\n\n".join(table(measure) for measure in measures), end=f"\n\n{LEGEND}\n")
    _write(args, config, settings, {**facts, "results": [measure.to_dict() for measure in measures]})


def _protocol(
    args: Any, system: System, config: Config, settings: HeadTraining, published: Literal["train", "all"]
) -> tuple[Protocol, dict[str, Any]]:
    """The clips of the experiment, and what is worth knowing of them."""
    from avs_dist.downstream.events import match_events, read_events
    from avs_dist.downstream.protocol import one_data_set, two_data_sets

    splits = _encode(args, system, config, config.data.shards, settings)
    facts: dict[str, Any] = {}
    if args.test_shards is None:
        protocol = one_data_set(splits, published)
    else:
        others = _encode(args, system, config, args.test_shards, settings)
        ours, theirs = (next(iter(each.values())).events for each in (splits, others))
        pairs = match_events(ours, theirs) if args.events is None else read_events(args.events, ours, theirs)
        protocol = two_data_sets(splits, others, pairs)
        facts = {"test_shards": args.test_shards, "events": [list(pair) for pair in pairs]}
    parts = ("train", "val", "test", "own", "published_train", "published_test")
    return protocol, {**facts, "clips": {part: len(getattr(protocol, part)) for part in parts}}


def _retrieve(args: Any) -> None:
    settings = _settings(args)
    from avs_dist.downstream.retrieval import SOUND, retrieval_through_audio, table

    system, config = _load(args, settings)
    splits = _encode(args, system, config, config.data.shards, settings, keep=(SOUND,))
    results = retrieval_through_audio(splits, config.model.unicode, settings, args.train_on or ())
    print(_heading(args, config, {}), end="\n\n")
    print(table(results))
    _write(args, config, settings, {"results": [result.to_dict() for result in results]})


def _settings(args: Any) -> HeadTraining:
    # after parsing, so that --help and errors come at once
    import torch

    from avs_dist.downstream.training import HeadTraining

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HeadTraining(args.epochs, args.lr, args.batch, args.seed, device)


def _load(args: Any, settings: HeadTraining) -> tuple[System, Config]:
    """The system, and its config with the shards of the command line."""
    from avs_dist.checkpoint import load_system

    system, config = load_system(args.checkpoint, settings.device)
    return system, with_data(config, shards=args.shards, max_damaged=args.max_damaged)


def _encode(
    args: Any, system: System, config: Config, shards: str, settings: HeadTraining, keep: tuple[str, ...] = ()
) -> dict[str, CodedSplit]:
    from avs_dist.checkpoint import check_word_vectors
    from avs_dist.downstream.coded import encode_split
    from avs_dist.shards.index import ShardIndex

    index = ShardIndex.load(shards)
    check_word_vectors(args.checkpoint, index.word_vectors, shards)
    return {s: encode_split(system, config, index, s, keep=keep, device=settings.device) for s in index.splits}


def _heading(args: Any, config: Config, facts: dict[str, Any]) -> str:
    """What was measured, and on how many clips."""
    from avs_dist.checkpoint import find_checkpoint

    lines = [f"checkpoint {find_checkpoint(args.checkpoint)}  shards {config.data.shards}"]
    if "test_shards" in facts:
        lines[0] += f"  test shards {facts['test_shards']}"
        pairs = facts["events"]
        lines.append("events: " + ", ".join(one if one == other else f"{one} = {other}" for one, other in pairs))
    if "clips" in facts:
        clips = facts["clips"]
        lines.append(
            f"{clips['train']} clips to train on, {clips['val']} to choose the epoch, {clips['test']} to test on; "
            f"as published: {clips['published_train']} to train on, {clips['published_test']} to measure"
        )
    return "\n".join(lines)


def _write(args: Any, config: Config, settings: HeadTraining, results: dict[str, Any]) -> None:
    if args.json is None:
        return
    from avs_dist.checkpoint import find_checkpoint
    from avs_dist.shards.files import write_text

    facts = {"checkpoint": str(find_checkpoint(args.checkpoint))}
    heads = {"epochs": settings.epochs, "lr": settings.lr, "batch": settings.batch, "seed": settings.seed}
    written = {**facts, "shards": config.data.shards, "heads": heads, **results}
    write_text(args.json, json.dumps(written, indent=1) + "\n")
    print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    raise SystemExit(run("downstream"))
