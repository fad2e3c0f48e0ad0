"""MediaWorker: decoding in a child process that is killed and replaced when it misses its deadline.

Messages go through a socket; they are so short that they never wait for the other side. Bytes, pixels and samples go
through a piece of memory that both have open, which has no name and goes with them, however they end. So nothing that
the child does, not even standing still in the midst of an answer, holds up its parent beyond the deadline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from avs_dist.shards.children import deaf
from avs_dist.shards.faults import ClipFault
from avs_dist.shards.video_member import StoredVideo

START_DEADLINE_S = 120.0
# decord leaks memory over many files; a fresh process costs half a second
RECYCLE_AFTER = 200


class ClipError(ValueError):
    """A clip cannot be used; the message is the reason, `kind` one of faults.KINDS."""

    def __init__(self, message: str, kind: str = "video") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class VideoFacts:
    """What a container says about its video stream (the duration counts its frames)."""

    fps: float
    width: int
    height: int
    duration_s: float


@dataclass(frozen=True)
class Media:
    """A decoded clip.

    frames_THWC:    uint8 RGB [T,size,size,3], or None when no video was asked for.
    waveform_S:     float32 mono at `sample_rate_hz`, at most T seconds, or None without a sound track.
    video:          facts of the container, None when no video was asked for.
    decoder:        "decord" or "pyav".
    stored:         part of the film that gives these frames again, where one was asked for.
    """

    frames_THWC: np.ndarray | None
    waveform_S: np.ndarray | None
    sample_rate_hz: int
    video: VideoFacts | None
    decoder: str | None
    stored: StoredVideo | None = None


class MediaWorker:
    """One decoding process, used by one thread at a time.

    Args:
        deadline_s: Longest time for one request. A hang inside decord is tried once more with PyAV alone.
    """

    def __init__(self, deadline_s: float = 60.0) -> None:
        self._deadline_s = deadline_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._memory = -1
        self._served = 0

    def __enter__(self) -> MediaWorker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def probe(self, path: Path) -> VideoFacts:
        """Facts of a video file.

        Raises:
            ClipError: If it cannot be read, or not in time.
        """
        return VideoFacts(**self._request({"kind": "probe", "video": str(path)})["facts"])

    def decode(
        self, video: Path | None, sound: Path | None, start_s: float, seconds: int, size: int, store: bool = False
    ) -> Media:
        """Frames and sound of the window [start_s, start_s + seconds).

        Args:
            video: File for one frame a second (AVSBench frame rule), resized to size x size; may be None.
            sound: File for the sound, may be the same; may be None.
            seconds: At most so many; fewer when the video ends earlier.
            store: Also cut the part out of the video that gives these frames.

        Raises:
            ClipError: If the file cannot be decoded, or not in time, or no part of it gives the frames.
        """
        request = {
            "kind": "decode",
            "video": str(video) if video else None,
            "sound": str(sound) if sound else None,
            "start_s": start_s,
            "seconds": seconds,
            "size": size,
            "decoder": "decord",
            "store": store,
        }
        try:
            answer = self._request(request)
        except _DecordHung:
            answer = self._request({**request, "decoder": "pyav"})
        facts = answer["facts"]
        return Media(
            frames_THWC=answer["frames"],
            waveform_S=None if facts["rate"] is None else answer["waveform"],
            sample_rate_hz=facts["rate"] or 0,
            video=VideoFacts(*(facts[k] for k in ("fps", "width", "height", "duration_s"))) if video else None,
            decoder=facts["decoder"],
            stored=StoredVideo(answer["data"], **facts["stored"]) if store else None,
        )

    def decode_member(self, stored: StoredVideo) -> np.ndarray:
        """uint8 RGB [T,size,size,3], the frames of a stored video.

        Raises:
            ClipFault: If it cannot be decoded, or not in time.
        """
        request = {"kind": "member", "stored": stored.facts, "bytes": len(stored.data), "video": stored.member}
        try:
            return self._request(request, stored.data)["frames"]
        except ClipError as error:
            raise ClipFault(error.kind, str(error)) from error

    def close(self) -> None:
        """End the process; the next request starts another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            os.close(self._memory)

    def interrupt(self) -> None:
        """End the request in progress, from any thread."""
        process = self._process
        if process is not None:
            process.kill()

    def _request(self, request: dict[str, Any], data: Any = b"") -> dict[str, Any]:
        if self._served >= RECYCLE_AFTER:
            self.close()
        if self._process is None:
            self._start()
        assert self._connection is not None
        # decord reads all files and some members
        self._served += request["kind"] != "member" or request["stored"]["decoder"] == "decord"
        stage, path = "opening", request["video"] or request["sound"]
        end = time.monotonic() + self._deadline_s
        os.pwrite(self._memory, data, 0)
        try:
            self._connection.send_bytes(json.dumps({**request, "deadline_s": self._deadline_s}).encode())
            while True:
                answer = json.loads(self._receive(end))
                if answer["status"] == "stage":
                    stage, path = answer["stage"], answer["path"]
                elif answer["status"] == "failed":
                    raise ClipError(answer["reason"], answer["kind"])
                else:
                    return self._with_arrays(answer)
        except TimeoutError:
            self.close()
            if stage == "decord":
                raise _DecordHung from None
            raise ClipError(f"hung ({stage} {path}): no answer within {self._deadline_s:g} s") from None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._process.wait() if self._process else None
            self.close()
            raise ClipError(f"the decoder crashed ({stage} {path}), exit code {code}") from None

    def _with_arrays(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Attach what the answer left in the memory, one behind the other."""
        frames_THWC = np.empty(answer.get("shape", (0,)), dtype=np.uint8)
        waveform_S = np.empty(answer.get("samples", 0), dtype=np.float32)
        data = bytearray(answer.get("bytes", 0))
        buffers = [frames_THWC.data.cast("B")] if len(frames_THWC) else []
        buffers += [waveform_S.data.cast("B")] if len(waveform_S) else []
        os.preadv(self._memory, [*buffers, memoryview(data)], 0)
        os.ftruncate(self._memory, 0)
        return {**answer, "frames": frames_THWC if len(frames_THWC) else None, "waveform": waveform_S, "data": data}

    def _receive(self, end: float) -> bytes:
        assert self._connection is not None
        if not self._connection.poll(max(0.0, end - time.monotonic())):
            raise TimeoutError
        return self._connection.recv_bytes()

    def _start(self) -> None:
        ours, theirs = Pipe()
        self._memory = os.memfd_create("clip")
        with deaf():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "avs_dist.shards.decode", str(theirs.fileno()), str(self._memory)],
                pass_fds=[theirs.fileno(), self._memory],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        theirs.close()
        self._connection, self._served = ours, 0
        try:
            self._receive(time.monotonic() + START_DEADLINE_S)
        except (EOFError, TimeoutError, ConnectionResetError):
            self.close()
            raise RuntimeError("the decoding process does not start; its error stands above") from None


class _DecordHung(Exception):
    """decord missed the deadline; PyAV may still read the file."""
