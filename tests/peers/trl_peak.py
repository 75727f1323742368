"""python trl_peak.py trl|rlkern: peak resident memory of two GRPO steps at V = 32,000, as JSON.

ru_maxrss never falls, so what is measured before the first step is taken off: a forward and
backward pass of a model with a small vocabulary has then loaded every library.
"""

import json
import os
import resource
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import torch
import transformers
from peers.test_trl import even_words, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from rlkern.integrations import trl as integration

LENGTH = 96


class FixedLength(GRPOTrainer):
    """Completions are drawn at random: generating them is not what is measured."""

    vocab = 0

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.vocab, (len(prompt_ids), LENGTH), generator=draw).tolist()
        return ids, None


def steps(vocab: int) -> list[float]:
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    FixedLength.vocab = vocab
    with tempfile.TemporaryDirectory() as folder:
        made = FixedLength(
            model=transformers.AutoModelForCausalLM.from_config(config),
            reward_funcs=even_words,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                max_steps=2,
                num_iterations=2,
                optim="sgd",
                per_device_train_batch_size=8,
                num_generations=8,
                max_completion_length=LENGTH,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"]}),
            processing_class=tokenizer,
        )
        made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if sys.argv[1] == "rlkern":
        integration.enable()
    steps(64)
    before = peak()
    losses = steps(32000)
    print(json.dumps({"mib": peak() - before, "loss": losses[-1]}))
