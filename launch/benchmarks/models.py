"""Parameters of the networks part by part against those that the papers state, and the time of a prediction.

Published figures: Table 7 of the ECMVAE paper; section IV-B of the latent diffusion paper (second version).

One clip of 5 frames of 224 x 224 with its sound goes through `System.predict` in evaluation mode, with one draw of the
codes, from random weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from avs_dist.launch.benchmarks import timing
from avs_dist.launch.benchmarks.report import ROOT, table

if TYPE_CHECKING:  # a bare GPU host has nothing that these need
    from avs_dist.clip import Clip
    from avs_dist.systems.base import System

FRAMES, SIZE, TINY_SIZE = 5, 224, 64
AUDIO, UNUSED = "audio", "unused unit"

# names of parameters begin with these
PARTS = {
    AUDIO: ("trunk.audio_encoder.",),
    "backbone": ("trunk.backbone.",),
    "necks": ("generator.necks.",),
    "TPAVI": ("trunk.blocks.",),
    "codes": ("prior.", "generator.fusion.", "generator.injection.", "condition_encoder.", "denoiser."),
    "decoder": ("generator.decoder.",),
    "training only": ("posterior.", "posterior_generator.", "objective.", "mask_encoder."),
}


class Model(NamedTuple):
    """A network: the files of configs/ that make it, and what its paper says of it (millions, and ms on an A100)."""

    label: str
    configs: tuple[str, ...]
    published_m: float
    published_ms: float | None = None


R50 = "resnet50.yaml"
PAPER = "ecmvae_ms3.yaml"
CODE = "ecmvae/published_code.yaml"
MODELS = (
    Model("TPAVI, R50", ("tpavi_ms3.yaml", R50), 70.50, 28),
    Model("ECMVAE of the paper, R50", (PAPER, R50), 33.97, 23),
    Model("ECMVAE of the public code, R50", (PAPER, CODE, R50), 33.97, 23),
    Model("TPAVI, PVT", ("tpavi_ms3.yaml",), 101.32, 53),
    Model("ECMVAE of the paper, PVT", (PAPER,), 91.18, 46),
    Model("ECMVAE of the public code, PVT", (PAPER, CODE), 91.18, 46),
    Model("latent diffusion, PVT", ("diffusion_ms3.yaml",), 94.48),
)


def build(model: Model) -> System:
    """The network of the configs with random weights."""
    from avs_dist.launch.train import parse_config
    from avs_dist.systems import build_system

    words = [word for name in model.configs for word in ("--config", str(ROOT / "configs" / name))]
    return build_system(parse_config(words), load_pretrained=False)


def count(system: System) -> dict[str, int]:
    """Parameters of each part, and of the residual units that the public codes hold and never use, as ours do not.

    Raises:
        ValueError: a parameter that belongs to no part.
    """
    from avs_dist.modules.decoder import FusionStage, TopDownDecoder

    found = dict.fromkeys(PARTS, 0)
    for name, parameter in system.named_parameters():
        part = next((part for part, begins in PARTS.items() if name.startswith(begins)), None)
        if part is None:
            raise ValueError(f"{name} belongs to no part of the table")
        found[part] += parameter.numel()
    decoders = [module for module in system.modules() if isinstance(module, TopDownDecoder)]
    coarsest = [decoder.stages[0] for decoder in decoders]
    units = [stage.unit for stage in coarsest if isinstance(stage, FusionStage) and stage.skip_unit is None]
    return found | {UNUSED: sum(parameter.numel() for unit in units for parameter in unit.parameters())}


def total(parts: dict[str, int]) -> int:
    """As the paper counts: without the frozen audio encoder, with what only training needs."""
    return sum(number for part, number in parts.items() if part not in (AUDIO, UNUSED))


def measure(model: Model, device: str, repeats: int, tiny: bool) -> dict[str, Any]:
    """Parameters by part, and milliseconds of a prediction."""
    system = build(model).to(device).eval()
    if system.num_samples is not None:
        system.num_samples = 1
    clip = _clip(TINY_SIZE if tiny else SIZE).to(torch.device(device))

    def call() -> list[torch.Tensor]:
        return [system.predict(clip).logits_BTHW]

    call()  # loads and compiles
    wall = timing.wall(call, device, repeats, 0.0 if tiny else timing.SECONDS)
    return {"parameters": count(system), "ms": {name: us / 1e3 for name, us in wall._asdict().items()}}


def _clip(size: int) -> Clip:
    from avs_dist.clip import Clip

    generator = torch.Generator().manual_seed(0)
    exist_BT = torch.ones(1, FRAMES, dtype=torch.bool)
    return Clip(
        frames_BTCHW=torch.randn(1, FRAMES, 3, size, size, generator=generator),
        mel_BTFM=torch.randn(1, FRAMES, 96, 64, generator=generator),
        masks_BTHW=torch.zeros(1, FRAMES, size, size, dtype=torch.uint8),
        labelled_BT=exist_BT,
        valid_BT=exist_BT,
        key=("clip",),
    )


def markdown(facts: dict[str, Any], rows: list[tuple[Model, dict[str, Any]]]) -> str:
    measured = [(model, result) for model, result in rows if "parameters" in result]
    audio = ", ".join(dict.fromkeys(_millions(result["parameters"][AUDIO]) for _, result in measured))
    why = [(model.label, result.get("failed") or result.get("skipped")) for model, result in rows]
    notes = [f"- {label}: {reason}" for label, reason in why if reason]
    paragraphs = [
        "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".",
        "### models: sizes stated in the papers",
        f"Parameters, millions. The frozen audio encoder ({audio}) is not counted, as in the papers; what only "
        "training needs (posterior and mask encoders, the public code's second generator, information head) is. Each "
        "decoder of the public codes holds one residual unit that nothing uses; ours leave it out, the last column "
        "adds it.",
        _parameter_table(measured),
        f"Milliseconds of one prediction: a clip of {FRAMES} frames of {SIZE} x {SIZE} ({TINY_SIZE} x {TINY_SIZE} with "
        "--tiny), sound included, one draw of the codes, from Python.",
        _time_table(measured),
    ]
    return "\n\n".join([*paragraphs, *(["Notes:\n\n" + "\n".join(notes)] if notes else [])]) + "\n"


def _parameter_table(measured: list[tuple[Model, dict[str, Any]]]) -> str:
    counted = [part for part in PARTS if part != AUDIO]
    rows = [["model", *counted, "total", "published", "difference", f"with {UNUSED}"]]
    for model, result in measured:
        parts = result["parameters"]
        ours = total(parts)
        cells = [*(_millions(parts[part]) for part in counted), _millions(ours), f"{model.published_m:.2f}"]
        cells += [f"{ours / 1e6 / model.published_m - 1:+.1%}", _millions(ours + parts[UNUSED])]
        rows.append([model.label, *cells])
    return table(rows)


def _time_table(measured: list[tuple[Model, dict[str, Any]]]) -> str:
    rows = [["model", "p20", "p50", "p80", "published (A100)"]]
    for model, result in measured:
        spread = [f"{result['ms'][name]:.1f}" for name in ("p20", "p50", "p80")]
        rows.append([model.label, *spread, "-" if model.published_ms is None else f"{model.published_ms:g}"])
    return table(rows)


def as_json(facts: dict[str, Any], rows: list[tuple[Model, dict[str, Any]]]) -> dict[str, Any]:
    return {"facts": facts, "rows": [{**model._asdict(), **result} for model, result in rows]}


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f}"
