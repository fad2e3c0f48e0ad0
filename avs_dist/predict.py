"""Any video file in; a mask for each second, a painted video with the original sound, and a JSON summary out.

<out>/<name>/masks/0001.png ...         {0,255} at the size of the video, one for each second
<out>/<name>/uncertainty/0001.png ...   of a system that draws several masks: the standard deviation of the probability
                                        over them, 0..0.5 as 0..255
<out>/<name>/classes/0001.png ...       of a system of several classes: class indices, shown in the PASCAL VOC palette
<out>/<name>/overlay.mp4                all frames with the mask of their second, the sound of the input
<out>/<name>/summary.json               what `predict_video` returns
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from avs_dist.clip import Clip, collate
from avs_dist.overlay import write_overlay
from avs_dist.semantic import BACKGROUND
from avs_dist.shards.audio import clip_log_mel, sound_flag
from avs_dist.shards.files import write_text
from avs_dist.shards.palette import colours
from avs_dist.shards.schema import MEL_FRAMES, Sample
from avs_dist.shards.workers import ClipError, MediaWorker, VideoFacts
from avs_dist.systems.base import System
from avs_dist.uncertainty import MAX_STD

LEVELS_PER_S = 8  # of the sound meter
SILENT_RATE_HZ = 16_000  # rate of the silence that stands for a missing sound track
CLASSES_AT_ONCE = 8  # enlarged to the size of the video: all 71 of a 4K frame would take 2.4 GB


@dataclass(frozen=True)
class Window:
    """Frames and log-mel examples of consecutive seconds; the first `skip` of them belong to the window before."""

    sample: Sample
    start: int
    skip: int


class _Painted(NamedTuple):
    """A window at the size of the video, on the CPU."""

    probability_THW: Tensor
    std_THW: Tensor | None
    classes_THW: Tensor | None  # uint8 class indices
    class_names: Sequence[str]  # their numbers where the names are not known

    def mask_HW(self, t: int) -> np.ndarray:
        """Where something sounds in second t; of several classes what the class map says, so that the two agree."""
        if self.classes_THW is None:
            return (self.probability_THW[t] > 0.5).numpy()
        return (self.classes_THW[t] != BACKGROUND).numpy()


def predict_video(
    system: System,
    video_path: str | Path,
    out_dir: str | Path,
    *,
    image_size: int,
    window_s: int = 5,
    device: torch.device | str = "cpu",
    progress: bool = True,
    class_names: Sequence[str] | None = None,
    text_WE: np.ndarray | None = None,
) -> dict[str, Any]:
    """Masks, overlay and summary of one video, in a folder of `out_dir` named like the file without its suffix.

    The video goes through the system in windows of `window_s` seconds, the length of the training clips; neither the
    decoded film nor its masks are ever in memory as a whole.

    Args:
        image_size: Side of the frames the system was trained on; the aspect is not kept, as in AVSBench.
        class_names: Names of the classes of a system that has several; without them the summary has their numbers.
        text_WE: Vectors of the words of a prompt, for a system that is asked in text.

    Returns:
        Facts of the video, `sound` ("ok", "silent" or "none"), `audio_track` of the overlay ("copied", "re-encoded" or
        "none"), paths, and for each second its mask file, `sounding_area` (share of the picture), `mean_probability`
        and `loudness` (mean log-mel; ln 0.01 = -4.6 is digital silence). Of a system that gives a variance also
        `uncertainty`, the folder of those pictures, and for each second `mean_std`. Of a system of several classes also
        `classes`, the folder of the class maps, `class_names` if known, and for each second `class_areas`: the share of
        the picture of each class that is there, by name (or number), but for the background.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as a video, or an argument is out of range.
    """
    video, folder = Path(video_path), Path(out_dir) / Path(video_path).stem
    if not video.is_file():
        raise FileNotFoundError(f"no such video file: {video}")
    if window_s < 1:
        raise ValueError(f"window_s is {window_s}: a window has at least 1 second")
    seconds: list[dict[str, Any]] = []
    levels: list[np.ndarray] = []
    sounds: set[str] = set()
    with MediaWorker() as worker:
        try:
            facts = worker.probe(video)
            for kind in ("masks", "uncertainty", "classes"):
                _remove_pictures(folder / kind)
            total = _whole_seconds(facts)
            bar = tqdm(total=total, desc=f"predict {video.name}", unit="s", disable=not progress)
            for window in _windows(worker, video, facts, image_size, window_s):
                clip = collate([replace(window.sample, text_WE=text_WE)])
                painted = _paint(system, clip, (facts.height, facts.width), device, class_names)
                sounds.add(window.sample.meta["sound"])
                for t in range(window.skip, len(painted.probability_THW)):
                    mel_FM = window.sample.mel_TFM[t]
                    seconds.append(_write_second(folder, window.start + t, painted, t, mel_FM))
                    levels.append(mel_FM.reshape(LEVELS_PER_S, MEL_FRAMES // LEVELS_PER_S, -1).mean(axis=(1, 2)))
                bar.update(len(painted.probability_THW) - window.skip)
            bar.close()
        except ClipError as error:
            raise ValueError(f"{video}: cannot be read as a video: {error}") from None
    kind = "classes" if "class_areas" in seconds[0] else "masks"
    pictures = [folder / kind / Path(second["mask"]).name for second in seconds]
    overlay = folder / "overlay.mp4"
    track = write_overlay(video, overlay, pictures, np.concatenate(levels), LEVELS_PER_S, progress)
    summary = {
        "video": str(video),
        "overlay": str(overlay),
        "width": facts.width,
        "height": facts.height,
        "fps": facts.fps,
        "duration_s": facts.duration_s,
        "image_size": image_size,
        "window_s": window_s,
        "sound": next(kind for kind in ("ok", "silent", "none") if kind in sounds),
        "audio_track": track,
        "seconds": seconds,
    }
    if "mean_std" in seconds[0]:
        summary["uncertainty"] = str(folder / "uncertainty")
    if "class_areas" in seconds[0]:
        summary["classes"] = str(folder / "classes")
        if class_names is not None:
            summary["class_names"] = list(class_names)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _whole_seconds(facts: VideoFacts) -> int:
    """Seconds that get a mask: a started one counts when at least half of it exists, and there is always one."""
    return max(1, int(facts.duration_s + 0.5))


def _windows(worker: MediaWorker, video: Path, facts: VideoFacts, image_size: int, window_s: int) -> Iterator[Window]:
    """Consecutive windows; the last one reaches back over the one before, so that it is as long as the others."""
    total = _whole_seconds(facts)
    for first_new in range(0, total, window_s):
        start = max(0, min(first_new, total - window_s))
        media = worker.decode(video, video, float(start), min(window_s, total - start), image_size)
        assert media.frames_THWC is not None
        count = len(media.frames_THWC)
        # copies: what comes from the decoding process is read-only, which torch warns about
        frames_THWC = media.frames_THWC.copy()
        wave_S = media.waveform_S.copy() if media.waveform_S is not None else np.zeros(0, dtype=np.float32)
        mel_TFM = clip_log_mel(wave_S, media.sample_rate_hz or SILENT_RATE_HZ, count).numpy()
        no_mask = np.zeros((count, image_size, image_size), dtype=np.uint8)
        unlabelled = np.zeros(count, dtype=bool)
        meta = {"sound": sound_flag(media.waveform_S)}
        # a name of its own, as draws of latent codes depend on it
        name = f"{video.stem}/{start}"
        sample = Sample(name, frames_THWC, mel_TFM, no_mask, unlabelled, meta)
        yield Window(sample, start, first_new - start)


@torch.no_grad()
def _paint(
    system: System,
    clip: Clip,
    size_HW: tuple[int, int],
    device: torch.device | str,
    class_names: Sequence[str] | None,
) -> _Painted:
    prediction = system.predict(clip.to(device))
    probability_THW = _enlarged(prediction.logits_BTHW, size_HW).sigmoid().cpu()
    std_THW, classes_THW, names = None, None, class_names or ()
    if prediction.variance_BTHW is not None:
        std_THW = _enlarged(prediction.variance_BTHW, size_HW).clamp_min(0).sqrt().cpu()
    if prediction.class_logits_BTKHW is not None:
        num_classes = prediction.class_logits_BTKHW.shape[2]
        names = names or [str(number) for number in range(num_classes)]
        if len(names) != num_classes:
            raise ValueError(f"{len(names)} class names for a system of {num_classes} classes")
        classes_THW = torch.stack([_class_map(c_KHW, size_HW) for c_KHW in prediction.class_logits_BTKHW[0]])
    return _Painted(probability_THW, std_THW, classes_THW, names)


def _enlarged(value_NCHW: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """The only item of a batch at another size, [C,H,W]."""
    return F.interpolate(value_NCHW.float(), size_HW, mode="bilinear", align_corners=False)[0]


def _class_map(class_logits_KHW: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """Index of the class whose logit is highest at the size of the video: uint8 on the CPU."""
    best_HW = torch.full(size_HW, -torch.inf, device=class_logits_KHW.device)
    index_HW = torch.zeros(size_HW, dtype=torch.int64, device=class_logits_KHW.device)
    for first in range(0, len(class_logits_KHW), CLASSES_AT_ONCE):
        part_KHW = class_logits_KHW[first : first + CLASSES_AT_ONCE]
        highest_HW, which_HW = _enlarged(part_KHW[None], size_HW).max(dim=0)
        index_HW = torch.where(highest_HW > best_HW, which_HW + first, index_HW)
        best_HW = torch.maximum(highest_HW, best_HW)
    return index_HW.to(torch.uint8).cpu()


def _write_second(folder: Path, second: int, painted: _Painted, t: int, mel_FM: np.ndarray) -> dict[str, Any]:
    probability_HW, mask_HW = painted.probability_THW[t], painted.mask_HW(t)
    name = f"{second + 1:04d}.png"
    path = folder / "masks" / name
    _write_picture(path, Image.fromarray(mask_HW.astype(np.uint8) * 255))
    facts = {
        "second": second,
        "mask": str(path),
        "sounding_area": float(mask_HW.mean()),
        "mean_probability": float(probability_HW.mean()),
        "loudness": float(mel_FM.mean()),
    }
    if painted.std_THW is not None:
        std_HW = painted.std_THW[t].numpy()
        grey_HW = (std_HW * (255 / MAX_STD)).round().clip(0, 255)
        _write_picture(folder / "uncertainty" / name, Image.fromarray(grey_HW.astype(np.uint8)))
        facts["mean_std"] = float(std_HW.mean())
    if painted.classes_THW is not None:
        class_map = Image.fromarray(painted.classes_THW[t].numpy())
        class_map.putpalette(colours(len(painted.class_names)).tobytes())
        _write_picture(folder / "classes" / name, class_map)
        facts["class_areas"] = _class_areas(painted.classes_THW[t], painted.class_names)
    return facts


def _class_areas(classes_HW: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Share of the picture of each class that is there but for the background, the largest first."""
    counts = torch.bincount(classes_HW.flatten(), minlength=len(names)).tolist()
    there = sorted((k for k in range(len(names)) if counts[k] and k != BACKGROUND), key=lambda k: -counts[k])
    return {names[k]: counts[k] / classes_HW.numel() for k in there}


def _write_picture(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, format="PNG")
    partial.replace(path)


def _remove_pictures(folder: Path) -> None:
    """Those of an earlier, longer video of the same name, or of another system, must not stay."""
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
