"""Optimizers of the literature by their names, each a short chain of public parts.

A recipe is a complete optimizer, from the gradients of the workers to the step. Read its source to
see the chain, and copy the chain to change a part.
"""

from ef_optax.recipes.demo import demo
from ef_optax.recipes.dgc_sgd import dgc_sgd
from ef_optax.recipes.distro import distro
from ef_optax.recipes.ef_sign_sgd import ef_sign_sgd
from ef_optax.recipes.one_bit_adam import one_bit_adam
from ef_optax.recipes.power_sgd_momentum import power_sgd_momentum
from ef_optax.recipes.signum import signum

__all__ = [
    "demo",
    "dgc_sgd",
    "distro",
    "ef_sign_sgd",
    "one_bit_adam",
    "power_sgd_momentum",
    "signum",
]
