"""A synthetic benchmark of paired feature sequences, in the layouts of the public feature sets.

Clips of `sequence_world.py` are written twice, with different draws: as VGGSound-AVEL (one event a clip, for training
and transfer) and as AVVP (events localised in each modality). A clip depends on seed and number only.

    VGGSound-AVEL/vggsound-avel40k.csv                   category,video_id,split
    VGGSound-AVEL/vggsoundCategories2Prompts.csv         label,prompt
    VGGSound-AVEL/feature/{video,audio,label}/zip/ID.zip  [T,h,w,C], [T,C], [1,T] (1 = the event happens)
    AVVP/AVVP_eval_{visual,audio}_checked_combined.csv   filename, event_labels, onset, offset, split; tabs between
    AVVP/feature/{video,audio}/zip/ID.zip                ID: the first 11 characters of the filename

Each zip holds one pickled array.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from tqdm import tqdm

from avs_dist.shards.files import write_text
from avs_dist.shards.plain_pickle import write_zip_array
from avs_dist.shards.sequence_world import World, make_sequence, make_world
from avs_dist.shards.synthetic import split_of

FOLDERS = ("VGGSound-AVEL", "AVVP")
_LISTS = tuple(f"AVVP_eval_{modality}_checked_combined.csv" for modality in ("visual", "audio"))


def write_sequences(out: Path, clips: int, seed: int = 0, progress: bool = True) -> list[Path]:
    """Write both sets below `out`, `clips` clips each; returns their folders.

    Of every ten clips, one is for validation and one for test. The csv files are written last: a folder without them
    is an interrupted run.

    Raises:
        ValueError: clips or seed out of range.
        FileExistsError: a folder exists and is not empty.
    """
    if clips < 1 or seed < 0:
        raise ValueError(f"clips is {clips} and seed {seed}: give at least 1 clip and no negative seed")
    roots = [out / folder for folder in FOLDERS]
    for root in roots:
        if root.exists() and any(root.iterdir()):
            raise FileExistsError(f"{root} already holds data: remove it or choose another --out")
    world = make_world(seed)
    with tqdm(total=2 * clips, desc="synth cmg", unit="clip", disable=not progress) as bar:
        _write_avel(roots[0], world, clips, seed, bar)
        _write_avvp(roots[1], world, clips, seed, bar)
    return roots


def sequence_of(world: World, seed: int, folder: str, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Clip number `index` of one of FOLDERS, see `make_sequence`."""
    return make_sequence(np.random.default_rng([seed, 1 + FOLDERS.index(folder), index]), world)


def _write_avel(root: Path, world: World, clips: int, seed: int, bar: tqdm) -> None:
    rows = []
    for index in range(clips):
        visual_THWC, audio_TC, labels_TK, category = sequence_of(world, seed, FOLDERS[0], index)
        name = f"avel_{index:06d}"
        label_1T = labels_TK[None, :, world.events.index(category)]
        _write_arrays(root, name, {"video": visual_THWC, "audio": audio_TC, "label": label_1T})
        rows.append((category, name, split_of(index)))
        bar.update()
    # words have letters only: the kinds are a, b, c ...
    prompts = [(event, f"an event of kind {kind}") for event, kind in zip(world.events, ascii_lowercase, strict=False)]
    _write_table(root / "vggsoundCategories2Prompts.csv", ("label", "prompt"), prompts)
    _write_table(root / "vggsound-avel40k.csv", ("category", "video_id", "split"), rows)


def _write_avvp(root: Path, world: World, clips: int, seed: int, bar: tqdm) -> None:
    rows = []
    for index in range(clips):
        visual_THWC, audio_TC, labels_TK, _ = sequence_of(world, seed, FOLDERS[1], index)
        name = f"avvp_{index:06d}"
        _write_arrays(root, name, {"video": visual_THWC, "audio": audio_TC})
        intervals = _intervals(world, labels_TK)
        cells = [",".join(str(interval[i]) for interval in intervals) for i in range(3)]
        rows.append((f"{name}_0_{len(labels_TK)}", *cells, split_of(index)))
        bar.update()
    for name in _LISTS:
        _write_table(root / name, ("filename", "event_labels", "onset", "offset", "split"), rows, delimiter="\t")


def _intervals(world: World, labels_TK: np.ndarray) -> list[tuple[str, int, int]]:
    """Event, first second and second after the last, of each time that an event happens."""
    edges_TK = np.diff(labels_TK.astype(np.int8), axis=0, prepend=0, append=0)
    intervals = []
    for k, event in enumerate(world.events):
        onsets, offsets = np.flatnonzero(edges_TK[:, k] > 0), np.flatnonzero(edges_TK[:, k] < 0)
        intervals += [(event, int(on), int(off)) for on, off in zip(onsets, offsets, strict=True)]
    return intervals


def _write_arrays(root: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    for folder, array in arrays.items():
        path = root / "feature" / folder / "zip" / f"{name}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_zip_array(path, array)


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]], delimiter: str = ",") -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())
