"""Uni-Code as a system: every weighted term against the printed formulas, clip by clip and second by second."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from sync_guard import no_host_sync
from torch import Tensor
from unicode_batches import STEPS, make_batch, small_config

from avs_dist.launch.train import parse_config
from avs_dist.sequences import Sequences
from avs_dist.systems import build_system
from avs_dist.systems.unicode import UnicodeSystem

THREE = ("audio", "visual", "text")
PAIRS = [("audio", "visual"), ("audio", "text"), ("visual", "text"), THREE]
VARIANTS = {
    "paper": (),
    "public code": (
        *("--model.unicode.codebook.update", "sequential", "--model.unicode.codebook.teacher", "time_aligned"),
        *("--model.unicode.codebook.reset_rule", "any", "--loss.unicode.club_input", "quantised"),
        *(
            "--model.unicode.context_layers",
            "2",
            "--loss.unicode.cpc_self",
            "0.1",
            "--loss.unicode.align_weight",
            "0.5",
        ),
    ),
    "two steps ahead": ("--model.unicode.predict_steps", "2"),
    "sampled": ("--loss.unicode.club_estimate", "sampled"),
    "baseline": (
        *("--loss.unicode.club", "0", "--loss.unicode.cpc", "0", "--loss.unicode.align", "none"),
        *("--model.unicode.codebook.teacher", "none", "--model.unicode.codebook.cross_commitment", "0"),
    ),
    "margin": ("--loss.unicode.align", "margin"),
    "contrast": ("--loss.unicode.align", "contrast", "--model.unicode.shared_encoder", "true"),
    "transport": ("--loss.unicode.align", "transport"),
    "cross reconstruction": ("--loss.unicode.align", "cross_reconstruction"),
}


def build(*overrides: str) -> UnicodeSystem:
    torch.manual_seed(0)
    system = build_system(small_config(*overrides))
    assert isinstance(system, UnicodeSystem)
    with torch.no_grad():  # codes among the tokens, so that clips choose different ones
        system.codebook.codes.normal_()
    return system.train()


def names(modalities: tuple[str, ...]) -> tuple[str, str]:
    return ("--model.unicode.modalities", f"[{','.join(modalities)}]")


@pytest.mark.parametrize("modalities", PAIRS, ids="-".join)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_from_any_modalities(variant, modalities):
    system = build(*VARIANTS[variant], *names(modalities))
    terms = system.loss_terms(make_batch(modalities=modalities), 3)
    sum(terms.values()).backward()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert [name for name, p in system.named_parameters() if p.grad is None] == []
    zero = {name for name, p in system.named_parameters() if not p.grad.any()}
    assert {name for name in zero if "relu" not in name and "gate" not in name} == set()


class Literal:
    """The terms of a step from the encoders' outputs, in float64."""

    def __init__(self, system: UnicodeSystem, batch: Sequences, step: int) -> None:
        self.system, self.step = copy.deepcopy(system), step
        with torch.no_grad():
            heard = self.system._hear(batch, system.modalities)
        self.z = {m: value.double() for m, value in heard.semantic.items()}
        self.valid = {m: value.tolist() for m, value in heard.valid.items()}
        self.heard, self.modalities, self.clips = heard, system.modalities, len(batch)
        self.codes_LD = system.codebook.codes.double().clone()

    def seconds(self, *modalities: str) -> list[tuple[int, int]]:
        every = itertools.product(range(self.clips), range(STEPS))
        return [(b, t) for b, t in every if all(self.valid[m][b][t] for m in modalities)]

    def code(self, m: str, b: int, t: int) -> Tensor:
        return self.codes_LD[(self.z[m][b, t] - self.codes_LD).square().sum(1).argmin()]

    def quantised(self, m: str) -> Tensor:
        out = torch.zeros_like(self.z[m])
        for b, t in self.seconds(m):
            out[b, t] = self.code(m, b, t)
        return out

    def error(self, m: str, code_of: str) -> Tensor:
        network = self.system._network(m)
        rebuilt = network.decode(self.quantised(code_of).float(), self.heard.specific[m].features)
        return (rebuilt - self.heard.inputs[m].target).double().square().flatten(2).mean(2)

    def reconstruction(self) -> float:
        return sum(np.mean([self.error(m, m)[b, t].item() for b, t in self.seconds(m)]) for m in self.modalities)

    def commitment(self, beta: float, ratio: float) -> float:
        total = 0.0
        for m in self.modalities:
            each = []
            for b, t in self.seconds(m):
                others = [o for o in self.modalities if o != m and self.valid[o][b][t]]
                own = (self.z[m][b, t] - self.code(m, b, t)).square().mean().item()
                far = [(self.z[m][b, t] - self.code(o, b, t)).square().mean().item() for o in others]
                each.append(beta * own + beta * ratio * (np.mean(far) if far else 0.0))
            total += np.mean(each)
        return total

    def club(self, quantised: bool = False) -> float:
        """Eq. 5; the mean over i takes the seconds that exist, the mean over j those that exist there."""
        total, config = 0.0, self.system.config.loss.unicode
        for m in self.modalities:
            network, counted = self.system.club[m], torch.tensor(self.valid[m])
            x_BTD, y_BTS = (self.quantised(m) if quantised else self.z[m]).float(), self.heard.specific[m].summary_BTS
            network.fit(x_BTD.flatten(0, 1), y_BTS.flatten(0, 1), config.club_steps, counted.flatten())
            with torch.no_grad():
                mean, log_var = (v.double() for v in network(x_BTD))
            y = y_BTS.double()

            def log_q(i: int, j: int, t: int, mean=mean, log_var=log_var, y=y) -> float:
                squared = (y[j, t] - mean[i, t]).square() / log_var[i, t].exp()
                return -0.5 * (squared + log_var[i, t] + math.log(2 * math.pi)).sum().item()

            each = []
            for i, t in self.seconds(m):
                others = [log_q(i, j, t) for j in range(self.clips) if self.valid[m][j][t]]
                each.append(log_q(i, i, t) - np.mean(others))
            total += np.mean(each)
        return total

    def cpc(self, own_weight: float = 0.0) -> float:
        """Eq. 6; the same part of what the two modalities of a clip have in common is seen of all clips."""
        predictor = self.system.predictor
        share = int(np.random.default_rng([self.system.config.seed, self.step]).integers(2**20)) / 2**20
        total = 0.0
        for source, target in predictor.pairs:
            common = [min(sum(self.valid[source][b]), sum(self.valid[target][b])) for b in range(self.clips)]
            there = [b for b in range(self.clips) if common[b] > predictor.steps]
            seen = {b: 1 + int(share * (common[b] - predictor.steps)) for b in there}
            for k in range(predictor.steps):
                each = []
                for i in there:
                    prediction_D = self.prediction(source, target, i, seen[i], k)
                    scores = {j: (prediction_D @ self.z[target][j, seen[j] + k]).item() for j in there}
                    each.append(-scores[i] + math.log(sum(map(math.exp, scores.values()))))
                total += (own_weight if source == target else 1.0) * np.mean(each) / predictor.steps
        return total

    def prediction(self, source: str, target: str, clip: int, seen: int, k: int) -> Tensor:
        """W_k c_t of one clip."""
        predictor = self.system.predictor
        with torch.no_grad():
            context_1TD, _ = predictor.contexts[source](self.z[source][clip : clip + 1, :seen].float())
            every_KD = predictor.predictors[f"{source}_to_{target}"](context_1TD[0, -1]).view(predictor.steps, -1)
        return every_KD[k].double()

    def code_matching(self) -> float:
        posterior = {}
        for m in self.modalities:
            for b in range(self.clips):
                there = [t for t in range(STEPS) if self.valid[m][b][t]]
                each = [(-(self.z[m][b, t] - self.codes_LD).norm(dim=1)).softmax(0) for t in there]
                posterior[m, b] = torch.stack(each).mean(0)
        total = 0.0
        for one, other in itertools.combinations(self.modalities, 2):
            each = []
            for i in range(self.clips):
                p = posterior[one, i]
                scores = [(p @ q.log() + p.log() @ q).item() for q in (posterior[other, j] for j in range(self.clips))]
                each.append(-scores[i] + math.log(sum(map(math.exp, scores))))
            total += np.mean(each)
        return total


