"""Paint what sounds on any video file, with a trained checkpoint.

    avs-dist predict --checkpoint runs/demo/train film.mp4 clip.webm --out painted

For each video: painted/NAME/masks/0001.png ... (one a second, 0 or 255, at the size of the video), overlay.mp4 (the
video with the masks and its own sound) and summary.json. Long videos go through in windows, in constant memory.

A system that samples latent codes paints a mask for each of --samples draws and gives their mean. How much they differ
is in painted/NAME/uncertainty/0001.png ...: grey, the standard deviation of the probability, 0 (black) to 0.5 (white).

A system of queries paints what the sound means, or with --prompt "the sound of a dog" what the words mean.

A system of several classes (AVSS) also says what sounds: painted/NAME/classes/0001.png ... hold class indices in the
PASCAL VOC palette, overlay.mp4 has each class in its colour, and summary.json how much of the picture each class takes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser

if TYPE_CHECKING:  # heavy, see main
    import numpy as np

    from avs_dist.shards.text import WordVectors
    from avs_dist.systems.base import System


def build_parser() -> Parser:
    parser = Parser(prog="avs-dist predict", description=__doc__)
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="any format that ffmpeg reads")
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="checkpoint folder, or a run folder: its best checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder; each video gets one named like it")
    parser.add_argument(
        "--window", type=int, default=5, help="seconds seen at a time: the length of the training clips"
    )
    parser.add_argument(
        "--device", type=str, default="auto", help='"auto" (a GPU if there is one), "cpu", "cuda:1" ...'
    )
    parser.add_argument(
        "--samples",
        type=int | None,
        default=None,
        help="draws that a mask averages, 1: no uncertainty (default: that of the training config)",
    )
    parser.add_argument(
        "--prompt",
        type=str | None,
        default=None,
        help='ask a system of queries in words, as in "the sound of a dog" (default: the sound of the video asks)',
    )
    parser.add_argument(
        "--word-vectors",
        type=Path | None,
        default=None,
        help="with --prompt: the file its shards were built with (default: vectors made from the words)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _check(args.videos)
    # after parsing, so that --help and errors come at once
    import torch

    from avs_dist.checkpoint import class_names, image_size, load_system
    from avs_dist.predict import predict_video
    from avs_dist.uncertainty import set_num_samples

    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if args.device == "auto" else args.device)
    system, _ = load_system(args.checkpoint, device)
    if args.samples is not None:
        set_num_samples(system, args.samples)
    options: dict[str, Any] = {"text_WE": _ask(system, args)}
    size, names = image_size(args.checkpoint), class_names(args.checkpoint)
    options |= {"image_size": size, "window_s": args.window, "device": device, "class_names": names}
    for video in args.videos:
        done = predict_video(system, video, args.out, **options)
        area = sum(second["sounding_area"] for second in done["seconds"]) / len(done["seconds"])
        print(
            f"{video}: {len(done['seconds'])} masks, {area:.1%} of the picture sounds; "
            f"sound {done['sound']}, track {done['audio_track']}; {done['overlay']}",
            flush=True,
        )
        if "uncertainty" in done:
            spread = sum(second["mean_std"] for second in done["seconds"]) / len(done["seconds"])
            print(f"{video}: standard deviation {spread:.4f} on average; {done['uncertainty']}", flush=True)
        if "classes" in done:
            print(f"{video}: {_largest(done['seconds'])}; {done['classes']}", flush=True)
    return 0


def _ask(system: System, args: Any) -> np.ndarray | None:
    """Have the words of --prompt ask, whose vectors are returned, or the sound, whatever asked in training.

    Raises:
        FileNotFoundError, ValueError: word vectors that are missing, not those of the training, or not for a prompt; a
            prompt without known words; a system that answers no queries.
    """
    from avs_dist.systems.query import set_query

    if args.prompt is not None:
        set_query(system, "text")
        return _word_vectors(args.checkpoint, args.word_vectors).of(args.prompt)
    if args.word_vectors is not None:
        raise ValueError(f"--word-vectors {args.word_vectors}: is for --prompt")
    if system.query is not None:
        set_query(system, "audio")
    return None


def _word_vectors(checkpoint: str, path: Path | None) -> WordVectors:
    """Of a file, or hashed; as in the training, where the checkpoint says what that was."""
    from avs_dist.checkpoint import word_vectors
    from avs_dist.shards.text import WordVectors

    vectors, learnt = WordVectors.load(path), word_vectors(checkpoint)
    if learnt not in (None, vectors.name):
        raise ValueError(
            f"{checkpoint} was trained with word vectors {learnt}: give that file as --word-vectors (hashed: no file)"
        )
    return vectors


def _largest(seconds: list[dict[str, Any]], shown: int = 5) -> str:
    """The classes that take most of the picture, on average over the seconds."""
    total: Counter[str] = Counter()
    for second in seconds:
        total.update(second["class_areas"])
    found = (f"{name} {area / len(seconds):.1%}" for name, area in total.most_common(shown))
    return ", ".join(found) or "no class sounds"


def _check(videos: list[Path]) -> None:
    """Errors that would otherwise come after minutes of work."""
    for video in videos:
        if not video.is_file():
            raise FileNotFoundError(f"no such video file: {video}")
    names = [video.stem for video in videos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several videos are named {', '.join(twice)}: their outputs would mix; run them one by one")


if __name__ == "__main__":
    raise SystemExit(run("predict"))
