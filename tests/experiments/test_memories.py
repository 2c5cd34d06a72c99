"""The study of small memories, from its flags to its picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import memories
from tests.experiments.test_studies import results, value

SMALL = ("--epochs=8", "--stretches=2", "--train_images=64", "--seeds=2", "--ratio=0.1")


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_memories(tmp_path: Path) -> None:
    rows = results(memories.main, tmp_path / "out", *SMALL, "--methods=float32,4 bits")
    assert value(rows, "bytes", method="float32") == pytest.approx(4, rel=0.01)
    # Half a byte a value and a scale for each block of 128, of which the last bias fills a part.
    leaves, packed = (64 * 128, 128, 128 * 10, 10), 0.0
    for size in leaves:
        packed += size / 2 + 4 * -(-size // 128)
    assert value(rows, "bytes", method="4 bits") == pytest.approx(packed / sum(leaves), rel=0.02)
    for row in rows:
        assert len(row["accuracy"]) == 2 and min(row["accuracy"]) > 20  # chance is 10
        assert row["milliseconds"] > 0


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--methods=2 bits", "2 bits.*choose of float32"),
        ("--train_images=5", "--train_images=5: a step of 8 workers with 2 examples takes 16"),
        ("--stretches=5", "--stretches=5: it must divide --epochs=12"),
        ("--dataset=mnist", "mnist is read from files"),
    ],
)
def test_flags_that_cannot_be_leave_nothing_there(
    flag: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EF_OPTAX_DATA", raising=False)
    with pytest.raises(SystemExit, match=words):
        memories.main(["memories", flag, f"--out_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
