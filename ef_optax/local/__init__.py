"""Rules with several local steps between two exchanges; each is a complete optimizer."""

from ef_optax.local.cser import cser
from ef_optax.local.qsparse_local_sgd import qsparse_local_sgd

__all__ = ["cser", "qsparse_local_sgd"]
