"""The shared codebook as a module: a step against loops in float64, resets, ranks, types, and no waiting."""

from __future__ import annotations

import codebook_loops
import pytest
import torch
from codebook_loops import NAMES, B, D, L, Settings, T, assert_same, copy_of, make, masks, tokens
from sync_guard import no_host_sync
from torch import Tensor

from avs_dist.kernels.codebook import CodebookState
from avs_dist.modules.codebook import CodebookOutput, MultiModalCodebook


def double(state: CodebookState) -> CodebookState:
    return CodebookState(*(value.double() if value.is_floating_point() else value.clone() for value in state))


def backward(output: CodebookOutput, quantised: list[Tensor], commitment: list[Tensor]) -> None:
    """Gradients of arbitrary weights of everything that has one."""
    outputs = [*output.quantised.values(), *output.commitment.values()]
    torch.autograd.backward(outputs, [w.to(o.dtype) for w, o in zip([*quantised, *commitment], outputs, strict=True)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("teacher", ["cross_attention", "time_aligned", "none"])
@pytest.mark.parametrize("update", ["joint", "sequential"])
@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_steps_match_loops(modalities: int, update: str, teacher: str, masked: bool) -> None:
    """Three steps with resets: codes, straight-through gradient, commitment of each token, state."""
    settings = Settings(0.8, update, teacher, 0.3, 0.7, reset_after=2, reset_rule="any", seed=3)
    module = make(modalities, **settings._asdict())
    state, resets = double(module.state), 0
    for updates in range(3):
        z = tokens(modalities)
        valid = masks(modalities) if masked else {name: torch.ones(B, T, dtype=torch.bool) for name in z}
        exact_z = [value.detach().double().requires_grad_() for value in z.values()]
        before = module.codes.clone()
        output = module(z, valid if masked else None)
        exact = codebook_loops.step(exact_z, list(valid.values()), state, updates, settings)
        weights = [torch.randn(B, T, D) for _ in z], [torch.randn(B, T) for _ in z]
        backward(output, *weights)
        exact_outputs = [*exact.quantised, *exact.commitment]
        torch.autograd.backward(exact_outputs, [w.double() for w in [*weights[0], *weights[1]]], inputs=exact_z)
        assert torch.equal(output.codes_LD, before)
        for m, name in enumerate(z):
            assert torch.equal(output.indices[name], exact.indices[m])
            assert torch.equal(output.valid[name], valid[name])
            close(output.quantised[name], exact.quantised[m])
            close(output.commitment[name], exact.commitment[m])
            close(z[name].grad, exact_z[m].grad)
            assert not z[name].grad[~valid[name]].any()
        means = [exact.commitment[m].sum() / valid[name].sum() for m, name in enumerate(z)]
        close(output.commitment_loss, sum(means))
        state = exact.state
        assert torch.equal(module.idle, state.idle_ML)
        for got, want in zip(module.state[:3], state[:3], strict=True):
            close(got, want)
        resets += int((state.count_L == 1).sum())
        assert module.updates.item() == updates + 1
    assert resets > 0


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


def test_codes_are_exact_and_copied_gradients() -> None:
    """Quantised tokens are codes to the last bit, and the gradient is that of the quantised token."""
    module, z = make(), tokens()
    output = module(z)
    output.quantised["audio"].backward(weight_BTD := torch.randn(B, T, D))
    assert torch.equal(output.quantised["audio"], output.codes_LD[output.indices["audio"]])
    assert torch.equal(z["audio"].grad, weight_BTD)


def test_commitment_is_eq_8_by_default() -> None:
    """beta 0.25, the other code at half the weight; three modalities in the ratio 0.5 : 0.125 : 0.125."""
    for modalities, share in ((2, 0.125), (3, 0.0625)):
        module, z = make(modalities), tokens(modalities)
        output = module(z)
        codes = {name: output.codes_LD[index] for name, index in output.indices.items()}
        own = 0.25 * (z["audio"] - codes["audio"]).square().mean(-1)
        cross = sum(share * (z["audio"] - codes[name]).square().mean(-1) for name in NAMES[1:modalities])
        torch.testing.assert_close(output.commitment["audio"], own + cross)


def test_reset_survives_and_needs_every_modality_under_all() -> None:
    """Codes 0-5 are chosen by both, 6 by sound alone, the rest by none; the clones stay while nobody chooses them."""
    for rule, kept in (("all", 6), ("any", 7)):
        module = make(reset_after=3, reset_rule=rule, teacher="none")
        start_LD = module.codes.clone()
        z = {"audio": start_LD[:7].view(1, 7, D), "visual": start_LD[[0, 1, 2, 3, 4, 5, 5]].view(1, 7, D)}
        for _ in range(3):
            output = module(z)
        assert output.indices["audio"].tolist() == [list(range(7))]
        placed_LD = module.codes.clone()
        gap_L = torch.cdist(placed_LD, start_LD[:kept]).amin(1)  # a clone lies beside a code in use
        assert gap_L.max() < 0.02
        moved_L = (placed_LD - start_LD).norm(dim=1) > 0.05
        assert moved_L.tolist() == [code >= kept for code in range(L)], rule
        for _ in range(2):
            module({name: value[:, :kept] for name, value in z.items()})
        torch.testing.assert_close(module.codes, placed_LD, rtol=0, atol=1e-3)


def test_no_reset_at_zero() -> None:
    module = make(reset_after=0)
    for _ in range(5):
        module(tokens())
    assert module.idle.max() == 5


def test_eval_moves_nothing_and_asks_nobody() -> None:
    def reduce(flat: Tensor) -> Tensor:
        raise AssertionError("a collective in eval mode")

    module = make(3, reduce=reduce)
    before, z = copy_of(module), tokens(3)
    with pytest.raises(AssertionError, match="a collective"):
        module(z)
    module.load_state_dict(before)
    module.eval()
    output = module(z)
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value), name
    module.train(False)
    alone = module({"visual": z["visual"]})
    assert torch.equal(alone.indices["visual"], output.indices["visual"])
    assert list(alone.quantised) == ["visual"]


def test_bfloat16_is_looked_up_and_averaged_in_float32() -> None:
    module, exact = make().to(torch.bfloat16), make()
    z = tokens(dtype=torch.bfloat16)
    single = {name: value.detach().float().requires_grad_() for name, value in z.items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = module(z)
    want = exact(single)
    assert {value.dtype for value in module.state[:3]} == {torch.float32}
    assert module.idle.dtype == torch.int32
    assert_same(module, exact)
    (output.commitment_loss + output.quantised["audio"].float().sum()).backward()
    (want.commitment_loss + want.quantised["audio"].sum()).backward()
    for name in z:
        assert output.quantised[name].dtype == z[name].grad.dtype == torch.bfloat16
        assert torch.equal(output.quantised[name], want.quantised[name].bfloat16())
        assert torch.equal(z[name].grad, single[name].grad.bfloat16())
    assert output.commitment_loss.dtype == torch.float32
    double_z = {name: value.detach().double() for name, value in z.items()}
    assert module(double_z).quantised["audio"].dtype == torch.float64


@pytest.mark.parametrize("teacher", ["cross_attention", "time_aligned"])
def test_a_token_that_is_not_finite_shows_in_the_loss_and_not_in_the_codes(teacher: str) -> None:
    for wrong in (torch.nan, torch.inf, 1e30):  # the square of the last is beyond float32
        module, z = make(teacher=teacher), tokens()
        with torch.no_grad():
            z["audio"][1, 2, 3] = wrong
        output = module(z)
        assert not output.commitment_loss.isfinite()
        assert not output.quantised["audio"][1, 2].isfinite().any()
        assert output.indices["audio"][1, 2] == -1
        assert all(value.isfinite().all() for value in module.state)
        # it is left out, as if it were not there
        same = make(teacher=teacher)
        same(
            {name: value.nan_to_num(0.0, 0.0, 0.0) for name, value in z.items()},
            {"audio": output.indices["audio"] >= 0},
        )
        assert_same(module, same)


def test_what_is_not_valid_may_hold_anything() -> None:
    module, same = make(), make()
    z, valid = tokens(), masks(2)
    poisoned = {n: torch.where(valid[n][..., None], v.detach(), torch.nan).requires_grad_() for n, v in z.items()}
    output, want = module(poisoned, valid), same(z, {"audio": valid["audio"], "visual": valid["visual"]})
    output.commitment_loss.backward()
    want.commitment_loss.backward()
    assert_same(module, same)
    for name in z:
        assert torch.equal(output.quantised[name], want.quantised[name])
        assert torch.equal(poisoned[name].grad, z[name].grad)
        assert bool((output.indices[name] == -1).eq(~valid[name]).all())
    nothing = {name: torch.zeros(B, T, dtype=torch.bool) for name in z}
    assert module(poisoned, nothing).commitment_loss == 0


def test_first_codes_are_uniform_and_fixed_by_the_seed() -> None:
    module = MultiModalCodebook(50, 64, seed=1)
    assert 0.99 / 50 < module.codes.abs().max() <= 1 / 50
    assert abs(module.codes.mean()) < 0.001
    assert torch.equal(module.codes, MultiModalCodebook(50, 64, seed=1).codes)
    assert not torch.equal(module.codes, MultiModalCodebook(50, 64, seed=2).codes)
    assert torch.equal(module.sum, module.codes)
    assert bool((module.count == 1).all())
    assert module.state.idle_ML.shape == (2, 50)


@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_a_step_does_not_wait_for_the_device(update: str) -> None:
    module, z = make(3, update=update, reset_after=2), tokens(3)
    for valid in (None, masks(3)):
        with no_host_sync():
            output = module(z, valid)
            (output.commitment_loss + sum(value.sum() for value in output.quantised.values())).backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update": "both"}, "update must be one of joint, sequential, got 'both'"),
        ({"teacher": "attention"}, "teacher must be one of cross_attention, time_aligned, none"),
        ({"reset_rule": "both"}, "reset_rule must be one of all, any"),
        ({"reset_after": -1}, "reset_after at least 0"),
        ({"decay": 0.0}, "decay must be above 0"),
        ({"decay": 1.1}, "at most 1"),
        ({"modalities": ("audio", "audio")}, "different names"),
        ({"modalities": ()}, "different names"),
    ],
)
def test_settings_that_do_not_exist(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiModalCodebook(L, D, **settings)


def test_tokens_that_do_not_fit() -> None:
    module, z = make(), tokens()
    for given, valid, message in (
        ({"audio": z["audio"]}, None, r"all of \['audio', 'visual'\], got \['audio'\]"),
        ({**z, "text": z["audio"]}, None, "got .*'text'"),
        (z, {"sound": z["audio"][..., 0] > 0}, r"masks \['sound'\]"),
        ({"audio": z["audio"], "visual": z["visual"][:2]}, None, r"z\['visual'\] must be \[B,T,D\] = \[3, 4, 6\]"),
        ({name: value[..., :4] for name, value in z.items()}, None, r"z\['audio'\] must be .*\[3, 4, 6\], got"),
        (z, {"audio": z["audio"][0] > 0}, r"valid\['audio'\] must be \[B,T\] = \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            module(given, valid)
    with pytest.raises(ValueError, match="some of"):
        module.eval()({})
