"""Text as rows of tokens: characters or bytes of a text, or token files of other trainers.

| `data_dir` | tokens | held out |
|---|---|---|
| not given | the bundled sonnets of Shakespeare, 95,729 characters | the last tenth |
| a `.txt` or `.txt.gz` file, or a folder of them | its characters, or its bytes | the last tenth |
| a folder of `.bin` files | 16-bit unsigned integers | the files with `val` in their name |

Token files are what nanoGPT's `prepare.py` writes (the bare numbers), or the shards of llm.c and of
modded-nanogpt (the same after a header of 256 32-bit integers that states their number). They are
mapped into memory, so a set may be larger than the memory is. Everything that can be checked is,
because a truncated download that trains anyway is worse than one that stops.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import DataError

BUNDLED = Path(__file__).with_name("texts") / "shakespeare_sonnets.txt.gz"
UNITS = ("characters", "bytes")

_HELD_OUT = 0.1
_HEADER = 256
"""Number of 32-bit integers before the tokens of a shard: magic number, version, count, zeros."""

_MAGIC, _VERSION = 20240520, 1
_FOREIGN = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed by gzip",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard",
}


class Tokens:
    """A long row of token numbers in one or several arrays, which may be mapped into memory.

    Windows do not cross from one array to the next, as files are not continued by others.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = [array for array in arrays if len(array)]

    def __len__(self) -> int:
        return sum(map(len, self._arrays))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._arrays)

    def split(self, fraction: float) -> tuple[Tokens, Tokens]:
        """All but the last `fraction` of every array, and the rest."""
        cuts = [round(len(array) * (1 - fraction)) for array in self._arrays]
        pairs = [(array[:cut], array[cut:]) for array, cut in zip(self._arrays, cuts, strict=True)]
        return Tokens([first for first, _ in pairs]), Tokens([last for _, last in pairs])

    def starts(self, length: int) -> int:
        """Number of windows of `length` tokens, counted by where they start."""
        return sum(max(0, len(array) - length + 1) for array in self._arrays)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows with these numbers (any shape, below `starts(length)`), as int32."""
        counts = [max(0, len(array) - length + 1) for array in self._arrays]
        firsts = np.cumsum([0, *counts[:-1]])
        flat = np.ravel(starts)
        found = np.empty((len(flat), length), np.int32)
        owner = np.searchsorted(np.cumsum(counts), flat, side="right")
        for row, (start, index) in enumerate(zip(flat, owner, strict=True)):
            offset = start - firsts[index]
            found[row] = self._arrays[index][offset : offset + length]
        return found.reshape(*np.shape(starts), length)

    def spread(self, count: int, length: int) -> np.ndarray:
        """At most `count` windows that do not overlap, at equal distances: the same every time."""
        blocks = [
            array[: len(array) // length * length].reshape(-1, length) for array in self._arrays
        ]
        rows = [(index, row) for index, block in enumerate(blocks) for row in range(len(block))]
        chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
        found = [blocks[index][row] for index, row in (rows[i] for i in chosen)]
        return np.array(found, np.int32).reshape(-1, length)


class Text(NamedTuple):
    """A training set and what is held out from it."""

    name: str
    train: Tokens
    held_out: Tokens
    vocabulary: int
    symbols: str | None = None  # what the numbers stand for, if they are characters
    characters: float | None = None  # of the held-out text, for each token; None: not known

    def hold_out(self, fraction: float = _HELD_OUT) -> Text:
        """The training set alone, with its last `fraction` in place of what is held out.

        Learning rates are chosen on this split, so nothing looks at the held-out text before the
        final run.
        """
        train, held_out = self.train.split(fraction)
        return self._replace(train=train, held_out=held_out)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of a row of tokens.

        Raises:
          DataError: they come from token files, whose tokenizer is not known.
        """
        if self.symbols is not None:
            return "".join(self.symbols[token] for token in tokens)
        if self.characters is not None:
            return bytes(tokens.tolist()).decode("utf-8", errors="replace")
        raise DataError(f"{self.name}: the tokenizer of token files is not known")


