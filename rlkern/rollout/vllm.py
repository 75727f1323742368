"""vLLM as an engine, in the trainer's own process: weights go in through vLLM's own reload.

    engine = VllmEngine(model, eos_token_ids=[1])
    rollouts = engine.generate(prompts, group_size=16, max_new_tokens=64, generator=generator)
    engine.update_weights(dict(model.named_parameters()))      # after the optimiser's step

vLLM is imported where an engine is made, and nowhere else.
"""

import contextlib
import copy
import gc
import os
import random
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from rlkern.rollout.engine import Rollouts, check_prompts, check_sampling, offsets
from rlkern.rollout.environment import Environment
from rlkern.rollout.run import Kept
from rlkern.rollout.strategies.base import Strategy


class VllmEngine:
    """Group sampling by vLLM, one process, one device.

    Args:
        model: of Hugging Face, whose weights are copied; or the folder of a checkpoint, a quantised
            one too where vLLM knows its format.
        eos_token_ids: a sequence ends with any of these, and with nothing else.
        max_sequences: sequences decoded at once; the others wait.
        options: arguments of `vllm.LLM`, such as max_model_len, kv_cache_memory_bytes or
            enable_sleep_mode. Where nothing is said: eager execution, and on a CPU 1 GiB for keys
            and values.

    vLLM makes a process group of torch.distributed with one rank: a trainer that has ranks of its
    own needs it in another process.

    Raises:
        RuntimeError: vLLM cannot be imported, or was told to run in processes of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int = 256,
        **options: Any,
    ) -> None:
        if not len(eos_token_ids):
            raise ValueError("VllmEngine: expected at least one end token id, got none")
        if max_sequences < 1:
            raise ValueError(f"VllmEngine: expected max_sequences >= 1, got {max_sequences}")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
            raise RuntimeError(
                "VllmEngine: weights are handed over within this process: unset "
                "VLLM_ENABLE_V1_MULTIPROCESSING"
            )
        self.eos = [int(i) for i in eos_token_ids]
        self.version = 0
        self.stats: dict[str, float] = {}  # of the last call, see generate
        self.kept = Kept()  # stays empty: nothing goes on in the next call
        with _undisturbed():
            try:
                import vllm
                from vllm.platforms import current_platform
            except ImportError as error:
                raise RuntimeError(
                    f"VllmEngine: vLLM cannot be imported, see docs/rollout.md: {error}"
                ) from error
            self.vllm, self.on_cpu = vllm, current_platform.is_cpu()
            options = {
                "skip_tokenizer_init": True,
                "generation_config": "vllm",  # none of a checkpoint's sampling defaults
                "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
                "enforce_eager": True,
                "max_num_seqs": max_sequences,
                **({"kv_cache_memory_bytes": 2**30} if self.on_cpu else {}),
                **options,
            }
            self.eager = options["enforce_eager"]
            if isinstance(model, (str, Path)):
                self.shapes, self.ties = shapes_of(Path(model)), set()
                self.llm = _made(vllm.LLM(str(model), **options))
                return
            with tempfile.TemporaryDirectory() as folder:
                config = copy.deepcopy(model.config)
                config.architectures = [type(model).__name__]
                config.save_pretrained(folder)
                options = {"load_format": "dummy", "dtype": model.dtype, **options}
                self.llm = _made(vllm.LLM(folder, **options))
        weights = dict(model.named_parameters())
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.ties = dict(model.named_parameters(remove_duplicate=False)).keys() - weights.keys()
        self.update_weights(weights, 0)

    def update_weights(self, weights: Mapping[str, Tensor], version: int | None = None) -> None:
        """Puts new weights in place of the old ones, and forgets what was computed with those.

        Args:
            weights: all of them, by the names that they have in the model, or in the checkpoint,
                that the engine was made from; on any device, cast to vLLM's dtype.
            version: of these weights; default: the one after the present one.

        Raises:
            ValueError: a missing, unknown or ill-shaped tensor. The old weights stay then.
        """
        given = check_weights("VllmEngine", weights, self.shapes, self.ties)
        pairs = ((name, weights[name].detach()) for name in given)
        with torch.no_grad(), _undisturbed():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
            if self.on_cpu:
                self.llm.apply_model(pack_tied_head)
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("VllmEngine.update_weights: the prefix cache is in use")
        self.version = self.version + 1 if version is None else version

    def generate(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        strategy: Strategy | None = None,
        environment: Environment | None = None,
        generator: torch.Generator | None = None,
    ) -> Rollouts:
        """Samples `group_size` completions of every prompt.

        The log-probs are vLLM's own, of the distribution that it sampled from: softmax(logits /
        temperature) in float32 over the tokens that are left by min_p, then top_k, then top_p (by
        NativeEngine in another order: min_p last). `greedy` takes the most likely token, with its
        log-prob at temperature 1 among all tokens. `Rollouts.entropy` and `origin` are None: vLLM
        has no entropy, and does not say what it has shared.

        A generator gives each sequence a seed of its own: its tokens then do not depend on how
        sequences are batched, save where other matrix products round a draw to another token.
        Without one vLLM draws from its own stream, which is faster.

        stats: rollout/prefix_cached, the share of prompt tokens that were read from the cache.
        """
        config = self.llm.model_config
        arguments = sampling_arguments(
            "VllmEngine",
            prompts,
            [i for i in self.eos if 0 <= i < config.get_vocab_size()],  # vLLM takes no others
            config.max_model_len,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            greedy=greedy,
            strategy=strategy,
            environment=environment,
        )
        seeds = draw_seeds(generator, len(prompts) * group_size)
        quick = {"flat_logprobs": True, "detokenize": False, "skip_clone": True}
        params = [self.vllm.SamplingParams(seed=seed, **arguments, **quick) for seed in seeds]
        asked = [{"prompt_token_ids": list(p)} for p in prompts for _ in range(group_size)]
        # vLLM compiles one function, of ranks that nobody asks for: 20 s on a CPU
        stance = (
            torch.compiler.set_stance("force_eager") if self.eager else contextlib.nullcontext()
        )
        with torch.no_grad(), stance:
            outputs = self.llm.generate(asked, params, use_tqdm=False)
        read = sum(out.num_cached_tokens or 0 for out in outputs)
        self.stats = {
            "rollout/prefix_cached": read / sum(len(p["prompt_token_ids"]) for p in asked)
        }
        drawn = [
            (one.token_ids, one.logprobs.logprobs, one.finish_reason == "length")
            for one in (out.outputs[0] for out in outputs)
        ]
        return packed(prompts, group_size, drawn, self.version, generator)

    def sleep(self, level: int = 1) -> None:
        """Frees the device's memory: level 1 keeps the weights on the host, 2 drops them too.

        Needs an engine made with enable_sleep_mode=True, on a GPU.
        """
        if self.on_cpu:
            raise RuntimeError("VllmEngine.sleep: vLLM has no sleep mode on a CPU")
        self.llm.sleep(level)

    def wake(self) -> None:
        """Takes the memory back; after level 2, `update_weights` comes before `generate`."""
        if self.on_cpu:
            raise RuntimeError("VllmEngine.wake: vLLM has no sleep mode on a CPU")
        self.llm.wake_up()


def sampling_arguments(
    engine: str,
    prompts: list[list[int]],
    ends: list[int],
    limit: int,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    greedy: bool,
    strategy: Strategy | None,
    environment: Environment | None,
) -> dict[str, Any]:
    """Checks what an engine was asked for -> arguments of vllm.SamplingParams."""
    if strategy is not None and type(strategy) is not Strategy:
        raise ValueError(
            f"{engine}.generate: expected plain groups, got {type(strategy).__name__}: vLLM "
            "neither forks nor prunes branches while it decodes"
        )
    if environment is not None:
        raise ValueError(
            f"{engine}.generate: expected no environment: each turn would be a request of its own, "
            "which this engine does not make"
        )
    check_prompts(engine, prompts)
    check_sampling(engine, group_size, max_new_tokens, temperature)
    if (need := max(map(len, prompts)) + max_new_tokens) > limit:
        raise ValueError(
            f"{engine}.generate: longest prompt + max_new_tokens = {need} tokens, but vLLM "
            f"was made for {limit} (max_model_len)"
        )
    return {
        "max_tokens": max_new_tokens,
        "temperature": 0.0 if greedy else temperature,
        "top_k": 0 if greedy else top_k,
        "top_p": 1.0 if greedy else top_p,
        "min_p": 0.0 if greedy else min_p,
        "stop_token_ids": ends,
        "ignore_eos": True,  # the model's own: these are those of `stop_token_ids`
        "logprobs": 0,  # of the sampled token alone
    }


def draw_seeds(generator: torch.Generator | None, count: int) -> list[int | None]:
    """A seed for each of vLLM's requests, or none."""
    if generator is None:
        return [None] * count
    device = generator.device
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()


