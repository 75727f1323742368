"""On-policy distillation: a student learns its teacher's distribution on tokens of its own.

Reverse KL token by token, from the hidden states of both: neither model's logits exist in training.
"""

import torch

import rlkern

torch.manual_seed(0)
vocab, contexts, width, tokens = 500, 16, 32, 256
teacher = torch.nn.Embedding(contexts, 2 * width), torch.nn.Linear(2 * width, vocab, bias=False)
student = torch.nn.Embedding(contexts, width), torch.nn.Linear(width, vocab, bias=False)
teacher[1].weight.data *= 3
parameters = [p for module in student for p in module.parameters()]
optimiser = torch.optim.Adam(parameters, lr=0.02)
curve = []
for step in range(60):
    context = torch.randint(contexts, (tokens,))
    with torch.no_grad():
        # what the student says, and the log-prob at which it said it
        drawn = rlkern.sample_tokens(
            student[1](student[0](context)),
            seed=step,
            branch_ids=torch.arange(tokens),
            positions=torch.zeros(tokens, dtype=torch.long),
        )
    out = rlkern.linear_distill_loss(
        student[0](context),
        student[1].weight,
        teacher[0](context).detach(),
        teacher[1].weight.detach(),
        targets=drawn.token,
        divergence="reverse_kl",
    )
    loss = out.divergence.mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    curve.append(loss.item())
print(f"KL of student to teacher: {curve[0]:.3f}, then {curve[-1]:.3f} nats a token")
assert curve[-1] < 0.5 * curve[0]