@pytest.mark.parametrize("modalities", PAIRS, ids="-".join)
@pytest.mark.parametrize("ragged", [False, True])
def test_terms_are_those_of_the_paper(modalities, ragged):
    system = build(*names(modalities), "--loss.unicode.club", "0.3", "--loss.unicode.cpc", "0.7")
    batch = make_batch(modalities=modalities, ragged=ragged)
    literal = Literal(system, batch, step=4)
    expected = {
        "reconstruction": literal.reconstruction(),
        "commitment": literal.commitment(beta=0.25, ratio=0.5),
        "club": 0.3 * literal.club(),
        "cpc": 0.7 * literal.cpc(),
        "align": literal.code_matching(),
    }
    terms = {name: term.item() for name, term in system.loss_terms(batch, 4).items()}
    assert terms == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_terms_are_those_of_the_public_code():
    system = build(*VARIANTS["public code"], "--loss.unicode.commitment", "0.5")
    batch = make_batch()
    literal = Literal(system, batch, step=9)
    terms = {name: term.item() for name, term in system.loss_terms(batch, 9).items()}
    expected = {
        "commitment": literal.commitment(beta=0.5, ratio=0.5),
        "club": 0.1 * literal.club(quantised=True),
        "cpc": literal.cpc(own_weight=0.1),
        "align": 0.5 * literal.code_matching(),
    }
    assert {name: terms[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=1e-5)


ALIGNMENTS = ("code_matching", "margin", "contrast", "transport", "cross_reconstruction")


def cut(batch: Sequences, rows: list[int]) -> Sequences:
    inputs, valid = ({m: x[rows] for m, x in each.items()} for each in (batch.inputs, batch.valid))
    return Sequences(inputs, valid, {}, tuple(batch.key[row] for row in rows))


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_clips_without_a_modality_change_nothing_that_compares_modalities(align):
    batch = make_batch(clips=6, modalities=THREE)
    for m, rows in (("audio", [1, 4]), ("text", [1, 4])):
        batch.valid[m][rows], batch.inputs[m][rows] = False, 0.0
    both = [0, 2, 3, 5]
    for names_of in (("audio", "visual"), ("audio", "text")):
        system = build("--loss.unicode.align", align, *names(names_of))
        with_all = copy.deepcopy(system).loss_terms(batch, 1)
        alone = copy.deepcopy(system).loss_terms(cut(batch, both), 1)
        for name in ("cpc", "align"):
            assert with_all[name].item() == pytest.approx(alone[name].item(), rel=1e-4), name


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_longer_padding_changes_no_term(align):
    system, batch = build("--loss.unicode.align", align, *names(THREE)), make_batch(modalities=THREE)
    longer = Sequences(
        {m: torch.cat([x, torch.zeros_like(x[:, :4])], 1) for m, x in batch.inputs.items()},
        {m: torch.cat([x, torch.zeros_like(x[:, :4])], 1) for m, x in batch.valid.items()},
        {},
        batch.key,
    )
    for step in range(5):
        short, long = (copy.deepcopy(system).loss_terms(each, step) for each in (batch, longer))
        for name, term in short.items():
            assert long[name].item() == pytest.approx(term.item(), rel=1e-4), name
        assert short["cpc"] > 0


def test_turn_rebuilds_each_modality_from_the_codes_of_the_others():
    system, batch = build(*VARIANTS["cross reconstruction"], *names(THREE)), make_batch(modalities=THREE)
    literal = Literal(system, batch, step=0)
    expected = 0.0
    for own, other in itertools.permutations(THREE, 2):
        error_BT = literal.error(own, other)
        expected += np.mean([error_BT[b, t].item() for b, t in literal.seconds(own, other)]) / 2
    assert system.loss_terms(batch, 0)["align"].item() == pytest.approx(expected, rel=1e-4)


def test_the_sampled_estimate_compares_each_clip_with_one_other(monkeypatch):
    """Over many steps its mean is that of the variational one, less the pairs of a clip with itself."""
    system, batch = build(*VARIANTS["sampled"], "--loss.unicode.club", "1"), make_batch(clips=6, ragged=False)
    for network in system.club.values():
        monkeypatch.setattr(network, "learning_rate", 0.0)
    with torch.no_grad():
        sampled = torch.stack([system.loss_terms(batch, step)["club"] for step in range(300)]).mean().item()
        everyone = build("--loss.unicode.club", "1")
        everyone.load_state_dict(system.state_dict())
        for network in everyone.club.values():
            monkeypatch.setattr(network, "learning_rate", 0.0)
        expected = everyone.loss_terms(batch, 0)["club"].item() * 6 / 5
    assert sampled == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_does_not_wait_for_the_device(variant):
    system, batch = build(*VARIANTS[variant]), make_batch()
    with no_host_sync():
        sum(system.loss_terms(batch, 2).values()).backward()


def test_a_training_step_of_the_published_size_does_not_wait_for_the_device():
    """On the meta device, where there are no values to wait for."""
    config = parse_config(["--model.system", "unicode"])
    assert config.model.unicode.codebook.num_codes == 400
    with torch.device("meta"):
        system = build_system(config).train()
        inputs = {"audio": torch.empty(80, 10, 128), "visual": torch.empty(80, 10, 7, 7, 512)}
        valid = {m: torch.ones(80, 10, dtype=torch.bool) for m in inputs}
    batch = Sequences(inputs, valid, {}, tuple(map(str, range(80))))
    with no_host_sync():
        sum(system.loss_terms(batch, 2).values()).backward()
    assert all(p.grad is not None for p in system.parameters())


def test_encoding_moves_nothing_and_leaves_the_mode():
    system, batch = build("--model.unicode.dropout", "0.5"), make_batch()
    before = {name: value.clone() for name, value in system.state_dict().items()}
    first, second = system.encode(batch), system.encode(batch)
    assert system.training
    assert all(torch.equal(value, before[name]) for name, value in system.state_dict().items())
    for m, encoded in first.items():
        assert torch.equal(encoded.quantised_BTD, second[m].quantised_BTD)  # no dropout
        assert torch.equal(
            encoded.quantised_BTD[~encoded.valid_BT], torch.zeros_like(encoded.quantised_BTD[~encoded.valid_BT])
        )
        valid_BT = encoded.valid_BT
        assert torch.equal(encoded.quantised_BTD[valid_BT], system.codebook.codes[encoded.indices_BT[valid_BT]])
        nearest = torch.cdist(encoded.semantic_BTD[valid_BT], system.codebook.codes).argmin(1)
        assert torch.equal(encoded.indices_BT[valid_BT], nearest)


def test_a_clip_is_encoded_alike_alone_among_others_and_with_one_modality():
    system, batch = build(), make_batch()
    together = system.encode(batch)
    for m in batch.inputs:
        for b in range(len(batch)):
            alone = Sequences({m: batch.inputs[m][b : b + 1]}, {m: batch.valid[m][b : b + 1]}, {}, ("x",))
            encoded = system.encode(alone)
            assert set(encoded) == {m}
            torch.testing.assert_close(encoded[m].semantic_BTD, together[m].semantic_BTD[b : b + 1])
            assert torch.equal(encoded[m].indices_BT, together[m].indices_BT[b : b + 1])


def test_bfloat16_keeps_the_statistics_in_float32():
    system = build().bfloat16()
    floats = {name: b.dtype for name, b in system.named_buffers() if b.is_floating_point()}
    assert set(floats.values()) == {torch.float32}
    before = system.codebook.codes.clone()
    batch = make_batch().to("cpu", torch.bfloat16)
    terms = system.loss_terms(batch, 0)
    sum(terms.values()).backward()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert (system.codebook.codes - before).abs().max() > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--model.unicode.modalities", "[audio]"), "name two or three"),
        (("--model.unicode.modalities", "[audio,audio]"), "name two or three"),
        (("--model.unicode.heads", "3"), "model.unicode.dim=8: must be a multiple of model.unicode.heads=3"),
        (("--model.unicode.visual_specific", "10"), "model.unicode.visual_specific=10: must be a multiple of 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises((ValueError, SystemExit)) as caught:
        build(*overrides)
    assert message in str(caught.value) or caught.type is SystemExit
