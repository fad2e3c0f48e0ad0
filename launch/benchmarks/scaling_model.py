"""A model, not a measurement: the time of a step on many GPUs, from what one step was counted to compute and send.

Everything that it takes for granted is a field of `Assumptions`. A step lasts as long as the slower of reading and
training; training is computing, waiting for the slowest GPU, and what communication is not hidden behind computing.
Collectives run in rings, one after the other; an all_reduce in a tree where that is faster. A ring over several nodes
leaves each node through the network ports of all its GPUs at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import NamedTuple

from avs_dist.launch.benchmarks.traffic import ZERO, Sent

BACKWARD_SHARE = 2 / 3  # of computing: gradients of inputs and of weights, beside the forward pass


@dataclass(frozen=True)
class Assumptions:
    """Defaults: nodes of 8 H200 with 400 Gb/s of network for each GPU.

    Args:
        gpus_per_node: GPUs of a node.
        peak_tflops: TFLOP/s of a GPU (bf16, dense, by the data sheet).
        utilisation: Share of that which the network reaches.
        node_gb_s: GB/s of a GPU to others of its node, each way.
        network_gb_s: GB/s of a GPU to other nodes, each way.
        bandwidth_share: Share of both that collectives reach.
        node_hop_us: Microseconds from GPU to GPU within a node.
        network_hop_us: Microseconds from node to node.
        call_us: Microseconds to start a collective.
        overlap: Share of the gradients' and weights' way that is hidden behind computing, as far as that lasts.
        straggling: Standard deviation of the computing time of a GPU, as a share of it.
        clips: Clips of a GPU in a step.
        clip_mb: MB of a clip in its shard (raw frames of 224 x 224, masks and log-mel).
        clips_s: Clips that a loading process reads in a second (shards/README.md, one core).
        loaders: Loading processes of a GPU.
        node_read_gb_s: GB/s that a node reads from its disk or cache.
    """

    gpus_per_node: int = 8
    peak_tflops: float = 989.0
    utilisation: float = 0.3
    node_gb_s: float = 450.0
    network_gb_s: float = 50.0
    bandwidth_share: float = 0.8
    node_hop_us: float = 2.0
    network_hop_us: float = 6.0
    call_us: float = 10.0
    overlap: float = 0.0
    straggling: float = 0.02
    clips: int = 4
    clip_mb: float = 1.131
    clips_s: float = 2283.0
    loaders: int = 1
    node_read_gb_s: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("overlap", "straggling") or field.name.endswith("_us") else 1e-12
            most = 1 if field.name in ("overlap", "utilisation", "bandwidth_share") else math.inf
            if not least <= value <= most:
                raise ValueError(
                    f"{field.name}={value:g}: must be {'at least' if value < least else 'at most'} "
                    f"{least if value < least else most:g}"
                )


class Step(NamedTuple):
    """Seconds of one step."""

    gpus: int
    computing: float
    straggling: float  # waiting for the slowest GPU
    gradients: float  # not hidden, as the next
    weights: float
    own: float  # moments, negatives, codebook: never hidden
    reading: float

    @property
    def seconds(self) -> float:
        return max(self.computing + self.straggling + self.gradients + self.weights + self.own, self.reading)


def model_step(assumed: Assumptions, gpus: int, gflop_per_clip: float, sent: Sequence[Sent]) -> Step:
    """One step of `gpus`, of which each sends what was counted.

    Args:
        gflop_per_clip: of forward and backward pass.
        sent: collectives of one step of one rank, with whole tensors.
    """
    computing = assumed.clips * gflop_per_clip / (1e3 * assumed.peak_tflops * assumed.utilisation)
    zero = [each for each in sent if each.owner == ZERO]
    gathers = sum(collective_seconds(assumed, gpus, each) for each in zero if each.collective == "all_gather")
    reductions = sum(collective_seconds(assumed, gpus, each) for each in zero if each.collective != "all_gather")
    return Step(
        gpus,
        computing,
        computing * assumed.straggling * slowest_of(gpus),
        reductions - min(assumed.overlap * reductions, BACKWARD_SHARE * computing),
        gathers - min(assumed.overlap * gathers, computing),
        sum(collective_seconds(assumed, gpus, each) for each in sent if each.owner != ZERO),
        reading_seconds(assumed, gpus),
    )


def collective_seconds(assumed: Assumptions, gpus: int, sent: Sent) -> float:
    """All calls of one kind together."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / assumed.gpus_per_node)
    ways = [assumed.node_gb_s, *([assumed.network_gb_s * min(gpus, assumed.gpus_per_node)] if nodes > 1 else [])]
    bytes_s = 1e9 * assumed.bandwidth_share * min(ways)
    ring_us = (gpus - nodes) * assumed.node_hop_us + (nodes - 1) * assumed.network_hop_us
    passes = sent.passed_elements / sent.elements if sent.elements else 1
    ring = sent.calls * 1e-6 * (assumed.call_us + passes * ring_us) + sent.sent_bytes(gpus) / bytes_s
    if sent.collective != "all_reduce":
        return ring
    depth_us = (min(gpus, assumed.gpus_per_node) - 1) * assumed.node_hop_us
    depth_us += math.ceil(math.log2(nodes)) * assumed.network_hop_us
    tree = sent.calls * 1e-6 * (assumed.call_us + passes * depth_us) + passes * sent.bytes / bytes_s
    return min(ring, tree)


def slowest_of(gpus: int) -> float:
    """By how many standard deviations the slowest of so many is expected to be late (Blom's approximation)."""
    return NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))


def reading_seconds(assumed: Assumptions, gpus: int) -> float:
    """The slower of the loading processes of a GPU and of the disk of its node."""
    on_node = min(gpus, assumed.gpus_per_node)
    disk = assumed.clips * on_node * assumed.clip_mb / (1e3 * assumed.node_read_gb_s)
    return max(assumed.clips / (assumed.clips_s * assumed.loaders), disk)


def efficiency(step: Step, alone: Step) -> float:
    """Clips a second of a GPU, as a share of those of one alone: as many clips on each (weak scaling)."""
    return alone.seconds / step.seconds
