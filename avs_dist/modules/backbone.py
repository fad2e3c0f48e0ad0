"""Visual backbones: any timm model with features_only, as four stages at strides 4, 8, 16 and 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from avs_dist.modules.dropout import ClipDropPath
from avs_dist.modules.norm import synchronise_batchnorm
from avs_dist.modules.weights import channels_last, first_lines, read_state_dict

STRIDES = [4, 8, 16, 32]


class Backbone(nn.Module):
    """frames [N,3,H,W] -> four feature maps [N,C_s,H/s,W/s], channels last; `channels` lists the C_s.

    Batch normalisations use the moments of all ranks.

    Args:
        name: timm model name (papers: pvt_v2_b5 with drop path 0.1, resnet50).
        weights: "none", "hub" (timm's ImageNet weights), or a local .safetensors or .pth state dict, in the names of
            timm or of the model's original release.

    Raises:
        ValueError: unknown model, a model without these four strides, weights that do not fit.
        FileNotFoundError: the weights file does not exist.
    """

    def __init__(self, name: str, weights: str = "none") -> None:
        super().__init__()
        self.model = _create(name, weights)
        reduction = self.model.feature_info.reduction()
        if reduction[-4:] != STRIDES:
            raise ValueError(f"model.backbone.name: {name} has stages at strides {reduction}, need {STRIDES}")
        self.channels: list[int] = self.model.feature_info.channels()[-4:]
        synchronise_batchnorm(self.model)
        self._paths = _clip_paths(self.model)
        channels_last(self)

    def forward(self, frames_NCHW: Tensor, draws_N: Tensor | None = None) -> list[Tensor]:
        """Args:
        draws_N: numbers of the frames, see `ClipDropout`, for a model with stochastic depth in training.
        """
        for path in self._paths:
            path.draws_N = draws_N
        features = self.model(frames_NCHW.contiguous(memory_format=torch.channels_last))
        return [f.contiguous(memory_format=torch.channels_last) for f in features[-4:]]


def _clip_paths(model: nn.Module) -> list[ClipDropPath]:
    """Replace the stochastic depth of timm, where each process draws for itself."""
    found: list[ClipDropPath] = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                found.append(ClipDropPath(child.drop_prob, place=len(found)))
                setattr(module, name, found[-1])
    return found


def _create(name: str, weights: str) -> Any:
    options: dict[str, Any] = {"features_only": True}
    if name.startswith("pvt_v2"):
        options["drop_path_rate"] = 0.1
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"{name[:6]}*")[:5]
        raise ValueError(f"model.backbone.name: timm has no model '{name}'; near: {', '.join(near) or 'none'}")
    if weights == "none":
        return timm.create_model(name, pretrained=False, **options)
    if weights == "hub":
        return _from_hub(name, options)
    return _from_file(name, Path(weights), options)


def _from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub client raises a different class for each way of being offline
        config = timm.get_pretrained_cfg(name)
        where = f"https://huggingface.co/{config.hf_hub_id}" if config and config.hf_hub_id else "the model's page"
        raise ValueError(
            f"model.backbone.weights=hub: cannot fetch the ImageNet weights of {name} ({type(error).__name__}); "
            f"download model.safetensors from {where} and set model.backbone.weights to that file"
        ) from error


def _from_file(name: str, path: Path, options: dict[str, Any]) -> nn.Module:
    state = read_state_dict(path, "model.backbone.weights")
    config = timm.get_pretrained_cfg(name)
    classifiers = config.classifier if config and config.classifier else ()
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        state = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")}
    # without a classifier timm loads strictly: a missing or unexpected key is an error that lists it
    overlay = {"state_dict": state, "classifier": None}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **options)
    except RuntimeError as error:
        raise ValueError(f"model.backbone.weights: {path} does not fit {name}: {first_lines(error)}") from error
