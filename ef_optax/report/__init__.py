"""One page about some runs: ``python -m ef_optax.report runs/a [runs/b ...]``.

It reads what a run left in its folder, and writes ``report.html``, which opens without a network.

    metrics.jsonl    one JSON object per line: "method", "seed", "epoch" (or "step"), any of
                     "train_loss", "test_loss", "test_accuracy", and optionally "monitor", what
                     ef_optax.measure.summary(opt_state, by="leaf") returned
    config.json      optional: {"about": {"steps_per_epoch": 89, "dense_bytes": 78000}}
    wire.json        optional: {method: {"message_bytes": 840, "link_bytes": 11760}} of a step

``experiments.train --report`` writes these files and the page. The charts need the extra
``ef-optax[report]``.
"""

from ef_optax.report.runs import ReportError
from ef_optax.report.write import require, write

__all__ = ["ReportError", "require", "write"]
