"""Pre-training a codebook on paired sequences, and measuring it without labels."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor
from tqdm import tqdm

from avs_dist import world
from avs_dist.code_usage import CodeUsage
from avs_dist.config import Config
from avs_dist.engine import Engine, micro_batch_size
from avs_dist.loader import eval_loader
from avs_dist.pairing import mean_code, pairing_score
from avs_dist.sequences import Sequences
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.plan import PADDING
from avs_dist.tasks.base import Task


class CodebookTask(Task):
    """Paired sequences; the best checkpoint is the one whose codes pair the clips of the evaluation split best."""

    best_by = "pairing"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        losses = config.loss.unicode
        compares = [name for name in ("cpc", "club") if getattr(losses, name) > 0]
        if losses.align not in ("none", "cross_reconstruction") and losses.align_weight > 0:
            compares.append("align_weight")
        if self.clips_together < 2 and compares:
            raise ValueError(
                "train.global_batch, engine.grad_accumulation: one clip at a time leaves nothing to compare; take more "
                f"or set {', '.join(f'loss.unicode.{name}=0' for name in compares)}"
            )
        if config.engine.grad_accumulation > 1:
            raise ValueError(
                f"engine.grad_accumulation={config.engine.grad_accumulation}: codebook and negatives of Uni-Code are "
                "those of a whole batch; set 1, and spread train.global_batch over more ranks"
            )
        if config.model.compat == "published_code":
            raise ValueError(
                "model.compat=published_code: Uni-Code departs from its paper by settings; give --config "
                "configs/unicode/published_code.yaml instead"
            )
        for name, off in (("mirror", 0.0), ("crop", 1.0), ("shift", 0)):
            value = getattr(config.data, name)
            if value != off:
                raise ValueError(f"data.{name}={value}: is for masks; set {off:g} with model.system=unicode")

    def check_data(self, index: ShardIndex) -> None:
        unicode, shards = self.config.model.unicode, self.config.data.shards
        kind = "features" if unicode.inputs == "features" else "clips"
        if index.kind != kind:
            other = "media" if kind == "features" else "features"
            raise ValueError(
                f"data.shards={shards}: holds {index.kind}, and model.unicode.inputs={unicode.inputs} needs {kind}: "
                f"set model.unicode.inputs={other} or build other shards"
            )
        if kind == "features":
            self._check_shapes(index)
        elif "text" in unicode.modalities and not index.has_prompts:
            raise ValueError(f"model.unicode.modalities: clips in {shards} have no text; build them with --prompts")
        if unicode.predict_steps >= index.clip_seconds and self.config.loss.unicode.cpc > 0:
            raise ValueError(
                f"model.unicode.predict_steps={unicode.predict_steps}: clips in {shards} have {index.clip_seconds} s"
            )
        for _, split, each in self.splits(index):
            each.split(split)

    def _check_shapes(self, index: ShardIndex) -> None:
        settings = {"audio": "audio_channels", "visual": "visual_shape", "text": "text_channels"}
        for modality, shape in self.config.model.unicode.shapes.items():
            there = index.feature_shapes.get(modality)
            if there is None:
                raise ValueError(
                    f"model.unicode.modalities: there is no {modality} in {self.config.data.shards}, only "
                    f"{', '.join(index.feature_shapes)}"
                )
            if tuple(there) != tuple(shape):
                value = list(there) if modality == "visual" else there[0]
                raise ValueError(
                    f"{modality} features in {self.config.data.shards} are {list(there)}, the config says "
                    f"{list(shape)}: set model.unicode.{settings[modality]}={value}"
                )

    def augment(self, batch: Sequences, step: int) -> Sequences:
        return batch

    def evaluate(self, engine: Engine) -> tuple[dict[str, float], dict[str, float]]:
        """ "pairing" (mean over pairs of modalities, see `pairing_score`), and how the codes are used."""
        config, modalities = self.config, self.config.model.unicode.modalities
        usage = CodeUsage(config.model.unicode.codebook.num_codes, modalities)
        loader = eval_loader(config, config.data.eval_split, micro_batch_size(config), world.rank(), world.world_size())
        self.damage = loader.damage
        means: dict[str, list[Tensor]] = {m: [] for m in modalities}
        counted: list[Tensor] = []
        for batch, positions in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not world.is_main()):
            real_B = torch.as_tensor(positions) != PADDING
            batch = replace(batch, valid={m: valid & real_B[:, None] for m, valid in batch.valid.items()})
            encoded = engine.encode(batch)
            usage.update({m: each.indices_BT for m, each in encoded.items()})
            there_B = torch.stack([each.valid_BT.any(1) for each in encoded.values()]).all(0)
            counted.append(there_B)
            for m, each in encoded.items():
                means[m].append(mean_code(each.quantised_BTD, each.valid_BT))
        metrics = {"pairing": _pairing(means, torch.cat(counted)), **usage.compute().scalars()}
        return loader.counted(metrics), {}


def _pairing(means: dict[str, list[Tensor]], counted_N: Tensor) -> float:
    everywhere_N = world.gather_flags(counted_N)
    vectors = {m: world.gather_rows(torch.cat(each), equal=True)[0][everywhere_N] for m, each in means.items()}
    scores = [pairing_score(vectors[one], vectors[other]) for one, other in combinations(vectors, 2)]
    return sum(scores) / len(scores)
