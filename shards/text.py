"""Text as the models see it: vectors of the words of a prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from avs_dist.shards.files import sha256_of

# the published models read the first ten words
MAX_WORDS = 10
_HASHED_DIM = 768
_SAFETENSORS = "a tensor 'vectors' [V,E] and a JSON list of V 'words' in the metadata"
# as safetensors names the types that NumPy has, too
_FLOATS = ("F16", "F32", "F64")
_WORD2VEC_HEADER = re.compile(r"\d+ \d+")


def words_of(prompt: str) -> list[str]:
    """The first ten words: lower case, letters only (of any alphabet); all else separates."""
    return re.findall(r"[^\W\d_]+", prompt.lower())[:MAX_WORDS]


@dataclass(frozen=True)
class WordVectors:
    """A vector for each word, float32 [E].

    name:   Tells these vectors from others: SHA-256 of their file, or "hashed".
    vectors: By word; None: made from the word itself.
    """

    name: str
    dim: int
    vectors: dict[str, np.ndarray] | None = None

    @staticmethod
    def from_file(path: Path) -> WordVectors:
        """Read a safetensors file (tensor "vectors" [V,E], metadata "words": JSON list) or a GloVe text file.

        A GloVe file has a word and its E values on each line. The first line tells E: its word has no spaces, those of
        others may. The line of word2vec with the numbers of words and values is passed over.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it is neither, or the vectors are not finite.
        """
        vectors = dict(_read_safetensors(path) if path.suffix == ".safetensors" else _read_glove(path))
        if not vectors:
            raise ValueError(f"{path}: no word vectors in it")
        return WordVectors(sha256_of(path), len(next(iter(vectors.values()))), vectors)

    @staticmethod
    def load(path: Path | None) -> WordVectors:
        """Vectors of a file, or hashed ones where there is none."""
        return WordVectors.from_file(path) if path else WordVectors.hashed()

    @staticmethod
    def hashed(dim: int = _HASHED_DIM) -> WordVectors:
        """Gaussian vectors of unit variance that depend on the word alone: equal words are equal, no two alike."""
        return WordVectors("hashed", dim)

    def of(self, prompt: str) -> np.ndarray:
        """float32 [W,E] of the first ten words, without those that have no vector.

        Raises:
            ValueError: If none is left.
        """
        found = [vector_E for word in words_of(prompt) if (vector_E := self._vector(word)) is not None]
        if not found:
            raise ValueError(f"no word of the prompt {prompt!r:.100} has a vector")
        return np.stack(found)

    def _vector(self, word: str) -> np.ndarray | None:
        if self.vectors is not None:
            return self.vectors.get(word)
        key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=16).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(self.dim, dtype=np.float32)


def _read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            words = json.loads((file.metadata() or {}).get("words", "null"))
            dtype = file.get_slice("vectors").get_dtype()
            if dtype not in _FLOATS:
                raise ValueError(f"'vectors' holds values of type {dtype}: store them as float16 or float32")
            vectors_VE = file.get_tensor("vectors").astype(np.float32)
    # RecursionError: lists in lists
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; expected {_SAFETENSORS}") from error
    texts = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not texts or vectors_VE.ndim != 2 or len(words) != len(vectors_VE):
        raise ValueError(f"{path}: expected {_SAFETENSORS}")
    if not np.isfinite(vectors_VE).all():
        raise ValueError(f"{path}: 'vectors' holds infinite values or NaN")
    yield from zip(words, vectors_VE, strict=True)


def _read_glove(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    dim = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode().rstrip()
                if number == 1 and _WORD2VEC_HEADER.fullmatch(text):
                    continue
                dim = dim or text.count(" ")
                word, vector_E = _parse_glove(text, dim)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            yield word, vector_E


def _parse_glove(text: str, dim: int) -> tuple[str, np.ndarray]:
    """The word and the last `dim` values of a line; spaces before them belong to the word."""
    word, *values = text.rsplit(" ", max(dim, 1))
    # a word may hold spaces, but one that ends with a number is a line of too many values
    if not dim or len(values) != dim or (" " in word and _is_number(word.rpartition(" ")[2])):
        raise ValueError(f"expected a word and {dim or 'its'} values, as in the first line")
    vector_E = np.array(values, dtype=np.float32)
    if not np.isfinite(vector_E).all():
        raise ValueError("expected a word and finite values")
    return word, vector_E


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
