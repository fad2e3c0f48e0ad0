"""Settings of a build of shards, and the sources it can have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avs_dist.shards.feature_members import DTYPES
from avs_dist.shards.members import FRAME_FORMATS
from avs_dist.shards.remote import refuse_url
from avs_dist.shards.schema import MAX_CLIP_SECONDS, MAX_IMAGE_SIZE
from avs_dist.shards.video_member import VIDEO

_FRAME_RULE = "one frame a second, the one at 15/16 of it (AVSBench)"
CLIP_RULES = {
    "avsbench-s4": f"AVSBench S4 folders; {_FRAME_RULE}; first mask only in train",
    "avsbench-ms3": f"AVSBench MS3 folders; {_FRAME_RULE}; all masks",
    "avss": "AVSBench-semantic folders; published frames, squashed in val and test, cropped to the middle in train; "
    "classes by colour; first mask only in train of v1s",
    "vggsound": f"VGGSound videos, from their start; {_FRAME_RULE}; no masks; those that are there",
    "videos": f"consecutive windows of media files; {_FRAME_RULE}; no masks; split test",
}
FEATURE_RULES = {
    "vggsound-avel": "VGGSound-AVEL features; audio padded with its last second; labels of the category where the clip "
    "corresponds",
    "ave": "AVE features in HDF5; labels of each second, the last column is the background",
    "avvp": "AVVP (LLP) features; events of each modality by its own list",
    "feature-list": "features listed by category, which is the label of every second",
}
SOURCE_RULES = CLIP_RULES | FEATURE_RULES
SOURCES = tuple(SOURCE_RULES)
_LONGEST_S = {"avss": 10, "vggsound": 10} | dict.fromkeys(FEATURE_RULES, 10)
_LONGEST_DEADLINE_S = 86_400
# value of `prompts` that needs no file
SENTENCE = "sentence"


@dataclass(frozen=True)
class BuildConfig:
    """Settings of a build; see `avs-dist shards build --help`."""

    source: str
    root: Path
    out: Path
    size: int = 224
    workers: int = 1
    shard_mb: float = 128.0
    max_skipped: float = 0.01
    deadline_s: float = 60.0
    frames: str = "raw"
    decode_video: bool = False
    stored_mel: bool = False
    clip_s: int | None = None
    features: str = "float16"
    word_vectors: Path | None = None
    prompts: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown source '{self.source}'; known: {', '.join(SOURCES)}")
        if self.frames not in FRAME_FORMATS:
            raise ValueError(f"unknown frame format '{self.frames}'; known: {', '.join(FRAME_FORMATS)}")
        if self.frames == VIDEO and self.source == "avss":
            raise ValueError("--frames video stores parts of films; avss has pictures only, use raw, png, webp or jpeg")
        if self.features not in DTYPES:
            raise ValueError(f"unknown type of features '{self.features}'; known: {', '.join(DTYPES)}")
        if self.size < 1 or self.longest_s < 1 or self.shard_mb <= 0 or self.deadline_s <= 0:
            raise ValueError("--size, --clip-s, --shard-mb and --deadline-s must be positive")
        bounds = {"size": MAX_IMAGE_SIZE, "longest_s": MAX_CLIP_SECONDS, "deadline_s": _LONGEST_DEADLINE_S}
        for name, bound in bounds.items():
            if getattr(self, name) > bound:
                option = {"longest_s": "clip-s"}.get(name, name.replace("_", "-"))
                raise ValueError(f"--{option} {getattr(self, name):g}: at most {bound}")
        for option, path in (("--root", self.root), ("--out", self.out)):
            refuse_url(option, path)
        if not self.root.is_dir():
            raise FileNotFoundError(f"--root {self.root} is not a folder")
        if not 0.0 <= self.max_skipped <= 1.0:
            raise ValueError(f"--max-skipped is a fraction from 0 to 1, got {self.max_skipped:g}")
        if self.prompts is not None and self.source != "avsbench-s4":
            raise ValueError(f"--prompts is for --source avsbench-s4, not {self.source}")
        if self.stored_mel and self.source not in ("avsbench-s4", "avsbench-ms3"):
            raise ValueError(f"--stored-mel is for --source avsbench-s4 and avsbench-ms3, not {self.source}")
        if self.word_vectors is not None and self.prompts is None and self.source not in FEATURE_RULES:
            raise ValueError("--word-vectors is for features, and for clips with --prompts")
        if self.word_vectors is not None and not self.word_vectors.is_file():
            raise FileNotFoundError(f"--word-vectors {self.word_vectors} is not a file")

    @property
    def longest_s(self) -> int:
        """Longest clip in seconds: `clip_s`, or what suits the source."""
        return _LONGEST_S.get(self.source, 5) if self.clip_s is None else self.clip_s
