"""The run: a supervised warm-up on the form of answers, then GRPO. Read `fit`, then `rl_step`.

S sequences of a step, T their response tokens. Every random stream is derived from
(seed, purpose, step), so a step depends on nothing but the state that a checkpoint holds.
"""

import copy
import hashlib
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import rlkern
from rlkern import _ranks as ranks
from rlkern.rollout import Environment, Rollouts, most_contrastive, turn_rows
from rlkern.rollout.environment import replies_in
from rlkern.rollout.strategies import Strategy
from rlkern.rollout.trees import widest
from rlkern.rollout.weights import dense_weights
from rlkern.train import EngineHang, TrainError, diagnose
from rlkern.train import checkpoint as ckpt
from rlkern.train.batch import TokenBatch, collate, collate_shared, response_logprobs
from rlkern.train.config import Config
from rlkern.train.data import batch_at, load_data
from rlkern.train.log import RunLog
from rlkern.train.model import add_adapters, encode_prompt, end_tokens, load_model
from rlkern.train.precision import RolloutPolicy, mismatch, staleness
from rlkern.train.rewards import RewardError, judge, load_reward, score
from rlkern.train.tasks import Example

# what sampling gives: rollouts, the example of each of their prompts, and what it took
Drawn = tuple[Rollouts, list[Example], dict[str, float]]


