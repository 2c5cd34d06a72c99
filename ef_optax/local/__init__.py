"""Rules whose workers have models of their own; each is a complete optimizer.

Between two exchanges the workers take several steps by themselves (:func:`local_steps` and what is
made of it), or they hear only their neighbours in a graph (:func:`choco_sgd`, :func:`beer`),
or one partner (:func:`noloco`).
"""

from ef_optax.local.beer import beer
from ef_optax.local.choco_sgd import choco_sgd
from ef_optax.local.cser import cser
from ef_optax.local.diloco import diloco
from ef_optax.local.graphs import complete, metropolis, ring
from ef_optax.local.local_steps import local_steps
from ef_optax.local.noloco import noloco
from ef_optax.local.qsparse_local_sgd import qsparse_local_sgd
from ef_optax.local.sparse_loco import sparse_loco
from ef_optax.local.streaming import streaming

__all__ = [
    "beer",
    "choco_sgd",
    "complete",
    "cser",
    "diloco",
    "local_steps",
    "metropolis",
    "noloco",
    "qsparse_local_sgd",
    "ring",
    "sparse_loco",
    "streaming",
]
