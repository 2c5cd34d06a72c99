"""Optimizers of the literature by their names, each a short chain of public parts.

A recipe is a complete optimizer, from the gradients of the workers to the step. Read its source to
see the chain, and copy the chain to change a part.
"""

from ef_optax.recipes.dct_adamw import dct_adamw
from ef_optax.recipes.demo import demo
from ef_optax.recipes.dgc_sgd import dgc_sgd
from ef_optax.recipes.dion import dion
from ef_optax.recipes.dion2 import dion2
from ef_optax.recipes.distro import distro
from ef_optax.recipes.dual_averaging import dual_averaging
from ef_optax.recipes.econtrol_dual_averaging import econtrol_dual_averaging
from ef_optax.recipes.ef21_muon import ef21_muon
from ef_optax.recipes.ef_sign_sgd import ef_sign_sgd
from ef_optax.recipes.gpa import gpa
from ef_optax.recipes.ldadam import ldadam
from ef_optax.recipes.loco import loco
from ef_optax.recipes.micro_adam import micro_adam
from ef_optax.recipes.muloco import muloco
from ef_optax.recipes.one_bit_adam import one_bit_adam
from ef_optax.recipes.one_bit_lamb import one_bit_lamb
from ef_optax.recipes.orthogonalise import orthogonalise, spectral_scale
from ef_optax.recipes.power_sgd_momentum import power_sgd_momentum
from ef_optax.recipes.signum import signum
from ef_optax.recipes.trion import trion
from ef_optax.recipes.zero_one_adam import zero_one_adam

__all__ = [
    "dct_adamw",
    "demo",
    "dgc_sgd",
    "dion",
    "dion2",
    "distro",
    "dual_averaging",
    "econtrol_dual_averaging",
    "ef21_muon",
    "ef_sign_sgd",
    "gpa",
    "ldadam",
    "loco",
    "micro_adam",
    "muloco",
    "one_bit_adam",
    "one_bit_lamb",
    "orthogonalise",
    "power_sgd_momentum",
    "signum",
    "spectral_scale",
    "trion",
    "zero_one_adam",
]
