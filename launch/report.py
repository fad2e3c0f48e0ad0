"""Pictures of what a checkpoint has learnt."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Literal

from avs_dist.config import Config
from avs_dist.launch.cli import run
from avs_dist.launch.evaluate import load_for_shards
from avs_dist.launch.parser import Parser, add_max_damaged
from avs_dist.shards.files import write_text

LATENTS_HELP = """Draw the latent codes of the frames of a split, all in one t-SNE embedding (Fig. 3 of ECMVAE).

    avs-dist report latents --checkpoint runs/ecmvae --split test --out latents.png

Each point is the mean of one code of one frame. Writes the picture, and beside it a .json with the coordinates and the
silhouette score of the codes in their own space. The codes come from separate encoders and lie apart even in an
untrained system, so a high score alone says little: compare runs, with and without the orthogonality loss.
"""


DENOISING_HELP = """Draw mIoU and F over the number of denoising steps of a prediction (Fig. 5 of latent diffusion).

    avs-dist report denoising --checkpoint runs/diffusion --split test --out denoising.png --steps 1 2 3 5 10 20

Evaluates the split once for each number of steps. Writes the picture, and beside it a .json with the scores and the
seconds that a prediction takes.
"""

CODES_HELP = """Draw which modalities choose each code of a shared codebook (Fig. 4 of Uni-Code).

    avs-dist report codes --checkpoint runs/cmg/train --split test --out codes.png

Above, a dot for each code in use: how many tokens have it, and whether it is mostly of one modality (over 80 % of its
tokens) or shared (at least 20 % of each). Below, whose its tokens are. Writes the picture, and beside it a .json with
the shares of the codes in use, the share of seconds in which modalities have one code, and the tokens of every code.
"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="avs-dist report", description=__doc__)
    reports = (
        ("latents", _latents_parser(), "the latent codes of the frames of a split, by t-SNE"),
        ("denoising", _denoising_parser(), "the scores over the number of denoising steps"),
        ("codes", _parser(CODES_HELP, out="codes.png"), "which modalities choose each code of a shared codebook"),
    )
    parser.add_commands("report", reports)
    args = parser.parse_args(argv)
    {"latents": _latents, "denoising": _denoising, "codes": _codes}[args.report](args[args.report])
    return 0


def _latents_parser() -> Parser:
    parser = _parser(LATENTS_HELP, out="latents.png")
    add = parser.add_argument
    add("--frames", type=int, default=1000, help="at most so many frames of the split, drawn at random")
    add(
        "--from",
        type=Literal["prior", "posterior"],
        default="prior",
        help="codes from picture and sound alone, or also from the true mask (frames with a mask only)",
    )
    add("--seed", type=int, default=0, help="of the choice of frames and the embedding")
    return parser


def _denoising_parser() -> Parser:
    parser = _parser(DENOISING_HELP, out="denoising.png")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=None,
        help="numbers of steps (default: every one from 1 to model.diffusion.train_steps)",
    )
    return parser


