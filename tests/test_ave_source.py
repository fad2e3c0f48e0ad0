"""The source AVE: rows of HDF5 files, and files that do not fit together or are not what they say."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from feature_files import audio_of, visual_of
from test_feature_sources import built, samples

from avs_dist.shards.sources.metadata import read_names


def write_ave(root: Path, **changes: np.ndarray) -> Path:
    """Six clips; clip n has event n modulo 3 in its first n + 1 seconds, background else; clip 5 background alone."""
    labels_NTK = np.zeros((6, 10, 4))
    labels_NTK[..., 3] = 1
    for n in range(5):
        labels_NTK[n, : n + 1] = np.eye(4)[n % 3]
    arrays = {
        "visual_feature": np.stack([visual_of(n) for n in range(6)]),
        "audio_feature": np.stack([audio_of(n) for n in range(6)]),
        "labels": labels_NTK,
        "train_order": np.array([4, 0, 5]),
        "val_order": np.array([1]),
        "test_order": np.array([3, 2]),
        **changes,
    }
    root.mkdir()
    for name, array in arrays.items():
        with h5py.File(root / f"{name}.h5", "w") as file:
            file["order" if name.endswith("order") else "avadataset"] = array
    return root


def test_ave(tmp_path: Path):
    index = built(write_ave(tmp_path / "raw"), tmp_path / "out", "ave")
    assert index.events == ("event0", "event1", "event2")
    train = samples(index, "train")
    assert list(train) == ["ave_000004", "ave_000000", "ave_000005"]
    sample = train["ave_000004"]
    np.testing.assert_array_equal(sample.features["visual"], visual_of(4).astype(np.float32), strict=True)
    np.testing.assert_array_equal(sample.features["audio"], audio_of(4).astype(np.float32), strict=True)
    expected_TK = np.zeros((10, 3), np.uint8)
    expected_TK[:5, 1] = 1
    for labels_TK in sample.labels.values():
        np.testing.assert_array_equal(labels_TK, expected_TK, strict=True)
    assert [clip.meta.get("category") for clip in train.values()] == ["event1", "event0", None]
    assert not train["ave_000005"].labels["audio"].any()
    assert (list(samples(index, "val")), list(samples(index, "test"))) == (["ave_000001"], ["ave_000003", "ave_000002"])


def test_ave_with_names_and_shorter_clips(tmp_path: Path):
    root = write_ave(tmp_path / "raw")
    (root / "classes.txt").write_text("bell\n\n dog \ncar\n")
    index = built(root, tmp_path / "out", "ave", clip_s=2)
    assert index.events == ("bell", "dog", "car")
    sample = samples(index, "train")["ave_000004"]
    assert {len(array) for array in (*sample.features.values(), *sample.labels.values())} == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_feature": np.zeros((5, 10, 4))}, "audio_feature.h5: audio features are"),
        ({"audio_feature": np.zeros((6, 9, 4))}, "audio_feature.h5: audio features are"),
        ({"visual_feature": np.zeros((6, 10, 4))}, "visual_feature.h5: visual features are"),
        ({"visual_feature": np.array(["a"] * 6, dtype=h5py.string_dtype())}, "holds object, expected numbers"),
        ({"labels": np.full((6, 10, 4), 2)}, "labels.h5: expected labels 0 and 1"),
        ({"labels": np.zeros((6, 10))}, "labels.h5: labels are"),
        ({"val_order": np.array([6])}, "val_order.h5: expected row numbers from 0 to 5"),
        ({"val_order": np.array([-1])}, "val_order.h5: expected row numbers"),
        ({"val_order": np.array([0.5])}, "val_order.h5: expected row numbers"),
        ({"val_order": np.array([2, 2])}, "val_order.h5: expected row numbers"),
    ],
)
def test_ave_that_does_not_fit_together(tmp_path: Path, changes: dict[str, np.ndarray], message: str):
    with pytest.raises(ValueError, match=message):
        built(write_ave(tmp_path / "raw", **changes), tmp_path / "out", "ave")


def test_ave_rows_in_two_splits(tmp_path: Path):
    root = write_ave(tmp_path / "raw", test_order=np.array([3, 0]))
    message = "clip ave_000000 is in train and in test; a clip must be in one split, or test scores are those of train"
    with pytest.raises(ValueError, match=message):
        built(root, tmp_path / "out", "ave")


def test_ave_files_of_another_kind(tmp_path: Path):
    root = write_ave(tmp_path / "raw")
    (root / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="classes.txt names 2 events, labels.h5 has 3"):
        built(root, tmp_path / "out", "ave")
    (root / "classes.txt").write_text("a\na\nb")
    with pytest.raises(ValueError, match="a name stands twice"):
        read_names(root, ())
    (root / "classes.txt").unlink()
    with h5py.File(root / "train_order.h5", "w") as file:
        file["order"] = h5py.ExternalLink(str(root / "val_order.h5"), "order")
    with pytest.raises(ValueError, match="train_order.h5: no dataset 'order' in it; it has: order"):
        built(root, tmp_path / "out", "ave")
    with h5py.File(root / "train_order.h5", "w") as file:
        file.create_dataset("order", shape=(10**12,), chunks=(10**8,), dtype="f8", compression="gzip")
    with pytest.raises(ValueError, match=r"train_order.h5: 'order' is stored in chunks of 8e\+08 bytes"):
        built(root, tmp_path / "out", "ave")
    with h5py.File(root / "train_order.h5", "w") as file:
        file.create_dataset("order", shape=(10**12,), chunks=(10,), dtype="f8", compression="gzip")
    with pytest.raises(ValueError, match="has 8000000000000 bytes, the limit"):
        built(root, tmp_path / "out", "ave")
    with h5py.File(root / "train_order.h5", "w") as file:
        file.create_dataset("order", shape=(3,), dtype="f8", external=[(str(root / "classes.txt"), 0, 24)])
    with pytest.raises(ValueError, match="train_order.h5: no dataset 'order' in it"):
        built(root, tmp_path / "out", "ave")
    with h5py.File(root / "train_order.h5", "w") as file:
        layout = h5py.VirtualLayout(shape=(1,), dtype="i8")
        layout[:] = h5py.VirtualSource(str(root / "val_order.h5"), "order", shape=(1,))
        file.create_virtual_dataset("order", layout)
    with pytest.raises(ValueError, match="train_order.h5: no dataset 'order' in it"):
        built(root, tmp_path / "out", "ave")
    (root / "train_order.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="train_order.h5: .*signature not found"):
        built(root, tmp_path / "out", "ave")
    (root / "train_order.h5").unlink()
    with pytest.raises(FileNotFoundError, match="no train_order.h5"):
        built(root, tmp_path / "out", "ave")


def test_ave_clips_of_any_size(tmp_path: Path):
    root = write_ave(tmp_path / "raw")
    with h5py.File(root / "visual_feature.h5", "w") as file:
        file.create_dataset("avadataset", shape=(6, 10, 7, 7, 10**6), chunks=(1, 1, 7, 7, 10), dtype="f4")
    with pytest.raises(ValueError, match="visual_feature.h5: a clip has 1960000000 bytes, the limit is"):
        built(root, tmp_path / "out", "ave")
