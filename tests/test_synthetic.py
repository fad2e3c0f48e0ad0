"""The synthetic benchmark: layout, determinism, agreement of masks, pictures and sound, media files that play."""

from __future__ import annotations

import csv
import wave
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from avs_dist.launch.cli import run
from avs_dist.shards import timbre
from avs_dist.shards.encode import Mp4Writer
from avs_dist.shards.render import BACKGROUND, Rendered, render_scene
from avs_dist.shards.scene import CLASSES, FPS, TIMBRES, Scene
from avs_dist.shards.synthetic import scene_of, split_of, subset_of, write_benchmark

SIZE, CLIPS, SECONDS = 64, 5, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic")
    write_benchmark(out, "s4", CLIPS, seed=7, size=SIZE, workers=1, progress=False)
    write_benchmark(out, "ms3", CLIPS, seed=7, size=SIZE, workers=1, progress=False)
    write_benchmark(out, "avss", CLIPS, seed=7, size=SIZE, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Rendered]]:
    scenes = [scene_of("ms3", 3, index) for index in range(24)]
    return [(scene, render_scene(scene, SIZE)) for scene in scenes]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32768


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_s4_layout(data: Path) -> None:
    table = rows(data / "Single-source/s4_meta_data.csv")
    assert list(table[0]) == ["name", "start", "category", "split"]
    assert [row["split"] for row in table] == ["train", "val", "test", "train", "train"]
    folder = data / "Single-source/s4_data"
    expected = {"visual_frames": 0, "gt_masks": 0, "raw_videos": CLIPS, "audio_wav": CLIPS}
    for row in table:
        name, group = row["name"], Path(row["split"]) / row["category"]
        assert row["category"] in CLASSES
        num_masks = 1 if row["split"] == "train" else SECONDS
        assert all((folder / "visual_frames" / group / name / f"{name}_{k}.png").is_file() for k in range(1, 6))
        assert all((folder / "gt_masks" / group / name / f"{name}_{k}.png").is_file() for k in range(1, num_masks + 1))
        assert (folder / "raw_videos" / group / f"{name}.mp4").is_file()
        assert (folder / "audio_wav" / group / f"{name}.wav").is_file()
        expected["visual_frames"] += SECONDS
        expected["gt_masks"] += num_masks
    assert {d: sum(p.is_file() for p in (folder / d).rglob("*")) for d in expected} == expected


def test_ms3_layout(data: Path) -> None:
    table = rows(data / "Multi-sources/ms3_meta_data.csv")
    assert list(table[0])[:2] == ["name", "split"]  # read by position in the published code
    folder = data / "Multi-sources/ms3_data"
    for row in table:
        name, split = row["name"], row["split"]
        assert set(row["sounding_objects"].split("_")) <= set(CLASSES)
        for k in range(1, 6):
            assert (folder / "visual_frames" / name / f"{name}.mp4_{k}.png").is_file()
            mask = np.asarray(Image.open(folder / "gt_masks" / split / name / f"{name}_{k}.png"))
            assert mask.shape == (SIZE, SIZE)
            assert set(np.unique(mask)) <= {0, 255}
        assert (folder / "raw_videos" / split / f"{name}.mp4").is_file()
        assert (folder / "audio_wav" / split / f"{name}.wav").is_file()
    assert sum(p.is_file() for p in folder.rglob("*")) == CLIPS * 12
    assert not [p for p in data.rglob("*") if "partial" in p.name]


def test_labelled_frames_are_on_show_at_fifteen_sixteenths_of_each_second() -> None:
    for seconds, index in ((5, 0), (10, 1)):
        scene = scene_of("avss", 0, index)
        assert len(scene.labelled_frames) == scene.seconds == seconds
        for second, frame in enumerate(scene.labelled_frames):
            assert frame / FPS <= second + 15 / 16 < (frame + 1) / FPS
            assert frame < scene.num_frames


def test_split_shares() -> None:
    splits = [split_of(i) for i in range(400)]
    assert (splits.count("train"), splits.count("val"), splits.count("test")) == (320, 40, 40)
    assert {split_of(i) for i in range(3)} == {"train", "val", "test"}


