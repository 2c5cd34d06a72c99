"""How messages travel: a transport a file, and each takes any compressor that fits.

>>> import ef_optax as ef
>>> tx = ef.error_feedback(ef.exchanges.two_shot(ef.top_k(0.01)), axis_name="data")

=========================== ========================================================================
:func:`gather`              every message to everybody; how compressors travel by themselves
:func:`reduce`              decoded and averaged on the way, dense
:func:`two_shot`            every worker averages one shard and compresses again
:func:`leader`              one worker's places serve all, whose values are summed
:func:`largest_of_sum`      of the sum only the largest entries are applied
:func:`tree`                the same, merged pairwise
:func:`majority`            the sign of the sum
=========================== ========================================================================

The literature's names are lines of these: :func:`leader_top_k`, :func:`global_top_k_of_sum`,
:func:`majority_vote`. :func:`perm_k` is a codec of its own, whose permutation is the method.
:func:`carried` makes a compressor of a codec and any ``Transport``; to write one, see
``docs/write-your-own.md``.
"""

from ef_optax.exchanges.carried import carried
from ef_optax.exchanges.gather import gather
from ef_optax.exchanges.global_top_k_of_sum import global_top_k_of_sum, largest_of_sum
from ef_optax.exchanges.leader import leader, leader_top_k
from ef_optax.exchanges.majority import majority, majority_vote
from ef_optax.exchanges.perm import perm_k
from ef_optax.exchanges.reduce import reduce
from ef_optax.exchanges.tree import tree
from ef_optax.exchanges.two_shot import two_shot

__all__ = [
    "carried",
    "gather",
    "global_top_k_of_sum",
    "largest_of_sum",
    "leader",
    "leader_top_k",
    "majority",
    "majority_vote",
    "perm_k",
    "reduce",
    "tree",
    "two_shot",
]
