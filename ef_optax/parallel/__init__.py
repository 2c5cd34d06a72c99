"""From one worker's transformation to all workers: inference, the lift, simulation, gradients.

:func:`ef_optax.data_parallel`, :func:`ef_optax.simulate` and
:func:`ef_optax.worker_value_and_grad` are imported from ``ef_optax``. Here is what hand-written
maps, checkpoints, updates that overlap with gradients and a change of the number of workers need
besides.
"""

from ef_optax.parallel.change_workers import change_workers
from ef_optax.parallel.inference import worker_axes
from ef_optax.parallel.lift import Lifted, abstract_state, state_specs
from ef_optax.parallel.overlapped import Overlapped
from ef_optax.parallel.quarantine import exchange_states, guard
from ef_optax.parallel.replicas import differing_replicas

__all__ = [
    "Lifted",
    "Overlapped",
    "abstract_state",
    "change_workers",
    "differing_replicas",
    "exchange_states",
    "guard",
    "state_specs",
    "worker_axes",
]