def test_every_split_has_the_subsets_of_avss() -> None:
    for clips, least in ((20, {"v2"}), (30, {"v1s", "v1m", "v2"})):
        for split in ("train", "val", "test"):
            subsets = {subset_of(i) for i in range(clips) if split_of(i) == split}
            assert subsets >= least
            assert len(subsets) > 1


def test_avss_layout(data: Path) -> None:
    table = rows(data / "avs_released/metadata.csv")
    assert list(table[0]) == ["vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"]
    assert [(row["split"], row["label"]) for row in table] == [
        *(("train", "v1s"), ("val", "v2"), ("test", "v1m"), ("train", "v1s"), ("train", "v2"))
    ]
    seen = {"metadata.csv", "label2idx.json"}
    for row in table:
        seconds = 10 if row["label"] == "v2" else 5
        num_masks = 1 if (row["split"], row["label"]) == ("train", "v1s") else seconds
        folder = f"{row['label']}/{row['uid']}"
        seen |= {f"{folder}/audio.wav", *(f"{folder}/frames/{k}.jpg" for k in range(seconds))}
        seen |= {f"{folder}/labels_rgb/{k}.png" for k in range(num_masks)}
        assert len(read_wav(data / "avs_released" / folder / "audio.wav")) == seconds * 16_000
        assert len(row["a_obj"].split("_")) == 1 or row["label"] != "v1s"
        assert set(row["a_obj"].split("_")) <= set(CLASSES)
    assert set(content(data / "avs_released")) == seen


def test_the_background_drifts_on_for_ten_seconds() -> None:
    scene = scene_of("avss", 0, 1)
    fast = replace(scene, background_velocity=np.array([0.06, -0.06]), items=scene.items[:1])
    frames = render_scene(fast, SIZE).frames_FHWC
    assert frames.shape == (100, SIZE, SIZE, 3)
    assert frames[-1].std(axis=(0, 1)).min() > 3


@pytest.mark.parametrize("setting", ["s4", "ms3", "avss"])
def test_same_seed_same_bytes_for_any_workers_and_number_of_clips(data: Path, tmp_path: Path, setting: str) -> None:
    root = write_benchmark(tmp_path, setting, 3, seed=7, size=SIZE, workers=2, progress=False)
    again, first = content(root), content(data / root.name)
    table = "metadata.csv" if setting == "avss" else f"{setting}_meta_data.csv"
    assert first[table].startswith(again.pop(table))
    assert len(again) > 3 * 8
    for name, data_bytes in again.items():
        assert first[name] == data_bytes, name  # mp4 too


def test_other_seed_other_clip() -> None:
    first, second = (render_scene(scene_of("ms3", seed, 0), SIZE).frames_FHWC for seed in (0, 1))
    assert np.abs(first.astype(int) - second).mean() > 5


def test_mask_is_the_visible_part_of_what_sounds(drawn: list[tuple[Scene, Rendered]]) -> None:
    """Take the sounding items out of the scene: exactly the pixels of the mask change, but for soft edges."""
    checked = 0
    for scene, rendered in drawn[:12]:
        masks_THW = rendered.masks_THW(scene)
        for t, frame in enumerate(scene.labelled_frames):
            sounding = [item for item in scene.items if item.on_T[t]]
            assert masks_THW[t].any() == bool(sounding)
            if not sounding:
                continue
            silent = replace(scene, items=tuple(item for item in scene.items if not item.on_T[t]))
            without = render_scene(silent, SIZE).frames_FHWC[frame].astype(int)
            changed_HW = np.abs(rendered.frames_FHWC[frame] - without).max(axis=2) > 1
            inside, outside = masks_THW[t] & ~changed_HW, changed_HW & ~_grown(masks_THW[t])
            assert inside.sum() <= 0.01 * masks_THW[t].sum()  # a colour may happen to equal the background
            assert outside.sum() <= 4  # slivers that show less than half of a pixel
            checked += 1
    assert checked > 20


