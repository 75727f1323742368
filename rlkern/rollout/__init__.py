"""Engines that turn prompts into packed rollouts."""

from rlkern.rollout.engine import Engine, Rollouts
from rlkern.rollout.environment import Calculator, Environment, Reply, Turn, turn_rows
from rlkern.rollout.explore import most_contrastive
from rlkern.rollout.native import NativeEngine
from rlkern.rollout.vllm import VllmEngine
from rlkern.rollout.vllm_server import VllmServer

__all__ = [
    "Calculator",
    "Engine",
    "Environment",
    "NativeEngine",
    "Reply",
    "Rollouts",
    "Turn",
    "VllmEngine",
    "VllmServer",
    "most_contrastive",
    "turn_rows",
]
