"""Rollouts that fork where the policy is unsure, then one policy update on the tree that they make.

Tokens that sequences share are drawn once, kept once and trained on once.
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import rlkern
from rlkern import kv
from rlkern.kv import hf
from rlkern.rollout import NativeEngine
from rlkern.rollout.strategies import CURE

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
model = AutoModelForCausalLM.from_config(config)
engine = NativeEngine(model, eos_token_ids=[1])
prompts = [[5, 6, 7, 8], [9, 10, 11]]
rollouts = engine.generate(
    prompts,
    group_size=8,
    max_new_tokens=16,
    strategy=CURE(num_first=4, num_regenerated=1),
    generator=torch.Generator().manual_seed(0),
)
drawn, held = rollouts.origin.unique().numel(), len(rollouts.tokens)
print(f"{len(rollouts.lengths)} sequences of {held} tokens, of which {drawn} were drawn")
assert drawn < held

# a reward for every sequence: how many of its tokens are even
even = (rollouts.tokens % 2 == 0).float()
rewards = rlkern.segment_reduce(even, rollouts.cu_seqlens, kind="mean")
advantages = rlkern.group_advantage(rewards, rollouts.group_ids, kind="rloo")

# prompts once, with the responses to them
pack = kv.group_pack(
    rollouts.prompt_tokens,
    rollouts.prompt_cu_seqlens,
    rollouts.tokens,
    rollouts.cu_seqlens,
    rollouts.group_ids,
    rollouts.logprob,
)
hf.install(model)
along = hf.attending(hf.along_tree(pack.subtree_end, pack.cu_seqlens))
hidden = model.model(pack.ids[None], position_ids=pack.positions[None], **along)
rows = pack.pred_row[pack.targets]
new = rlkern.linear_logprob(
    hidden.last_hidden_state[0, rows], model.lm_head.weight, pack.ids[pack.targets]
)
old = pack.logprob[pack.targets]
out = rlkern.policy_loss(
    new.logprob[pack.paths],
    old[pack.paths],
    advantages,
    cu_seqlens=pack.path_cu_seqlens,
    objective="grpo",
)
out.loss.backward()
far = (new.logprob - old).abs().max().item()
print(f"{len(pack.ids)} tokens in the forward; log-probs {far:.1e} from the engine's")
assert far < 1e-4
assert model.lm_head.weight.grad.abs().max() > 0