def _grown(mask_HW: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours: soft edges reach one pixel beyond it."""
    padded = np.pad(mask_HW, 1)
    shifts = [padded[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)]
    return np.any(shifts, axis=0)


def test_classes_are_those_of_the_items_on_show(drawn: list[tuple[Scene, Rendered]]) -> None:
    seen = set()
    for scene, rendered in drawn[:12]:
        classes_THW = rendered.classes_THW(scene)
        for t, y, x in np.ndindex(classes_THW[:, ::4, ::4].shape):
            owner = rendered.owner_THW[t, 4 * y, 4 * x]
            sounds = owner != BACKGROUND and scene.items[owner].on_T[t]
            expected = 1 + CLASSES.index(scene.items[owner].kind) if sounds else 0
            assert classes_THW[t, 4 * y, 4 * x] == expected
            seen.add(expected)
    assert seen == set(range(7))


def test_distractors_never_own_a_mask(drawn: list[tuple[Scene, Rendered]]) -> None:
    seen = 0
    for scene, rendered in drawn:
        silent = [i for i, item in enumerate(scene.items) if item.kind == "blob"]
        blobs_THW = np.isin(rendered.owner_THW, [*silent, BACKGROUND])
        seen += int(np.isin(rendered.owner_THW, silent).sum())
        assert not (rendered.masks_THW(scene) & blobs_THW).any()
    assert seen > 1000


def test_sound_and_mask_agree_in_the_files(data: Path) -> None:
    folder = data / "Multi-sources/ms3_data"
    empty = 0
    for row in rows(data / "Multi-sources/ms3_meta_data.csv"):
        name, split = row["name"], row["split"]
        samples_S = read_wav(folder / "audio_wav" / split / f"{name}.wav")
        assert len(samples_S) == SECONDS * 16_000
        for t in range(SECONDS):
            mask = np.asarray(Image.open(folder / "gt_masks" / split / name / f"{name}_{t + 1}.png"))
            rms = np.sqrt(np.mean(samples_S[t * 16_000 : (t + 1) * 16_000] ** 2))
            assert (rms > 0.03) == mask.any(), (name, t, rms)
            assert rms > 0.0005  # background noise is always there
            empty += not mask.any()
    assert empty > 0


def test_ms3_statistics(drawn: list[tuple[Scene, Rendered]]) -> None:
    """Neither nothing nor everything is a good guess, and sounds really switch."""
    masks = np.concatenate([rendered.masks_THW(scene) for scene, rendered in drawn])
    empty = ~masks.any(axis=(1, 2))
    assert 0.12 < empty.mean() < 0.3
    several = [scene.objects for scene, _ in drawn]
    assert all(len({o.kind for o in objects}) == len(objects) in (2, 3) for objects in several)
    counts = np.concatenate([np.sum([o.on_T for o in objects], axis=0) for objects in several])
    assert (counts > 1).mean() > 0.08
    assert {o.kind for objects in several for o in objects} == set(CLASSES)
    everything = [
        np.isin(rendered.owner_THW, [i for i, item in enumerate(scene.items) if item.kind in TIMBRES])
        for scene, rendered in drawn
    ]
    assert np.mean(_iou(np.concatenate(everything), masks)) < 0.63
    assert np.mean(_iou(np.zeros_like(masks), masks)) < 0.3


def _iou(guess: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Frame IoU by the published rule: on an empty truth, the share of pixels left empty."""
    scores = []
    for g, m in zip(guess, truth, strict=True):
        scores.append((g & m).sum() / (g | m).sum() if m.any() else 1 - g.mean())
    return np.array(scores)


def test_s4_sound_is_one_source_throughout() -> None:
    for index in range(6):
        scene = scene_of("s4", 0, index)
        sounding = [o for o in scene.objects if o.on_T.any()]
        assert len(sounding) == 1
        assert sounding[0].on_T.all()
        assert render_scene(scene, SIZE).masks_THW(scene).any(axis=(1, 2)).all()


def test_timbres_are_far_apart() -> None:
    """Nearest mean spectrum (48 bands) names the class of a one-second sound it has not seen."""
    seconds = np.ones(SECONDS, dtype=bool)

    def features(kind: str, seed: int) -> np.ndarray:
        sound_S = timbre.mix([(TIMBRES[kind], seconds, 0.1, seed)], noise_rms=0.003, noise_seed=seed + 100)
        frames = sound_S.reshape(-1, 400) * np.hanning(400)
        magnitude = np.abs(np.fft.rfft(frames))[:, 1:193].reshape(-1, 48, 4).mean(axis=2)
        logs = np.log(magnitude + 0.01).reshape(SECONDS, 40, 48)
        return np.concatenate([logs.mean(axis=1), logs.std(axis=1)], axis=1)  # [SECONDS, 96]

    means = np.stack([np.concatenate([features(kind, s) for s in range(4)]).mean(axis=0) for kind in CLASSES])
    for number, kind in enumerate(CLASSES):
        for vector in features(kind, 50):
            assert np.argmin(np.linalg.norm(means - vector, axis=1)) == number, kind


@pytest.mark.parametrize("setting", ["s4", "ms3"])
def test_mp4_plays(data: Path, setting: str) -> None:
    root = data / {"s4": "Single-source", "ms3": "Multi-sources"}[setting]
    videos = sorted((root / f"{setting}_data/raw_videos").rglob("*.mp4"))
    assert len(videos) == CLIPS
    for path in videos:
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.width, video.height, video.average_rate) == (SIZE, SIZE, FPS)
            for stream in (video, audio):
                assert abs(float(stream.duration * stream.time_base) - SECONDS) <= 1 / float(FPS)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 50
        name = path.stem
        pictures = sorted((root / f"{setting}_data/visual_frames").rglob(f"{name}*_?.png"))
        for picture, index in zip(pictures, (9, 19, 29, 39, 49), strict=True):
            error = np.mean((np.asarray(Image.open(picture)).astype(float) - frames[index]) ** 2)
            assert 10 * np.log10(255**2 / error) > 26  # chroma is stored at half resolution


