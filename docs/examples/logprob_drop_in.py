"""Log-probs and entropies of a Hugging Face model's tokens without its logits.

The two lines that change in a trainer: ask the model's body for hidden states, and hand them with
the head's weight to `linear_logprob`.
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import rlkern

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=5000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
model = AutoModelForCausalLM.from_config(config)
ids = torch.randint(config.vocab_size, (2, 32))

# before: logits of every token, and their log-softmax
logits = model(ids).logits[:, :-1]
log_p = (logits / 0.7).log_softmax(-1)
want = log_p.gather(-1, ids[:, 1:, None])[..., 0]
want_entropy = -(log_p.exp() * log_p).sum(-1)
want.mean().backward()
want_gradient = model.lm_head.weight.grad.clone()
model.zero_grad()

# after: row t of the hidden states predicts token t + 1
hidden = model.model(ids).last_hidden_state[:, :-1]
out = rlkern.linear_logprob(
    hidden.flatten(0, 1),
    model.lm_head.weight,
    ids[:, 1:].flatten(),
    temperature=0.7,
    outputs=("logprob", "entropy"),
)
out.logprob.mean().backward()

far = (out.logprob - want.flatten()).abs().max().item()
print(f"largest difference of log-probs {far:.1e}")
torch.testing.assert_close(out.logprob, want.flatten(), rtol=1e-5, atol=1e-5)
torch.testing.assert_close(out.entropy, want_entropy.flatten(), rtol=1e-5, atol=1e-5)
torch.testing.assert_close(model.lm_head.weight.grad, want_gradient, rtol=1e-4, atol=1e-7)
