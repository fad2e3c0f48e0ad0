"""index.json: what a folder of shards holds, and where each clip lies in its tar file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avs_dist.shards.files import write_text
from avs_dist.shards.palette import MAX_CLASSES
from avs_dist.shards.schema import CLIPS, FEATURE_NDIM, FEATURES, INDEX_FILE, MAX_CLIP_BYTES, SCHEMA_VERSION


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
        name = data["name"]
        if not name.endswith(".tar") or Path(name).name != name:
            raise ValueError(f"shard name {name!r} is not a plain file name ending in .tar")
        clips = tuple(ClipEntry(**clip) for clip in data["clips"])
        if data["count"] != len(clips):
            raise ValueError(f"shard {name}: count is {data['count']}, but {len(clips)} clips are listed")
        for clip in clips:
            if clip.offset < 0 or not 0 < clip.length <= MAX_CLIP_BYTES or clip.offset + clip.length > data["bytes"]:
                raise ValueError(f"shard {name}: clip {clip.key} lies outside the file or is too large")
        return ShardEntry(name, data["split"], data["sha256"], data["bytes"], clips)


@dataclass(frozen=True)
class ShardIndex:
    """A finished folder of shards.

    settings: how it was built (kind, source, image size, frame format, clip length, names of classes or events ...).
    skipped:  clips that could not be used: name, split, path, reason.
    """

    directory: Path
    settings: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    skipped: tuple[dict[str, str], ...]

    @staticmethod
    def load(directory: str | Path) -> ShardIndex:
        """Read index.json.

        Raises:
            FileNotFoundError: If there is none (the build did not finish, or the folder is another one).
            ValueError: If it is damaged or of another schema version.
        """
        path = Path(directory) / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no {INDEX_FILE} in {directory}: not a folder of finished shards; "
                "run `avs-dist shards build --out` on it (again)"
            )
        try:
            data = json.loads(path.read_bytes())
            version = data["schema_version"]
            if version != SCHEMA_VERSION:
                raise ValueError(
                    f"schema version {version}, this program reads version {SCHEMA_VERSION}: build the shards again"
                )
            shards = tuple(ShardEntry.from_dict(shard) for shard in data["shards"])
            _check_settings(data["settings"])
            return ShardIndex(path.parent, data["settings"], shards, tuple(data["skipped"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

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
            raise ValueError(f"{self.directory} has no split '{name}'; it has: {', '.join(self.splits) or 'none'}")
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
            self.directory / INDEX_FILE,
            {
                "schema_version": SCHEMA_VERSION,
                "settings": self.settings,
                "splits": counts,
                "shards": [shard.to_dict() for shard in self.shards],
                "skipped": list(self.skipped),
            },
        )


def _check_settings(settings: dict[str, Any]) -> None:
    """Of what readers rely on; features need more than clips."""
    kind = settings.get("kind", CLIPS)
    if kind == FEATURES:
        _check_events(settings)
        _check_feature_shapes(settings["feature_shapes"])
    elif kind != CLIPS:
        raise ValueError(f"settings.kind must be '{CLIPS}' or '{FEATURES}', got {kind!r}")
    _check_classes(settings)


def _check_events(settings: dict[str, Any]) -> None:
    names = settings["events"]
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed or not 1 <= len(set(names)) == len(names):
        raise ValueError(f"settings.events must list one or more different names, got {names!r:.200}")
    if "classes" in settings:
        raise ValueError("settings.classes are for masks, features have settings.events")


def _check_feature_shapes(shapes: Any) -> None:
    """One shape for each modality: whole numbers from 1 on, as many as the modality has without its time."""
    for name, shape in shapes.items():
        whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
        if not whole or len(shape) + 1 != FEATURE_NDIM.get(name):
            raise ValueError(f"settings.feature_shapes: {name}: {shape!r:.200} is not the shape of a second's features")


def _check_classes(settings: dict[str, Any]) -> None:
    """Several names, each once, where the settings name classes at all."""
    names = settings.get("classes", ["background", "object"])
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed or not 2 <= len(set(names)) == len(names) <= MAX_CLASSES:
        raise ValueError(f"settings.classes must list 2 to {MAX_CLASSES} different names, got {names!r:.200}")


def write_json(path: Path, data: Any) -> None:
    """Compact JSON with sorted keys: equal data give equal bytes."""
    write_text(path, json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n")
