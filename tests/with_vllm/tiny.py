"""Models of two layers, and engines for them."""

import os

# before vLLM is imported: nothing here may go to a network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rlkern.rollout import VllmEngine

EOS = [1, 2]
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,  # not one that ends a sequence here
}


def tiny(kind=Qwen3Config, seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    config = kind(**SHAPE | {"tie_word_embeddings": False} | options)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def engine_of(model, **options):
    options = {"eos_token_ids": EOS, "block_size": 32, "kv_cache_memory_bytes": 2**26} | options
    return VllmEngine(model, **options)


def distinct(prompt, completion, answer):
    """A reward that a model gets which knows nothing: the share of characters that differ."""
    return len(set(completion)) / max(1, len(completion))
