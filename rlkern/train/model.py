"""The model and its tokenizer: from a folder, from the hub, or a small one from the config."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config

from rlkern.kv import hf
from rlkern.rollout.weights import adapted
from rlkern.train import TrainError
from rlkern.train.config import Config
from rlkern.train.tasks import ALPHABET


class CharTokenizer:
    """One token per character; ids 0 and 1 are padding and the end mark."""

    FILE = "char_tokenizer.json"
    pad_token_id, eos_token_id, chat_template = 0, 1, None

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.ids = {character: i for i, character in enumerate(alphabet, 2)}

    def __len__(self) -> int:
        return len(self.ids) + 2

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        if unknown := "".join(sorted(set(text) - set(self.ids))):
            raise TrainError(
                f"the character tokenizer knows {self.alphabet!r}, but {text!r} holds {unknown!r}: "
                "set model.path to a model with a tokenizer"
            )
        return [self.ids[character] for character in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.alphabet[i - 2] for i in ids if i > 1)

    def save_pretrained(self, folder: str | Path) -> None:
        (Path(folder) / self.FILE).write_text(json.dumps({"alphabet": self.alphabet}))


def load_model(cfg: Config, path: Path | None = None) -> tuple[PreTrainedModel, Any]:
    """-> model and tokenizer; `path` (a checkpoint) stands over `model.path`."""
    device, source = pick_device(cfg.run.device), str(path or cfg.model.path)
    options = {"dtype": getattr(torch, cfg.model.dtype), "attn_implementation": cfg.model.attention}
    tokenizer: Any
    if not source:
        torch.manual_seed(cfg.run.seed)
        tokenizer = CharTokenizer(ALPHABET)
        model = AutoModelForCausalLM.from_config(small_config(cfg), **options)
        return prepared(model, cfg).to(device), tokenizer
    try:
        characters = Path(source) / CharTokenizer.FILE
        if characters.is_file():
            tokenizer = CharTokenizer(**json.loads(characters.read_text()))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except Exception as error:  # the libraries raise a dozen kinds for one bad folder
        raise TrainError(f"model.path: {source!r} could not be loaded: {error}") from error
    return prepared(model, cfg).to(device), tokenizer


def prepared(model: PreTrainedModel, cfg: Config) -> PreTrainedModel:
    """With the attention that packed trees need, where they are trained on."""
    if cfg.trains_on_trees:
        hf.install(model)
    return model


def add_adapters(model: PreTrainedModel, cfg: Config, saved: Path | None) -> Any:
    """Freezes the model and puts LoRA adapters into its layers -> peft's view of it.

    The model keeps its class and its forward. saved: the adapters of a checkpoint.
    """
    try:
        import peft
    except ImportError as error:
        raise TrainError("lora.rank needs peft: pip install 'rlkern[lora]'") from error
    torch.manual_seed(cfg.run.seed)
    how = {"r": cfg.lora.rank, "lora_alpha": cfg.lora.alpha, "target_modules": cfg.lora.targets}
    how["task_type"] = "CAUSAL_LM"
    try:
        view = peft.get_peft_model(model, peft.LoraConfig(**how), autocast_adapter_dtype=False)
    except ValueError as error:
        raise TrainError(f"lora.targets: {error}") from error
    for name, layer in adapted(model).items():
        if layer is model.get_output_embeddings() or type(layer.base_layer) is not nn.Linear:
            what = "expected linear layers other than the head, whose log-probs take one weight"
            raise TrainError(f"lora.targets: {what}; got {name}")
    if saved is not None:
        peft.set_peft_model_state_dict(view, load_file(saved / "adapter_model.safetensors"))
    return view


def small_config(cfg: Config) -> Qwen3Config:
    shape = cfg.model
    return Qwen3Config(
        vocab_size=len(ALPHABET) + 2,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        pad_token_id=CharTokenizer.pad_token_id,
        eos_token_id=CharTokenizer.eos_token_id,
    )


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every id that ends a completion; the one that demonstrations end with comes first."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    ids = dict.fromkeys(i for i in [tokenizer.eos_token_id, *listed] if i is not None)
    if not ids:
        raise TrainError("the model has no end token: set eos_token_id in its generation_config")
    return list(ids)


def encode_prompt(tokenizer: Any, prompt: Any, chat_template: str) -> list[int]:
    """A string or chat messages -> ids, through the chat template where there is one."""
    has_template = tokenizer.chat_template is not None
    if chat_template == "on" and not has_template:
        raise TrainError("data.chat_template = 'on', but the tokenizer has no chat template")
    if not has_template or chat_template == "off":
        if not isinstance(prompt, str):
            raise TrainError("prompts that are chat messages need a chat template; none is in use")
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise TrainError(f"run.device: {name!r} cannot be used: {error}") from error
