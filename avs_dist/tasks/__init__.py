"""What the trainer does differently for each kind of system: check the data, augment, and evaluate."""

from __future__ import annotations

from avs_dist.config import Config
from avs_dist.tasks.base import Task


def build_task(config: Config) -> Task:
    """The task of the system that the config names.

    Raises:
        ValueError: a batch size that the losses cannot do with.
    """
    if config.model.system == "unicode":
        from avs_dist.tasks.codebook import CodebookTask

        return CodebookTask(config)
    from avs_dist.tasks.segmentation import SegmentationTask

    return SegmentationTask(config)
