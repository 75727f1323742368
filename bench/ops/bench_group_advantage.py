"""`group_advantage` (GRPO) against the copy of its bytes and the ways that trainers write it."""

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from bench.shapes import GROUPS
from rlkern.ops.group_advantage.samples import bytes_and_flops

OP = "group_advantage"
CASES = [
    Case("smoke"),
    Case("64x8"),
    Case("512x16"),
    Case("4096x16"),
]
VARIANTS = [harness.LIMIT, "rlkern", "eager", "eager-blocks", "eager-loop", "compile"]
# a Python loop over more rows than this takes seconds a call
LOOP_ROWS = 10_000


def problem(case: Case, device: str) -> Problem:
    prompts, samples = GROUPS[case.shape]
    rows = prompts * samples
    rewards = torch.randint(2, (rows,)).to(device, torch.float32) + torch.rand(rows, device=device)
    group_ids = torch.arange(prompts, device=device).repeat_interleave(samples)
    compiled = peers.compiled(peers.scatter_advantage)
    variants = {
        "rlkern": lambda: rlkern.group_advantage(rewards, group_ids, num_groups=prompts),
        "eager": lambda: peers.scatter_advantage(rewards, group_ids, prompts),
        "eager-blocks": lambda: peers.reshaped_advantage(rewards, samples),
        "compile": lambda: compiled(rewards, group_ids, prompts),
    }
    if rows <= LOOP_ROWS:
        ids = group_ids.tolist()
        variants["eager-loop"] = lambda: peers.looped_advantage(rewards, ids)
    num_bytes, _ = bytes_and_flops(rows, rewards.element_size())
    return Problem(variants, "copy", GROUPS[case.shape]._asdict(), num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
