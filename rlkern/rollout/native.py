"""Continuous batching over the tree cache, in the trainer's own process.

A step feeds one packed row of tokens, prompts that have just been admitted beside the last token of
every branch, and samples from the logits of each branch's last token. Attention reads every cached
token once for all branches that share it. No weight copy, no server: the model's weights, quantised
or not, are the sampling weights.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlkern.kv import TreeKVCache, Work, hf
from rlkern.ops.tree_attention import TreePlan
from rlkern.rollout.decoder import Attend, Decoder
from rlkern.rollout.engine import Rollouts, check_prompts, check_sampling
from rlkern.rollout.environment import Environment
from rlkern.rollout.run import Kept, Run
from rlkern.rollout.strategies.base import Strategy


class NativeEngine:
    """Group and tree sampling from a Hugging Face causal LM.

    Args:
        model: of a family whose attention goes through transformers' attention interface, without
            sliding windows shorter than what is sampled. It may change between calls: see
            `bump_version`.
        eos_token_ids: a sequence ends with any of these.
        max_sequences: branches decoded at once; the others wait.
        max_cached_tokens: of the KV cache, over all branches. Default: what the call may need.
            Where a step finds too little room, the group that began last is put aside, and computed
            again later: with the same result.
        page_size: tokens of a page of the cache.
        chunk: tokens that attention reads at once, and shares or does not; see TreeKVCache. Results
            depend on it in their last bits.
        stale: what becomes of cached tokens of older weights, see TreeKVCache. It matters where a
            strategy keeps branches from one call to the next.
        share: False reads shared tokens once for each branch, with the same bits.
        direct: False goes through the model's own forward even where `Decoder` knows its layout.
        score: from the last hidden states [R, H], the chosen tokens [R] and the temperature to
            their log-probs [R], for those of a trainer to the bit; None: from the logits that were
            sampled from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int = 512,
        max_cached_tokens: int | None = None,
        page_size: int = 16,
        chunk: int | None = None,
        stale: str = "recompute",
        share: bool = True,
        direct: bool = True,
        score: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    ) -> None:
        if not len(eos_token_ids):
            raise ValueError("NativeEngine: expected at least one end token id, got none")
        if max_sequences < 1:
            raise ValueError(f"NativeEngine: expected max_sequences >= 1, got {max_sequences}")
        self.model = model
        self.eos = np.asarray(list(eos_token_ids))
        self.max_sequences = max_sequences
        self.max_cached_tokens = max_cached_tokens
        self.page_size, self.chunk, self.stale, self.share = page_size, chunk, stale, share
        self.direct, self.score = direct, score
        self.cache: TreeKVCache | None = None
        self.version = 0
        self.stats: dict[str, float] = {}  # of the last call, see Run.stats
        self.kept = Kept()

    def bump_version(self, version: int | None = None) -> None:
        """Says that the weights have changed; default: to the version after the present one."""
        self.version = self.version + 1 if version is None else version
        if self.cache is not None:
            self.cache.bump_version(self.version)

    @torch.no_grad()
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
        first: int = 0,
    ) -> Rollouts:
        """Samples `group_size` completions of every prompt, or what `strategy` makes of that.

        `greedy` takes the most likely token and draws nothing. The log-probs are those of the
        distribution that was sampled from: softmax(logits / temperature) in float32, over the
        tokens that top_k, top_p and min_p leave (see `rlkern.sample_tokens`). The same generator
        state gives the same bits; a draw depends on that state, on the prompt's number, on the
        sample's number within its group and on its position, not on max_sequences or on what is
        sampled beside it. `first` is the number of the first prompt: calls for parts of a list
        draw what one call for all of it draws.

        `environment` answers turns, see `rlkern.rollout.environment`; max_new_tokens counts its
        replies, too. A sequence that it does not end is truncated.

        Groups that a strategy with `num_groups` leaves unfinished go on in the next call, before
        its own prompts, of which there may be none; `Rollouts.prompt_ids` counts on from call to
        call as long as that happens.
        """
        if prompts or not self.kept.groups:
            check_prompts("NativeEngine", prompts)
        check_sampling("NativeEngine", group_size, max_new_tokens, temperature)
        config = self.model.config.get_text_config()
        need = max(map(len, prompts), default=0) + max_new_tokens
        need = max(need, self.kept.longest(max_new_tokens))
        limit = getattr(config, "max_position_embeddings", None)
        window, kinds = (getattr(config, name, None) for name in ("sliding_window", "layer_types"))
        if window is not None and (kinds is None or "sliding_attention" in kinds):
            limit = min(limit, window)
        if limit is not None and need > limit:
            raise ValueError(
                f"NativeEngine.generate: longest prompt + max_new_tokens = {need} tokens, "
                f"but the model has {limit} positions"
            )
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        strategy = strategy or Strategy()
        if environment is not None and not strategy.multi_turn:
            raise ValueError(
                f"NativeEngine.generate: {type(strategy).__name__} does not go with an environment"
            )
        strategy.begin(group_size)
        self._reserve(prompts, strategy, max_new_tokens)
        sampling = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "greedy": greedy}
        was_training, how = self.model.training, config._attn_implementation
        hf.register()
        self.model.eval()
        # set_attn_implementation would walk through all modules, twice a call
        config._attn_implementation = hf.NAME
        exact = self.score is not None
        self.layers = list(zip(self.cache.k.unbind(), self.cache.v.unbind(), strict=True))
        self.decoder = Decoder(self.model, need, direct=self.direct, exact=exact)
        run = Run(self, strategy, max_new_tokens, temperature, sampling, seed, environment)
        try:
            rollouts = run.all(prompts, first)
            self.stats = run.stats(rollouts)
            return rollouts
        finally:
            run.close()
            self.model.train(was_training)
            config._attn_implementation = how

    def _reserve(self, prompts: list[list[int]], strategy: Strategy, max_new_tokens: int) -> None:
        """A cache that is large enough for this call."""
        size, rows = self.page_size, strategy.rows(strategy.group_size)
        bounded = not (strategy.together or strategy.keeps_pages)
        lengths = sorted(map(len, prompts), reverse=True)
        at_once = -(-self.max_sequences // rows) + 1  # groups that are not done at the same time
        own = min(rows, self.max_sequences) if bounded else rows
        own *= -(-max_new_tokens // size) + 2
        pages = sum(-(-length // size) + own for length in lengths[:at_once])
        pages = min(pages, sum(-(-n // size) for n in lengths) + own * len(lengths))
        if self.max_cached_tokens is not None:
            pages = min(pages, max(1, self.max_cached_tokens // size))
        cache = self.cache
        if cache is not None and (cache.num_pages >= pages or len(cache.branches())):
            return
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        self.cache = TreeKVCache(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            num_pages=pages,
            page_size=size,
            dtype=self.model.dtype,
            device=self.model.device,
            stale=self.stale,
            chunk=self.chunk,
        )
        self.cache.bump_version(self.version)

    def forward(
        self, work: Work, plan: TreePlan, rows: Tensor | None, needs_hidden: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Feeds tokens along a plan of them -> logits of these rows, and their hidden states.

        rows: None for all.
        """
        attend = Attend(self.layers, work, plan)
        needs_hidden |= self.score is not None
        rows = None if rows is None else rows.to(self.model.device)
        return self.decoder(work, rows, attend, needs_hidden)
