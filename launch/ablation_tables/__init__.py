"""The ablation tables of the papers, as data: what `avs-dist ablations` runs, and the published scores."""

from __future__ import annotations

from avs_dist.launch.ablation_tables.diffusion import DIFFUSION
from avs_dist.launch.ablation_tables.ecmvae import ECMVAE
from avs_dist.launch.ablation_tables.unicode import UNICODE

PAPERS = {"ecmvae": ECMVAE, "diffusion": DIFFUSION, "unicode": UNICODE}
