"""The predictors of Cross-CPC against LSTM cells and matrices, step by step."""

from __future__ import annotations

import pytest
import torch
from test_transformer_decoder import shard_parameters
from torch import Tensor

from avs_dist.modules.cross_cpc import CrossPredictor

MODALITIES = ("audio", "visual", "text")
B, T, D, STEPS = 4, 7, 6, 2


def make(layers: int = 1, own: bool = False) -> tuple[CrossPredictor, dict[str, Tensor]]:
    predictor = CrossPredictor(MODALITIES, D, STEPS, layers, own).double()
    return predictor, {m: torch.randn(B, T, D, dtype=torch.float64) for m in MODALITIES}


def seen(predictor: CrossPredictor, *t: int) -> list[Tensor]:
    """The same seconds for all pairs; one number for all clips, or one for each."""
    return [torch.tensor(t if len(t) > 1 else t * B)] * len(predictor.pairs)


def by_pair(predictor: CrossPredictor, z: dict[str, Tensor], *t: int) -> dict[tuple[str, str], Tensor]:
    return dict(zip(predictor.pairs, predictor(z, seen(predictor, *t)), strict=True))


def context(predictor: CrossPredictor, modality: str, z_TD: Tensor, layers: int) -> Tensor:
    """Of one clip, by the equations of the LSTM: gates i, f, g, o."""
    lstm = predictor.contexts[modality]
    for layer in range(layers):
        w_in, w_hidden, b_in, b_hidden = (
            getattr(lstm, f"{n}_l{layer}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden, cell, outputs = z_TD.new_zeros(D), z_TD.new_zeros(D), []
        for z_D in z_TD:
            i, f, g, o = (w_in @ z_D + b_in + w_hidden @ hidden + b_hidden).chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs.append(hidden)
        z_TD = torch.stack(outputs)
    return z_TD[-1]


@pytest.mark.parametrize("t", [1, 3, T - STEPS])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("own", [True, False])
def test_predictions_equal_their_formula(t, layers, own):
    predictor, z = make(layers, own)
    got = by_pair(predictor, z, t)
    assert set(got) == {(a, b) for a in MODALITIES for b in MODALITIES if own or a != b}
    for (source, target), predicted_KBD in got.items():
        assert predicted_KBD.shape == (STEPS, B, D)
        maps_KDD = predictor.predictors[f"{source}_to_{target}"].weight.view(STEPS, D, D)
        for b in range(B):
            c_D = context(predictor, source, z[source][b, :t], layers)
            for k in range(STEPS):
                torch.testing.assert_close(predicted_KBD[k, b], maps_KDD[k] @ c_D)


def test_only_the_past_of_the_source_counts():
    predictor, z = make(2, own=True)
    t = 3
    want = by_pair(predictor, z, t)
    changed = {m: torch.cat([v[:, :t], torch.randn(B, T - t, D, dtype=v.dtype)], 1) for m, v in z.items()}
    changed["text"] = changed["text"] + 1
    got = by_pair(predictor, changed, t)
    for pair in want:
        assert torch.equal(got[pair], want[pair]) == (pair[0] != "text")


@pytest.mark.parametrize("t", range(1, T - STEPS + 1))
@pytest.mark.parametrize("own", [True, False])
def test_every_parameter_takes_part_whatever_is_seen(t, own):
    predictor, z = make(2, own)
    sum(v.square().sum() for v in predictor(z, seen(predictor, t))).backward()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None, name
        # at the first second there is no hidden state yet
        assert (parameter.grad.abs().max() > 0) == (t > 1 or "weight_hh" not in name), name


def test_number_of_parameters_as_published():
    lstm = 4 * (256 * 256 + 256 * 256 + 2 * 256)
    for own, pairs in ((False, 2), (True, 4)):
        predictor = CrossPredictor(("audio", "visual"), 256, 1, 2, own)
        assert sum(p.numel() for p in predictor.parameters()) == 2 * 2 * lstm + pairs * 256 * 256


def test_no_value_is_read_on_the_host_and_sharded_parameters_suffice():
    predictor, z = make(2)
    with torch.no_grad():
        want = by_pair(predictor, z, 2)
        shard_parameters(predictor)
        got = by_pair(predictor, z, 2)
    assert all(torch.equal(got[pair], want[pair]) for pair in want)
    on_meta = by_pair(make(2)[0].to("meta"), {m: v.to("meta") for m, v in z.items()}, 2)
    assert on_meta["audio", "text"].shape == (STEPS, B, D)


def test_bfloat16_stays():
    predictor, z = make()
    got = by_pair(predictor.bfloat16(), {m: v.bfloat16() for m, v in z.items()}, 2)
    assert all(v.dtype == torch.bfloat16 and torch.isfinite(v).all() for v in got.values())


def test_each_clip_and_pair_has_its_own_second():
    predictor, z = make(2)
    t_B = (1, 3, T, 2)
    got = by_pair(predictor, z, *t_B)
    for pair in predictor.pairs:
        for b, t in enumerate(t_B):
            torch.testing.assert_close(got[pair][:, b], by_pair(predictor, z, t)[pair][:, b])
    mixed = predictor(z, [torch.full((B,), 1 + place) for place in range(len(predictor.pairs))])
    for place, pair in enumerate(predictor.pairs):
        torch.testing.assert_close(mixed[place], by_pair(predictor, z, 1 + place)[pair])
