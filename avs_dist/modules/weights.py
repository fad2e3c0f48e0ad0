"""Reading weights from files, and their layout in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def channels_last(module: nn.Module) -> nn.Module:
    """`module` with its convolution weights in the layout of channels-last images."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def read_state_dict(path: Path, key: str) -> dict[str, Tensor]:
    """State dict of a .safetensors or .pth file (nothing but tensors is unpickled).

    Raises:
        FileNotFoundError, ValueError: naming the config key and the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{key}: {path} is no state dict of plain tensors: {first_lines(error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{key}: {path} holds a {type(state).__name__}, not a state dict")
    return state


def first_lines(error: Exception) -> str:
    """Message of a library's error on one line, cut to 400 characters."""
    return " ".join(str(error).split())[:400]
