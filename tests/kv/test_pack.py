"""tree_pack and group_pack spell the sequences; a loss through them is that of the copies."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkern
from rlkern import kv
from rlkern.kv import hf
from rlkern.kv.pack import plan_of
from rlkern.ops.tree_attention.reference import paths


def make(**changes):
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "num_pages": 400, "page_size": 4}
    return kv.TreeKVCache(**(sizes | changes))


def grown(seed, steps=25):
    """Trees of random forks, with the log-prob of a token derived from what it is."""
    cache, random = make(), torch.Generator().manual_seed(seed)

    def pick(n):
        return int(torch.randint(n, (), generator=random))

    prompts = [1 + pick(9), 1 + pick(9)]
    groups = []
    for group, length in enumerate(prompts):
        tokens = torch.randint(1000, (length,), generator=random)
        branches = cache.new(tokens, group=group).tolist()
        for _ in range(steps):
            b = branches[pick(len(branches))]
            if pick(3) == 0 and len(branches) < 9:
                depth = len(cache.tokens(b))
                at = length + pick(depth - length + 1)
                branches += cache.fork(b, 1 + pick(2), at=at).tolist()
            else:
                new = torch.randint(1000, (1 + pick(5),), generator=random)
                cache.append(b, new, torch.tensor([0, len(new)]), logprob=-new.float())
            cache.append_slots(branches)
        groups.append(branches)
    return cache, groups, prompts


def check(pack, sequences, prompts):
    """Against lists of (tree, tokens), in the order of the sequences."""
    count = len(pack.ids)
    assert pack.cu_seqlens.tolist()[-1] == count
    assert pack.cu_seqlens.dtype == torch.int32
    ids, ends = pack.ids.tolist(), pack.subtree_end.tolist()
    # whom a row sees, and so what it was told
    paths = [[j for j in range(i + 1) if i < ends[j]] for i in range(count)]
    assert pack.positions.tolist() == [len(path) - 1 for path in paths]
    assert pack.pred_row.tolist() == [path[-2] if len(path) > 1 else -1 for path in paths]
    bounds, found = pack.path_cu_seqlens.tolist(), []
    rows = pack.targets[pack.paths].tolist()
    uses = [0] * count
    for (tree, tokens), first, last in zip(sequences, bounds, bounds[1:]):
        own = rows[first:last]
        assert [ids[r] for r in own] == tokens[prompts[tree] :]
        root = int(pack.cu_seqlens[tree])
        whole = paths[own[-1]] if own else list(range(root, root + prompts[tree]))
        assert [ids[r] for r in whole] == tokens
        assert whole[len(tokens) - len(own) :] == own
        for r in whole:
            uses[r] += 1
        found += own
    assert len(bounds) == len(sequences) + 1
    # a sequence that is all prompt may have a row of its own for the prompt's last token
    known = pack.targets if bool((pack.path_cu_seqlens.diff() == 0).any()) else slice(None)
    assert pack.leaves[known].tolist() == torch.tensor(uses)[known].tolist()
    assert sorted(set(found)) == pack.targets.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_a_tree_spells_its_branches(seed):
    cache, groups, prompts = grown(seed)
    exports = [cache.export_tree(g) for g in range(len(groups))]
    pack = kv.tree_pack(exports, prompts)
    sequences = [
        (g, cache.tokens(b).tolist()) for g, e in enumerate(exports) for b in e.branches.tolist()
    ]
    check(pack, sequences, prompts)
    response = pack.targets
    assert pack.logprob[response].tolist() == (-pack.ids[response].float()).tolist()
    assert pack.versions.tolist() == [0] * len(pack.ids)
    assert torch.equal(pack.positions, torch.cat([positions_of(e) for e in exports]))


def positions_of(export):
    return torch.cat([torch.arange(n) + s for s, n in zip(export.start, export.length)])


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    responses=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=9),
)
def test_a_group_spells_its_responses(prompts, responses):
    """In any order of groups, with prompts that nobody answers, and empty responses."""
    group_ids = torch.tensor([g % len(prompts) for g, _ in responses], dtype=torch.int64)
    bounds, prompt_bounds = (
        torch.tensor([0, *lengths]).cumsum(0) for lengths in ([n for _, n in responses], prompts)
    )
    tokens = torch.randint(1000, (int(bounds[-1]),))
    prompt = torch.randint(1000, (int(prompt_bounds[-1]),))
    pack = kv.group_pack(prompt, prompt_bounds, tokens, bounds, group_ids, -tokens.float())
    answered = sorted(set(group_ids.tolist()))
    sequences = []
    for g, first, last in zip(group_ids.tolist(), bounds.tolist(), bounds.tolist()[1:]):
        own = prompt[prompt_bounds[g] : prompt_bounds[g + 1]].tolist()
        sequences.append((answered.index(g), own + tokens[first:last].tolist()))
    assert len(pack.cu_seqlens) == len(answered) + 1
    check(pack, sequences, [prompts[g] for g in answered])
    assert pack.logprob[pack.targets].tolist() == (-pack.ids[pack.targets].float()).tolist()
    # every token once: that is the point
    assert len(pack.ids) == sum(prompts[g] for g in answered) + len(tokens)


def test_no_trees():
    pack = kv.tree_pack([], [])
    assert pack.path_cu_seqlens.tolist() == pack.cu_seqlens.tolist() == [0]
    assert [len(x) for x in pack[:5]] == [0, 0, 0, 1, 0]


def test_bad_input():
    cache, _, prompts = grown(0)
    tree = cache.export_tree(0)
    with pytest.raises(ValueError, match=r"tree_pack: expected prompt_lengths of length 1, got"):
        kv.tree_pack([tree], prompts)
    hollow = tree._replace(branch_node=torch.full_like(tree.branch_node, -1))
    with pytest.raises(ValueError, match="tree_pack: expected trees whose branches have tokens"):
        kv.tree_pack([hollow], [1])


DUAL = rlkern.PolicyObjective.preset("ppo", clip_ratio_c=3.0)
OBJECTIVES = {
    "dapo": rlkern.PolicyObjective.preset("dapo"),
    "grpo": rlkern.PolicyObjective.preset("grpo"),
    "dual clip": DUAL,
    "cispo": rlkern.PolicyObjective.preset("cispo"),
    "dr_grpo": rlkern.PolicyObjective.preset("dr_grpo", loss_scale_factor=37.0),
    "gspo": rlkern.PolicyObjective.preset("gspo"),
}
RATIO_OF_TOKENS = [name for name in OBJECTIVES if name != "gspo"]


def problem(dtype, seed=8):
    """A forest, a log-prob for each response token, and advantages and old log-probs."""
    cache, groups, prompts = grown(seed)
    exports = [cache.export_tree(g) for g in range(len(groups))]
    pack = kv.tree_pack(exports, prompts)
    count, sequences = len(pack.targets), len(pack.path_cu_seqlens) - 1
    assert len(pack.paths) > 1.5 * count  # response tokens are shared
    old = -torch.rand(count, dtype=dtype)
    logprob = (old + 0.5 * torch.randn(count, dtype=dtype)).requires_grad_()
    return pack, logprob, old, torch.randn(sequences, dtype=dtype)


def copies(pack, logprob, old, advantages, objective):
    """Each sequence with its own tensors, as if nothing had been shared."""
    mine, before, grads = [], [], torch.zeros_like(logprob)
    bounds = pack.path_cu_seqlens.tolist()
    rows = [pack.paths[a:b] for a, b in pairwise(bounds)]
    for own in rows:
        mine.append(logprob.detach()[own].requires_grad_())
        before.append(old[own])
    loss = rlkern.policy_loss(
        torch.cat(mine),
        torch.cat(before),
        advantages,
        cu_seqlens=pack.path_cu_seqlens,
        objective=objective,
    ).loss
    loss.backward()
    for own, copy in zip(rows, mine):
        grads[own] += copy.grad
    return loss.detach(), grads


def assert_equal(got, want, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    scale = want.abs().max().clamp(min=1e-30)
    assert float(((got - want).abs().max() / scale).detach()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_paths_give_the_loss_of_the_copies(name, dtype):
    """Also ratios of whole sequences."""
    pack, logprob, old, advantages = problem(dtype)
    want, grads = copies(pack, logprob, old, advantages, OBJECTIVES[name])
    loss = rlkern.policy_loss(
        logprob[pack.paths],
        old[pack.paths],
        advantages,
        cu_seqlens=pack.path_cu_seqlens,
        objective=OBJECTIVES[name],
    ).loss
    loss.backward()
    assert_equal(loss, want, dtype)
    assert_equal(logprob.grad, grads, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RATIO_OF_TOKENS)
def test_two_advantages_give_the_loss_of_the_copies(name, dtype):
    pack, logprob, old, advantages = problem(dtype)
    objective = OBJECTIVES[name]
    want, grads = copies(pack, logprob, old, advantages, objective)
    lengths = pack.path_cu_seqlens.diff()
    sequences = int((lengths > 0).sum())  # the others do not count
    weights = {
        "token-mean": torch.full((len(lengths),), 1 / len(pack.paths), dtype=dtype),
        "seq-mean-token-mean": 1 / (lengths.clamp(min=1).to(dtype) * sequences),
        "seq-mean-token-sum-norm": torch.full((len(lengths),), 1 / (37.0 * sequences), dtype=dtype),
    }[objective.loss_agg_mode]
    positive, negative, weight = kv.tree_advantages(pack, advantages, weights)
    torch.testing.assert_close(weight.sum(), (weights * lengths).sum())
    both = torch.arange(len(pack.targets)).repeat(2)
    loss = rlkern.policy_loss(
        logprob[both],
        old[both],
        torch.cat([positive, negative]),
        objective=replace(objective, loss_agg_mode="token-sum", loss_scale_factor=None),
    ).loss
    loss.backward()
    assert_equal(loss, want, dtype)
    assert_equal(logprob.grad, grads, dtype)


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_of_a_pack_reads_each_rows_path(seed):
    cache, groups, prompts = grown(seed)
    pack = kv.tree_pack([cache.export_tree(g) for g in range(len(groups))], prompts)
    plan, ends = plan_of(pack), pack.subtree_end.tolist()
    bounds = pack.cu_seqlens.tolist()
    found = paths(plan.items, plan.slots, plan.parts, plan.part_offsets)
    for row, where in zip(plan.rows.tolist(), found, strict=True):
        root = max(b for b in bounds if b <= row)
        assert where.tolist() == [j for j in range(root, row + 1) if row < ends[j]]


def test_attention_as_decoded_is_attention_along_the_tree():
    """To rounding, and its gradients with it; the bits of decoding are tests/train's to compare."""
    cache, groups, prompts = grown(2, steps=40)
    pack = kv.tree_pack([cache.export_tree(g) for g in range(len(groups))], prompts)
    shapes = ((4, 16), (2, 16), (2, 16), (4, 16))
    q, k, v, upstream = (torch.randn(len(pack.ids), *shape) for shape in shapes)
    results = []
    for attend in (hf.as_decoded(pack), hf.along_tree(pack.subtree_end, pack.cu_seqlens)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(0, *inputs, 0.25, 5.0)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_the_plan_of_nothing():
    empty = torch.empty(0, dtype=torch.int64)
    pack = kv.group_pack(empty, torch.tensor([0]), empty, torch.tensor([0]), empty)
    assert plan_of(pack).rows.tolist() == []
