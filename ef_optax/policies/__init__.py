"""What changes over time or from leaf to leaf.

- **Schedules of a compressor**, which work in every rule: :func:`delayed_start`, :func:`gradual`,
  :func:`dgc_warmup` and :func:`flush`, a dense step now and then.
- **Controllers in the program**, which choose one of a few compiled levels as a run goes:
  :func:`hold_bytes`, :func:`hold_contraction`.
- **Policies around a rule**: :func:`dense_steps`, in which the rule rests.
- **Policies of the residual**, which are wrapped around a rule that has one: :func:`clip_residual`,
  :func:`reset_residual`, :func:`steer_residual` (injection and retention),
  :func:`rescale_residual`. What they drop is counted in their state.
- **Choices of a level for each leaf**, made on the host every few epochs from measured gradients:
  :func:`accordion`, :func:`l_greco`, :func:`within_bytes`, :func:`with_contraction`.
- **Policies of the optimizer** after it: :func:`freeze`, and its rate, :func:`compressed_rate`.
"""

from ef_optax.policies.accordion import accordion
from ef_optax.policies.clip_residual import clip_residual
from ef_optax.policies.compressed_rate import compressed_rate
from ef_optax.policies.delayed_start import delayed_start
from ef_optax.policies.dense_steps import dense_steps
from ef_optax.policies.dgc_warmup import dgc_warmup, dgc_warmup_ratio
from ef_optax.policies.flush import flush
from ef_optax.policies.freeze import freeze
from ef_optax.policies.gradual import DGC_RATIOS, gradual
from ef_optax.policies.hold_bytes import hold_bytes
from ef_optax.policies.hold_contraction import hold_contraction
from ef_optax.policies.l_greco import l_greco
from ef_optax.policies.rescale_residual import rescale_residual
from ef_optax.policies.reset_residual import reset_residual
from ef_optax.policies.steer_residual import OfNorm, steer_residual
from ef_optax.policies.with_contraction import with_contraction
from ef_optax.policies.within_bytes import within_bytes

__all__ = [
    "DGC_RATIOS",
    "OfNorm",
    "accordion",
    "clip_residual",
    "compressed_rate",
    "delayed_start",
    "dense_steps",
    "dgc_warmup",
    "dgc_warmup_ratio",
    "flush",
    "freeze",
    "gradual",
    "hold_bytes",
    "hold_contraction",
    "l_greco",
    "rescale_residual",
    "reset_residual",
    "steer_residual",
    "with_contraction",
    "within_bytes",
]
