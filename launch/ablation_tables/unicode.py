"""Tables 1 to 3 and Fig. 3 of Uni-Code; published: AVE V->A and A->V, pre-trained on VGGSound-AVEL 40K, in percent."""

from __future__ import annotations

from avs_dist.launch.ablation_tables.experiment import Codes
from avs_dist.launch.ablation_tables.paper import FULL, Paper, Row, Table

UNI_CODE = (47.7, 52.3)
NO_MM_EMA = (36.4, 42.9)  # in Table 2; the same row as DCID+CMCM in Table 1

UNICODE = Paper(
    title="Uni-Code",
    base=("demo_unicode.yaml",),
    overlays="unicode",
    out="runs/ablations_unicode",
    experiment=Codes(),
    clips=2000,
    steps=600,
    tables={
        1: Table(
            "other methods",
            (
                Row("baseline", "baseline", (5.5, 5.4)),
                Row("S-MiT", "baseline+smit", (14.4, 15.9)),
                Row("MST", "baseline+mst", (19.5, 23.1)),
                Row("CODIS", "baseline+codis", (20.8, 26.4)),
                Row("TURN", "baseline+turn", (19.1, 24.3)),
                Row("CMCM", "baseline+cmcm", (32.7, 36.8)),
                Row("DCID + S-MiT", "no_mm_ema+smit", (32.2, 34.0)),
                Row("DCID + MST", "no_mm_ema+mst", (34.9, 37.8)),
                Row("DCID + TURN", "no_mm_ema+turn", (29.7, 36.9)),
                Row("DCID + CODIS", "no_mm_ema+codis", (36.7, 41.0)),
                Row("DCID + CMCM", "no_mm_ema", NO_MM_EMA),
                Row("Uni-Code", FULL, UNI_CODE),
            ),
        ),
        2: Table(
            "audio and visual, without",
            (
                Row("CLUB", "no_club", (37.2, 40.3)),
                Row("Cross-CPC", "no_cpc", (5.2, 7.1)),
                Row("CLUB, Cross-CPC", "no_club+no_cpc", (35.2, 36.9)),
                Row("MM-EMA", "no_mm_ema", NO_MM_EMA),
                Row("reset", "no_reset", (38.9, 40.3)),
                Row("L_cmcm", "no_cmcm", (41.3, 46.0)),
                Row("MM-EMA, reset", "no_mm_ema+no_reset", (31.5, 33.8)),
                Row("nothing", FULL, UNI_CODE),
            ),
        ),
        3: Table(
            "audio, visual and text, without",
            (
                Row("CLUB", "avt+no_club", (50.2, 51.8)),
                Row("Cross-CPC", "avt+no_cpc", (43.8, 49.2)),
                Row("MM-EMA", "avt+no_mm_ema", (52.9, 49.9)),
                Row("MM-EMA, reset", "avt+no_mm_ema+no_reset", (33.0, 35.5)),
                Row("reset", "avt+no_reset", (50.8, 47.8)),
                Row("L_cmcm", "avt+no_cmcm", (52.4, 54.5)),
                Row("nothing", "avt", None),  # not in the text of the paper
            ),
        ),
        "transfer": Table(
            "what transfers, of Tables 1 and 2",
            (
                Row("baseline", "baseline", (5.5, 5.4)),
                Row("Uni-Code without Cross-CPC", "no_cpc", (5.2, 7.1)),
                Row("Uni-Code without MM-EMA", "no_mm_ema", NO_MM_EMA),
                Row("Uni-Code", FULL, UNI_CODE),
            ),
        ),
        "fig3": Table(
            "size of the codebook (sizes of ours)",
            tuple(Row(f"L = {size}", f"codes_{size}", None) for size in (64, 128, 256, 512, 1024)),
        ),
    },
)
