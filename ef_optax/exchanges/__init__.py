"""How messages travel, where that is more than a gather or a sum."""

from ef_optax.exchanges.global_top_k_of_sum import global_top_k_of_sum
from ef_optax.exchanges.leader import leader_top_k
from ef_optax.exchanges.majority import majority_vote
from ef_optax.exchanges.perm import perm_k
from ef_optax.exchanges.two_shot import two_shot

__all__ = ["global_top_k_of_sum", "leader_top_k", "majority_vote", "perm_k", "two_shot"]
