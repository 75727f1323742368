"""A LoRA adapter on the LM head, which TRL refuses: log-probs and gradients are peft's."""

import pytest
import torch
from peers.compare import distance, relative

pytest.importorskip("peft")

import peft
import transformers

from rlkern.integrations import transformers as integration


def adapted(**options):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=503,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    lora = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head", "q_proj"], **options)
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


def both(model, ids):
    """Log-probs and adapter gradients of the logits, and of the fused head."""
    up = torch.linspace(-1, 1, ids[:, 1:].numel()).view(ids[:, 1:].shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    want = log_p.gather(-1, ids[:, 1:, None])[..., 0]
    with integration.add_logprobs(model):
        got = model(input_ids=ids, labels=ids, logprobs=("logprob",)).logprob
    assert got.requires_grad == want.requires_grad
    if not want.requires_grad:
        return got, want, (), ()
    by = [torch.autograd.grad((x * up).sum(), trained) for x in (got, want)]
    return got.detach(), want.detach(), *by


def test_a_lora_head(parity):
    model, ids = adapted(), torch.randint(503, (2, 17))
    got, want, grads, theirs = both(model, ids)
    assert len(grads) == 4
    parity(
        "integrations",
        "peft LoRA on lm_head",
        "r=4, alpha=12 on a tiny Qwen3: log-probs of its logits",
        rlkern="integrations.transformers.add_logprobs(model)",
        value=distance(got, want),
        gradient=max(relative(x, y) for x, y in zip(grads, theirs)),
        budget=2e-5,
    )
    with model.disable_adapter():
        got, without, *_ = both(model, ids)
    assert distance(got, without) < 2e-5
    assert distance(want, without) > 0.1
    model.merge_adapter()
    got, merged, *_ = both(model, ids)
    assert distance(got, merged) < 2e-5
    assert distance(merged, want) < 1e-4


def test_dropout_and_two_adapters():
    model, ids = adapted(lora_dropout=0.5), torch.randint(503, (2, 17))
    got, want, *_ = both(model, ids)
    assert distance(got, want) < 2e-5
    with integration.add_logprobs(model.train()):
        first, second = (
            model(input_ids=ids, labels=ids, logprobs=("logprob",)).logprob for _ in range(2)
        )
    assert not torch.equal(first, second)


def test_other_adapters_are_refused():
    model, ids = adapted(use_dora=True), torch.randint(503, (2, 17))
    with integration.add_logprobs(model), pytest.raises(ValueError, match="to be plain LoRA"):
        model(input_ids=ids, labels=ids, logprobs=("logprob",))
