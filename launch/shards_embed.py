"""`avs-dist shards embed`: the output of a frozen audio encoder, stored beside the log-mels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from avs_dist.launch.parser import Parser
from avs_dist.shards.embed import AudioEncoder, embed
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.remote import refuse_url
from avs_dist.shards.verify import describe

EMBED_HELP = """Copy shards and store what a frozen audio encoder makes of each second.

Training and evaluation then read it, and the encoder leaves the training step. The log-mels stay there. A model takes
such shards only with the very weights that were used here (a checkpoint has them in itself). A damaged clip is left out
and listed in index.json. The command can be killed at any time: the same command goes on where it stopped.
"""


def embed_parser() -> Parser:
    parser = Parser(description=EMBED_HELP)
    add = parser.add_argument
    add("--shards", type=Path, required=True, help="folder of finished shards, which stays as it is")
    add("--out", type=Path, required=True, help="folder of the copy, a little larger than the original")
    add("--audio-encoder", type=Literal["vggish"], default="vggish", help="the frozen encoder")
    add("--weights", type=str, required=True, help="its weights, as for model.audio.weights")
    add("--batch", type=int, default=32, help="clips that are encoded at a time")
    add("--max-skipped", type=float, default=0.01, help="fails when a larger fraction of the clips is damaged")
    add("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    return parser


def embed_command(options: Any) -> int:
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: must be at least 1")
    if not 0.0 <= options.max_skipped <= 1.0:
        raise ValueError(f"--max-skipped is a fraction from 0 to 1, got {options.max_skipped:g}")
    for name in ("shards", "out"):
        refuse_url(f"--{name}", getattr(options, name))
    index = ShardIndex.load(options.shards)
    encoder = _encoder(options.audio_encoder, options.weights, options.device)
    _tell_disk_use(index, options.out)
    embedded = embed(index, options.out, encoder, batch=options.batch, max_skipped=options.max_skipped)
    print(describe(embedded))
    return 0


def _encoder(kind: Literal["vggish"], weights: str, device: str) -> AudioEncoder:
    from avs_dist.modules.audio import build_audio_encoder  # heavy
    from avs_dist.stored_audio import weights_sha256

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ValueError("--device cuda: torch finds no GPU here; leave it at auto")
    device = "cuda" if there and device != "cpu" else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # what is stored once is worth all its digits
    network = build_audio_encoder(kind, weights, key="--weights")
    sha256 = weights_sha256(network)
    network = network.to(device)

    def encode(mel_NFM: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(mel_NFM).to(device)).cpu().numpy()

    return AudioEncoder(kind, sha256, encode)


def _tell_disk_use(index: ShardIndex, out: Path) -> None:
    size = sum(shard.bytes for shard in index.shards)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    print(f"the copy takes about {size / 1e6:.1f} MB in {out}, where {free / 1e6:.1f} MB are free", flush=True)
