"""Whether the sound that shards hold encoded (`avs-dist shards embed`) is what a system's own encoder would say."""

from __future__ import annotations

import hashlib

from torch import nn

from avs_dist.modules.audio import LogMelCNN, VGGish
from avs_dist.shards.index import ShardIndex


def weights_sha256(encoder: nn.Module) -> str:
    """SHA-256 of the names and float32 values of all tensors, so that it does not depend on the kind of the file."""
    sha256 = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(memoryview(value.detach().float().cpu().contiguous().numpy()).cast("B"))
    return sha256.hexdigest()


def check_stored_audio(system: nn.Module, index: ShardIndex) -> None:
    """See that the stored sound of the shards, if they have any, stands for that of every audio encoder of a system.

    Call it while the weights are whole: before an engine shards them.

    Raises:
        ValueError: an encoder has other weights, or is one that learns; tells both and the way out.
    """
    stored = index.audio_encoder
    if stored is None:
        return
    theirs = f"{index.place} holds the output of {stored['kind']} with weights {stored['weights_sha256'][:12]}"
    for module in system.modules():
        if isinstance(module, LogMelCNN):
            raise ValueError(
                f"{theirs}, model.audio.kind=logmel_cnn learns its own: take the shards that these were made from, or "
                f"set model.audio.kind={stored['kind']}"
            )
        if isinstance(module, VGGish) and (ours := weights_sha256(module)) != stored["weights_sha256"]:
            raise ValueError(
                f"{theirs}, those of this model's vggish are {ours[:12]}: take the shards that these were made from, "
                "run `avs-dist shards embed` on them with the weights of this model, or set model.audio.weights to the "
                "file that was embedded with"
            )
