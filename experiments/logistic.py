"""Logistic regression whose rows are split among workers: the problem of several studies.

f_i(x) = mean_j log(1 + exp(-b_j <a_j, x>)) + nonconvex sum_k x_k^2/(1 + x_k^2) + (l2/2)||x||^2
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import libsvm

BUNDLED = "breast_cancer"


def define_data_dir(values: flags.FlagValues) -> None:
    """The flag that says where files are."""
    flags.DEFINE_string(
        "data_dir",
        os.environ.get("EF_OPTAX_DATA"),
        "Folder with LibSVM files, itself or in libsvm/ (default: EF_OPTAX_DATA).",
        flag_values=values,
    )


def load(dataset: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, d) and labels +-1 of the bundled set, scaled to [-1, 1], or of a file as it is.

    Raises:
      libsvm.FormatError: no folder was named, or the file is damaged. OSError: no such file.
    """
    if dataset == BUNDLED:
        from sklearn import datasets

        given: Any = datasets.load_breast_cancer()
        low, high = given.data.min(0), given.data.max(0)
        return 2 * (given.data - low) / (high - low) - 1, np.where(given.target == 0, -1.0, 1.0)
    if not data_dir:
        raise libsvm.FormatError(
            f"{dataset} is a LibSVM file: name its folder with --data_dir=DIR or EF_OPTAX_DATA"
        )
    folder = Path(data_dir)
    nested = folder / "libsvm" / dataset
    return libsvm.read(nested if nested.exists() else folder / dataset)


class Rows(NamedTuple):
    """The rows of all workers."""

    signed: np.ndarray  # (n, m, d): b_j a_j; rows of zeros make the workers equally long
    counts: np.ndarray  # (n,): number of rows that each worker really has


def rows_of(parts: Sequence[tuple[np.ndarray, ...]]) -> Rows:
    """The rows of parts (features, labels), one for each worker."""
    most = max(len(labels) for _, labels in parts)
    signed = [labels[:, None] * features for features, labels in parts]
    padded = np.stack([np.pad(rows, ((0, most - len(rows)), (0, 0))) for rows in signed])
    return Rows(padded, np.array([float(len(labels)) for _, labels in parts]))


def gradients(x: jax.Array, rows: Any, *, nonconvex: float = 0.0, l2: float = 0.0) -> jax.Array:
    """Gradient of every f_i at x, (n, d)."""
    slopes = -jax.nn.sigmoid(-(rows.signed @ x)) / rows.counts[:, None]
    data = jnp.einsum("nmd,nm->nd", rows.signed, slopes)
    return data + nonconvex * 2 * x / (1 + x**2) ** 2 + l2 * x
