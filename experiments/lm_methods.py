"""The methods that the language model compares: expressions, and short names for some of them."""

from __future__ import annotations

from collections.abc import Sequence

import optax

import ef_optax as ef
from ef_optax.measure.planner.named import period_of
from experiments import expressions
from experiments.arguments import parse_methods, parse_rates
from experiments.workers import AXIS

SHORT = {
    "adamw": "compressed_mean(identity()) | adamw(cosine({rate}), b2=0.99)",
    "muon": "compressed_mean(identity()) | muon(cosine({rate}))",
    "ef_top_k": "error_feedback(top_k(0.01)) | adamw(cosine({rate}), b2=0.99)",
    "ef_sign": "error_feedback(scaled_sign()) | adamw(cosine({rate}), b2=0.99)",
    "ef_power_sgd": "error_feedback(power_sgd(4)) | adamw(cosine({rate}), b2=0.99)",
    "diloco": "local.diloco(adamw(cosine({rate}), b2=0.99), 15)",
    "sparse_loco": "local.sparse_loco(adamw(cosine({rate}), b2=0.99), 15, "
    "compose(sigma_bins(2), top_k(0.03)))",
}
"""Their rate is that of --lr, or `RATES`."""

RATES = {"adamw": 3e-3, "muon": 1e-2, "ef_top_k": 3e-3, "ef_sign": 3e-3, "ef_power_sgd": 3e-3}
RATES |= {"diloco": 3e-3, "sparse_loco": 3e-3}


class Methods:
    """What --methods and --lr say."""

    def __init__(self, text: str, lr: Sequence[str], steps: int, warmup: float) -> None:
        def cosine(peak: float) -> optax.Schedule:
            """From 0 to the peak, then half of a cosine to a tenth of it at the last step."""
            rise = round(warmup * steps)
            return optax.warmup_cosine_decay_schedule(
                0.0 if rise else peak, peak, rise, max(steps, rise + 1), peak / 10
            )

        self._also = {"cosine": cosine}
        names = parse_methods(text, list(SHORT), self._also)
        given = [item.partition("=")[0] for item in lr]
        default = [f"{name}={rate}" for name, rate in RATES.items() if name not in given]
        self.rates = parse_rates([*lr, *default], names, list(SHORT))
        self.expressions = {
            name: SHORT[name].format(rate=self.rates[name]) if name in SHORT else name
            for name in names
        }
        for name in names:
            expressions.check(self.parsed(name))

    def parsed(self, method: str) -> ef.expressions.Expression:
        """What the name or the text of a method says."""
        return ef.parse(self.expressions[method], self._also)

    def optimizer(self, method: str) -> optax.GradientTransformationExtraArgs:
        """The transformation of one worker."""
        return optax.with_extra_args_support(self.parsed(method).build(AXIS))

    def compressor(self, method: str) -> ef.Compressor:
        """What `method` would send."""
        return expressions.compressor(self.parsed(method))

    def period(self, method: str) -> int:
        """Steps between two exchanges of local steps, else 1."""
        return period_of(self.parsed(method))
