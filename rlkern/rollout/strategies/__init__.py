"""Rollout strategies, one class each; docs/rollout.md has them in a table."""

from rlkern.rollout.strategies.april import APRIL
from rlkern.rollout.strategies.arrol import ARRoL
from rlkern.rollout.strategies.base import Strategy
from rlkern.rollout.strategies.cure import CURE
from rlkern.rollout.strategies.deepsearch import DeepSearch
from rlkern.rollout.strategies.ead import EAD
from rlkern.rollout.strategies.latr import LATR
from rlkern.rollout.strategies.prefix_rl import PrefixRL
from rlkern.rollout.strategies.reinforce_ada import ReinforceAda
from rlkern.rollout.strategies.rose import ROSE
from rlkern.rollout.strategies.smc import SMC, PowerSMC
from rlkern.rollout.strategies.tree_rl import TreeRL

# the names that recipes use
STRATEGIES: dict[str, type[Strategy]] = {
    "groups": Strategy,
    "april": APRIL,
    "arrol": ARRoL,
    "cure": CURE,
    "deepsearch": DeepSearch,
    "ead": EAD,
    "latr": LATR,
    "power_smc": PowerSMC,
    "prefix_rl": PrefixRL,
    "reinforce_ada": ReinforceAda,
    "rose": ROSE,
    "smc": SMC,
    "tree_rl": TreeRL,
}

__all__ = ["STRATEGIES", *(kind.__name__ for kind in STRATEGIES.values())]
