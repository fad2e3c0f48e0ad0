"""Draw a model of the time of a training step on 1 to 1,024 GPUs. It is a model, not a measurement.

    avs-dist bench scaling --out scaling.png                            TPAVI with PVT-v2-b5, nodes of 8 H200
    avs-dist bench scaling --assume network_gb_s=12.5 overlap=0.7       another cluster
    avs-dist bench scaling --count r50.json --config configs/tpavi_ms3.yaml --config configs/resnet50.yaml
    avs-dist bench scaling --counted r50.json --out r50.png

What a step computes and sends is counted (--count: by two ranks on this host, some minutes); how fast that is done are
assumptions, which are printed with the table; each of them can be set with --assume NAME=VALUE.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avs_dist.launch.benchmarks.command import Parser, save
from avs_dist.launch.benchmarks.report import table
from avs_dist.launch.benchmarks.scaling_counted import DEFAULT, Counted, count
from avs_dist.launch.benchmarks.scaling_figure import scaling_png
from avs_dist.launch.benchmarks.scaling_model import Assumptions, Step, efficiency, model_step
from avs_dist.shards.files import write_text

GPUS = [1 << power for power in range(11)]


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if args.count:
        if not args.config:
            raise ValueError("--count: name the network with --config FILE")
        write_text(args.count, json.dumps(count(args.config, args.limit_s).to_dict(), indent=1) + "\n")
        print(f"counted: {args.count}")
        return 0
    if args.config:
        raise ValueError("--config goes with --count; give what that writes with --counted")
    if min(args.gpus) < 1:
        raise ValueError(f"--gpus {min(args.gpus)}: at least 1")
    assumed, counted = _assumptions(args.assume), Counted.load(args.counted)
    if args.stage not in counted.sent:
        raise ValueError(f"--stage {args.stage}: {args.counted} has {', '.join(map(str, counted.sent))}")
    numbers = sorted({1, *args.gpus})
    steps = {
        stage: [model_step(assumed, number, counted.gflop_per_clip, sent) for number in numbers]
        for stage, sent in counted.sent.items()
    }
    tables = markdown(f"avs-dist bench scaling {shlex.join(argv)}".strip(), assumed, counted, steps, args.stage)
    save(args, _as_json(assumed, counted, steps), tables)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(scaling_png(f"{counted.name}, {assumed.clips} clips a GPU", steps, args.stage))
    print(tables)
    return 0


def markdown(
    command: str, assumed: Assumptions, counted: Counted, steps: Mapping[int, Sequence[Step]], shown: int
) -> str:
    facts = (
        f"A model, not a measurement: {command}. Counted: {counted.name}, {counted.parameters:,} parameters, "
        f"{counted.precision}, {counted.gflop_per_clip:,.1f} GFLOP of a clip forward and backward, and the collectives "
        "of a step of each ZeRO stage."
    )
    values = [f"- {name} = {value:g}: {text}" for name, value, text in _described(assumed)]
    return (
        "\n\n".join(
            [facts, "Assumed:\n\n" + "\n".join(values), _efficiencies(steps), _parts(steps[shown], shown, assumed)]
        )
        + "\n"
    )


def _efficiencies(steps: Mapping[int, Sequence[Step]]) -> str:
    numbers = [step.gpus for step in next(iter(steps.values()))]
    rows = [["GPUs", *(f"{number:,}" for number in numbers)]]
    rows += [
        [f"efficiency, ZeRO {stage}", *(f"{efficiency(step, row[0]):.1%}" for step in row)]
        for stage, row in steps.items()
    ]
    return table(rows)


def _parts(row: Sequence[Step], stage: int, assumed: Assumptions) -> str:
    names = ("computing", "straggling", "gradients", "weights", "own", "reading")
    rows = [["GPUs", *(f"{name}, ms" for name in names), "step, ms", "clips/s", "efficiency"]]
    for step in row:
        parts = [f"{1e3 * getattr(step, name):.2f}" for name in names]
        clips = step.gpus * assumed.clips / step.seconds
        rows.append(
            [f"{step.gpus:,}", *parts, f"{1e3 * step.seconds:.2f}", f"{clips:,.0f}", f"{efficiency(step, row[0]):.1%}"]
        )
    return f"ZeRO {stage}:\n\n{table(rows)}"


def _described(assumed: Assumptions) -> list[tuple[str, float, str]]:
    """Name, value and meaning of each field, which the docstring has."""
    meanings = dict(re.findall(r"(?m)^\s+(\w+): (.+)\.$", Assumptions.__doc__ or ""))
    return [(field.name, getattr(assumed, field.name), meanings[field.name]) for field in dataclasses.fields(assumed)]


def _assumptions(words: Sequence[str]) -> Assumptions:
    kinds = typing.get_type_hints(Assumptions)
    values: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in kinds:
            raise ValueError(f"--assume {word}: there is {', '.join(kinds)}")
        try:
            values[name] = kinds[name](text)
        except ValueError as error:
            raise ValueError(f"--assume {word}: {text or 'nothing'} is no {kinds[name].__name__}") from error
    return Assumptions(**values)


def _as_json(assumed: Assumptions, counted: Counted, steps: Mapping[int, Sequence[Step]]) -> dict[str, Any]:
    modelled = {
        stage: [{**step._asdict(), "seconds": step.seconds, "efficiency": efficiency(step, row[0])} for step in row]
        for stage, row in steps.items()
    }
    return {
        "note": "a model, not a measurement",
        "assumed": vars(assumed),
        "counted": counted.to_dict(),
        "steps": modelled,
    }


def _parser() -> Parser:
    parser = Parser(
        "bench scaling",
        description=__doc__,
        epilog="assumptions:\n" + "\n".join(f"  {n}={v:g}: {text}" for n, v, text in _described(Assumptions())),
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="numbers of GPUs (default: 1 to 1,024)")
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="ZeRO stage shown in parts (default 1)")
    parser.add_argument("--assume", nargs="+", default=[], metavar="NAME=VALUE", help="see below")
    parser.add_argument("--counted", type=Path, default=DEFAULT, help="what a step computes and sends, by --count")
    parser.add_argument("--count", type=Path, metavar="FILE", help="count that for --config, write it, and end")
    parser.add_argument("--config", action="append", metavar="FILE", help="settings of the network; several compose")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="longest time for counting (default 3600)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the curves")
    parser.add_results()
    return parser
