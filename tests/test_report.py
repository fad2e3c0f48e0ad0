"""The report: one well-formed page that needs no network, with pictures that can be opened and true numbers."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from avs_dist.config import Config, to_dict
from avs_dist.report import Panel, read_records, write_report
from avs_dist.shards.encode import write_clip

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects attributes and text, and checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def make_panel(name: str = "clip", seconds: int = 5, with_truth: bool = True) -> Panel:
    rng = np.random.default_rng(0)
    truth = np.zeros((seconds, 32, 48), np.uint8)
    truth[:-1, 8:24, 10:30] = 1  # silent in the last second
    probability = np.where(truth > 0, 0.9, 0.1).astype(np.float32)
    probability[0, 16:24] = 0.1  # half of the object missed: IoU 0.5
    probability[-1, :8] = 0.8  # a quarter of the silent frame painted
    return Panel(
        name=name,
        frames_THWC=rng.integers(0, 256, (seconds, 32, 48, 3), dtype=np.uint8),
        truth_THW=truth if with_truth else None,
        probability_THW=probability,
        mel_TFM=rng.uniform(-4.6, 1.0, (seconds, 96, 64)).astype(np.float32),
    )


def row(miou: float) -> dict[str, float]:
    return {
        "miou": miou,
        "miou_sounding": miou - 0.05,
        "miou_silent": 0.97,
        "f_score": 0.87,
        "f_score_batched": 0.9,
        "frames": 200,
        "frames_with_sound": 158,
        "batch_size": 4,
    }


CURVES = [{"phase": "train", "step": s, "loss": 1 / s, "bce": 1 / s, "lr": 1e-4} for s in range(1, 40)]
CURVES += [{"phase": "eval", "step": s, **row(s / 60)} for s in (20, 40)]
RESULTS = {"real": row(0.81), "muted": row(0.51), "swapped": row(0.46), "not aligned": row(0.61), "own <row>": row(0.2)}


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "predict é" / "held out.mp4"
    path.parent.mkdir(parents=True)
    frames = np.full((10, 64, 96, 3), 128, np.uint8)
    write_clip(path, frames, Fraction(10), np.zeros(16000, np.float32), 16000)
    return path


def write(path: Path, **changes) -> Page:
    arguments = {
        "title": "A <title> & more",
        "config": to_dict(Config()),
        "curves": CURVES,
        "results": RESULTS,
        "panels": [make_panel(), make_panel("film", seconds=3, with_truth=False)],
        "overlay": None,
        "notes": ["What it <is>."],
        "command": "make demo && ls",
    }
    write_report(path, **{**arguments, **changes})
    return Page(path.read_text(encoding="utf-8"))


def test_page_is_self_contained_and_every_picture_opens(tmp_path, overlay):
    page = write(tmp_path / "run" / "report.html", overlay=overlay)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    pictures, links = [], set()
    for source in page.attributes("src") + page.attributes("href") + page.attributes("poster"):
        if source.startswith("data:image/png;base64,"):
            with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
                picture.load()
                pictures.append((picture.format, picture.size))
        else:
            links.add(source)
    # 5 seconds x (frame, truth, model, sound) + 3 x (frame, model, sound) + 2 curves + the still of the video
    assert len(pictures) == 20 + 9 + 2 + 1
    assert {kind for kind, _ in pictures} == {"PNG"}
    assert pictures.count(("PNG", (96, 64))) == 8 + 1  # the sound of each second; the still has the same size
    (link,) = links
    assert (tmp_path / "run" / unquote(link)).samefile(overlay)
    assert "controls" in dict(page.tags)["video"]
    assert "://" not in (tmp_path / "run" / "report.html").read_text()


def test_numbers_and_texts(tmp_path):
    page = write(tmp_path / "report.html")
    text = re.sub(r"\s+", " ", page.text)
    assert "A <title> & more" in text
    assert "What it <is>." in text
    assert "0.81 mIoU with its own sound" in text
    assert "−0.35 mIoU with the sound of another clip" in text
    assert "−0.30 mIoU without sound" in text
    assert "+0.20 mIoU by time alignment" in text
    assert "own <row> 0.200 0.150 0.970 0.870 0.900" in text
    assert "(batches of 4)" in text
    assert "make demo && ls" in text
    assert "zero_stage: 1" in text
    assert text.count("IoU 1.00") == 3
    assert "IoU 0.50" in text
    assert "silent, 75% empty" in text
    assert "5 s" in text


def test_model_row_paints_where_the_probability_is_high(tmp_path):
    panel = make_panel()
    page = write(tmp_path / "report.html", panels=[panel])
    (source,) = [a["src"] for tag, a in page.tags if tag == "img" and a.get("alt") == "model, second 2"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")).astype(int)
    factor = picture.shape[0] // 32
    orange = picture[..., 0] - picture[..., 2]
    inside = orange[12 * factor : 20 * factor, 14 * factor : 26 * factor].mean()
    outside = orange[26 * factor :, :].mean()
    assert inside > 100 > 60 > outside


def semantic_panel(with_truth: bool = True) -> Panel:
    """Class 1 is found by half, class 9 is predicted where nothing is; the last second should be empty."""
    panel = make_panel(with_truth=False)
    truth, classes = np.zeros((2, 5, 32, 48), np.uint8)
    truth[:-1, 8:24, 10:30] = 1
    classes[:-1, 8:16, 10:30] = 1
    classes[1, 28:, 40:] = 9
    classes[-1, :8] = 9
    names = ("background", "man & dog", *(f"thing {k}" for k in range(2, 71)))
    return replace(panel, truth_THW=truth if with_truth else None, classes_THW=classes, class_names=names)


def picture(page: Page, alt: str) -> np.ndarray:
    """At the size of the panel."""
    (source,) = [a["src"] for tag, a in page.tags if tag == "img" and a.get("alt") == alt]
    enlarged = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")).astype(int)
    factor = enlarged.shape[0] // 32
    return enlarged[factor // 2 :: factor, factor // 2 :: factor]


def test_classes_have_their_colours_and_a_legend(tmp_path):
    page = write(tmp_path / "report.html", panels=[semantic_panel()])
    text = re.sub(r"\s+", " ", page.text)
    assert "each class in its colour" in text
    assert "man & dog thing 9" in text
    assert "what the model paints" not in text
    legend = [style for style in page.attributes("style") if "#800000" in style or "#c00000" in style]
    assert legend == ["background:#800000", "background:#c00000"]  # 1 and 9 of the VOC palette
    # class 1 alone; then the mean with class 9, which is nowhere right; a quarter of the last second is painted
    assert text.count("IoU 0.50") == 3
    assert text.count("IoU 0.25") == 1
    assert "silent, 75% empty" in text
    for alt, painted in (("truth, second 2", np.s_[10:22, 12:28]), ("model, second 2", np.s_[10:14, 12:28])):
        shown = picture(page, alt)
        assert np.abs(shown[painted].mean(axis=(0, 1)) - (0.85 * np.array([128, 0, 0]) + 0.15 * 84)).max() < 12
        outside = shown[2:6, 2:40].mean(axis=(0, 1))  # the frame in grey, where nothing sounds
        assert np.ptp(outside) < 25
        assert np.abs(outside - 84).max() < 25
    without_truth = write(tmp_path / "report.html", panels=[semantic_panel(with_truth=False), make_panel()])
    assert "what the model paints" in without_truth.text  # of the other panel
    assert "man & dog" in without_truth.text


def test_numbers_of_classes_are_explained(tmp_path):
    semantic = {"miou": 0.3, "miou_no_background": 0.29, "miou_present": 0.31, "miou_dataset": 0.4, "f_score": 0.35}
    semantic |= {"frames": 200, "frames_with_sound": 158, "std": 0.1}
    text = write(
        tmp_path / "report.html", panels=[], results={"real": semantic, "muted": {**semantic, "miou": 0.1}}
    ).text
    assert "a class never seen counts 0" in text
    assert "Precision and recall of each class" in text
    assert "mIoU -bg" in text
    assert "(sounding or not)" in text
    assert "threshold" not in text


def test_parts_without_data_are_left_out(tmp_path):
    page = write(tmp_path / "report.html", curves=[], results={}, panels=[], command=None)
    for heading in ("Results", "Second by second", "On video", "Training"):
        assert heading not in page.text
    assert "How to repeat it" in page.text
    diverged = [{"step": s, "loss": float("nan") if s == 2 else 1.0} for s in range(4)]
    assert "Training" in write(tmp_path / "report.html", curves=diverged).text
    assert "–" in write(tmp_path / "report.html", results={"real": {"miou": float("nan")}}).text


def test_errors_name_what_is_missing(tmp_path):
    page = tmp_path / "report.html"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4: no such file; avs-dist predict writes it"):
        write(page, overlay=tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4: not a video"):
        write(page, overlay=tmp_path / "text.mp4")
    with pytest.raises(ValueError, match=r"results\['real'\] has no 'miou'"):
        write(page, results={"real": {"f_score": 0.5}})
    assert list(tmp_path.glob("*report*")) == []  # nothing half-written either
    good = make_panel()
    with pytest.raises(ValueError, match="panel x: probability_THW has shape"):
        Panel("x", good.frames_THWC, None, good.probability_THW[:, :-1], good.mel_TFM)
    with pytest.raises(ValueError, match="panel x: frames_THWC must be uint8 RGB"):
        Panel("x", good.frames_THWC.astype(np.float32), None, good.probability_THW, good.mel_TFM)
    with pytest.raises(ValueError, match="panel x: mel_TFM has shape"):
        Panel("x", good.frames_THWC, None, good.probability_THW, good.mel_TFM[:3])


def test_read_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in CURVES))
    assert read_records(path) == CURVES
    with pytest.raises(FileNotFoundError, match="training writes metrics.jsonl"):
        read_records(tmp_path / "none.jsonl")
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_records(path)
    path.write_text('{"loss": 2}\n')
    with pytest.raises(ValueError, match="line 1: a record must be an object with the key 'step'"):
        read_records(path)
