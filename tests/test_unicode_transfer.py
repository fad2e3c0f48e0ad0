"""Uni-Code transfers between the modalities of synthetic sequences; reconstruction alone does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unicode_batches import ROOT

from avs_dist.launch.train import parse_config
from avs_dist.sequences import Sequences
from avs_dist.shards.sequence_world import make_sequence, make_world
from avs_dist.systems import build_system
from avs_dist.systems.unicode import UnicodeSystem

CLIPS, TRAINED = 900, 700
STEPS, BATCH = 250, 48
BASELINE = (
    *("--loss.unicode.club", "0", "--loss.unicode.cpc", "0", "--loss.unicode.align", "none"),
    *("--model.unicode.codebook.teacher", "none", "--model.unicode.codebook.cross_commitment", "0"),
    *("--model.unicode.codebook.reset_after", "0"),
)


def data() -> tuple[dict[str, Tensor], Tensor]:
    """Features of all clips, and the event of each; less nuisance than in the benchmark, so that a short run does."""
    world = dataclasses.replace(make_world(1), nuisance=0.5)
    clips = [make_sequence(np.random.default_rng([1, i]), world) for i in range(CLIPS)]
    inputs = {
        name: torch.from_numpy(np.stack([clip[place] for clip in clips]))
        for place, name in enumerate(("visual", "audio"))
    }
    return inputs, torch.tensor([world.events.index(clip[3]) for clip in clips])


def batch(inputs: dict[str, Tensor], rows: Tensor) -> Sequences:
    chosen = {m: x[rows] for m, x in inputs.items()}
    valid = {m: torch.ones(x.shape[:2], dtype=torch.bool) for m, x in chosen.items()}
    return Sequences(chosen, valid, {}, tuple(map(str, rows.tolist())))


def train(inputs: dict[str, Tensor], *overrides: str) -> UnicodeSystem:
    config = parse_config(["--config", str(ROOT / "configs/demo_unicode.yaml"), *overrides])
    torch.manual_seed(0)
    system = build_system(config).train()
    optimiser = torch.optim.Adam(system.parameters(), lr=config.optim.lr)
    for step in range(STEPS):
        terms = system.loss_terms(batch(inputs, torch.randint(TRAINED, (BATCH,))), step)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(system.parameters(), config.optim.clip_norm)
        optimiser.step()
    assert isinstance(system, UnicodeSystem)
    return system


def accuracy(system: UnicodeSystem, inputs: dict[str, Tensor], event_N: Tensor, learnt: str) -> dict[str, float]:
    """Of a classifier of the codes of one modality, on those of both."""
    encoded = system.encode(batch(inputs, torch.arange(CLIPS)))
    head = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 8)])
    optimiser = torch.optim.Adam(head.parameters(), lr=2e-3)

    def classify(modality: str, rows: Tensor) -> Tensor:
        return head[1](head[0](encoded[modality].quantised_BTD[rows]).amax(1))

    for _ in range(300):
        rows = torch.randint(TRAINED, (128,))
        optimiser.zero_grad()
        F.cross_entropy(classify(learnt, rows), event_N[rows]).backward()
        optimiser.step()
    rest = torch.arange(TRAINED, CLIPS)
    with torch.no_grad():
        return {m: (classify(m, rest).argmax(1) == event_N[rest]).float().mean().item() for m in inputs}


def test_codes_transfer_where_reconstruction_alone_stays_near_chance():
    inputs, event_N = data()
    unicode, baseline = train(inputs), train(inputs, *BASELINE)
    for own, other in (("audio", "visual"), ("visual", "audio")):
        found = accuracy(unicode, inputs, event_N, own)
        assert found[own] > 0.7
        assert found[other] >= 0.6 * found[own]
        assert accuracy(baseline, inputs, event_N, own)[other] < 0.3  # chance is 0.125