def packed(
    prompts: list[list[int]],
    group_size: int,
    drawn: list[tuple[Sequence[int], Sequence[float], bool]],
    version: int,
    generator: torch.Generator | None,
) -> Rollouts:
    """Token ids, their log-probs and whether it was cut off, of each sequence in turn."""
    device = "cpu" if generator is None else generator.device

    def tensor(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    tokens = tensor([i for ids, _, _ in drawn for i in ids])
    number = torch.arange(len(prompts), device=device)
    return Rollouts(
        prompt_tokens=tensor([i for prompt in prompts for i in prompt]),
        prompt_cu_seqlens=offsets(tensor([len(prompt) for prompt in prompts])),
        tokens=tokens,
        cu_seqlens=offsets(tensor([len(ids) for ids, _, _ in drawn])),
        logprob=tensor([x for _, logprobs, _ in drawn for x in logprobs], torch.float32),
        group_ids=number.repeat_interleave(group_size),
        truncated=tensor([cut for _, _, cut in drawn], torch.bool),
        versions=torch.full_like(tokens, version),
        prompt_ids=number,
    )


def check_weights(
    engine: str,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    ties: Set[str] = frozenset(),
) -> list[str]:
    """-> the names to send: those of `shapes`, no more and no less."""
    given = {name: tuple(w.shape) for name, w in weights.items() if name not in ties}
    if given != shapes:
        odd = dict(given.items() ^ shapes.items())
        name = next(iter(odd))
        raise ValueError(
            f"{engine}.update_weights: expected {name} of shape {shapes.get(name)}, got "
            f"{given.get(name)}; {len(odd)} names in all differ"
        )
    return list(given)


def _made(llm: Any) -> Any:
    """When it is dropped it frees what is its own, and leaves other engines the process group.

    vLLM's finaliser ends the group for all; its gc.freeze would keep what nothing holds any more.
    """
    client = llm.llm_engine.engine_core
    client._finalizer.detach()
    gc.unfreeze()
    weakref.finalize(client, client.engine_core.model_executor.shutdown)
    return llm


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint's tensors, by name."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def pack_tied_head(model: torch.nn.Module) -> None:
    """vLLM 0.32 multiplies by a packed copy of a head that is tied, and its reload forgets it."""
    if model.config.tie_word_embeddings:
        for module in model.modules():
            if hasattr(module, "cpu_linear") and hasattr(module, "num_embeddings"):
                module.quant_method.process_weights_after_loading(module)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What vLLM sets for the whole process stays as it was: random states, set_num_threads."""
    numbers, python = np.random.get_state(), random.getstate()
    set_num_threads = torch.set_num_threads  # replaced by one that does nothing
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numbers)
            random.setstate(python)
            torch.set_num_threads = set_num_threads
