"""Tables 2 to 6 of ECMVAE; published: mIoU on MS3 with PVT, in percent."""

from __future__ import annotations

from avs_dist.launch.ablation_tables.experiment import Masks
from avs_dist.launch.ablation_tables.paper import FROM_S4, FULL, Paper, Row, Table

ECMVAE = Paper(
    title="ECMVAE",
    base=("demo_ecmvae.yaml",),
    overlays="ecmvae",
    out="runs/ablations",
    experiment=Masks(),
    clips=160,
    steps=150,
    tables={
        2: Table(
            "VAE and sound",
            (
                Row("without audio", "table2_no_audio", 48.20),
                Row("CVAE", "table2_cvae", 49.26),
                Row("CMVAE", "table2_cmvae", 54.99),
            ),
        ),
        3: Table(
            "factorised codes",
            (
                Row("VAE, one code of 16", "table2_cmvae", 54.99),
                Row("VAE, one code of 48", "table3_vae_48", 55.09),
                Row("VAE, factorised, 3 x 16", "table3_factorised", 56.38),
                Row("AE", "table3_ae", 54.00),
                Row("AE, factorised", "table3_ae_factorised", 54.82),
            ),
        ),
        4: Table(
            "divergence of the shared code",
            (
                Row("KL", "table3_factorised", 56.38),
                Row("PoE", "table4_poe", 57.35),
                Row("MoE", "table4_moe", 57.53),
                Row("JS", FULL, 57.84),
                Row("JS, geometric (ours)", "table4_js_geometric", None),
            ),
        ),
        5: Table(
            "constraints",
            (
                Row("neither", "table5_none", 57.01),
                Row("L_diff", "table5_diff", 57.65),
                Row("L_sic", "table5_sic", 57.51),
                Row("L_diff and L_sic", FULL, 57.84),
            ),
        ),
        6: Table("start", (Row("from scratch", FULL, 57.84), Row("pre-trained on S4", FROM_S4, 60.81))),
    },
)