def _parser(description: str, out: str) -> Parser:
    """What all reports ask."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="checkpoint folder, or a run folder: its best checkpoint")
    add("--shards", type=str | None, default=None, help="shard folder (default: that of the training)")
    add("--split", type=str, default="test", help="split of the shards")
    add_max_damaged(parser)
    add("--out", type=Path, default=Path(out), help="picture; the numbers go into a .json beside it")
    return parser


def _latents(args: Any) -> None:
    _check_out(args.out)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be at least 0")
    # after parsing, so that --help and errors come at once
    import torch

    from avs_dist.latent_figure import MIN_FRAMES, choose_frames, collect_codes, embed, latents_png
    from avs_dist.loader import eval_loader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.frames < MIN_FRAMES:
        raise ValueError(f"--frames {args.frames}: an embedding needs at least {MIN_FRAMES}")
    system, config = load_for_shards(args.checkpoint, args.shards, device, args.max_damaged)
    codes = collect_codes(system, eval_loader(config, args.split, batch_size=4), args["from"], device)
    codes = choose_frames(codes, args.frames, args.seed)
    embedding = embed(codes, args.seed)

    num_frames = len(next(iter(codes.values())))
    chosen = f"split {args.split}: t-SNE of the {args['from']} codes of {num_frames} frames"
    numbers = {"from": args["from"], "seed": args.seed, "frames": num_frames, **embedding.to_dict()}
    print(_verdict(embedding.silhouette))
    _write(args, config, latents_png(embedding, _title(args, chosen)), numbers)


def _verdict(silhouette: float | None) -> str:
    if silhouette is None:
        return "the system has one code: there is no silhouette score"
    return (
        f"silhouette score {silhouette:+.3f}: near 1 each code lies in a region of its own, near 0 they overlap, "
        "and below 0 points lie nearer to another code than to their own"
    )


def _denoising(args: Any) -> None:
    _check_out(args.out)
    if args.steps is not None and min(args.steps) < 1:
        raise ValueError(f"--steps {min(args.steps)}: must be at least 1")
    import torch

    from avs_dist.denoising_figure import denoising_png, measure_steps
    from avs_dist.loader import eval_loader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    system, config = load_for_shards(args.checkpoint, args.shards, device, args.max_damaged)
    diffusion = config.model.diffusion
    steps = sorted(set(args.steps or range(1, diffusion.train_steps + 1)))
    points = measure_steps(system, eval_loader(config, args.split, batch_size=4), steps, device)
    for point in points:
        f_score = "-" if point.f_score is None else f"{point.f_score:.4f}"
        print(f"{point.steps:>4} steps  mIoU {point.miou:.4f}  F {f_score}  {point.seconds_per_clip:.4f} s a clip")
    title = _title(args, f"split {args.split}: {diffusion.train_steps} noise levels, {diffusion.spacing} steps")
    settings = {key: getattr(diffusion, key) for key in ("train_steps", "schedule", "spacing", "eta", "samples")}
    numbers = {"config_steps": diffusion.steps, **settings, "points": [point.to_dict() for point in points]}
    _write(args, config, denoising_png(points, title, diffusion.steps), numbers)


def _codes(args: Any) -> None:
    _check_out(args.out)
    import torch

    from avs_dist.code_usage_figure import draw, measure_use
    from avs_dist.loader import eval_loader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    system, config = load_for_shards(args.checkpoint, args.shards, device, args.max_damaged)
    use = measure_use(system, eval_loader(config, args.split, batch_size=16), device)
    for name, value in use.scalars().items():
        print(f"{name:<24} {value:.4f}")
    picture = io.BytesIO()
    draw(use, picture)
    tokens = dict(zip(use.modalities, use.counts_ML.tolist(), strict=True))
    _write(args, config, picture.getvalue(), {**use.scalars(), "tokens": tokens})


def _check_out(out: Path) -> None:
    if out.suffix != ".png":
        raise ValueError(f"--out {out}: must end in .png")


def _title(args: Any, second_line: str) -> str:
    return f"{'/'.join(_checkpoint(args).parts[-3:])}\n{second_line}"


def _checkpoint(args: Any) -> Path:
    from avs_dist.checkpoint import find_checkpoint  # heavy, see _latents

    return find_checkpoint(args.checkpoint)


def _write(args: Any, config: Config, picture: bytes, numbers: dict[str, Any]) -> None:
    """The picture, and beside it the numbers with what they were made of."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(picture)
    facts = {
        "checkpoint": str(_checkpoint(args)),
        "shards": config.data.shards,
        "split": args.split,
    }
    write_text(args.out.with_suffix(".json"), json.dumps({**facts, **numbers}, indent=1) + "\n")
    print(f"written to {args.out} and {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    raise SystemExit(run("report"))
