"""Words of prompts as vectors, and prompts beside clips of frames."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_files import members_of, write_avel
from safetensors.numpy import save_file
from test_shards_build import write_s4

from avs_dist.launch import shards as command
from avs_dist.shards.build import build
from avs_dist.shards.build_config import BuildConfig
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.members import decode_clip, encode_clip
from avs_dist.shards.read import ClipReader
from avs_dist.shards.segment import encode_npy
from avs_dist.shards.text import WordVectors, words_of
from avs_dist.shards.verify import verify


def test_words_of_a_prompt():
    assert words_of("The SOUND of a race_car, auto-racing (2nd)!") == [
        *("the", "sound", "of", "a", "race", "car", "auto", "racing", "nd")
    ]
    assert words_of("Zürich 東京") == ["zürich", "東京"]
    assert words_of("a b c d e f g h i j k l") == list("abcdefghij")
    assert words_of("12 - 3") == []


def test_hashed_vectors_depend_on_the_word_alone():
    vectors = WordVectors.hashed(2000)
    first_WE, second_WE = vectors.of("a dog and a cat"), WordVectors.hashed(2000).of("Cat!")
    assert first_WE.dtype == np.float32
    assert first_WE.shape == (5, 2000)
    np.testing.assert_array_equal(first_WE[0], first_WE[3])
    np.testing.assert_array_equal(first_WE[4], second_WE[0])
    assert abs(first_WE.mean()) < 0.05
    np.testing.assert_allclose(first_WE.std(axis=1), 1, atol=0.06)
    cosines_WW = np.corrcoef(first_WE[[0, 1, 2, 4]])
    assert np.abs(cosines_WW - np.eye(4)).max() < 0.12
    key = int.from_bytes(hashlib.blake2b(b"dog", digest_size=16).digest(), "little")
    literal_E = np.random.Generator(np.random.Philox(key=key)).standard_normal(2000, dtype=np.float32)
    np.testing.assert_array_equal(first_WE[1], literal_E)
    assert vectors.name == "hashed"


def glove(path: Path) -> Path:
    path.write_text("dog 1 2 3.5\nsounds -1 0 1e-3\nzürich 0 0 0\n", encoding="utf-8")
    return path


def safetensors(path: Path, words: Any = ("dog", "sounds"), vectors: np.ndarray | None = None) -> Path:
    vectors = np.arange(6, dtype=np.float16).reshape(2, 3) if vectors is None else vectors
    save_file({"vectors": vectors}, path, metadata={"words": json.dumps(words)})
    return path


def test_vectors_of_a_file(tmp_path: Path):
    path = glove(tmp_path / "glove.txt")
    vectors = WordVectors.load(path)
    expected = np.array([[1, 2, 3.5], [-1, 0, 1e-3]], np.float32)
    np.testing.assert_array_equal(vectors.of("the dog sounds"), expected, strict=True)
    assert vectors.name == hashlib.sha256(path.read_bytes()).hexdigest()
    assert vectors.dim == 3
    with pytest.raises(ValueError, match="no word of the prompt 'the cat' has a vector"):
        vectors.of("the cat")
    other = WordVectors.load(safetensors(tmp_path / "a.safetensors"))
    np.testing.assert_array_equal(other.of("sounds dog"), np.array([[3, 4, 5], [0, 1, 2]], np.float32), strict=True)
    assert WordVectors.load(None).dim == 768


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog 1 2\ncat 1\n", "line 2: expected a word and 2 values"),
        (b"dog 1 2\ncat 1 2 3\n", "line 2: expected a word and 2 values"),
        (b"dog 1 2\n\n", "line 2: expected a word and 2 values"),
        (b". . 1 2\n", "line 1: could not convert"),
        (b"2 2\ndog 1 2\ncat 1 x\n", "line 3: could not convert"),
        (b"dog 1 2\n3 4\n", "line 2: expected a word and 2 values"),
        (b"dog 1 2\ncat 1 x\n", "line 2: could not convert"),
        (b"dog 1 2\ncat 1 nan\n", "line 2: expected a word and finite values"),
        (b"dog\n", "line 1: expected a word and its values"),
        (b"dog 1\n\xff 1\n", "line 2: .*utf-8"),
        (b"", "no word vectors in it"),
        (b"0 300\n", "no word vectors in it"),
    ],
)
def test_glove_files_that_make_no_sense(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "glove.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        WordVectors.from_file(path)


def test_safetensors_files_that_make_no_sense(tmp_path: Path):
    path, message = tmp_path / "a.safetensors", "expected a tensor 'vectors' .* of V 'words'"
    for words in (("dog",), "dog", None, ("dog", 1)):
        with pytest.raises(ValueError, match=message):
            WordVectors.from_file(safetensors(path, words))
    with pytest.raises(ValueError, match=message):
        WordVectors.from_file(safetensors(path, vectors=np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match="infinite values or NaN"):
        WordVectors.from_file(safetensors(path, vectors=np.full((2, 3), np.nan, np.float32)))
    save_file({"other": np.zeros((2, 3))}, path)
    with pytest.raises(ValueError, match=f"{path}: .*vectors"):
        WordVectors.from_file(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"{path}: "):
        WordVectors.from_file(path)
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        WordVectors.from_file(tmp_path / "b.safetensors")


@pytest.mark.parametrize(("name", "size"), [("BF16", 2), ("F8_E4M3", 1), ("F8_E5M2", 1), ("I32", 4)])
def test_safetensors_of_other_types(tmp_path: Path, name: str, size: int):
    tensor = {"dtype": name, "shape": [2, 3], "data_offsets": [0, 6 * size]}
    header = json.dumps({"__metadata__": {"words": '["dog", "sounds"]'}, "vectors": tensor}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(6 * size))
    with pytest.raises(ValueError, match=f"{path}: .*type {name}: store them as float16 or float32"):
        WordVectors.from_file(path)


def test_safetensors_with_nested_words(tmp_path: Path):
    path, zeros = tmp_path / "a.safetensors", np.zeros((2, 3), np.float32)
    for depth in (500, 10**6):
        save_file({"vectors": zeros}, path, metadata={"words": "[" * depth + "]" * depth})
        with pytest.raises(ValueError, match=f"{path}: .*expected a tensor 'vectors' .* a JSON list of V 'words'"):
            WordVectors.from_file(path)


def test_glove_words_with_spaces_and_the_header_of_word2vec(tmp_path: Path):
    path = tmp_path / "glove.txt"
    lines = ("dog 1 2 3.5", ". . . 0.1 0.2 0.3", "to name@domain.com -1 0 1e-3 ", "7 4 5 6", "sounds 7 8 9")
    for header in ("", "5 3\n", "5 3 \n"):
        path.write_text(header + "\n".join(lines))
        vectors = WordVectors.from_file(path)
        assert vectors.dim == 3
        assert vectors.vectors is not None
        assert list(vectors.vectors) == ["dog", ". . .", "to name@domain.com", "7", "sounds"]
        np.testing.assert_array_equal(
            np.stack(list(vectors.vectors.values())),
            np.array([[1, 2, 3.5], [0.1, 0.2, 0.3], [-1, 0, 1e-3], [4, 5, 6], [7, 8, 9]], np.float32),
            strict=True,
        )


def test_word_vectors_of_features(tmp_path: Path):
    path = glove(tmp_path / "glove.txt")
    config = BuildConfig("vggsound-avel", write_avel(tmp_path / "raw"), tmp_path / "out", word_vectors=path)
    index = build(config, progress=False)
    assert index.feature_shapes["text"] == (3,)
    assert index.settings["word_vectors"] == hashlib.sha256(path.read_bytes()).hexdigest()
    sample = next(ClipReader(index, "train").samples([0]))
    np.testing.assert_array_equal(sample.features["text"], np.array([[1, 2, 3.5], [-1, 0, 1e-3]], np.float16))


def test_word_vectors_without_prompts_or_a_file(tmp_path: Path):
    root, path = write_avel(tmp_path / "raw", prompts=False), glove(tmp_path / "glove.txt")
    message = f"--word-vectors: --source vggsound-avel in {root} has no prompts .*vggsoundCategories2Prompts.csv"
    with pytest.raises(ValueError, match=message):
        build(BuildConfig("vggsound-avel", root, tmp_path / "out", word_vectors=path), progress=False)
    for missing in (tmp_path / "no.txt", tmp_path):
        for source, prompts in (("vggsound-avel", None), ("avsbench-s4", "sentence")):
            with pytest.raises(FileNotFoundError, match=f"--word-vectors {missing} is not a file"):
                BuildConfig(source, root, tmp_path / "out", word_vectors=missing, prompts=prompts)


@pytest.fixture(scope="module")
def s4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("s4")
    write_s4(root)
    return root


def test_prompts_of_s4(s4: Path, tmp_path: Path):
    plain = build(BuildConfig("avsbench-s4", s4, tmp_path / "plain", size=32), progress=False)
    options = ["build", "--source", "avsbench-s4", "--root", str(s4), "--size", "32", "--workers", "1"]
    assert command.main([*options, "--out", str(tmp_path / "sentence"), "--prompts"]) == 0
    index = ShardIndex.load(tmp_path / "sentence")
    sample = next(ClipReader(index, "train").samples([0]))
    assert sample.meta["prompt"] == "the sound of a male speech"
    np.testing.assert_array_equal(sample.text_WE, WordVectors.hashed().of("the sound of a male speech"), strict=True)
    assert verify(index, progress=False) == []
    assert {k: v for k, v in index.settings.items() if k not in plain.settings} == {
        "prompts": "sentence", "word_vectors": "hashed", "word_channels": 768
    }  # fmt: skip
    bare = next(ClipReader(plain, "train").samples([0]))
    assert bare.text_WE is None
    np.testing.assert_array_equal(bare.frames_THWC, sample.frames_THWC)
    assert "prompt" not in bare.meta


def test_prompts_of_a_file(s4: Path, tmp_path: Path):
    table, vectors = tmp_path / "prompts.csv", glove(tmp_path / "glove.txt")
    table.write_text('label,prompt\nmale_speech,"a dog, talking"\nrace_car,it sounds\n')
    options: dict[str, Any] = {"size": 32, "prompts": str(table), "word_vectors": vectors}
    index = build(BuildConfig("avsbench-s4", s4, tmp_path / "out", **options), progress=False)
    sample = next(ClipReader(index, "train").samples([0]))
    assert sample.meta["prompt"] == "a dog, talking"
    np.testing.assert_array_equal(sample.text_WE, np.array([[1, 2, 3.5]], np.float32), strict=True)
    assert index.settings["prompts"] == hashlib.sha256(table.read_bytes()).hexdigest()
    table.write_text("label,prompt\nmale_speech,a dog\n")
    with pytest.raises(ValueError, match="prompts.csv: no prompt for race_car"):
        build(BuildConfig("avsbench-s4", s4, tmp_path / "other", **options), progress=False)


def test_text_of_a_clip_is_checked(s4: Path, tmp_path: Path):
    index = build(BuildConfig("avsbench-s4", s4, tmp_path / "out", size=32, prompts="sentence"), progress=False)
    sample = next(ClipReader(index, "train").samples([0]))
    members = members_of(encode_clip(replace(sample, text_WE=np.ones((2, 3)))))
    found = decode_clip(members).text_WE
    np.testing.assert_array_equal(found, np.ones((2, 3), np.float32), strict=True)
    bad = (np.ones((2, 3)), np.ones(3, np.float32), np.ones((0, 3), np.float32), np.full((1, 1), np.nan, np.float32))
    for text_WE in bad:
        with pytest.raises(ValueError, match=r"text\.npy (is .*, expected finite float32|holds infinite)"):
            decode_clip({**members, "text.npy": encode_npy(text_WE)})


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("avsbench-ms3", {"prompts": "sentence"}, "--prompts is for --source avsbench-s4"),
        ("vggsound-avel", {"prompts": "sentence"}, "--prompts is for --source avsbench-s4"),
        ("avsbench-s4", {"word_vectors": Path("x")}, "--word-vectors is for features, and for clips with --prompts"),
        ("ave", {"features": "float64"}, "unknown type of features 'float64'"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, source: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        BuildConfig(source, tmp_path, tmp_path / "out", **options)
