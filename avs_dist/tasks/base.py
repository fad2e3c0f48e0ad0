"""The Task protocol: all that the trainer knows of the data and the measures of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from avs_dist import world
from avs_dist.config import Config
from avs_dist.damage import DamageLog
from avs_dist.engine import Engine, micro_batch_size
from avs_dist.loader import mixed_sets
from avs_dist.shards.index import ShardIndex


class Task(ABC):
    """Data and measures of one run.

    best_by: the metric whose highest value makes a checkpoint the best.
    damage:  the damaged clips of the last evaluation.
    """

    best_by: str

    def __init__(self, config: Config) -> None:
        self.config = config
        self.damage: DamageLog | None = None

    @abstractmethod
    def check_data(self, index: ShardIndex) -> None:
        """Refuse before the first step what would otherwise fail in the middle of the run.

        Raises:
            ValueError: naming the setting and what the shards hold.
        """

    def splits(self, index: ShardIndex) -> list[tuple[str, str, ShardIndex]]:
        """All that the run reads: name of the setting, split, and the shards that must have it."""
        data = self.config.data
        training = [("train_split", data.train_split, each) for each in mixed_sets(data, index)]
        return [*training, ("eval_split", data.eval_split, index)]

    @abstractmethod
    def augment(self, batch: Any, step: int) -> Any:
        """The batch as it is trained on."""

    @abstractmethod
    def evaluate(self, engine: Engine) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics on data.eval_split, and the state of the codes of a system that has them; collective."""

    @property
    def clips_together(self) -> int:
        """Clips of all ranks that a micro-batch compares."""
        return micro_batch_size(self.config) * world.world_size()