def test_mp4_sound_is_in_time(data: Path) -> None:
    path = next((data / "Multi-sources/ms3_data/raw_videos").rglob("*.mp4"))
    wav = read_wav(Path(str(path).replace("raw_videos", "audio_wav")).with_suffix(".wav"))
    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])[: len(wav)]
    energy = [np.sqrt(np.mean(x[: 16_000 * SECONDS].reshape(SECONDS * 20, -1) ** 2, axis=1)) for x in (wav, sound)]
    assert np.abs(energy[0] - energy[1]).max() < 0.03
    lags = [float(np.dot(wav[2000:-2000], np.roll(sound, lag)[2000:-2000])) for lag in range(-40, 41)]
    assert np.argmax(lags) - 40 == 0


def test_odd_sizes_are_extended_not_stretched(tmp_path: Path) -> None:
    grey_HW = np.random.default_rng(0).integers(30, 220, (31, 47), dtype=np.uint8)
    with Mp4Writer(tmp_path / "odd.mp4", width=47, height=31, fps=FPS, crf=0) as writer:
        writer.write_frame(np.repeat(grey_HW[..., None], 3, axis=2))
    with av.open(str(tmp_path / "odd.mp4")) as container:
        frame_HW = next(container.decode(video=0)).to_ndarray(format="rgb24")[..., 1].astype(int)
    assert np.abs(frame_HW - np.pad(grey_HW, ((0, 1), (0, 1)), mode="edge")).max() <= 2


def test_an_error_leaves_neither_the_file_nor_a_part_of_it(tmp_path: Path) -> None:
    def write_half() -> None:
        with Mp4Writer(tmp_path / "clip.mp4", width=32, height=32, fps=FPS) as writer:
            for _ in range(80):  # more than the encoder holds back
                writer.write_frame(np.zeros((32, 32, 3), dtype=np.uint8))
            assert list(tmp_path.iterdir()) == [tmp_path / ".clip.mp4.partial"]
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_half()
    assert not list(tmp_path.iterdir())


def test_command_refuses_to_overwrite_and_bad_numbers(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--out", str(data), "--clips", "2"], "already holds a data set"),
        (["--out", str(data / "x"), "--clips", "0"], "clips is 0"),
        (["--out", str(data / "x"), "--clips", "2", "--size", "63"], "even number of pixels"),
    ]
    for arguments, message in cases:
        assert run("synth", ["--setting", "ms3", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert not (data / "x").exists()
