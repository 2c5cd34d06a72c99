"""Costs until the same loss, from files written here, against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import lm_costs, storage
from experiments.arguments import UsageError

DENSE = "compressed_mean(identity()) | sgd(cosine(0.1))"
LOCAL = "local.diloco(sgd(cosine({rate})), 5)"
FLAGS = {"size": "0.2M", "steps": 20, "eval_every": 10, "batch_size": 1, "length": 8}


def write(folder: Path, **changed: Any) -> Path:
    """Dense, which ends at 2.0 nats, and local steps at two rates, of which 0.2 is the better."""
    methods = [DENSE, LOCAL.format(rate=0.1), LOCAL.format(rate=0.2)]
    about = {"steps_per_epoch": 10, "expressions": {m: m for m in methods}}
    flags = FLAGS | {"workers": 4, "text": "a.txt"} | changed
    folder.mkdir()
    storage.write_text(folder / "config.json", json.dumps({"flags": flags, "about": about}))
    for method, losses in zip(methods, [(3.0, 2.0), (3.5, 2.9), (3.5, 2.1)], strict=True):
        for epoch, loss in enumerate(losses, 1):
            row = {"method": method, "seed": 0, "epoch": epoch, "test_loss": loss}
            storage.append_row(folder, row)
    sent = {"message_bytes": 4_000_000, "link_bytes": 12_000_000}
    dense = sent | {"rounds": [["reduce", 4_000_000, False]]}
    local = sent | {"at_most": True, "sometimes": sent, "period": 5}
    local["rounds"] = [["reduce", 4_000_000, True]]
    wire = {methods[0]: dense, methods[1]: local, methods[2]: local}
    storage.write_text(folder / "wire.json", json.dumps(wire))
    return folder


def test_bytes_and_seconds_until_the_same_loss(tmp_path: Path) -> None:
    dense, local = lm_costs.read([write(tmp_path / "a")])
    assert (local.name, local.rate, local.tried) == (
        LOCAL.format(rate="PEAK"),
        "0.2",
        ["0.1", "0.2"],
    )
    assert dense.steps_to(2.5) == 15.0 and dense.steps_to(1.9) is None and dense.steps_to(3.1) == 10
    np.testing.assert_allclose(local.steps_to(2.5), 10 + 10 * (3.5 - 2.5) / (3.5 - 2.1))
    assert (dense.bytes_per_step, local.bytes_per_step) == (4e6, 0.8e6)
    # A ring moves 2 x 3/4 x 4 MB in each direction, at 0.94 x 125 MB/s and 2 x 2 steps of 1 ms.
    link = lm_costs.Link("1gbit", "1ms")
    np.testing.assert_allclose(dense.transfer(link), 6e6 / (0.94 * 125e6) + 4e-3)
    np.testing.assert_allclose(local.transfer(link), dense.transfer(link) / 5)
    text = lm_costs.table([dense, local], 2.5, {"1gbit": link}, step_time=0.1)
    seconds = 15 * (0.1 + dense.transfer(link))
    assert f"| 0.1 (1) | 2.000 | 4,000,000 | 1x | 60.00 | {seconds:.1f} |" in text
    assert "| 0.2 (2) | 2.100 | 800,000 | 5x |" in text
    assert "| never |" in lm_costs.table([dense], 1.0, {"1gbit": link}, step_time=0.1)


def test_dense_steps_at_the_start_count_as_such() -> None:
    rounds = [["reduce", 100, True], ["gather", 10, True], ["reduce", 4, False]]
    wire = {"rounds": rounds, "dense_steps": 2}
    curves = np.zeros((1, 1))
    method = lm_costs.Method("1-bit Adam", "0.1", ["0.1"], curves, curves[0], wire, workers=4)
    steps = np.array([1, 2, 5])
    np.testing.assert_array_equal(method.total(steps, lm_costs.size), [104, 208, 208 + 3 * 14])
    assert method.steps_within(52, lm_costs.size) == 0.5
    assert method.steps_within(250, lm_costs.size) == 5
    assert method.steps_within(2 * 105 + 15, lm_costs.size, computation=1.0) == 3


def test_files_are_written_and_what_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "a")
    words = [f"--out_dir={tmp_path / 'out'}", "--target=2.5"]
    lm_costs.main(["lm_costs", f"--runs={folder}", *words])
    assert "Target: 2.5 nats" in capsys.readouterr().out
    assert (tmp_path / "out" / "costs.png").read_bytes()[:4] == b"\x89PNG"
    for arguments, message in (
        ([f"--runs={tmp_path}", *words], "experiments.lm has written nothing there"),
        (words, "give --runs=FOLDER"),
        ([f"--runs={folder}", *words, "--bandwidths=fast"], "bandwidth"),
    ):
        with pytest.raises(SystemExit, match=message):
            lm_costs.main(["lm_costs", *arguments])
    with pytest.raises(UsageError, match="has another --steps than"):
        lm_costs.read([folder, write(tmp_path / "b", steps=30)])
