"""The latent codes of many frames in one t-SNE embedding, as Fig. 3 of ECMVAE shows them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from avs_dist.clip import Clip
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.report_figures import INK, MODEL, MUTED, QUIET, TRUTH
from avs_dist.systems.base import System

MIN_FRAMES = 10
PERPLEXITY = 30.0
STYLES = ((TRUTH, "o"), (MODEL, "^"), (QUIET, "s"), (INK, "D"), (MUTED, "v"))
MEANINGS = {"s_v": "of the picture", "s_a": "of the sound", "c": "shared by both"}


@dataclass(frozen=True)
class Embedding:
    """Points in the plane: all frames of the first code, then all of the second, and so on.

    silhouette: of the codes as clusters, in their own space; None where there is one code only.
    """

    points_P2: np.ndarray
    labels: list[str]
    silhouette: float | None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.labels))

    def to_dict(self) -> dict[str, Any]:
        """JSON safe, with the number of points of each code."""
        return {
            "silhouette": self.silhouette,
            "counts": {name: self.labels.count(name) for name in self.names},
            "labels": self.labels,
            "coordinates": self.points_P2.tolist(),
        }


def collect_codes(
    system: System,
    batches: Iterable[tuple[Clip, Sequence[int]]],
    source: Literal["prior", "posterior"],
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """Means of the codes of all frames, float64 [N,L] by the name of the code.

    Args:
        batches: `(clip, positions)`, as `avs_dist.loader.eval_loader` yields them; position -1 marks padding.
        source: "posterior" takes the frames with a mask only, as it looks at the masks.

    Raises:
        ValueError: the system has no codes, or no posterior.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for clip, positions in batches:
        codes = system.latents(clip.to(device))
        if codes is None:
            raise ValueError(f"{type(system).__name__} has no latent codes: train one with model.system ecmvae")
        distributions = _chosen(codes.prior if source == "prior" else codes.posterior, system)
        exist_BT = clip.valid_BT & (torch.as_tensor(positions) >= 0)[:, None]
        counted_BT = exist_BT & clip.labelled_BT if source == "posterior" else exist_BT
        for name, distribution in distributions.items():
            mean_BTL = distribution.mean.double().cpu()
            parts.setdefault(name, []).append(mean_BTL[counted_BT.cpu()].numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def _chosen(distributions: Mapping[str, Gaussian | Mixture], system: System) -> Mapping[str, Gaussian | Mixture]:
    if not distributions:
        raise ValueError(
            f"{type(system).__name__} has no posterior (model.latent.kind ae): take the codes of the prior"
        )
    return distributions


def choose_frames(codes: Mapping[str, np.ndarray], count: int, seed: int) -> dict[str, np.ndarray]:
    """At most `count` frames, drawn at random: the same ones of every code, in order.

    Raises:
        ValueError: there are fewer than MIN_FRAMES.
    """
    there = len(next(iter(codes.values())))
    if there < MIN_FRAMES:
        raise ValueError(
            f"{there} frames found: an embedding needs at least {MIN_FRAMES} (of the posterior: frames with a mask)"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(there)[:count])
    return {name: values[chosen] for name, values in codes.items()}


def embed(codes: Mapping[str, np.ndarray], seed: int) -> Embedding:
    """One t-SNE embedding of all codes [N,L] together, which must be equally long; the same seed gives the same one.

    Raises:
        ValueError: codes of different length, codes that are not finite, or all codes of all frames are equal.
    """
    lengths = {name: values.shape[1] for name, values in codes.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"codes of different length do not share a space: {lengths}")
    codes_PL = np.concatenate(list(codes.values()))
    if not np.isfinite(codes_PL).all():
        raise ValueError("some codes are NaN or infinite: the training has diverged")
    if (codes_PL == codes_PL[0]).all():
        raise ValueError("all codes of all frames are equal: the posterior has collapsed, there is nothing to embed")
    labels = [name for name, values in codes.items() for _ in values]
    # the principal components that t-SNE starts from need two columns
    padded_PL = np.pad(codes_PL, ((0, 0), (0, max(0, 2 - codes_PL.shape[1]))))
    perplexity = min(PERPLEXITY, (len(labels) - 1) / 3)
    points_P2 = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(padded_PL)
    silhouette = float(silhouette_score(codes_PL, labels)) if len(codes) > 1 else None
    return Embedding(points_P2, labels, silhouette)


def latents_png(embedding: Embedding, title: str) -> bytes:
    """Scatter plot with a colour, a marker and a legend entry for each code; the axes of t-SNE have no unit."""
    figure = Figure(figsize=(6.4, 5.6), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots()
    labels = np.array(embedding.labels)
    # small points where there are many
    area = float(np.clip(9_000 / len(labels), 5, 40))
    for index, name in enumerate(embedding.names):
        colour, marker = STYLES[index % len(STYLES)]
        points_N2 = embedding.points_P2[labels == name]
        meaning = f" {MEANINGS[name]}" if name in MEANINGS else ""
        axes.scatter(
            points_N2[:, 0],
            points_N2[:, 1],
            s=area,
            color=colour,
            marker=marker,
            alpha=0.75,
            linewidths=0,
            label=name + meaning,
        )
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    for side in axes.spines.values():
        side.set_color(MUTED)
    # below the points, so that none is hidden
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=10, markerscale=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
