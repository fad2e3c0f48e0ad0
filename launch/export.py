"""Write a checkpoint as a folder to pass on: model.safetensors, config.json and README.md, a model card.

    avs-dist export runs/ms3 --out ms3-tpavi

Of a run, its best checkpoint; or give the folder of a checkpoint. What only its training needs is left out. The folder
is loaded with no DeepSpeed (`avs_dist.checkpoint.load_system`, `avs-dist evaluate --checkpoint ms3-tpavi`, `predict`),
and starts another run (`avs-dist train --train.init_from ms3-tpavi`).

config.json names the places of the training data (URLs without what they hold of credentials). The license is left
open: write it into README.md before you pass the folder on.
"""

from __future__ import annotations

from pathlib import Path

from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser


def build_parser() -> Parser:
    parser = Parser(prog="avs-dist export", description=__doc__, usage="avs-dist export CHECKPOINT --out FOLDER")
    parser.add_argument(
        "checkpoint", type=str, metavar="CHECKPOINT", help="checkpoint folder, or a run folder: its best"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not be there yet")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from avs_dist.checkpoint import find_checkpoint  # after parsing, so that --help and errors come at once
    from avs_dist.export import export

    out = export(args.checkpoint, args.out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"{find_checkpoint(args.checkpoint)} -> {out}, {size / 1e6:.1f} MB; the license in {out / 'README.md'} is open"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run("export"))
