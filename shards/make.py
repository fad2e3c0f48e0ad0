"""ClipJob -> Sample: reads the pictures, has the media decoded, computes the log-mel."""

from __future__ import annotations

from typing import Any

import numpy as np

from avs_dist.shards.audio import clip_log_mel, sound_flag
from avs_dist.shards.images import read_binary_mask, read_class_mask, read_frame
from avs_dist.shards.schema import Sample
from avs_dist.shards.sources import ClipJob
from avs_dist.shards.stored_mel import mel_flag, read_stored_mel
from avs_dist.shards.video_member import StoredVideo
from avs_dist.shards.workers import ClipError, Media, MediaWorker


def make_sample(
    job: ClipJob, worker: MediaWorker, size: int, store_video: bool = False
) -> tuple[Sample, StoredVideo | None]:
    """Make one clip; with `store_video` also the part of its film that gives the same frames.

    Raises:
        ClipError, ValueError, OSError: If it cannot be made; the message names the files.
    """
    if job.problem:
        raise ClipError(job.problem)
    if store_video and job.video is None:
        raise ClipError(f"{job.path} has extracted frames, no film to store: add --decode-video or use other --frames")
    # of a clip with extracted frames only the sound is decoded
    wanted = len(job.frames) or job.seconds
    media = worker.decode(job.video, job.sound, job.start_s, wanted, size, store_video)
    meta: dict[str, Any] = {**job.meta, "start_s": job.start_s, "decoder": media.decoder or "png"}
    if job.frames:
        pictures = [read_frame(path, size, job.fit) for path in job.frames]
        frames_THWC = np.stack([pixels for pixels, _ in pictures])
        originals = [original for _, original in pictures]
        meta |= {"fps": None, "width": originals[0][0], "height": originals[0][1]}
    else:
        assert media.frames_THWC is not None
        assert media.video is not None
        frames_THWC = media.frames_THWC
        originals = [(media.video.width, media.video.height)] * len(frames_THWC)
        meta |= {"fps": media.video.fps, "width": media.video.width, "height": media.video.height}
    seconds = len(frames_THWC)
    masks_THW, labelled_T = _read_masks(job, originals, size)
    mel_TFM, sound_facts = _log_mel(job, media, seconds)
    meta |= sound_facts
    return Sample(job.name, frames_THWC, mel_TFM, masks_THW, labelled_T, meta), media.stored


def _log_mel(job: ClipJob, media: Media, seconds: int) -> tuple[np.ndarray, dict[str, Any]]:
    """float32 [T,96,64], computed or as published, and the facts of the sound."""
    if job.mel:
        mel_TFM = read_stored_mel(job.mel, seconds)
        return mel_TFM, {"sound": mel_flag(mel_TFM), "sample_rate_hz": 0, "mel": "stored"}
    waveform_S = media.waveform_S if media.waveform_S is not None else np.zeros(0, dtype=np.float32)
    mel_TFM = clip_log_mel(waveform_S, media.sample_rate_hz or 16_000, seconds).numpy()
    return mel_TFM, {"sound": sound_flag(media.waveform_S), "sample_rate_hz": media.sample_rate_hz}


def _read_masks(job: ClipJob, originals: list[tuple[int, int]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the seconds, uint8 [T,size,size], and which seconds have one; `originals`: (width, height) of frames."""
    seconds = len(originals)
    paths = job.masks[:seconds]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ClipError(f"missing mask files in {paths[0].parent}: {', '.join(missing)}")
    masks_THW = np.zeros((seconds, size, size), dtype=np.uint8)
    for t, path in enumerate(paths):
        if job.num_classes > 1:
            masks_THW[t] = read_class_mask(path, size, job.fit, originals[t], job.num_classes)
        else:
            masks_THW[t] = read_binary_mask(path, size)
    return masks_THW, np.arange(seconds) < len(paths)
