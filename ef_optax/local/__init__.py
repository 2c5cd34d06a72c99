"""Rules with several local steps between two exchanges; each is a complete optimizer."""

from ef_optax.local.cser import cser
from ef_optax.local.diloco import diloco
from ef_optax.local.local_steps import local_steps
from ef_optax.local.qsparse_local_sgd import qsparse_local_sgd
from ef_optax.local.sparse_loco import sparse_loco
from ef_optax.local.streaming import streaming

__all__ = ["cser", "diloco", "local_steps", "qsparse_local_sgd", "sparse_loco", "streaming"]
