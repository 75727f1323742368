"""Training through the tree: loss and every gradient are those of the unshared copies."""

import math
from functools import partial

import pytest
import torch
from conftest import arguments, metrics
from kv.test_pack import grown, positions_of
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rlkern
from rlkern import kv
from rlkern.kv import hf
from rlkern.rollout import Rollouts
from rlkern.train import batch as batches
from rlkern.train import cli
from rlkern.train.loop import minibatches

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
OBJECTIVES = {
    "dapo": rlkern.PolicyObjective.preset("dapo"),
    "grpo": rlkern.PolicyObjective.preset("grpo"),
    "gspo": rlkern.PolicyObjective.preset("gspo"),
}


def model_of(family, dtype):
    torch.manual_seed(1)
    kinds = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config, kind = kinds[family]
    model = kind(config(**SIZES)).to(dtype)
    # weights that make the softmaxes and the ratios matter
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=0.05)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers' own compute in float32
            module.forward = partial(norm, module)
    hf.install(model)
    return model.train()


def norm(module, x):
    return torch.nn.functional.rms_norm(x, module.weight.shape, module.weight, 1e-6)


def rollouts_of(prompts, lengths):
    """Packed completions to prompts of these lengths."""
    count = len(prompts) * len(lengths[0])
    sizes = torch.tensor([n for group in lengths for n in group])
    total = int(sizes.sum())
    return Rollouts(
        prompt_tokens=torch.randint(1000, (sum(prompts),)),
        prompt_cu_seqlens=torch.tensor([0, *prompts]).cumsum(0),
        tokens=torch.randint(1000, (total,)),
        cu_seqlens=torch.nn.functional.pad(sizes.cumsum(0), (1, 0)),
        logprob=-torch.rand(total),
        group_ids=torch.arange(len(prompts)).repeat_interleave(len(lengths[0])),
        truncated=torch.zeros(count, dtype=torch.bool),
    )


def loss_and_gradients(model, batch, old, advantages, objective):
    model.zero_grad()
    out = batches.response_logprobs(model, batch, temperature=0.8)
    loss = rlkern.policy_loss(
        out.logprob,
        out.logprob.detach() + old.to(out.logprob),
        advantages.to(out.logprob),
        cu_seqlens=batch.cu_seqlens,
        objective=objective,
    ).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_same(model, shared, unshared, objective, tolerance):
    sequences = len(shared.cu_seqlens) - 1
    old = 0.4 * torch.randn(int(shared.cu_seqlens[-1]))
    advantages = torch.randn(sequences)
    got = loss_and_gradients(model, shared, old, advantages, objective)
    got = (got[0], {n: g.clone() for n, g in got[1].items()})
    want = loss_and_gradients(model, unshared, old, advantages, objective)
    assert abs(got[0] - want[0]) <= tolerance * max(1e-3, abs(want[0]))
    errors = {n: float((got[1][n] - g).norm()) for n, g in want[1].items()}
    norms = {n: float(g.norm()) for n, g in want[1].items()}
    assert math.hypot(*errors.values()) <= tolerance * math.hypot(*norms.values())
    for name, error in errors.items():  # of which some are sums that cancel
        assert error <= 3 * tolerance * norms[name], f"{name}: {error / norms[name]:.2e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_group_is_its_copies(family, name, dtype, tolerance):
    model = model_of(family, dtype)
    rollouts = rollouts_of([17, 5], [[9, 1, 30, 4], [3, 12, 8, 8]])
    rows = [2, 0, 1, 3, 6, 5, 4, 7]
    prompts, responses = rollouts.prompts(), rollouts.responses()
    unshared = batches.collate([prompts[i] for i in rows], [responses[i] for i in rows])
    shared = batches.collate_shared(rollouts, rows)
    assert shared.inputs["input_ids"].numel() == 22 + 75
    assert_same(model, shared, unshared, OBJECTIVES[name], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_tree_is_its_copies(family, dtype, tolerance):
    """Response tokens are shared too."""
    model = model_of(family, dtype)
    cache, groups, lengths = grown(8)
    exports = [cache.export_tree(g) for g in range(len(groups))]
    pack = kv.tree_pack(exports, lengths)
    assert torch.equal(pack.positions, torch.cat([positions_of(e) for e in exports]))
    keep = [b for e in exports for b in e.branches.tolist()]
    prompts, responses = [], []
    for group, branches in enumerate(e.branches.tolist() for e in exports):
        for b in branches:
            tokens = cache.tokens(b).long()
            prompts.append(tokens[: lengths[group]])
            responses.append(tokens[lengths[group] :])
    assert len(keep) == len(pack.path_cu_seqlens) - 1
    unshared = batches.collate(prompts, responses)
    assert_same(model, batches.along_tree(pack), unshared, OBJECTIVES["dapo"], tolerance)


def test_checkpointed_layers_find_the_tree_again():
    model = model_of("qwen3", torch.float64)
    rollouts = rollouts_of([9], [[5, 7]])
    shared = batches.collate_shared(rollouts, [0, 1])
    old, advantages = torch.randn(12), torch.randn(2)
    plain = loss_and_gradients(model, shared, old, advantages, OBJECTIVES["grpo"])[1]
    plain = {n: g.clone() for n, g in plain.items()}
    model.gradient_checkpointing_enable()
    for name, grad in loss_and_gradients(model, shared, old, advantages, OBJECTIVES["grpo"])[
        1
    ].items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-12, atol=1e-12)


def test_a_model_without_a_tree_attends_as_before():
    model = model_of("qwen3", torch.float32).eval()
    ids = torch.randint(1000, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model(ids, attention_mask=mask).logits)


def test_what_the_tree_s_attention_refuses():
    model = model_of("llama", torch.float32)
    how = hf.attending(hf.along_tree(None))
    with pytest.raises(ValueError, match="rlkern: expected packed tokens as one row, got 2 rows"):
        model(torch.zeros(2, 3, dtype=torch.int64), **how)


def test_minibatches_are_whole_groups():
    rollouts = rollouts_of([1, 2, 3, 4], [[1, 1], [2, 2], [1, 3], [1, 1]])
    shuffle = torch.Generator().manual_seed(0)
    parts = minibatches(rollouts, 2, True, shuffle)
    assert sorted(i for part in parts for i in part) == list(range(8))
    assert all(part[i] + 1 == part[i + 1] for part in parts for i in (0, 2))
    assert [len(part) for part in parts] == [4, 4]


def test_a_run_shares_its_prompts(tmp_path):
    """The first step has the same loss and gradient as without, from the same rollouts."""
    runs = {}
    for share in ("false", "true"):
        folder = tmp_path / share
        changes = {"optim__share_prefix": share, "optim__updates": 1, "run__steps": 2}
        assert cli.main(arguments(folder, **changes)) == 0
        runs[share] = [r for r in metrics(folder) if r["phase"] == "rl"]
    for key in ("loss", "grad_norm", "entropy", "completion/tokens"):
        assert runs["true"][0][key] == pytest.approx(runs["false"][0][key], rel=1e-4, abs=1e-7)
    assert runs["true"][0]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__attention": "eager"},
            "model.attention = eager goes neither with optim.share_pre",
        ),
        (
            {"optim__updates": 5},
            "optim.share_prefix does not go with optim.updates = 5: minibatches are whole groups, "
            "and there are 4",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, capsys, changes, message):
    assert cli.main(arguments(tmp_path, optim__share_prefix="true", **changes)) != 0
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
