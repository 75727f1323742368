"""Named shapes: the heads of real models, and the batches that trainers make."""

from typing import NamedTuple


class Head(NamedTuple):
    tokens: int
    hidden: int
    vocab: int


class Groups(NamedTuple):
    prompts: int
    samples: int  # per prompt


# hidden and vocab from each model's config.json; vocab is that of the weights, padding included
HEADS = {
    "smoke": Head(32, 64, 1000),
    # two CPU cores
    "cpu-64k": Head(1024, 896, 65536),
    "cpu-32k": Head(4096, 512, 32000),
    "cpu-qwen3-0.6b": Head(256, 1024, 151936),
    "cpu-qwen3-0.6b-2k": Head(2048, 1024, 151936),
    # one GPU
    "qwen3-0.6b": Head(8192, 1024, 151936),
    "qwen3-8b": Head(8192, 4096, 151936),
    "llama-3.1-8b": Head(8192, 4096, 128256),
    "gpt-oss-20b": Head(8192, 2880, 201088),
    "deepseek-v3": Head(4096, 7168, 129280),
}

# peak memory over the vocabulary alone
HEADS |= {f"vocab-{2**n}": Head(1024, 256, 2**n) for n in range(14, 19)}

GROUPS = {
    "smoke": Groups(4, 4),
    "64x8": Groups(64, 8),
    "512x16": Groups(512, 16),
    "4096x16": Groups(4096, 16),
}
