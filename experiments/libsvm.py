"""Binary classification data in LibSVM's text format, split among workers.

A line is `label index:value index:value ...`, with indices from 1; unnamed entries are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_MOST_FEATURES = 1 << 20


class FormatError(OSError):
    """The file is malformed; the message says where."""


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, d) and labels (N,) of a file; the smaller of its two labels becomes -1."""
    try:
        with open(path, encoding="ascii") as lines:
            return parse(lines, str(path))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not a LibSVM text file: {error}.") from error


def parse(lines: Iterable[str], name: str = "data") -> tuple[np.ndarray, np.ndarray]:
    """Like :func:`read`, from lines."""
    labels, cells = [], []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            labels.append(_finite(words[0]))
            for word in words[1:]:
                index, entry = word.split(":")
                cells.append((len(labels) - 1, int(index) - 1, _finite(entry)))
                if not 0 <= cells[-1][1] < _MOST_FEATURES:
                    raise ValueError(
                        f"indices start at 1 and end at {_MOST_FEATURES}, so {index} is none"
                    )
        except ValueError as error:
            raise FormatError(f"{name}, line {number} is not LibSVM format: {error}.") from error
    kinds = sorted(set(labels))
    if len(kinds) != 2:
        raise FormatError(f"{name} has the labels {kinds[:5]}; two different ones are needed.")
    if not cells:
        raise FormatError(f"{name} has labels and no features.")
    rows, columns, entries = (np.array(part) for part in zip(*cells, strict=True))
    features = np.zeros((len(labels), 1 + columns.max()))
    features[rows, columns] = entries
    return features, np.where(np.array(labels) == kinds[0], -1.0, 1.0)


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is not finite")
    return value


def split(features: np.ndarray, labels: np.ndarray, workers: int) -> list[tuple[np.ndarray, ...]]:
    """Every worker's rows: floor(N/n) consecutive ones, and the remainder for the last worker."""
    if workers > len(labels):
        raise FormatError(f"{workers} workers need at least as many rows; there are {len(labels)}.")
    ends = [i * (len(labels) // workers) for i in range(1, workers)]
    return list(zip(np.split(features, ends), np.split(labels, ends), strict=True))
