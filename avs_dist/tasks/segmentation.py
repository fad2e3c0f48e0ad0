"""Training and evaluating masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from avs_dist import world
from avs_dist.augment import crop, mirror, shift
from avs_dist.clip import Clip
from avs_dist.collapse import CollapseMonitor
from avs_dist.config import Config
from avs_dist.draws import ClipDraws
from avs_dist.engine import Engine, micro_batch_size
from avs_dist.evaluate import evaluate
from avs_dist.loader import eval_loader
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.plan import PADDING
from avs_dist.systems.matching import with_mask
from avs_dist.tasks.base import Task


class SegmentationTask(Task):
    """Clips with masks; the best checkpoint has the highest mIoU."""

    best_by = "miou"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        contrasts = config.model.system == "diffusion" and config.loss.diffusion.contrastive > 0
        if self.clips_together < 2 and contrasts:
            raise ValueError(
                "train.global_batch, engine.grad_accumulation: one clip at a time leaves nothing to contrast; take "
                "more or set loss.diffusion.contrastive=0"
            )

    def check_data(self, index: ShardIndex) -> None:
        config = self.config
        if index.kind != "clips":
            raise ValueError(f"data.shards={config.data.shards}: features without masks; set model.system=unicode")
        if config.model.system == "query" and config.model.query.modality == "text" and not index.has_prompts:
            raise ValueError(
                f"model.query.modality=text: clips in {config.data.shards} have no text; build them with --prompts"
            )
        num_classes = len(index.classes) if index.classes else 1
        if num_classes != config.model.num_classes:
            loss = "cross_entropy" if num_classes > 1 else "bce"
            raise ValueError(
                f"model.num_classes={config.model.num_classes}: the masks in {config.data.shards} have {num_classes}; "
                f"set model.num_classes={num_classes} and loss.segmentation={loss}"
            )
        for key, split, shards in self.splits(index):
            if not any(clip.labelled for shard in shards.split(split) for clip in shard.clips):
                raise ValueError(f"data.{key}={split}: no clip of this split in {shards.place} has a mask")

    def augment(self, batch: Clip, step: int) -> Clip:
        data, draws = self.config.data, ClipDraws(self.config.seed, step, batch.key)
        batch = mirror(batch, data.mirror, draws, each_frame=self.config.model.compat == "published_code")
        return shift(crop(batch, data.crop, draws), data.shift, draws)

    def evaluate(self, engine: Engine) -> tuple[dict[str, float], dict[str, float]]:
        batches = _Watched(engine, self.config)
        self.damage = batches.loader.damage
        metrics = batches.loader.counted(evaluate(engine.predict, batches))
        return metrics, batches.monitor.compute().scalars() if batches.monitor else {}


class _Watched:
    """Evaluation batches; the codes of a system that has them pass the posterior-collapse monitor on the way."""

    def __init__(self, engine: Engine, config: Config) -> None:
        size = micro_batch_size(config)
        self.loader = eval_loader(config, config.data.eval_split, size, world.rank(), world.world_size())
        self._engine = engine
        self.monitor: CollapseMonitor | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Clip, Sequence[int]]]:
        for clip, positions in self.loader:
            codes = self._engine.latents(clip)
            if codes is not None and codes.posterior:
                self.monitor = self.monitor or CollapseMonitor()
                counted_BT = clip.valid_BT & (torch.as_tensor(positions)[:, None] != PADDING) & with_mask(clip)
                self.monitor.update(codes, counted_BT)
            yield clip, positions
