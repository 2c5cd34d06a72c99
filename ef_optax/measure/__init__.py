"""What a running optimizer does, what travels, and how many bits it takes.

:func:`ef_optax.monitor`, :func:`ef_optax.wire_report` and :func:`ef_optax.message_bits` are
imported from ``ef_optax``. Here are the statistics of a monitored state and of what the rules
remember, the classes of the wire report, the sizes of entropy codes, whose length depends on the
data, and ``measure.planner``, which tells when compression pays.
"""

from ef_optax.measure import planner
from ef_optax.measure.entropy import (
    arithmetic_bits,
    elias_delta_bits,
    elias_gamma_bits,
    run_length_bits,
    sparse_elias_bits,
    zero_run_bits,
)
from ef_optax.measure.memories import memory_histogram, memory_statistics, state_bytes
from ef_optax.measure.statistics import statistics, summary
from ef_optax.measure.wire import Collective, WireReport

__all__ = [
    "Collective",
    "WireReport",
    "arithmetic_bits",
    "elias_delta_bits",
    "elias_gamma_bits",
    "memory_histogram",
    "memory_statistics",
    "planner",
    "run_length_bits",
    "sparse_elias_bits",
    "state_bytes",
    "statistics",
    "summary",
    "zero_run_bits",
]
