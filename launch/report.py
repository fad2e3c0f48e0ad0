"""Pictures of what a checkpoint has learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from avs_dist.launch.cli import run
from avs_dist.launch.evaluate import load_for_shards
from avs_dist.launch.parser import Parser

LATENTS_HELP = """Draw the latent codes of the frames of a split, all in one t-SNE embedding (Fig. 3 of ECMVAE).

    avs-dist report latents --checkpoint runs/ecmvae --split test --out latents.png

Each point is the mean of one code of one frame. Writes the picture, and beside it a .json with the coordinates and the
silhouette score of the codes in their own space. The codes come from separate encoders and lie apart even in an
untrained system, so a high score alone says little: compare runs, with and without the orthogonality loss.
"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="avs-dist report", description=__doc__)
    reports = parser.add_subcommands(required=True, dest="report")
    latents = _latents_parser()
    reports.add_subcommand("latents", latents, help="the latent codes of the frames of a split, by t-SNE")
    latents.prog = "avs-dist report latents"  # errors and help then name the command as it is typed
    latents.usage = f"{latents.prog} [options]"
    _latents(parser.parse_args(argv).latents)
    return 0


def _latents_parser() -> Parser:
    parser = Parser(description=LATENTS_HELP)
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="checkpoint folder, or a run folder: its best checkpoint")
    add("--shards", type=str | None, default=None, help="shard folder (default: that of the training)")
    add("--split", type=str, default="test", help="split of the shards")
    add("--out", type=Path, default=Path("latents.png"), help="picture; the numbers go into a .json beside it")
    add("--frames", type=int, default=1000, help="at most so many frames of the split, drawn at random")
    add(
        "--from",
        type=Literal["prior", "posterior"],
        default="prior",
        help="codes from picture and sound alone, or also from the true mask (frames with a mask only)",
    )
    add("--seed", type=int, default=0, help="of the choice of frames and the embedding")
    return parser


def _latents(args: Any) -> None:
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: must end in .png")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be at least 0")
    # after parsing, so that --help and errors come at once
    import torch

    from avs_dist.checkpoint import find_checkpoint
    from avs_dist.latent_figure import MIN_FRAMES, choose_frames, collect_codes, embed, latents_png
    from avs_dist.loader import eval_loader
    from avs_dist.shards.files import write_text

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.frames < MIN_FRAMES:
        raise ValueError(f"--frames {args.frames}: an embedding needs at least {MIN_FRAMES}")
    system, config = load_for_shards(args.checkpoint, args.shards, device)
    codes = collect_codes(system, eval_loader(config, args.split, batch_size=4), args["from"], device)
    codes = choose_frames(codes, args.frames, args.seed)
    embedding = embed(codes, args.seed)

    checkpoint = find_checkpoint(args.checkpoint)
    num_frames = len(next(iter(codes.values())))
    chosen = f"split {args.split}: t-SNE of the {args['from']} codes of {num_frames} frames"
    title = f"{'/'.join(checkpoint.parts[-3:])}\n{chosen}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(latents_png(embedding, title))
    facts = {
        "checkpoint": str(checkpoint),
        "shards": str(Path(config.data.shards)),
        "split": args.split,
        "from": args["from"],
        "seed": args.seed,
        "frames": num_frames,
    }
    write_text(args.out.with_suffix(".json"), json.dumps({**facts, **embedding.to_dict()}, indent=1) + "\n")
    print(_verdict(embedding.silhouette))
    print(f"written to {args.out} and {args.out.with_suffix('.json')}")


def _verdict(silhouette: float | None) -> str:
    if silhouette is None:
        return "the system has one code: there is no silhouette score"
    return (
        f"silhouette score {silhouette:+.3f}: near 1 each code lies in a region of its own, near 0 they overlap, "
        "and below 0 points lie nearer to another code than to their own"
    )


if __name__ == "__main__":
    raise SystemExit(run("report"))