class Trainer:
    """Everything that a run holds; with `checkpoint` it goes on from there."""

    def __init__(self, cfg: Config, run_dir: Path, checkpoint: Path | None = None) -> None:
        self.cfg, self.run_dir = cfg, run_dir
        state = ckpt.read_state(checkpoint) if checkpoint else {"step": 0, "cursor": 0}
        transformers.set_seed(cfg.run.seed)  # for rewards and models that draw
        self.step, self.cursor = state["step"], state["cursor"]  # cursor: questions used by RL
        self.reward = load_reward(cfg.reward, cfg.reward_timeout)
        self.train_set, heldout = load_data(cfg)
        self.heldout = heldout[: cfg.eval.max_prompts]
        cfg.check_processes(ranks.size(), len(self.heldout))
        # adapters stand beside the weights that the run began with
        found = checkpoint / "model" if checkpoint and not cfg.lora.rank else None
        self.model, self.tokenizer = load_model(cfg, found)
        # what samples and is saved: the model, or where that is cut or has adapters a whole copy
        self.policy, self.adapters = self.model, None
        if cfg.lora.rank or ranks.size() > 1:
            self.policy = copy.deepcopy(self.model).requires_grad_(False).eval()
        if cfg.lora.rank:
            saved = checkpoint and checkpoint / ckpt.ADAPTER
            self.adapters = add_adapters(self.model, cfg, saved)
        self.model.train()
        if cfg.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.device = self.model.device
        self.end_tokens = end_tokens(self.model, self.tokenizer)
        self.sampler = RolloutPolicy(cfg, self.policy, self.end_tokens)
        ranks.shard(self.model)
        self.gather()
        self.objective, self.reference = cfg.objective(), None
        self.strategy = cfg.rollout.build_strategy(self.reward_of)
        self.asked: dict[int, Example] = {}  # by Rollouts.prompt_ids
        baseline = state.get("baseline", [0.0] * cfg.algorithm.agents)  # of each role
        self.baseline = torch.tensor(baseline, dtype=torch.float64)
        self.worker = ThreadPoolExecutor(1)  # of rollouts that run ahead or have a time limit
        self.reader = copy.deepcopy(self.tokenizer)  # the worker's: fast tokenizers are not shared
        readers = self.tokenizer, self.reader
        self.environments = [cfg.rollout.build_environment(reader) for reader in readers]
        # by step: the cursor before its questions, and its rollouts
        self.ahead: dict[int, tuple[int, Callable[[], Drawn] | Future[Drawn] | Drawn]] = {}
        for step, told in state.get("ahead", {}).items():
            rollouts, _ = Rollouts.load(ckpt.rollouts_of(checkpoint, int(step)), self.device)
            at, examples = self.questions(len(rollouts.prompt_cu_seqlens) - 1)
            self.ahead[int(step)] = at, (rollouts, examples, told)
        self.optimizer = self.new_optimizer()
        if checkpoint:
            ckpt.restore_trainer(checkpoint, self.optimizer)
        start = self.step if checkpoint else -1
        self.log = RunLog(run_dir, cfg, start) if ranks.rank() == 0 else Silence()
        before, now = state.get("config"), cfg.model_dump(mode="json")
        if before and (changed := [k for k in now if now[k] != before.get(k) and k != "run"]):
            self.log.say(f"NOTE resumed with other settings in: {', '.join(changed)}")
        self.told: set[str] = set()
        self.stop = False  # set by a signal: finish this step, save, leave

    def fit(self) -> bool:
        """Runs to the end (-> True), or until `stop` is set (-> False)."""
        cfg = self.cfg
        if self.step == cfg.warmup.steps == 0:
            self.evaluate()
        while self.step < cfg.total_steps:
            if self.step == cfg.warmup.steps:
                self.optimizer = self.new_optimizer()
            start = time.perf_counter()
            self.step += 1
            rl_steps = self.step - cfg.warmup.steps
            phase, metrics = (
                ("rl", self.rl_step()) if rl_steps > 0 else ("warmup", self.warmup_step())
            )
            self.gather()
            metrics["time/step"] = time.perf_counter() - start
            if phase == "rl":
                metrics["time/tokens_per_second"] = (
                    metrics["completion/tokens"] / metrics["time/step"]
                )
            self.log.metrics({"step": self.step, "phase": phase, **metrics})
            self.advise(phase, metrics)
            if phase == "rl" and (told := diagnose.diverged(metrics, cfg)):
                self.leave(told)
            last = self.step == cfg.total_steps
            if rl_steps == 0 or last or (rl_steps > 0 and self.due(cfg.eval.every, rl_steps)):
                self.evaluate()
            self.stop = any(ranks.everyone(self.stop))
            if self.stop or last or self.due(cfg.checkpoint.every, self.step):
                self.save()
            if self.stop and not last:
                return False
        return True

    def warmup_step(self) -> dict[str, float]:
        """Next-token training on demonstrations: the form of an answer, not the answer."""
        cfg, seed = self.cfg.warmup, self.cfg.run.seed
        rng = random.Random(f"warmup/{seed}/{self.step}")
        examples = batch_at(self.train_set, self.step * cfg.batch_size, cfg.batch_size, seed)
        prompts, responses = self.encoded(examples), []
        for example in examples:
            shown = self.tokenizer.encode(example.demonstrate(rng), add_special_tokens=False)
            responses.append([*shown, self.end_tokens[0]])
        trained = [[True] * len(response) for response in responses]
        if environment := self.environments[0]:
            environment.tasks = dict(enumerate(examples))
            size = self.model.config.get_text_config().vocab_size
            for i, pair in enumerate(zip(prompts, responses)):
                said = replies_in(environment, i, *pair, self.end_tokens, size)
                trained[i] = [not reply for reply in said]
        own, count = ranks.part(len(examples)), sum(map(sum, trained))
        batch = collate(self.tensors(prompts[own]), self.tensors(responses[own]))
        mask = torch.tensor([token for one in trained[own] for token in one], device=self.device)
        batch = batch if mask.all() else batch.only(mask)
        logprob = ranks.call(response_logprobs, self.model, batch).logprob
        loss = -logprob.sum() / count
        loss.backward()
        lr = cfg.lr * schedule("linear", self.step, cfg.steps, cfg.steps // 10)
        norm = self.optimizer_step(lr, {"the log-probs": logprob})
        loss = ranks.total(loss.detach())
        metrics = {"loss": loss.item(), "lr": lr, "grad_norm": norm}
        if all(example.nats is not None for example in examples):
            metrics["loss_floor"] = sum(e.nats for e in examples) / count
        return metrics

    def rl_step(self) -> dict[str, float]:
        """Rollouts and rewards, advantages, old log-probs, minibatch updates."""
        cfg = self.cfg
        start = time.perf_counter()
        rollouts, rewards, told = self.seen = self.collect()
        sampled = time.perf_counter()
        advantages = self.advantages(rollouts, rewards)
        correct = rewards >= cfg.algorithm.nll_reward
        if cfg.run.null:  # the same numbers, given to other answers: nothing can be learnt
            advantages, correct = (
                x[torch.randperm(len(x), generator=self.generator("null")).to(self.device)]
                for x in (advantages, correct)
            )
        old_logprob, entropy = self.logprobs(self.model, rollouts)
        ref_logprob = None
        if self.objective.needs_reference:
            self.reference = self.reference or self.load_reference()
            with self.adapters.disable_adapter() if self.adapters else nullcontext():
                ref_logprob = self.logprobs(self.reference, rollouts)[0]
        scored = time.perf_counter()
        updates = self.update(rollouts, advantages, correct, old_logprob, ref_logprob)
        lengths = rollouts.lengths.float()
        return {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "reward/min": rewards.min().item(),
            "reward/max": rewards.max().item(),
            "signal/groups": signal(rewards, rollouts.group_ids),
            "completion/tokens": len(rollouts.tokens),
            "completion/length": lengths.mean().item(),
            "completion/length_max": lengths.max().item(),
            "completion/truncated": rollouts.truncated.float().mean().item(),
            "entropy": entropy.mean().item(),
            **staleness(rollouts, self.step),
            **mismatch(old_logprob, rollouts.trained(rollouts.logprob)),
            **told,
            **updates,
            "time/rollout": sampled - start,
            "time/old_logprob": scored - sampled,
            "time/update": time.perf_counter() - scored,
        }

    def advantages(self, rollouts: Rollouts, rewards: Tensor) -> Tensor:
        """[S], or with credit = turn one of each trained token."""
        cfg, groups, of_token = self.cfg.algorithm, rollouts.group_ids, None
        how = {"kind": cfg.advantage}
        if cfg.credit == "turn":
            rewards, groups, agents, of_token = turn_rows(rollouts, rewards)
            how |= {"agent_ids": agents, "num_agents": cfg.agents}
        if cfg.advantage == "spiral":  # over all questions
            groups, baseline = torch.zeros_like(groups), self.baseline.to(self.device)
            how |= {"num_groups": 1, "state": baseline}
            advantages, baseline = rlkern.group_advantage(rewards, groups, **how)
            self.baseline = baseline.cpu()
        else:
            advantages = rlkern.group_advantage(rewards, groups, **how)
        return advantages if of_token is None else advantages[of_token]

    def collect(self) -> tuple[Rollouts, Tensor, dict[str, float]]:
        """-> rollouts and float32 rewards [S], sampled or replayed; and what sampling took."""
        cfg = self.cfg.rollout
        name = f"step_{self.step:06d}.safetensors"
        if cfg.replay:
            self.questions(cfg.prompts)
            try:
                rollouts, extra = Rollouts.load(Path(cfg.replay) / name, self.device)
                rewards = extra["rewards"].view(len(rollouts.group_ids))
            except (ValueError, KeyError, RuntimeError) as error:
                raise TrainError(f"rollout.replay, step {self.step}: {error}") from error
            found = len(rollouts.prompt_cu_seqlens) - 1
            if self.strategy.num_groups is None and found != cfg.prompts:
                what = f"{name} holds {found} prompts where rollout.prompts = {cfg.prompts}"
                raise TrainError(f"rollout.replay, step {self.step}: {what}")
            return rollouts, rewards, {}
        self.ask()
        rollouts, examples, told = self.drawn(self.step)
        del self.ahead[self.step]
        samples = self.judged(rollouts, examples, self.cfg.reward_policy)
        totals = [sample["reward"] + sum(sample.get("turns", ())) for sample in samples]
        rewards = torch.tensor(totals, device=self.device)
        if rewards.isnan().any():  # reward_policy = skip
            kept = (~rewards.isnan()).nonzero()[:, 0]
            if not len(kept):
                raise TrainError(f"step {self.step}: not one completion got a reward")
            rollouts, rewards = rollouts.select(kept), rewards[kept]
            samples = [samples[i] for i in kept.tolist()]
        if cfg.explore > 1:
            kept = most_contrastive(rewards.view(cfg.prompts, -1), cfg.group_size)
            rollouts, rewards = rollouts.select(kept), rewards[kept]
            samples = [samples[i] for i in kept.tolist()]
        self.log.samples(self.step, samples)
        self.log.tree(self.step, widest(rollouts, rewards))
        if cfg.save and ranks.rank() == 0:
            rollouts.save(self.run_dir / "rollouts" / name, rewards=rewards)
        return rollouts, rewards, told

    def questions(self, count: int) -> tuple[int, list[Example]]:
        """-> the cursor as it was, and the next of them."""
        at, self.cursor = self.cursor, self.cursor + count
        return at, batch_at(self.train_set, at, count, self.cfg.run.seed)

    def ask(self) -> None:
        """Hands in this step's questions, and with the same weights those of steps ahead.

        Step s samples with the weights from before step s - max_staleness, however fast the worker
        is: that, and not the clock, makes a run what it is.
        """
        cfg, weights = self.cfg.rollout, dict(self.policy.named_parameters())
        last = min(self.step + cfg.max_staleness, self.cfg.total_steps)
        todo = [step for step in range(self.step, last + 1) if step not in self.ahead]
        if cfg.max_staleness and todo:
            weights = {name: p.detach().clone() for name, p in weights.items()}
        for step in todo:
            # prompts that are half done count among those of a step
            at, examples = self.questions(
                max(0, cfg.prompts - len(self.sampler.engine.kept.groups))
            )
            prompts = self.encoded(examples)
            job = partial(self.draw, step, self.step, examples, prompts, weights)
            if cfg.timeout or cfg.max_staleness:
                job = self.worker.submit(job)
            self.ahead[step] = at, job

    def drawn(self, step: int) -> Drawn:
        """Rollouts of all processes; this one waits for its own."""
        at, job = self.ahead[step]
        if not isinstance(job, tuple):
            limit = self.cfg.rollout.timeout
            try:
                job = job.result(limit or None) if isinstance(job, Future) else job()
            except TimeoutError as error:
                what = f"no rollouts within rollout.timeout = {limit:g} s"
                raise EngineHang(f"step {step}: {what}") from error
            rollouts, examples, told = job
            job = self.together(rollouts), examples, averaged(ranks.everyone(told))
            self.ahead[step] = at, job
        return job

    def together(self, rollouts: Rollouts) -> Rollouts:
        """Those of every process, in the order of the questions."""
        if ranks.size() == 1:
            return rollouts
        return Rollouts.joined(ranks.everyone(rollouts.to("cpu"))).to(self.device)

    @torch.no_grad()
    def logprobs(self, model: Any, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """-> log-prob and entropy of all trained tokens, in batches of the size of the update's."""
        lengths = rollouts.trained_lengths.tolist()
        rows = list(range(len(lengths)))
        places = torch.arange(sum(lengths), device=self.device).split(lengths)
        both = torch.zeros(2, sum(lengths), device=self.device)
        for own in self.micro_batches(rollouts, rows, self.cfg.optim.updates):
            out = self.score(model, self.batch(rollouts, own or rows[:1]))
            if own:
                both[:, torch.cat([places[i] for i in own])] = torch.stack(out[:2])
        logprob, entropy = ranks.total(both)
        return logprob, entropy

    def micro_batches(self, rollouts: Rollouts, rows: list[int], parts: int = 1) -> list[list[int]]:
        """These sequences, in so many parts or more -> those of each forward of this process.

        Each process makes as many: the others need its share of every layer. Some may be empty.
        """
        cfg, n = self.cfg.optim, ranks.size()
        if cfg.micro_tokens:
            batches = rollouts.token_batches(rows, cfg.micro_tokens, n, cfg.share_prefix)
        else:
            size = cfg.micro_batch or -(-len(rows) // (parts * n))
            batches = [rows[i : i + size] for i in range(0, len(rows), size)]
            batches += [[]] * (-len(batches) % n)
        return batches[ranks.rank() :: n]

    def batch(self, rollouts: Rollouts, rows: list[int]) -> TokenBatch:
        """These sequences as the model reads them."""
        if self.cfg.trains_on_trees:
            how = self.cfg.rollout.chunk, self.cfg.precision == "fp8-unified"
            batch = collate_shared(rollouts, rows, *how)
        else:
            prompts, responses = rollouts.prompts(), rollouts.responses()
            batch = collate([prompts[i] for i in rows], [responses[i] for i in rows])
        if rollouts.mask is None or bool(rollouts.mask.all()):
            return batch
        masks = rollouts.mask.split(rollouts.lengths.tolist())
        return batch.only(torch.cat([masks[i] for i in rows]))

    def score(self, model: Any, batch: TokenBatch) -> rlkern.LogprobOutput:
        temperature, unified = self.cfg.rollout.temperature, self.cfg.precision == "fp8-unified"
        if type(self.strategy).temperature is not Strategy.temperature:
            at = self.strategy.temperature(batch.place.cpu().numpy(), temperature)
            temperature = torch.from_numpy(at).to(batch.place.device, torch.float32)
        how = {"temperature": temperature, "batch_invariant": unified}
        return ranks.call(response_logprobs, model, batch, **how)

    def reward_of(self, number: int, tokens: Tensor) -> float:
        """Of a response to a prompt that this step has asked, for strategies that look at it."""
        example = self.asked[number]
        text = self.reader.decode(tokens.tolist(), skip_special_tokens=True)
        try:
            return score(self.reward, example.prompt, text, example.answer)
        except RewardError:  # `judge` tells it
            if self.cfg.reward_policy == "fail":
                raise
            return 0.0

    def update(
        self,
        rollouts: Rollouts,
        advantages: Tensor,
        correct: Tensor,
        old_logprob: Tensor,
        ref_logprob: Tensor | None,
    ) -> dict[str, float]:
        """The optimiser steps of one rollout batch -> loss, grad_norm, lr and policy/*."""
        cfg, objective = self.cfg.optim, self.objective
        lengths = rollouts.trained_lengths.tolist()
        old = old_logprob.split(lengths)
        ref = None if ref_logprob is None else ref_logprob.split(lengths)
        sampled = rollouts.trained(rollouts.logprob).split(lengths)
        # A sequence of advantage 0 skips the forward where nothing else moves it, and still counts
        # in the denominator.
        skips = objective.idle_without_advantage
        of_tokens = self.cfg.algorithm.credit == "turn"
        shares = advantages.split(lengths if of_tokens else 1)
        busy = [not skips or bool(share.any()) for share in shares]
        done, total = self.step - self.cfg.warmup.steps, self.cfg.run.steps
        lr = cfg.lr * schedule(cfg.schedule, done, total, cfg.warmup_steps)
        losses, norms, seen = [], [], defaultdict(list)
        weights, idle = [rollouts.logprob[:0].cpu()], 0
        shuffle = self.generator("minibatch")
        for _ in range(cfg.epochs):
            for chunk in minibatches(rollouts, cfg.updates, cfg.share_prefix, shuffle):
                picked, count = [i for i in chunk if busy[i]], sum(lengths[i] for i in chunk)
                idle += count - sum(lengths[i] for i in picked)
                if not picked:
                    continue
                counts = {"token-mean": count, "token-sum": None}
                loss = torch.zeros((), dtype=torch.float64, device=self.device)
                for own in self.micro_batches(rollouts, picked):
                    micro = own or picked[:1]
                    batch = self.batch(rollouts, micro)
                    out = self.score(self.model, batch)
                    result = rlkern.policy_loss(
                        out.logprob,
                        torch.cat([old[i] for i in micro]),
                        torch.cat([shares[i] for i in micro]),
                        cu_seqlens=batch.cu_seqlens,
                        objective=objective,
                        ref_logprob=None if ref is None else torch.cat([ref[i] for i in micro]),
                        rollout_logprob=torch.cat([sampled[i] for i in micro]),
                        entropy=out.entropy if objective.needs_entropy else None,
                        nll_weight=correct[micro],
                        normalizer=counts.get(objective.loss_agg_mode, len(chunk)),
                    )
                    out.logprob.retain_grad()
                    (result.loss if own else 0 * result.loss).backward()
                    if own:
                        weights.append(out.logprob.grad.cpu() * -count)
                        loss += result.loss.detach()
                        for name, value in result.metrics.items():
                            seen[name].append((value.item(), len(out.logprob)))
                loss = ranks.total(loss)
                watched = {"the sampler's log-probs": rollouts.logprob, "old_logprob": old_logprob}
                watched |= {"the advantages": advantages, "the log-probs": out.logprob}
                norms.append(self.optimizer_step(lr, watched | {"the loss": loss}))
                losses.append(loss.item())
        self.log.gradients(self.step, torch.cat(ranks.everyone(torch.cat(weights))), idle)
        metrics = {"loss": mean(losses), "grad_norm": mean(norms), "lr": lr}
        parts = ranks.everyone(seen)
        for name in dict.fromkeys(name for part in parts for name in part):
            metrics[f"policy/{name}"] = folded(name, [v for part in parts for v in part[name]])
        return metrics

    def optimizer_step(self, lr: float, watched: dict[str, Tensor]) -> float:
        """Clips and applies the gradient -> its norm. NaN or Inf stops before a weight moves."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.grad is not None]
        clip = self.cfg.optim.grad_clip
        # Clipping by a NaN norm would make every gradient NaN: look at the norm first.
        norm = ranks.whole(torch.nn.utils.get_total_norm([p.grad for _, p in named]))
        broken = next(filter(None, ranks.everyone(diagnose.nonfinite(watched))), "")
        if not torch.isfinite(norm) or broken:
            weights = ((f"the weight {n}", ranks.whole(p)) for n, p in named)
            gradients = ((f"the gradient of {n}", ranks.whole(p.grad)) for n, p in named)
            what = first_nonfinite(weights) or broken or first_nonfinite(gradients)
            last = ckpt.latest_checkpoint(self.run_dir / "checkpoints")
            raise TrainError(
                f"step {self.step}: {what or 'the gradient norm overflowed'}. The optimiser step "
                "was not taken. Try a lower optim.lr, warmup.lr or optim.grad_clip, or model.dtype "
                f"= 'float32'.\n  last good checkpoint: {last or 'none yet'}"
            )
        torch.nn.utils.clip_grads_with_norm_([p for _, p in named], clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    @torch.no_grad()
    def gather(self) -> None:
        """Brings `policy` to the weights of the model, where it is a copy."""
        if self.policy is not self.model:
            for name, weight in dense_weights(self.model):
                self.policy.get_parameter(name).copy_(weight)

    def draw(
        self,
        step: int,
        version: int,
        examples: list[Example],
        prompts: list[list[int]],
        weights: dict[str, Tensor],
    ) -> Drawn:
        """Rollouts for a step by the policy of these weights; it may run in the worker."""
        cfg, strategy = self.cfg.rollout, self.strategy
        synced = self.sampler.refresh(version, weights)
        kept = self.sampler.engine.kept.count if strategy.num_groups is not None else 0
        strategy.training_step = step
        self.asked |= dict(enumerate(examples, kept))
        how = {"group_size": cfg.group_size * cfg.explore, "strategy": strategy, "step": step}
        how |= answering(self.environments[1], self.asked)
        try:
            rollouts = self.sample(self.sampler.engine, prompts, "rollout", **how)
        except Exception as error:
            if isinstance(error, TrainError) or diagnose.out_of_memory(error, self.cfg):
                raise
            what = f"step {step}: the engine failed with {type(error).__name__}: {error}"
            self.log.say(f"NOTE {what}. It begins this step again, with the same random numbers")
            self.sampler.restart(version, weights)
            try:
                rollouts = self.sample(self.sampler.engine, prompts, "rollout", **how)
            except Exception as again:
                raise TrainError(f"{what}, and again after a restart: {again}") from again
        if strategy.num_groups is not None:  # and so some of earlier steps
            examples = [self.asked.pop(number) for number in rollouts.prompt_ids.tolist()]
        return rollouts, examples, synced | self.sampler.engine.stats

    def sample(
        self, engine: Any, prompts: list[list[int]], purpose: str, step: int, **how: Any
    ) -> Rollouts:
        """This process's part of the prompts."""
        if ranks.size() > 1:
            own = ranks.part(len(prompts))
            prompts, how = prompts[own], how | {"first": own.start}
        try:
            return engine.generate(
                prompts,
                max_new_tokens=self.cfg.rollout.max_new_tokens,
                temperature=self.cfg.rollout.temperature,
                generator=self.generator(purpose, self.device, step),
                **how,
            )
        except ValueError as error:  # a prompt that is empty, or too long for the model
            raise TrainError(f"step {step}: {error}") from error

    def judged(
        self, rollouts: Rollouts, examples: list[Example], policy: str
    ) -> list[dict[str, Any]]:
        """{prompt, completion, answer, reward} of each sequence."""
        count = len(rollouts.group_ids)
        if ranks.size() > 1:
            rollouts = rollouts.select(torch.arange(count, device=self.device)[ranks.part(count)])
        parts = ranks.everyone(judge(rollouts, examples, self.tokenizer, self.reward, policy))
        samples, errors = ([x for part in parts for x in part[i]] for i in (0, 1))
        if errors:
            count = f"{len(errors)} of {len(samples)} completions got no reward"
            self.log.say(f"NOTE step {self.step}: {count}: reward_policy = {policy}. {errors[0]}")
        return samples

    def answers(self, group_size: int, greedy: bool = False) -> list[float]:
        """Rewards of held-out questions: of the trainer's policy, which is what a run leaves."""
        how = {"group_size": group_size, "greedy": greedy, "step": self.step}
        how |= answering(self.environments[0], dict(enumerate(self.heldout)))
        rollouts = self.sample(self.sampler.of_trainer, self.encoded(self.heldout), "eval", **how)
        rollouts = self.together(rollouts)
        policy = "fail" if self.cfg.reward_policy == "fail" else "zero"
        return [s["reward"] for s in self.judged(rollouts, self.heldout, policy)]

    def evaluate(self) -> None:
        """Held-out accuracy; a completion is right at a reward of 1 or more."""
        start, n = time.perf_counter(), self.cfg.eval.samples
        greedy = self.answers(1, greedy=True)
        scores = {"eval/greedy": mean([r >= 1 for r in greedy]), "eval/reward": mean(greedy)}
        if self.cfg.eval.k:
            right = [reward >= 1 for reward in self.answers(n)]
            counts = [sum(right[i : i + n]) for i in range(0, len(right), n)]
            for k in self.cfg.eval.k:
                scores[f"eval/pass@{k}"] = mean([pass_at_k(n, c, k) for c in counts])
        scores["time/eval"] = time.perf_counter() - start
        self.log.metrics({"step": self.step, "phase": "eval", **scores})

    def advise(self, phase: str, metrics: dict[str, float]) -> None:
        """Says what stands in the way of learning, once until it goes away."""
        found = {}
        if phase == "rl":
            found = diagnose.diagnose_step(metrics, self.cfg)
        elif self.step == self.cfg.warmup.steps:
            found = diagnose.diagnose_warmup(metrics["loss"], metrics.get("loss_floor"), self.cfg)
        for name in found.keys() - self.told:
            self.log.say(f"NOTE step {self.step}: {found[name]}")
        self.told = set(found)

    def leave(self, told: str) -> None:
        """Saves a run that has diverged, for a look at it, beside its checkpoints."""
        folder, last = self.run_dir / "diverged", self.run_dir / "checkpoints"
        if ranks.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            rollouts, rewards, _ = self.seen
            rollouts.save(folder / "rollouts.safetensors", rewards=rewards)
        self.save("diverged")
        raise TrainError(
            f"step {self.step}: {told}.\n  this state and its rollouts: {folder}\n"
            f"  --resume goes on from: {ckpt.latest_checkpoint(last) or 'the beginning'}"
        )

    def save(self, where: str = "checkpoints") -> None:
        """With the rollouts of steps ahead, which weights drew that are gone."""
        drawn = {step: self.drawn(step) for step in self.ahead}
        cursor = next((at for at, _ in self.ahead.values()), self.cursor)
        state = {"cursor": cursor, "config": self.cfg.model_dump()}
        state["baseline"] = self.baseline.tolist()
        state["ahead"] = {step: told for step, (_, _, told) in drawn.items()}
        ahead = {step: rollouts for step, (rollouts, _, _) in drawn.items()}
        ckpt.save_checkpoint(self.run_dir / where, self, state, ahead)
        ranks.everyone(None)  # nobody leaves, or goes on, before it is written

    def due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def encoded(self, examples: list[Example]) -> list[list[int]]:
        how = self.cfg.data.chat_template
        return [encode_prompt(self.tokenizer, example.prompt, how) for example in examples]

    def tensors(self, lists: list[list[int]]) -> list[Tensor]:
        return [torch.tensor(ids, device=self.device) for ids in lists]

    def generator(
        self, purpose: str, device: torch.device | str = "cpu", step: int | None = None
    ) -> torch.Generator:
        """A fresh random stream for this seed, purpose and step."""
        text = f"{self.cfg.run.seed}/{purpose}/{self.step if step is None else step}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        return torch.Generator(device=device).manual_seed(seed)

    def new_optimizer(self) -> torch.optim.Optimizer:
        cfg = self.cfg.optim
        trained = [p for p in self.model.parameters() if p.requires_grad]
        betas = cfg.beta1, cfg.beta2
        return torch.optim.AdamW(trained, betas=betas, weight_decay=cfg.weight_decay)

    def load_reference(self) -> Any:
        """The policy as RL began, frozen; kept in the run for a resume."""
        if self.adapters:  # without them
            return self.model
        folder, part = self.run_dir / "reference", self.run_dir / ".reference"
        if ranks.of_first(folder.is_dir):
            reference = load_model(self.cfg, folder)[0]
        else:
            reference = copy.deepcopy(self.policy)
            if ranks.rank() == 0:
                self.policy.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
                part.rename(folder)
        return ranks.shard(reference.requires_grad_(False).eval())


class Silence:
    """The log of a process that is not the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


def answering(environment: Environment | None, tasks: dict[int, Example]) -> dict[str, Any]:
    """What `generate` is told of an environment, which is told the questions."""
    if environment is None:
        return {}
    environment.tasks = tasks
    return {"environment": environment}


def minibatches(
    rollouts: Rollouts, updates: int, whole_groups: bool, shuffle: torch.Generator
) -> list[list[int]]:
    """The sequences of each update, in random order; whole groups where they share their prompt."""
    if not whole_groups:
        order = torch.randperm(len(rollouts.group_ids), generator=shuffle)
        return [chunk.tolist() for chunk in order.chunk(updates)]
    groups = rollouts.group_ids.unique().cpu()
    order = groups[torch.randperm(len(groups), generator=shuffle)]
    rows = {g: (rollouts.group_ids == g).nonzero()[:, 0].tolist() for g in groups.tolist()}
    return [[i for g in chunk.tolist() for i in rows[g]] for chunk in order.chunk(updates)]


def signal(rewards: Tensor, group_ids: Tensor) -> float:
    """The share of groups whose rewards differ."""
    groups = int(group_ids.max()) + 1
    top, low = (
        rewards.new_full((groups,), sign * -torch.inf).scatter_reduce(0, group_ids, rewards, how)
        for sign, how in ((1, "amax"), (-1, "amin"))
    )
    return (top > low).float().mean().item()


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    return next(filter(None, (diagnose.nonfinite({name: tensor}) for name, tensor in tensors)), "")


def folded(name: str, values: list[tuple[float, int]]) -> float:
    """Of a metric's (value, tokens) what its name says: the largest, smallest, sum or mean."""
    if "max" in name or "min" in name:
        return (max if "max" in name else min)(values)[0]
    if name.startswith("num_"):
        return sum(value for value, _ in values)
    return sum(value * n for value, n in values) / max(1, sum(n for _, n in values))


def averaged(told: list[dict[str, float]]) -> dict[str, float]:
    """What sampling took in each process; counts of tokens add up."""
    counts = ("rollout/computed", "rollout/used")
    return {k: sum(t[k] for t in told) / (1 if k in counts else len(told)) for k in told[0]}


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased chance that one of k draws without replacement is right: 1 - C(n-c, k) / C(n, k)."""
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def schedule(kind: str, step: int, total: int, warmup: int) -> float:
    """The factor on the learning rate of step 1..total: a linear rise, then `kind`."""
    if step <= warmup:
        return step / warmup
    rest = (total - step + 1) / (total - warmup)
    return {"constant": 1.0, "linear": rest, "cosine": 0.5 - 0.5 * math.cos(math.pi * rest)}[kind]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
