"""The papers whose ablation tables `avs-dist ablations` runs at toy scale; the tables are in configs/sweeps."""

from __future__ import annotations

from avs_dist.launch.ablation_tables.experiment import Codes, Masks
from avs_dist.launch.ablation_tables.paper import Paper

ECMVAE = Paper(
    name="ecmvae",
    title="ECMVAE",
    base=("demo_ecmvae.yaml",),
    out="runs/ablations",
    experiment=Masks(),
    clips=160,
    steps=150,
)
DIFFUSION = Paper(
    name="diffusion",
    title="contrastive latent diffusion (second version)",
    base=("demo_diffusion.yaml", "diffusion/toy.yaml"),
    out="runs/ablations_diffusion",
    experiment=Masks(),
    clips=160,
    steps=150,
)
UNICODE = Paper(
    name="unicode",
    title="Uni-Code",
    base=("demo_unicode.yaml",),
    out="runs/ablations_unicode",
    experiment=Codes(),
    clips=2000,
    steps=600,
)
PAPERS = {paper.name: paper for paper in (ECMVAE, DIFFUSION, UNICODE)}
