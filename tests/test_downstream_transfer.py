"""Classification and localisation: what transfers, how it is measured, and that nothing of the test leaks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from coded_clips import EVENTS, STEPS, coded_clips, with_labels_of_other_clips
from torch import Tensor, nn

from avs_dist.downstream.classification import Classification
from avs_dist.downstream.coded import CodedSplit
from avs_dist.downstream.heads import SecondHead
from avs_dist.downstream.localisation import Localisation, exp_log_loss, with_background
from avs_dist.downstream.protocol import Protocol, one_data_set, two_data_sets
from avs_dist.downstream.results import Measure, table
from avs_dist.downstream.training import HeadTraining, fit, fit_best, outputs
from avs_dist.downstream.transfer import Task, transfer

QUICK = HeadTraining(epochs=12, lr=2e-2, batch=16)


def splits(**options: object) -> dict[str, CodedSplit]:
    sizes = {"train": 60, "val": 30, "test": 40}
    return {
        name: coded_clips(size, seed, prefix=name, **options)  # type: ignore[arg-type]
        for seed, (name, size) in enumerate(sizes.items())
    }


def measures(task: Task, protocol: Protocol, settings: HeadTraining = QUICK, **options: object) -> dict[str, Measure]:
    return {m.name: m for m in transfer(task, protocol, settings, **options)}  # type: ignore[arg-type]


def flip(labels: Tensor) -> Tensor:
    return labels.roll(1, dims=-1)


def relabelled(clips: CodedSplit, modality: str) -> CodedSplit:
    """One modality with wrong labels."""
    return dataclasses.replace(clips, labels={**clips.labels, modality: flip(clips.labels[modality])})


@pytest.mark.parametrize("task", [Classification(), Localisation()])
def test_what_shares_codes_transfers_and_what_does_not_stays_at_chance(task: Task):
    name = next(iter(task.metrics))
    together = measures(task, one_data_set(splits(), "train"))[name]
    apart = measures(task, one_data_set(splits(apart=True), "train"))[name]
    for one, other in (("audio", "visual"), ("visual", "audio")):
        assert together.scores[one][one] > 0.9
        assert together.labelled[one] == together.scores[one][one]
        assert together.ratio(one, other) > 0.9
        assert apart.labelled[one] > 0.9
        assert apart.scores[one][other] < apart.chance[other] + 0.2


def test_classification_of_clips_with_one_event():
    clips = coded_clips(20, modalities=("audio", "visual", "text"))
    clips.labels["text"].zero_()
    clips.labels["audio"][3] = clips.labels["visual"][3] = 0  # nothing happens
    clips.valid["visual"][5] = False  # not seen
    category_N = clips.labels["visual"].any(1).int().argmax(1)
    seen, read = (Classification().examples(clips, m) for m in ("visual", "text"))
    keep = [i for i in range(20) if i not in (3, 5)]
    assert seen["category"].tolist() == category_N[keep].tolist()
    assert torch.equal(seen["code"], clips.codes["visual"][keep])
    assert read["category"].tolist() == category_N[[i for i in range(20) if i != 3]].tolist()
    clips.labels["audio"][7] = 1
    with pytest.raises(ValueError, match="clip clip7 has the events bell, cat, drum, rain"):
        Classification().examples(clips, "visual")


def test_localisation_uses_the_labels_of_the_modality_itself():
    clips = coded_clips(8)
    clips.labels["audio"] = flip(clips.labels["audio"])
    clips.labelled["audio"][2] = False
    clips.valid["audio"][4, 3:] = False
    heard, seen = (Localisation().examples(clips, m) for m in ("audio", "visual"))
    keep = [i for i in range(8) if i != 2]
    assert torch.equal(heard["target"], with_background(clips.labels["audio"][keep]))
    assert torch.equal(heard["valid"], clips.valid["audio"][keep])
    assert len(seen["code"]) == 8
    assert torch.equal(seen["target"][..., :-1], clips.labels["visual"].float())


def test_loss_of_localisation_is_over_the_seconds_that_exist():
    torch.manual_seed(1)
    clips = coded_clips(6)
    clips.valid["audio"][1:, 2:] = False
    head, batch = SecondHead(12, 4), Localisation().examples(clips, "audio")
    rows = [(n, t) for n in range(6) for t in range(STEPS) if clips.valid["audio"][n, t]]
    logits = torch.stack([head(batch["code"])[n, t] for n, t in rows])
    target = torch.stack([batch["target"][n, t] for n, t in rows])
    entropy = -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log()).mean()
    expected = entropy + exp_log_loss(logits, target, head.alpha_K)
    assert Localisation().loss(head, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_localisation_counts_the_background_only_as_published():
    examples = Localisation().examples(coded_clips(20), "audio")
    logits = torch.full_like(examples["target"], -1.0)
    logits[..., -1] = 1.0  # background all the time
    share = examples["target"][..., -1].mean().item()
    found = Localisation().scores(logits, examples)
    assert found["segment_f1"] == 0.0
    assert found["accuracy_published"] == pytest.approx(share)  # one event in each second, precision is recall
    assert found["f1_published"] == pytest.approx(share)
    constant = Localisation().constant(examples)
    assert constant["accuracy_published"] == pytest.approx(share)
    for name, target in (("segment_f1", examples["target"][..., :-1]), ("f1_published", examples["target"])):
        rates = target.mean((0, 1)).sort(descending=True).values
        best = max(2 * rates[:j].sum() / (j + rates.sum()) for j in range(1, len(rates) + 1))
        assert constant[name] == pytest.approx(best.item())


def test_scores_of_classification():
    examples = {"category": torch.tensor([0, 0, 0, 2])}
    logits = torch.eye(3)[[0, 1, 0, 2]]
    assert set(Classification().scores(logits, examples).values()) == {0.75}
    assert set(Classification().constant({"category": torch.tensor([0, 2, 2, 2, 1])}).values()) == {0.6}


def test_loss_of_classification_is_cross_entropy():
    clips = coded_clips(6)
    task, batch = Classification(), Classification().examples(clips, "audio")
    head = task.build(12, 4)
    logits = head(batch["code"], batch["valid"])
    expected = -torch.stack([F.log_softmax(z, 0)[c] for z, c in zip(logits, batch["category"], strict=True)]).mean()
    assert task.loss(head, batch).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("task", [Classification(), Localisation()])
def test_labels_of_the_test_clips_and_of_other_modalities_change_nothing_that_is_said(task: Task, monkeypatch):
    """The head that is tested, and when it is chosen, depend on the labelled modality of train and val alone."""
    said: list[Tensor] = []
    scores = type(task).scores

    def listen(self: Task, logits: Tensor, examples: dict[str, Tensor]) -> dict[str, float]:
        said.append(logits)
        return scores(self, logits, examples)

    monkeypatch.setattr(type(task), "scores", listen)
    parts = splits()
    before = measures(task, one_data_set(parts, "train"), train_on=["audio"])[next(iter(task.metrics))]
    first, said[:] = list(said), []
    parts["test"] = with_labels_of_other_clips(parts["test"])
    if isinstance(task, Localisation):  # the category of a clip is the same in all modalities
        parts |= {name: relabelled(parts[name], "visual") for name in ("train", "val")}
    after = measures(task, one_data_set(parts, "train"), train_on=["audio"])[next(iter(task.metrics))]
    assert before.epochs == after.epochs
    assert before.scores["audio"]["visual"] > after.scores["audio"]["visual"] + 0.2
    assert all(torch.equal(one, other) for one, other in zip(first, said, strict=True))


def test_published_and_proper_scores_differ_as_they_should():
    """Random labels can be learnt by heart and not generalised: only the published measure rewards it."""
    generator = torch.Generator().manual_seed(0)
    parts = splits(noise=1.0)
    for clips in parts.values():
        random_N = torch.randint(len(EVENTS), (len(clips),), generator=generator)
        labels = F.one_hot(random_N, len(EVENTS))[:, None].expand(-1, STEPS, -1).to(torch.uint8)
        clips.labels.update(dict.fromkeys(clips.labels, labels))
    found = measures(Classification(), one_data_set(parts, "train"), HeadTraining(epochs=40, lr=2e-2, batch=16))
    assert found["accuracy_published"].scores["audio"]["audio"] > 0.85
    assert found["accuracy"].scores["audio"]["audio"] < 0.5


def test_published_score_is_the_best_of_all_epochs_on_what_is_measured():
    parts = splits(noise=1.5)
    task, protocol = Localisation(), one_data_set(parts, "all")
    settings = HeadTraining(epochs=9, lr=0.2, batch=16)
    found = measures(task, protocol, settings, train_on=["visual"])
    train, test = (task.examples(protocol.published_train, m) for m in ("visual", "audio"))
    each = []
    for head in fit(lambda: task.build(12, 4), task.loss, train, settings):
        logits = outputs(lambda batch, head=head: task.logits(head, batch), test, "cpu")
        each.append(task.scores(logits, test))
    for name in ("accuracy_published", "f1_published"):
        values = [scores[name] for scores in each]
        assert values.index(max(values)) < 8  # the last is not the best
        assert found[name].scores["visual"]["audio"] == max(values)
        assert found[name].epochs["visual"]["audio"] == 1 + values.index(max(values))


def test_the_epoch_is_the_best_on_validation_clips_of_the_labelled_modality():
    parts = splits(noise=1.5)
    task, protocol = Classification(), one_data_set(parts, "train")
    settings = HeadTraining(epochs=8, lr=2e-2, batch=16)
    found = measures(task, protocol, settings, train_on=["visual"])["accuracy"]
    train = task.examples(parts["train"], "visual")
    val, other = task.examples(parts["val"], "visual"), task.examples(parts["test"], "audio")
    each = []
    for head in fit(lambda: task.build(12, 4), task.loss, train, settings):
        said = [outputs(lambda batch, head=head: task.logits(head, batch), x, "cpu") for x in (val, other)]
        each.append([task.scores(s, x)["accuracy"] for s, x in zip(said, (val, other), strict=True)])
    chosen = max(range(8), key=lambda i: (each[i][0], -i))
    assert found.epochs["visual"] == {"audio": chosen + 1, "visual": chosen + 1}
    assert found.scores["visual"]["audio"] == each[chosen][1]


def test_across_data_sets_each_may_have_one_modality():
    ours = splits(modalities=("visual",))
    theirs = {"test": coded_clips(40, 8, modalities=("audio",), events=EVENTS)}
    protocol = two_data_sets(ours, theirs, tuple((e, e) for e in EVENTS))
    found = measures(Classification(), protocol)
    assert found["accuracy"].scores == {"visual": {"audio": pytest.approx(1.0, abs=0.1)}}
    assert found["accuracy"].labelled["visual"] > 0.9  # on the held-out clips of the first data set
    assert found["accuracy_published"].labelled == {}
    assert found["accuracy_published"].ratio("visual", "audio") is None
    assert "-" in table(found["accuracy_published"]).splitlines()[-2]
    with pytest.raises(ValueError, match="--train-on audio: .* labelled and coded in visual"):
        transfer(Classification(), protocol, QUICK, ["audio"])
    both = two_data_sets(ours, {"test": coded_clips(40, 8)}, tuple((e, e) for e in EVENTS))
    found = measures(Classification(), both)
    assert found["accuracy_published"].scores["visual"]["visual"] > 0.9
    assert found["accuracy_published"].labelled == {}  # of other data
    unmeasured = dataclasses.replace(protocol, own=protocol.own.rows(torch.zeros(len(protocol.own), dtype=torch.bool)))
    assert measures(Classification(), unmeasured)["accuracy"].labelled == {}


def test_test_clips_without_labels_are_refused():
    parts = splits()
    parts["test"].labelled.update({m: torch.zeros(40, dtype=torch.bool) for m in ("audio", "visual")})
    with pytest.raises(ValueError, match="the test clips have no labels"):
        transfer(Localisation(), one_data_set(parts, "train"), QUICK)


def test_heads_are_seeded_and_leave_the_generator_alone():
    task, train = Classification(), Classification().examples(coded_clips(30), "audio")

    def weights(seed: int) -> Tensor:
        *_, head = fit(lambda: task.build(12, 4), task.loss, train, HeadTraining(epochs=2, batch=8, seed=seed))
        return nn.utils.parameters_to_vector(head.parameters())

    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = weights(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(weights(0), one)
    assert not torch.equal(weights(1), one)


def test_fit_is_adam_with_halved_rates_over_shuffled_batches():
    torch.manual_seed(0)
    examples = {"x": torch.randn(10, 3), "y": torch.randn(10, 1)}

    def loss(head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (head(batch["x"]) - batch["y"]).square().mean()

    settings = HeadTraining(epochs=12, lr=1e-2, batch=4, seed=5)
    torch.manual_seed(5)
    mine = nn.Linear(3, 1)
    adam = torch.optim.Adam(mine.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for epoch, head in enumerate(fit(lambda: nn.Linear(3, 1), loss, examples, settings)):
        assert not head.training
        adam.param_groups[0]["lr"] = 1e-2 if epoch < 10 else 5e-3
        order = torch.randperm(10, generator=generator)
        for batch in (order[:4], order[4:8], order[8:]):
            adam.zero_grad()
            loss(mine, {name: value[batch] for name, value in examples.items()}).backward()
            adam.step()
        torch.testing.assert_close(head.weight, mine.weight, rtol=1e-6, atol=1e-7)


def test_fit_best_gives_the_weights_of_the_first_best_epoch():
    examples = {"x": torch.randn(8, 3)}
    values, seen = iter([0.1, 0.7, 0.7, 0.2]), []

    def score(head: nn.Module) -> float:
        seen.append(head.weight.detach().clone())
        return next(values)

    head, epoch = fit_best(
        lambda: nn.Linear(3, 1), lambda h, b: h(b["x"]).square().mean(), examples, HeadTraining(4, 1e-2, 4), score
    )
    assert epoch == 2
    assert torch.equal(head.weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("batch", 0), ("seed", -1), ("lr", 0.0)])
def test_settings_out_of_range(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        HeadTraining(**{name: value})


def test_table_and_dict_of_a_measure():
    measure = Measure(
        "accuracy",
        "share of clips",
        {"audio": {"audio": 0.8, "visual": 0.6}, "visual": {"audio": 0.3, "visual": 0.9}},
        {"audio": 0.8},
        {"audio": 0.25, "visual": 0.5},
        {"audio": {"audio": 2, "visual": 2}},
    )
    rows = [line.split("  ") for line in table(measure).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["accuracy: share of clips"],
        ["trained on", "on audio", "on visual", "labelled"],
        ["audio", "0.8000", "0.6000 (x 0.75)", "0.8000"],
        ["visual", "0.3000", "0.9000", "-"],
        ["best constant", "0.2500", "0.5000"],
    ]
    assert measure.to_dict()["ratio"] == {"audio": {"visual": pytest.approx(0.75)}, "visual": {"audio": None}}
