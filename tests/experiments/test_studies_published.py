"""The studies at full size against published or earlier results: minutes, so marked slow."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import (
    batch_size_table,
    counterexamples,
    ef21_logreg,
    ef21_momentum,
    ef21_w,
    heterogeneity,
    processes,
    rare_features,
    rates,
    span,
    storage,
    train,
)

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]


def results(main: Callable[[list[str]], None], out_dir: Path, *words: str) -> Rows:
    main(["study", *words, f"--out_dir={out_dir}"])
    return storage.read_rows(out_dir)


def value(rows: Rows, key: str, **where: Any) -> Any:
    found = [row[key] for row in rows if key in row and where.items() <= row.items()]
    assert len(found) == 1
    return found[0]


def file_of(name: str) -> str:
    """The flag for the folder of a LibSVM file that the user has."""
    folder = Path(os.environ.get("EF_OPTAX_DATA", ""))
    if not any((folder / place / name).exists() for place in ("", "libsvm")):
        pytest.skip(f"{name} is not in EF_OPTAX_DATA")
    return f"--data_dir={folder}"


def test_counterexamples(tmp_path: Path) -> None:
    rows = results(counterexamples.main, tmp_path / "out")
    assert value(rows, "f", method="sign", example=1) > 0.24
    assert value(rows, "f", method="ef_sign", example=1) < -0.22
    for method in ("sign", "scaled_sign"):
        assert value(rows, "distance_to_line", method=method) < 1e-9
        assert value(rows, "norm", method=method, example=3) > 1
    for method in ("ef_sign", "ef_top_1"):
        for eps in counterexamples.EPS:
            assert value(rows, "f", method=method, example=2, eps=eps) < 0.02
        assert value(rows, "norm", method=method, example=3) < 1e-12
        assert value(rows, "norm", method=method, example=4) < 1e-3
    assert value(rows, "norm", method="top_1", example=4) > 1e6


def test_span(tmp_path: Path) -> None:
    rows = results(span.main, tmp_path / "out")

    def median(key: str, method: str, epoch: int) -> float:
        own = [r[key] for r in rows if r["method"] == method and r["epoch"] == epoch]
        assert len(own) == 10
        return float(np.median(own))

    assert median("distance", "ef_signsgd", 80) < 0.3
    assert median("distance", "ef_signsgd", 500) < 1e-6
    assert median("distance", "signsgd", 80) > 3.5
    assert median("test_loss", "ef_signsgd", 80) < 0.01
    assert median("test_loss", "signsgd", 80) > 0.5


def test_rates(tmp_path: Path) -> None:
    rows = results(rates.main, tmp_path / "out")
    for row in rows:
        assert "bound" not in row or row["gradient"] <= row["bound"]
        assert not row.get("lemma_3") or row["residual"] <= row["lemma_3"]
    assert -0.6 < value(rows, "exponent", method="sgd") < -0.4
    for method in ("ef_top_16", "ef_top_4", "ef_top_1", "ef_random_4"):
        assert value(rows, "exponent", method=method) < -0.4
    assert value(rows, "exponent", method="top_4") > -0.1
    u, scaled = (
        value(rows, "gradient", method=method, steps=8192) for method in ("random_4", "ef_random_4")
    )
    assert scaled < u / 3


def test_one_noisy_gradient_a_step(tmp_path: Path) -> None:
    rows = results(ef21_momentum.main, tmp_path / "out")
    for rate, ratio in {0.1: 1.3, 0.03: 1.6, 0.01: 2.2}.items():
        assert value(rows, "ratio", rate=rate) == pytest.approx(ratio, rel=0.15)
    biases = [value(rows, "bias", method="ef21_sgd", rate=rate) for rate in (0.1, 0.03, 0.01)]
    errors = [value(rows, "error", method="ef21_sgd", rate=rate) for rate in (0.1, 0.03, 0.01)]
    assert biases[2] < biases[0] + 2 * errors[0] and max(biases) < -0.03


def test_logistic_regression_on_mushrooms(tmp_path: Path) -> None:
    words = ["--dataset=mushrooms", "--multiples=64,128,256,512", "--rounds=3500"]
    rows = results(ef21_logreg.main, tmp_path / "out", file_of("mushrooms"), *words)
    assert value(rows, "L_QM") == pytest.approx(3.4932259751, rel=1e-9)
    assert value(rows, "L_AM") == pytest.approx(3.4711203982, rel=1e-9)
    assert value(rows, "rounds", method="gd") == 699
    for multiple, count in {64: 3130, 128: 1573, 256: 750, 512: 424}.items():
        found = value(rows, "rounds", method="ef21", multiple=multiple)
        assert count / 2 <= found <= 2 * count
    levels = [
        value(rows, "plateau", method="ef14", multiple=multiple) for multiple in (64, 128, 256, 512)
    ]
    assert min(levels) > 1e-4
    growth = np.array(levels[1:]) / levels[:-1]
    assert (growth > 2.5).all() and (growth < 6).all()


def test_ef21_w(tmp_path: Path) -> None:
    rows = results(ef21_w.main, tmp_path / "out")
    for name in ef21_w.FAMILIES:
        place = {"problem": name, "form": "exact"}
        assert value(rows, "apart", **place) < 1e-9
        slow, fast = (value(rows, "rounds", method=f"ef21 ({m})", **place) for m in ("QM", "AM"))
        gain = value(rows, "gain", **place)
        if gain > 2:
            assert slow / fast == pytest.approx(gain, rel=0.2)
    assert slow / fast > 8
    equal = [value(rows, "rounds", problem="equal", method=method) for method in ef21_w.METHODS]
    assert len(set(equal)) == 1


@pytest.mark.parametrize("name", ["mushrooms", "a9a"])
def test_ef21_w_gains_nothing_on_scaled_files(name: str, tmp_path: Path) -> None:
    words = [f"--datasets={name}", "--workers=1000", "--rounds=100"]
    rows = results(ef21_w.main, tmp_path / "out", file_of(name), *words)
    assert 1 <= value(rows, "gain", problem=name) < 1.01
    assert value(rows, "gained", problem=name) < 0.01
    assert value(rows, "apart", problem=name) < 1e-9


def test_ef21_w_gains_on_unscaled_features(tmp_path: Path) -> None:
    words = ["--datasets=australian", "--workers=1000", "--rounds=200"]
    rows = results(ef21_w.main, tmp_path / "out", file_of("australian"), *words)
    assert value(rows, "L_var", problem="australian") == pytest.approx(1e16, rel=0.2)
    assert value(rows, "gain", problem="australian") > 10
    assert value(rows, "gained", problem="australian") > 0.3


def test_rare_features(tmp_path: Path) -> None:
    rows = results(rare_features.main, tmp_path / "out")
    for share, gain in {0.05: 17.1, 0.5: 1.41, 0.9: 1.05}.items():
        found = value(rows, "gain", problem=f"c/n = {share}", method="rare")
        assert found == pytest.approx(gain, rel=0.05)
    slow, fast = (value(rows, "end", problem="c/n = 0.05", method=m) for m in ("QM", "rare"))
    assert fast < 1e-4 * slow


def test_ten_methods(tmp_path: Path) -> None:
    rows = results(heterogeneity.main, tmp_path / "out", "--dials=0,1")
    for dial in (0, 1):
        found = {m: value(rows, "bits", method=m, dial=dial) for m in heterogeneity.METHODS}
        lost = {"top_1", "ef14"}
        assert {method for method, bits in found.items() if bits is None} == lost
        assert all(
            bits < found["gd"] / 2 for bits in found.values() if bits and bits != found["gd"]
        )
    low, high = (value(rows, "end", method="top_1", dial=dial) for dial in (0, 1))
    assert high > 10 * low


def test_batch_size_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)  # the session keeps its own
    words = ["study", f"--out_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", batch_size_table.with_preset(words))
    with flagsaver.flagsaver():
        batch_size_table.main(train.FLAGS(sys.argv))
    rows = storage.read_rows(tmp_path / "out")
    # As published: the highest mean over the runs, at any epoch.
    best: dict[tuple[str, int], float] = {}
    for method in ("sgdm", "signsgd", "ef_signsgd"):
        for size in (128, 32, 8):
            own = [r for r in rows if r["method"] == method and r["batch_size"] == size]
            by_epoch = {r["epoch"]: [] for r in own}
            for r in own:
                by_epoch[r["epoch"]].append(100 * r["test_accuracy"])
            best[method, size] = max(map(np.mean, by_epoch.values()))
    gaps = {
        method: [best[method, size] - best["sgdm", size] for size in (128, 32, 8)]
        for method in ("signsgd", "ef_signsgd")
    }
    assert min(gaps["ef_signsgd"]) > -0.6
    assert gaps["signsgd"][0] >= gaps["signsgd"][1] >= gaps["signsgd"][2]
    assert gaps["signsgd"][2] < -1