def load(data_dir: str | None = None, units: str = "characters", vocabulary: int = 0) -> Text:
    """Reads what `data_dir` holds, see the table above; None: the bundled sonnets.

    Args:
      data_dir: a text, a folder of texts, or a folder of token files.
      units: of texts, `"characters"` or `"bytes"`.
      vocabulary: of token files; 0: the largest token and one, up to the next multiple of 64.

    Raises:
      DataError: files are missing or damaged; the message says which and what to do.
    """
    if units not in UNITS:
        raise DataError(f"unknown units {units!r}; choose {' or '.join(UNITS)}")
    if not data_dir:
        return _texts([BUNDLED], "the sonnets", units)
    root = Path(data_dir).expanduser()
    if root.is_file():
        if root.suffix == ".bin":
            raise DataError(f"data_dir {root}: name the folder that holds training and val files")
        return _texts([root], root.name, units)
    if not root.is_dir():
        raise DataError(f"data_dir {root} is neither a folder nor a file")
    if shards := sorted(root.glob("*.bin")):
        return _token_files(shards, root, vocabulary)
    if texts := sorted([*root.glob("*.txt"), *root.glob("*.txt.gz")]):
        return _texts(texts, texts[0].name if len(texts) == 1 else root.name, units)
    raise DataError(f"no .txt, .txt.gz or .bin file in {root}")


########################################################################################
# Texts
########################################################################################


def _texts(paths: list[Path], name: str, units: str) -> Text:
    text = "".join(map(_read, paths))
    if units == "bytes":
        numbers, symbols, vocabulary = np.frombuffer(text.encode(), np.uint8), None, 256
    else:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        found, numbers = np.unique(points, return_inverse=True)
        symbols, vocabulary = "".join(map(chr, found)), len(found)
        numbers = numbers.astype(np.uint16 if vocabulary < 1 << 16 else np.int32)
    train, held_out = Tokens([numbers]).split(_HELD_OUT)
    if not len(held_out):
        raise DataError(f"{name}: {len(numbers)} {units} are too few to hold some out")
    characters = 1.0
    if units == "bytes":  # those that begin a character, not those that continue it
        bytes_held_out = np.concatenate(list(held_out))
        characters = float(np.mean(bytes_held_out & 0xC0 != 0x80))
    return Text(name, train, held_out, vocabulary, symbols, characters)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip file ({error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


########################################################################################
# Token files
########################################################################################


def _token_files(paths: list[Path], root: Path, vocabulary: int) -> Text:
    held_out = [path for path in paths if "val" in path.name]
    train = [path for path in paths if path not in held_out]
    if not train or not held_out:
        raise DataError(
            f"{root} holds {len(train)} training and {len(held_out)} validation files; both are "
            "needed, the latter with 'val' in their names (nanoGPT: train.bin and val.bin)"
        )
    read = {path: read_shard(path) for path in paths}
    largest = max(_largest(read[path]) for path in paths)
    if vocabulary and largest >= vocabulary:
        worst = next(path for path in paths if _largest(read[path]) >= vocabulary)
        raise DataError(
            f"{worst}: token {_largest(read[worst])} in a vocabulary of {vocabulary}; is it the "
            "file of another tokenizer, or not a token file?"
        )
    vocabulary = vocabulary or -(-(largest + 1) // 64) * 64
    train, held_out = (Tokens([read[path] for path in part]) for part in (train, held_out))
    return Text(root.name, train, held_out, vocabulary)


def read_shard(path: Path) -> np.ndarray:
    """The tokens of one file, mapped into memory: uint16, after a header if it has one.

    Raises:
      DataError: the file is truncated, empty, or of another kind.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not size:
        raise DataError(f"{path}: empty")
    kind = next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), None)
    if kind is None and len(start) >= 64 and all(byte in b"\t\n\r" or byte >= 32 for byte in start):
        kind = "a text; name it .txt"
    if kind:
        raise DataError(f"{path}: not 16-bit tokens but {kind}")
    if size % 2:
        raise DataError(f"{path}: truncated: {size} bytes are not a whole number of 16-bit tokens")
    header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")[:3]
    if not len(header) or header[0] != _MAGIC:
        return np.memmap(path, "<u2", "r")
    if size < 4 * _HEADER:
        raise DataError(f"{path}: truncated inside the header ({size} of {4 * _HEADER} bytes)")
    if header[1] != _VERSION:
        raise DataError(f"{path}: version {header[1]} of the shard format; {_VERSION} is read")
    held = (size - 4 * _HEADER) // 2
    if held != header[2]:
        word = "truncated" if held < header[2] else "too long"
        raise DataError(
            f"{path}: {word}: the header promises {header[2]} tokens, the file holds {held}"
        )
    if not held:
        raise DataError(f"{path}: empty")
    return np.memmap(path, "<u2", "r", offset=4 * _HEADER)


def _largest(tokens: np.ndarray) -> int:
    """By parts, so that no copy of a large file is in memory."""
    return max(int(tokens[i : i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))
