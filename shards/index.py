"""index.json: what a folder of shards holds, and where each clip lies in its tar file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avs_dist.shards.files import read_plain_file, write_text
from avs_dist.shards.index_checks import (
    check_clip,
    check_sample,
    check_settings,
    check_shard,
    check_shards,
    check_skipped,
)
from avs_dist.shards.remote import check_url, fetch_bytes, is_url, join_url
from avs_dist.shards.schema import (
    AUDIO_ENCODER,
    CLIPS,
    FEATURES,
    INDEX_FILE,
    SCHEMA_VERSION,
    FeatureSample,
    Sample,
)
from avs_dist.shards.transfer import shown

# a clip takes about 200 bytes, and parsed some 30 times as much where somebody means harm
MAX_INDEX_BYTES = 2**28


@dataclass(frozen=True)
class ClipEntry:
    """One clip: `length` bytes at `offset` of its shard, with their CRC-32, and what `shards info` counts."""

    key: str
    name: str
    offset: int
    length: int
    crc32: int
    seconds: int
    labelled: int
    sound: str


@dataclass(frozen=True)
class ShardEntry:
    """One tar file."""

    name: str
    split: str
    sha256: str
    bytes: int
    clips: tuple[ClipEntry, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "count": len(self.clips)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ShardEntry:
        """Checked against names and sizes that a reader must never follow (the file may come from elsewhere)."""
        check_shard(data)
        clips = tuple(ClipEntry(**clip) for clip in data["clips"])
        for clip in clips:
            check_clip(data, clip)
        return ShardEntry(data["name"], data["split"], data["sha256"], data["bytes"], clips)


@dataclass(frozen=True)
class ShardIndex:
    """A finished folder of shards.

    directory: The folder, or its URL.
    settings:  how it was built (kind, source, image size, frame format, clip length, names of classes or events ...).
    skipped:   clips that could not be used: name, split, path, reason.
    """

    directory: Path | str
    settings: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    skipped: tuple[dict[str, str], ...]

    @staticmethod
    def load(directory: str | Path) -> ShardIndex:
        """Read index.json of a folder or a URL (http, https, s3, gs, az).

        Raises:
            FileNotFoundError: If there is none (the build did not finish, or the folder is another one).
            ValueError: If it is damaged, no plain file, or of another schema version.
            OSError: If the URL cannot be read.
        """
        if is_url(str(directory)):
            check_url(str(directory))
            place: Path | str = str(directory).rstrip("/")
            url = join_url(str(place), INDEX_FILE)
            path, content = shown(url), fetch_bytes(url, MAX_INDEX_BYTES)
        else:
            place = Path(directory)
            path = str(place / INDEX_FILE)
            if not (place / INDEX_FILE).exists():
                raise FileNotFoundError(
                    f"no {INDEX_FILE} in {directory}: not a folder of finished shards; "
                    "run `avs-dist shards build --out` on it (again)"
                )
            content = read_plain_file(place / INDEX_FILE, MAX_INDEX_BYTES)
        try:
            data = json.loads(content)
            version = data["schema_version"]
            if version != SCHEMA_VERSION:
                raise ValueError(
                    f"schema version {version}, this program reads version {SCHEMA_VERSION}: build the shards again"
                )
            shards = tuple(ShardEntry.from_dict(shard) for shard in data["shards"])
            check_settings(data["settings"])
            check_shards(shards, data["settings"]["clip_seconds"])
            check_skipped(data["skipped"])
            return ShardIndex(place, data["settings"], shards, tuple(data["skipped"]))
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def is_remote(self) -> bool:
        """Whether the shards have to be fetched."""
        return isinstance(self.directory, str)

    @property
    def place(self) -> str:
        """The folder, as messages show it: without what a URL may hold of credentials."""
        return shown(self.directory) if isinstance(self.directory, str) else str(self.directory)

    def place_of(self, shard: ShardEntry) -> str:
        """Path or URL of a shard, as messages show it."""
        if isinstance(self.directory, Path):
            return str(self.directory / shard.name)
        return shown(join_url(self.directory, shard.name))

    def check_sample(self, entry: ClipEntry, sample: Sample | FeatureSample) -> None:
        """Compare a decoded clip with what the index promises.

        Raises:
            ClipFault: naming the difference.
        """
        check_sample(self.settings, entry, sample)

    @property
    def kind(self) -> str:
        """What the shards hold: "clips" (Sample) or "features" (FeatureSample)."""
        return self.settings.get("kind", CLIPS)

    @property
    def events(self) -> tuple[str, ...]:
        """Names of the K event classes of features, without the background; empty for clips."""
        return tuple(self.settings.get("events", ()))

    @property
    def feature_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one second (text: of one word) by modality, e.g. visual (7, 7, 512); empty for clips."""
        return {name: tuple(shape) for name, shape in self.settings.get("feature_shapes", {}).items()}

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of each class, the background first; None where masks only tell sounding from silent."""
        return tuple(self.settings["classes"]) if "classes" in self.settings else None

    @property
    def has_prompts(self) -> bool:
        """Whether clips come with the words of a prompt."""
        return "prompts" in self.settings

    @property
    def word_vectors(self) -> str | None:
        """Which vectors the words of the prompts have: "hashed", or the SHA-256 of their file; None without text."""
        return self.settings.get("word_vectors")

    @property
    def audio_encoder(self) -> dict[str, Any] | None:
        """Which frozen encoder's output the clips come with: "kind" and "weights_sha256"; None where there is none."""
        return self.settings.get(AUDIO_ENCODER)

    @property
    def silence_D(self) -> np.ndarray | None:
        """float32 [128], what that encoder makes of the log-mel of silence."""
        return None if self.audio_encoder is None else np.asarray(self.audio_encoder["silence"], dtype=np.float32)

    @property
    def kind_of_clips(self) -> dict[str, Any]:
        """What clips must have in common to share a batch, by name of the setting."""
        names = ("classes", "events", "feature_shapes", "feature_dtype", "word_vectors")
        encoder = self.audio_encoder or {}
        return {
            "kind": self.kind,
            "image_size": self.image_size,
            **{name: self.settings.get(name) for name in names},
            AUDIO_ENCODER: [encoder.get(name) for name in ("kind", "weights_sha256")],
        }

    @property
    def clip_seconds(self) -> int:
        """Longest clip in seconds."""
        return int(self.settings["clip_seconds"])

    @property
    def image_size(self) -> int:
        """Side of the frames in pixels; 0 for features."""
        return 0 if self.kind == FEATURES else int(self.settings["image_size"])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def split(self, name: str) -> tuple[ShardEntry, ...]:
        """Shards of one split, in order.

        Raises:
            ValueError: If there is no such split.
        """
        shards = tuple(shard for shard in self.shards if shard.split == name)
        if not shards:
            raise ValueError(f"{self.place} has no split '{name}'; it has: {', '.join(self.splits) or 'none'}")
        return shards

    def save(self) -> None:
        """Write index.json atomically; it is the last thing a build does."""
        counts: dict[str, dict[str, int]] = {}
        for shard in self.shards:
            split = counts.setdefault(shard.split, {"shards": 0, "clips": 0, "seconds": 0, "labelled": 0})
            split["shards"] += 1
            split["clips"] += len(shard.clips)
            split["seconds"] += sum(clip.seconds for clip in shard.clips)
            split["labelled"] += sum(clip.labelled for clip in shard.clips)
        write_json(
            Path(self.directory) / INDEX_FILE,
            {
                "schema_version": SCHEMA_VERSION,
                "settings": self.settings,
                "splits": counts,
                "shards": [shard.to_dict() for shard in self.shards],
                "skipped": list(self.skipped),
            },
        )


def write_json(path: Path, data: Any) -> None:
    """Compact JSON with sorted keys: equal data give equal bytes."""
    write_text(path, json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n")
