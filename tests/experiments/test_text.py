"""Texts and token files made here: what is read, what is held out, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from experiments import text
from experiments.data import DataError


def shard(tokens: np.ndarray, version: int = 1, promised: int | None = None) -> bytes:
    """A file as llm.c writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(tokens) if promised is None else promised
    return header.tobytes() + tokens.astype("<u2").tobytes()


def test_the_bundled_sonnets_are_the_default() -> None:
    found = text.load()
    assert (len(found.train) + len(found.held_out), found.vocabulary) == (95_729, 62)
    assert len(found.held_out) == 9_573 and found.characters == 1.0
    assert found.decode(found.train.windows(np.array(0), 11)) == "THE SONNETS"
    tuned = found.hold_out()
    assert len(tuned.train) + len(tuned.held_out) == len(found.train)


def test_bytes_of_a_text_count_its_characters(tmp_path: Path) -> None:
    content = "aé漢😀" * 100
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    found = text.load(str(tmp_path), units="bytes")
    assert found.vocabulary == 256 and found.characters == pytest.approx(0.4)
    assert found.decode(found.train.windows(np.array(0), 10)) == "aé漢😀"
    characters = text.load(str(tmp_path / "a.txt.gz"))
    assert characters.symbols == "aé漢😀" and len(characters.train) == 360


def test_token_files_with_and_without_a_header(tmp_path: Path) -> None:
    first, second, val = np.arange(5), np.arange(100, 103), np.array([65_535, 7])
    (tmp_path / "x_train_000.bin").write_bytes(shard(first))
    (tmp_path / "x_train_001.bin").write_bytes(second.astype("<u2").tobytes())
    (tmp_path / "x_val_000.bin").write_bytes(shard(val))
    found = text.load(str(tmp_path))
    assert [list(array) for array in found.train] == [[0, 1, 2, 3, 4], [100, 101, 102]]
    assert [list(array) for array in found.held_out] == [[65_535, 7]]
    assert found.vocabulary == 65_536 and found.characters is None
    with pytest.raises(DataError, match="the tokenizer of token files is not known"):
        found.decode(val)
    with pytest.raises(DataError, match=r"x_val_000\.bin: token 65535 in a vocabulary of 50304"):
        text.load(str(tmp_path), vocabulary=50_304)


def test_windows_stay_within_one_file() -> None:
    tokens = text.Tokens([np.arange(5), np.arange(2), np.arange(100, 104)])
    assert tokens.starts(3) == 3 + 2
    every = tokens.windows(np.arange(5), 3)
    assert every.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [100, 101, 102], [101, 102, 103]]
    assert tokens.windows(np.array([[0], [4]]), 3).shape == (2, 1, 3)
    assert tokens.spread(10, 2).tolist() == [[0, 1], [2, 3], [0, 1], [100, 101], [102, 103]]
    assert tokens.spread(2, 2).tolist() == [[0, 1], [102, 103]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (shard(np.arange(9))[:-1], "truncated: 1041 bytes are not a whole number"),
        (shard(np.arange(9))[:-2], "truncated: the header promises 9 tokens, the file holds 8"),
        (shard(np.arange(9)) + b"\0\0", "too long"),
        (shard(np.arange(9))[:500], "truncated inside the header"),
        (shard(np.arange(9), version=2), "version 2 of the shard format"),
        (b"From fairest creatures we desire increase, That thereby beauty's", "a text; name it"),
        (b"\x93NUMPY\x01\x00", "not 16-bit tokens but a NumPy array"),
        (b"PK\x03\x04" * 2, "a zip archive"),
    ],
)
def test_what_is_no_token_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    (tmp_path / "val.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=words) as caught:
        text.load(str(tmp_path))
    assert "train.bin" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\x00", r"a\.txt: not a text in UTF-8"),
        (
            "a.txt.gz",
            gzip.compress(b"x" * 99, mtime=0)[:-9],
            r"a\.txt\.gz: truncated or damaged gzip",
        ),
        ("a.txt", b"abc", "3 characters are too few"),
        ("a.bin", b"\0\0", "1 training and 0 validation files"),
        ("a.pdf", b"", "no .txt, .txt.gz or .bin file"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        text.load(str(tmp_path))


def test_a_folder_that_does_not_exist_and_a_single_shard_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor a file"):
        text.load(str(tmp_path / "none"))
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="name the folder that holds"):
        text.load(str(tmp_path / "train.bin"))
    with pytest.raises(DataError, match="unknown units 'words'"):
        text.load(units="words")
