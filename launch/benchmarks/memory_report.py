"""Figures of `bench memory` as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avs_dist.launch.benchmarks.memory_rank import SECONDS, Case
from avs_dist.launch.benchmarks.memory_state import KINDS, Held, paper_formula, zero_formula
from avs_dist.launch.benchmarks.report import table
from avs_dist.launch.benchmarks.traffic import ZERO, Sent

Row = tuple[Case, dict[str, Any]]  # a case and its figures, or {"failed": why}
EXPECTED_PASSES = {0: 2, 1: 2, 2: 2, 3: 3}  # of P elements, by the ZeRO paper
LARGEST = 4  # of our own collectives that are listed


def held_of(figures: Mapping[str, Any]) -> Held:
    return Held(**figures["held"])


def excess(case: Case, figures: Mapping[str, Any]) -> float:
    """How much more the model state takes than ZeRO says; negative: less."""
    formula = zero_formula(case.stage, case.precision).bytes(figures["parameters"], case.ranks)
    return held_of(figures).state(case.stage) / formula - 1


def markdown(facts: Mapping[str, Any], parts: Mapping[str, Sequence[Row]]) -> str:
    made = {"state": lambda rows: [*_state(rows), *_traffic(rows)], "own": _own, "switches": _switches}
    paragraphs = ["; ".join(f"{name}: {value}" for name, value in facts.items()) + "."]
    for part, rows in parts.items():
        measured = [row for row in rows if "failed" not in row[1]]
        paragraphs += made[part](measured) if measured else []
    notes = [
        f"- {case.name}: {found['failed']}" for rows in parts.values() for case, found in rows if "failed" in found
    ]
    return "\n\n".join([*paragraphs, *(["Notes:\n\n" + "\n".join(notes)] if notes else [])]) + "\n"


def _state(rows: Sequence[Row]) -> list[str]:
    first = rows[0][1]
    head = ["ranks", "ZeRO", "precision", "ZeRO's paper", "ours", "MB", "measured MB", "difference"]
    cells = [[*head, *KINDS, "weights, at most"]]
    for case, found in rows:
        held, shares = held_of(found), zero_formula(case.stage, case.precision)
        paper = "-" if case.precision == "fp32" else str(paper_formula(case.stage))
        formula = shares.bytes(found["parameters"], case.ranks)
        kinds = {**held.by_kind, **({"gradients": held.most_gradients} if case.stage < 2 else {})}
        row = [str(case.ranks), str(case.stage), case.precision, paper, str(shares), _mb(formula)]
        row += [_mb(held.state(case.stage)), f"{excess(case, found):+.1%}"]
        cells.append([*row, *(_mb(kinds[kind]) for kind in KINDS), _mb(held.most_parameters)])
    text = (
        f"Bytes that the fullest rank holds before its second step, in MB of 10^6, by the storages of the live engine; "
        f"P = {first['parameters']:,} parameters learn, {first['frozen_parameters']:,} are frozen and apart. Measured: "
        "parameters + gradients + masters + moments. Without ZeRO and in ZeRO 1 these are the gradients at the end of "
        "the backward pass, when all are there; ZeRO 1 in fp32 and ZeRO 2 then keep those of the rank. fp32: DeepSpeed "
        "holds a second copy of the weights as masters from ZeRO 1 on. bf16: gradients are summed in fp32 (the paper "
        "counts 2 bytes), and ZeRO 1 keeps the bf16 ones beside them. ZeRO 3 keeps small parameters (below 100,000 "
        "elements) whole on every rank, and gives others back late (last column: weights at any time of the backward "
        "pass)."
    )
    return ["### Model state", text, table(cells)]


def _traffic(rows: Sequence[Row]) -> list[str]:
    kinds = list(dict.fromkeys(sent.collective for _, found in rows for sent in _sent(found)))
    head = ["ranks", "ZeRO", "precision", *(f"{kind}, P" for kind in kinds), "passes of P", "expected"]
    cells = [[*head, "MB sent a rank", "of these ours"]]
    for case, found in rows:
        parameters, sent = found["parameters"], _sent(found)
        by_kind = {kind: sum(each.elements for each in sent if each.collective == kind) for kind in kinds}
        passes = sum(each.passed_elements for each in sent) / parameters
        total = sum(each.sent_bytes(case.ranks) for each in sent)
        own = sum(each.sent_bytes(case.ranks) for each in sent if each.owner != ZERO)
        row = [str(case.ranks), str(case.stage), case.precision]
        row += [f"{number / parameters:.3f}" if number else "-" for number in by_kind.values()]
        row += [f"{passes:.2f}", str(EXPECTED_PASSES[case.stage]), _mb(total)]
        cells.append([*row, f"{own / total:.2%}" if total else "-"])
    text = (
        "What one step hands to torch.distributed: elements of the whole tensors, in units of P, by collective. An "
        "all_reduce passes every element twice over the network of many ranks (reduce-scatter and all-gather), all "
        "others once; expected is the arithmetic of ZeRO's paper. MB sent: of one rank, were the ranks a ring, "
        "(W - 1) / W of what is passed. DeepSpeed all-reduces the gradients in ZeRO 1 and 2 and cuts them afterwards, "
        "one pass more than expected; in ZeRO 3 it gathers again in the backward "
        "pass only what it has given back in between (it keeps up to 10^9 elements)."
    )
    return ["### Bytes of a step", text, table(cells)]


def _own(rows: Sequence[Row]) -> list[str]:
    cells = [["system", "P", "by DeepSpeed, MB", "ours, MB", "ours, calls", "the largest"]]
    for case, found in rows:
        sent = _sent(found)
        own = [each for each in sent if each.owner != ZERO]
        largest = [f"{each.owner} {_mb(each.bytes)}" for each in own[:LARGEST]]
        numbers = [_mb(sum(each.bytes for each in sent if each.owner == ZERO)), _mb(sum(each.bytes for each in own))]
        calls = str(sum(each.calls for each in own))
        cells.append([_settings(case), f"{found['parameters']:,}", *numbers, calls, "; ".join(largest)])
    text = (
        f"Our own collectives (moments of batch normalisation, negatives, codebook, counts) beside DeepSpeed's, of one "
        f"step of {rows[0][0].ranks} ranks, ZeRO {rows[0][0].stage}, {rows[0][0].precision}, a clip of {SECONDS} s a "
        "rank; MB of the whole tensors."
    )
    return ["### Our own collectives", text, table(cells)]


def _switches(rows: Sequence[Row]) -> list[str]:
    head = ["settings", "ranks", "ZeRO", "offload", "activation checkpointing"]
    cells = [[*head, "MiB between steps", "MiB more in a step", "s a step"]]
    for case, found in rows:
        row = [
            _settings(case),
            str(case.ranks),
            str(case.stage),
            case.offload,
            "on" if case.activation_checkpointing else "off",
        ]
        cells.append([*row, f"{found['between_mib']:,.0f}", f"{found['peak_mib']:,.0f}", f"{found['seconds']:.2f}"])
    text = (
        f"One clip of {SECONDS} frames of {rows[0][0].size} x {rows[0][0].size} a rank, each case in processes of its "
        "own. On a CPU: resident memory of the process between steps, and how much more the fullest moment of a step "
        "takes; on a GPU: allocated memory. A CPU is its own host, so that offload moves nothing away there."
    )
    return ["### Switches", text, table(cells)]


def _settings(case: Case) -> str:
    return " + ".join(Path(file).stem for file in case.files)


def _sent(figures: Mapping[str, Any]) -> list[Sent]:
    return [Sent(**each) for each in figures["sent"]]


def _mb(number: float) -> str:
    megabytes = number / 1e6
    return "0" if not number else f"{megabytes:,.1f}" if megabytes >= 0.1 else f"{megabytes:.4f}"
