"""Reading single clips out of tar shards by their byte ranges.

Shards may come from strangers. Nothing is ever unpickled: only our own decoders see the members. Nothing but plain
files of bounded size is accepted, and no name from a shard is used as a path or URL.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from avs_dist.shards.faults import ClipFault, Damage, DamagedClipError, printable
from avs_dist.shards.feature_members import decode_features
from avs_dist.shards.index import ClipEntry, ShardEntry, ShardIndex
from avs_dist.shards.members import Sound, decode_clip, decode_facts, decode_sound
from avs_dist.shards.plan import swapped
from avs_dist.shards.schema import FEATURES, MEL_BANDS, MEL_FRAMES, SILENT_LOG_MEL, FeatureSample, Sample
from avs_dist.shards.store import LocalStore, Store
from avs_dist.shards.untar import members_of
from avs_dist.shards.workers import MediaWorker

if TYPE_CHECKING:  # local shards need nothing of what fetches others
    from avs_dist.shards.shard_cache import ShardCache

Audio = Literal["real", "muted", "swapped"]
Result = TypeVar("Result")
# clips that are asked for their sound, before one goes without
MOST_DONORS = 100
# clips of a shard that a description names
_TOLD = 8
# what decoders of pictures, numbers and text raise on rubbish
_DECODING_ERRORS = (ValueError, OSError, SyntaxError, EOFError, struct.error, OverflowError, MemoryError)


class _Place(NamedTuple):
    """Where a clip lies."""

    set_number: int
    shard: ShardEntry
    entry: ClipEntry


class ClipReader:
    """The clips of one split by id; ids count through the sets and their shards in order.

    Args:
        sets: Index of the shards, or several of them whose clips are alike.
        audio: "real"; "muted" (the log-mel of silence); "swapped" (that of the clip half the split away).
        video_deadline_s: Longest time for decoding a clip that is stored as video.
        cache: Where shards are kept that come from a URL.

    Raises:
        ValueError: If there is no such split, or the sound of features should be replaced.
    """

    def __init__(
        self,
        sets: ShardIndex | Sequence[ShardIndex],
        split: str,
        audio: Audio = "real",
        *,
        video_deadline_s: float = 60.0,
        cache: ShardCache | None = None,
    ) -> None:
        if audio not in ("real", "muted", "swapped"):
            raise ValueError(f"audio must be real, muted or swapped, got '{audio}'")
        self._sets = [sets] if isinstance(sets, ShardIndex) else list(sets)
        first = self._sets[0]
        self._kind, self._split = first.kind, split
        if audio != "real" and self._kind == FEATURES:
            raise ValueError(
                f"{first.place} holds features, not log-mels that audio='{audio}' could replace: use 'real'"
            )
        self._silence_D = first.silence_D
        shards = [index.split(split) for index in self._sets]
        self.shard_counts = [[len(shard.clips) for shard in each] for each in shards]
        self._places = [
            _Place(k, shard, clip) for k, each in enumerate(shards) for shard in each for clip in shard.clips
        ]
        self._audio = audio
        self._video_deadline_s, self._cache = video_deadline_s, cache
        self._stores: list[Store] | None = None
        self._media: MediaWorker | None = None
        if audio == "swapped":
            swapped(0, len(self))

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens its own files and decoders."""
        return {**self.__dict__, "_stores": None, "_media": None}

    @property
    def shard_keys(self) -> list[list[list[str]]]:
        """Keys of the clips in each shard of each set."""
        shards = (index.split(self._split) for index in self._sets)
        return [[[clip.key for clip in shard.clips] for shard in each] for each in shards]

    def clips_of_same_set(self, clip: int) -> range:
        """Ids of all clips that come from the set of shards that this one is in."""
        number = self._places[clip].set_number
        first = sum(sum(counts) for counts in self.shard_counts[:number])
        return range(first, first + sum(self.shard_counts[number]))

    def sample(self, clip: int, own_sound: bool = False) -> Any:
        """Decoded sample of a clip: Sample, or FeatureSample where the shards hold features.

        Args:
            own_sound: Leave it its own, whatever the reader gives others.

        Raises:
            DamagedClipError: If it is damaged, or no other clip has a sound for it that can be read.
        """
        return self._checked(clip, lambda: self._decoded(clip, own_sound))

    def samples(self, clips: Iterable[int]) -> Iterator[Any]:
        """`sample` of the clips, in order."""
        return map(self.sample, clips)

    def members(self, clip: int) -> dict[str, memoryview]:
        """The stored members of a clip by name, as they are.

        Raises:
            DamagedClipError: If their bytes are damaged.
        """
        return self._checked(clip, lambda: self._members(clip))

    def describe(self, clips: Sequence[int]) -> str:
        """Their shards, and the names of the first clips of each, for a person."""
        shards: dict[str, list[str]] = {}
        for number, shard, entry in map(self._places.__getitem__, clips):
            shards.setdefault(self._sets[number].place_of(shard), []).append(printable(entry.name))
        told = (
            f"{place} (clips {', '.join(names[:_TOLD])}{', ...' * (len(names) > _TOLD)})"
            for place, names in shards.items()
        )
        return ", ".join(told) or "no clip of its own"

    def read_ahead(self, order: Callable[[], Iterator[int]]) -> None:
        """Shards that have to be fetched are fetched ahead of their use from now on.

        Args:
            order: Gives the clips that will be read, each time from the beginning.
        """
        for number, store in enumerate(self._opened()):
            store.upcoming(
                place.shard for place in map(self._places.__getitem__, order()) if place.set_number == number
            )

    def close(self) -> None:
        """End the decoding process and the fetching, where there are any; the next clip starts them again."""
        if self._media is not None:
            self._media.close()
        for store in self._stores or ():
            store.close()
        self._media = self._stores = None

    def _opened(self) -> list[Store]:
        if self._stores is None:
            self._stores = [_open_store(index, self._cache) for index in self._sets]
        return self._stores

    def _checked(self, clip: int, decode: Callable[[], Result]) -> Result:
        """What `decode` returns; any fault becomes one of this clip, with its place."""
        try:
            return decode()
        except ClipFault as fault:
            raise DamagedClipError(self._damage(clip, fault.kind, str(fault))) from fault
        except _DECODING_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
            raise DamagedClipError(self._damage(clip, "other", reason)) from error

    def _damage(self, clip: int, kind: str, reason: str) -> Damage:
        number, shard, entry = self._places[clip]
        return Damage(self._split, clip, entry.name, self._sets[number].place_of(shard), entry.offset, kind, reason)

    def _members(self, clip: int) -> dict[str, memoryview]:
        number, shard, entry = self._places[clip]
        segment = self._opened()[number].read(shard, entry.offset, entry.length)
        if zlib.crc32(segment) != entry.crc32:
            raise ClipFault("checksum", "the CRC-32 does not match the index")
        return members_of(segment, entry.key)

    def _decoded(self, clip: int, own_sound: bool) -> Sample | FeatureSample:
        members = self._members(clip)
        number, _, entry = self._places[clip]
        if self._kind == FEATURES:
            sample: Any = decode_features(members)
        else:
            if self._media is None:
                self._media = MediaWorker(self._video_deadline_s)
            sound = None if own_sound or self._audio == "real" else self._replacement(clip, members)
            sample = decode_clip(members, sound, self._media)
        self._sets[number].check_sample(entry, sample)
        return sample

    def _replacement(self, clip: int, members: dict[str, memoryview]) -> Sound:
        """Sound that replaces the clip's own. Sound that is shorter than the clip goes on as silence."""
        seconds = decode_facts(members)["seconds"]
        mel_TFM = np.full((seconds, MEL_FRAMES, MEL_BANDS), SILENT_LOG_MEL, dtype=np.float32)
        audio_TD = None if self._silence_D is None else np.tile(self._silence_D, (seconds, 1))
        if self._audio == "swapped":
            donor = self._donor(clip)
            mel_TFM[: len(donor.mel_TFM)] = donor.mel_TFM[:seconds]
            if audio_TD is not None and donor.audio_TD is not None:
                audio_TD[: len(donor.audio_TD)] = donor.audio_TD[:seconds]
        return Sound(mel_TFM, audio_TD)

    def _donor(self, clip: int) -> Sound:
        """Sound of the clip half the split away or, where that is damaged, of the first one after it that is not."""
        first, reason = swapped(clip, len(self)), ""
        donors = (donor % len(self) for donor in range(first, first + len(self)) if donor % len(self) != clip)
        for donor in islice(donors, MOST_DONORS):
            try:
                return self._checked(donor, lambda donor=donor: self._sound(donor))  # type: ignore[misc]
            except DamagedClipError as error:
                reason = reason or str(error)
        raise ClipFault("other", f"no other clip has a sound that can be read; the first: {reason}")

    def _sound(self, clip: int) -> Sound:
        members = self._members(clip)
        return decode_sound(members, decode_facts(members)["seconds"])


def _open_store(index: ShardIndex, cache: ShardCache | None) -> Store:
    if isinstance(index.directory, Path):
        return LocalStore(index.directory)
    if cache is None:
        raise ValueError(f"{index.place}: shards at a URL need a cache")
    from avs_dist.shards.remote_store import RemoteStore

    return RemoteStore(index.directory, cache)
