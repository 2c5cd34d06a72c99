"""What changes over time or from leaf to leaf: warm-ups and schedules of the compressor."""

from ef_optax.policies.dgc_warmup import dgc_warmup, dgc_warmup_ratio

__all__ = [
    "dgc_warmup",
    "dgc_warmup_ratio",
]
