"""Tables III to VIII of contrastive latent diffusion; published: mIoU on MS3 with PVT, in percent."""

from __future__ import annotations

from avs_dist.launch.ablation_tables.experiment import Masks
from avs_dist.launch.ablation_tables.paper import FROM_S4, FULL, Paper, Row, Table

DIFFUSION = Paper(
    title="contrastive latent diffusion (second version)",
    base=("demo_diffusion.yaml", "diffusion/toy.yaml"),
    overlays="diffusion",
    out="runs/ablations_diffusion",
    roman=True,
    experiment=Masks(),
    clips=160,
    steps=150,
    tables={
        3: Table(
            "latent diffusion",
            (
                Row("E-D", "table3_encoder_decoder", 54.28),
                Row("CVAE", "table3_cvae", 55.21),
                Row("LDM, without L_contrastive", "table3_ldm", 57.67),
            ),
        ),
        4: Table(
            "condition of the denoiser, without L_contrastive",
            (
                Row("none", "table4_none", 56.12),
                Row("audio", "table4_audio", 56.59),
                Row("visual", "table4_visual", 57.21),
                Row("audio-visual", "table3_ldm", 57.67),
            ),
        ),
        5: Table(
            "L_contrastive",
            (
                Row("without", "table3_ldm", 57.67),
                Row("first version: trains the condition", "table5_first_version", 58.18),
                Row("second version: trains both encoders", FULL, 59.62),
            ),
        ),
        6: Table(
            "numbers in a code",
            (
                Row("D = 8", "table6_8", 57.28),
                Row("D = 16", "table6_16", 57.98),
                Row("D = 24", FULL, 59.62),
                Row("D = 32", "table6_32", 57.01),
            ),
        ),
        7: Table(
            "transformer decoder (AVSegFormer)",
            (
                Row("without diffusion", "table7_transformer", 58.36),
                Row("with diffusion", "table7_diffusion", 59.94),
            ),
        ),
        8: Table("start", (Row("from scratch", FULL, 59.62), Row("pre-trained on S4", FROM_S4, 61.94))),
    },
)
