"""What changes over time or from leaf to leaf.

- **Schedules of a compressor**, which work in every rule: :func:`delayed_start`, :func:`gradual`,
  :func:`dgc_warmup` and :func:`flush`, a dense step now and then.
- **Policies of the residual**, which are wrapped around a rule that has one: :func:`clip_residual`,
  :func:`reset_residual`, :func:`steer_residual` (injection and retention),
  :func:`rescale_residual`. What they drop is counted in their state.
- **Policies of the optimizer** after it: :func:`freeze`.
"""

from ef_optax.policies.clip_residual import clip_residual
from ef_optax.policies.delayed_start import delayed_start
from ef_optax.policies.dgc_warmup import dgc_warmup, dgc_warmup_ratio
from ef_optax.policies.flush import flush
from ef_optax.policies.freeze import freeze
from ef_optax.policies.gradual import DGC_RATIOS, gradual
from ef_optax.policies.rescale_residual import rescale_residual
from ef_optax.policies.reset_residual import reset_residual
from ef_optax.policies.steer_residual import OfNorm, steer_residual

__all__ = [
    "DGC_RATIOS",
    "OfNorm",
    "clip_residual",
    "delayed_start",
    "dgc_warmup",
    "dgc_warmup_ratio",
    "flush",
    "freeze",
    "gradual",
    "rescale_residual",
    "reset_residual",
    "steer_residual",
]
