"""How messages travel: one transport per file, each for any compressor that fits.

>>> import ef_optax as ef
>>> tx = ef.error_feedback(ef.exchanges.two_shot(ef.top_k(0.01)), axis_name="data")

=========================== ========================================================================
:func:`auto`                the cheapest of the next four, by leaf; :func:`choices` lists them
:func:`gather`              all workers receive every message; this is the default
:func:`reduce`              messages are decoded first, and the dense arrays are averaged on the way
:func:`two_shot`            every worker averages one shard and compresses it again
:func:`delayed`             messages travel during the next step, and are applied one step late
:func:`leader`              one worker chooses the positions, and all workers' values are summed
:func:`largest_of_sum`      only the largest entries of the sum are applied
:func:`tree`                the same, but messages are merged pairwise
:func:`mean_of_senders`     each coordinate is averaged over the workers that sent it
:func:`majority`            the sign of the sum is applied
=========================== ========================================================================

:func:`leader_top_k`, :func:`global_top_k_of_sum` and :func:`majority_vote` are the literature's
names for some pairs of a transport and a compressor. :func:`perm_k` is a codec with its own
protocol, since its permutation is the method. :func:`carried` makes a compressor from a codec and
any ``Transport``; to write one, see ``docs/write-your-own.md``.
"""

from ef_optax.exchanges.auto import Choice, Choices, auto, choices
from ef_optax.exchanges.carried import carried
from ef_optax.exchanges.delayed import delayed
from ef_optax.exchanges.gather import gather
from ef_optax.exchanges.global_top_k_of_sum import global_top_k_of_sum, largest_of_sum
from ef_optax.exchanges.leader import leader, leader_top_k
from ef_optax.exchanges.majority import majority, majority_vote
from ef_optax.exchanges.perm import perm_k
from ef_optax.exchanges.reduce import reduce
from ef_optax.exchanges.senders import mean_of_senders
from ef_optax.exchanges.tree import tree
from ef_optax.exchanges.two_shot import two_shot

__all__ = [
    "Choice",
    "Choices",
    "auto",
    "carried",
    "choices",
    "delayed",
    "gather",
    "global_top_k_of_sum",
    "largest_of_sum",
    "leader",
    "leader_top_k",
    "majority",
    "majority_vote",
    "mean_of_senders",
    "perm_k",
    "reduce",
    "tree",
    "two_shot",
]
