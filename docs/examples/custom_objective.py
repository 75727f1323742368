"""A policy loss that no paper has, put together from the fields of PolicyObjective.

A soft clip, importance weights that correct for a sampler of another precision, a KL to a reference
and an entropy bonus; a table of logits learns by it which of eight actions is rewarded.
"""

import torch

import rlkern

torch.manual_seed(0)
objective = rlkern.PolicyObjective.preset(
    "sapo",  # a soft clip by a sigmoid
    rollout_is="token",
    rollout_is_threshold=2.0,
    kl_coef=0.01,
    kl_type="k3",
    entropy_coef=0.002,
)
print(rlkern.PolicyObjective.explain("sapo"))

actions, group = 8, 64
table = torch.nn.Parameter(torch.zeros(1, actions))
optimiser = torch.optim.Adam([table], lr=0.2)
reference = torch.zeros(group, actions).log_softmax(-1)
group_ids = torch.zeros(group, dtype=torch.long)
for _ in range(20):
    logits = table.detach().expand(group, -1)
    action = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    advantages = rlkern.group_advantage((action == 3).float(), group_ids, kind="grpo")
    old = rlkern.logprob_from_logits(logits, action).logprob
    # as of a sampler that rounds
    rollout = rlkern.logprob_from_logits(logits.bfloat16(), action).logprob
    for _ in range(2):
        new = rlkern.logprob_from_logits(
            table.expand(group, -1), action, outputs=("logprob", "entropy")
        )
        out = rlkern.policy_loss(
            new.logprob,
            old,
            advantages,
            cu_seqlens=torch.arange(group + 1),  # one token a sequence
            objective=objective,
            ref_logprob=reference.gather(-1, action[:, None])[:, 0],
            rollout_logprob=rollout,
            entropy=new.entropy,
        )
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
right = table.softmax(-1)[0, 3].item()
print(f"probability of the rewarded action: 0.125, then {right:.3f}")
assert right > 0.8
