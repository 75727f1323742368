"""Trees of tokens as training reads them: every token once, depth first."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlkern import _check
from rlkern.kv.cache import TreeExport, TreeKVCache, default_chunk
from rlkern.ops.tree_attention import TreePlan


class TreePack(NamedTuple):
    """T tokens of several trees, U of them response tokens, and the S sequences that they make.

    The model reads `ids` at `positions` with `shared_prefix_attention` along `subtree_end` and
    `cu_seqlens`. The log-prob of response token u is that of ids[targets[u]] from the hidden state
    of row pred_row[targets[u]]; those of sequence s, one after another, are at
    paths[path_cu_seqlens[s] : path_cu_seqlens[s + 1]]. So

        logprob = linear_logprob(hidden[pack.pred_row[pack.targets]], W, pack.ids[pack.targets])
        policy_loss(logprob.logprob[pack.paths], ..., cu_seqlens=pack.path_cu_seqlens)

    is the loss of the unshared sequences, whatever the objective: a token that many sequences share
    stands in each of them, and its gradient is the sum.
    """

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from the root on
    subtree_end: Tensor  # int32 [T], the row after the last token at or below the token's node
    cu_seqlens: Tensor  # int32 [trees + 1]
    pred_row: Tensor  # int64 [T], row whose hidden state predicts the token; -1: a root's first
    leaves: Tensor  # int32 [T], sequences that the token belongs to
    logprob: Tensor  # float32 [T], as sampled; 0 for tokens of prompts
    versions: Tensor  # int32 [T], of the weights when the token came
    targets: Tensor  # int64 [U], rows of the response tokens
    paths: Tensor  # int64 [N], into targets
    path_cu_seqlens: Tensor  # int64 [S + 1]

    def to(self, device: torch.device | str) -> "TreePack":
        return TreePack(*(x.to(device) for x in self))


def tree_pack(trees: Sequence[TreeExport], prompt_lengths: Sequence[int] | Tensor) -> TreePack:
    """Packs exported trees; every branch is a sequence, tree after tree.

    prompt_lengths: of each tree, how many tokens from its root on are not response tokens.

    Raises:
        ValueError: a branch without tokens, or as many prompt_lengths as there are not trees.
    """
    prompts = torch.as_tensor(prompt_lengths, dtype=torch.int64)
    if prompts.shape != (len(trees),):
        _check.fail("tree_pack", "prompt_lengths", f"of length {len(trees)}", tuple(prompts.shape))
    nodes = torch.tensor([0, *(len(t.parent) for t in trees)]).cumsum(0)
    parts = []
    for tree, first in zip(trees, nodes.tolist()):
        if bool((tree.branch_node < 0).any()):
            _check.fail("tree_pack", "trees", "whose branches have tokens", "an empty branch")
        parent = torch.where(tree.parent < 0, -1, tree.parent.long() + first)
        parts.append((parent, tree.length.long(), tree.branch_node.long() + first))
    empty = torch.empty(0, dtype=torch.int64)
    parent, length, ends = (torch.cat([empty, *(p[i] for p in parts)]) for i in range(3))
    tokens, logprob, versions = (
        torch.cat([kind, *(getattr(t, name) for t in trees)])
        for name, kind in (("tokens", empty), ("logprob", empty.float()), ("versions", empty.int()))
    )
    of_node = torch.repeat_interleave(nodes.diff())
    return _pack(parent, length, of_node, prompts, tokens.long(), logprob, versions, ends)


def group_pack(
    prompt_tokens: Tensor,
    prompt_cu_seqlens: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    logprob: Tensor | None = None,
) -> TreePack:
    """Packs plain groups: every prompt once, with the responses to it.

    The fields of `rollout.Rollouts`: packed prompts, packed responses and the prompt of each. A
    prompt that nobody answers is left out. Sequences keep their order.
    """
    device = tokens.device
    answered, group = torch.unique(group_ids, return_inverse=True)
    trees, sequences = len(answered), len(group_ids)
    prompt_lengths = prompt_cu_seqlens.diff()[answered].long()
    lengths = cu_seqlens.diff().long()
    # a tree is its prompt, then its responses in their order
    prompts = torch.arange(trees, device=device)
    order = torch.argsort(torch.cat([2 * prompts, 2 * group + 1]), stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    parent = torch.cat([torch.full_like(prompts, -1), place[group]])[order]
    length = torch.cat([prompt_lengths, lengths])[order]
    of_node = torch.cat([prompts, group])[order]
    # where each node's tokens lie in all prompts and then all responses
    source = torch.cat([prompt_cu_seqlens[answered], len(prompt_tokens) + cu_seqlens[:-1]])[order]
    rows = _spans(source, length)
    score = torch.zeros(len(tokens), device=device) if logprob is None else logprob
    whole = torch.cat([prompt_tokens, tokens]).long()[rows]
    scores = torch.cat([score.new_zeros(len(prompt_tokens)), score]).float()[rows]
    versions = torch.zeros_like(whole, dtype=torch.int32)
    ends = place[trees : trees + sequences]
    return _pack(parent, length, of_node, prompt_lengths, whole, scores, versions, ends)


def tree_advantages(
    pack: TreePack, advantages: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the sequences that share each response token -> (A_pos, A_neg, w), float [U].

        A_pos = sum of weights max(A, 0);  A_neg = sum of weights min(A, 0);  w = sum of weights

    All copies of a shared token have one ratio r, and a clipped surrogate is linear in A on either
    side of 0. So two tokens with advantages A_pos and A_neg, under loss_agg_mode "token-sum", have
    exactly the loss and the gradient of all copies, for every objective whose token depends on the
    ratio and on A alone:

        both = torch.arange(U).repeat(2)
        policy_loss(logprob[both], old[both], torch.cat([A_pos, A_neg]), ...)

    Ratios of whole sequences and penalties (KL, entropy) need `pack.paths` instead.

    advantages: (S,) or, along the paths, (N,). weights: the same, e.g. 1 / length; default 1.
    """
    lengths = pack.path_cu_seqlens.diff()
    count = len(pack.paths)

    def along(x: Tensor) -> Tensor:
        return x if len(x) == count else torch.repeat_interleave(x, lengths, output_size=count)

    adv = along(advantages)
    weight = torch.ones_like(adv) if weights is None else along(weights)
    zero = weight.new_zeros(len(pack.targets))
    terms = (weight * adv.clamp(min=0), weight * adv.clamp(max=0), weight)
    return tuple(zero.index_add(0, pack.paths, x) for x in terms)


def plan_of(pack: TreePack, chunk: int | None = None) -> TreePlan:
    """The plan by which `tree_attention` reads the pack, its keys and values as pages of one token.

    A row of the batch is a row of the pack; slots are rows of the pack. chunk: of the cache whose
    bits are wanted.
    """
    tokens, device = len(pack.ids), pack.ids.device
    tree = TreeKVCache(
        num_layers=1, num_kv_heads=1, head_dim=1, num_pages=max(1, tokens), page_size=1,
        chunk=chunk or default_chunk(device),
    )  # fmt: skip
    before, positions = pack.pred_row.cpu().numpy(), pack.positions.cpu().numpy()
    begins = np.flatnonzero((before != np.arange(tokens) - 1) | (np.arange(tokens) == 0))
    lengths = np.diff(np.append(begins, tokens))
    branches: list[int] = []
    slots = [torch.empty(0, dtype=torch.int32)]
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        above = int(before[begin])
        if above < 0:
            branch = tree.new([0] * length)
        else:
            owner = branches[int(np.searchsorted(begins, above, side="right")) - 1]
            branch = tree.fork(owner, at=int(positions[above]) + 1, forced=0)
            tree.append(branch, [0] * (length - 1), torch.tensor([0, length - 1]))
        slots.append(tree.append_slots(branch).slots)
        branches.append(int(branch))
    plan = tree.plan(branches, lengths)
    row_of = torch.empty(tree.num_pages, dtype=torch.int32)
    row_of[torch.cat(slots).long()] = torch.arange(tokens, dtype=torch.int32)
    plan = plan._replace(slots=row_of[plan.slots.long()])
    return TreePlan(*(part.to(device) for part in plan[:6]), *plan[6:])


def _pack(
    parent: Tensor,
    length: Tensor,
    tree: Tensor,
    prompt_lengths: Tensor,
    ids: Tensor,
    logprob: Tensor,
    versions: Tensor,
    ends: Tensor,
) -> TreePack:
    """From nodes in depth-first order (their parents, lengths and trees), their tokens, and the
    node that each sequence ends in."""
    device, num_nodes = ids.device, len(parent)
    node_end = length.cumsum(0)
    node_begin = node_end - length
    # Level by level, from the nodes of the sequences up to the roots.
    sequence = torch.arange(len(ends), device=device)
    at, steps = ends, []
    while len(at):
        steps.append(torch.stack([sequence, at]))
        up = parent[at] >= 0
        sequence, at = sequence[up], parent[at][up]
    steps = torch.cat([ends.new_empty(2, 0), *steps], 1)
    # ancestors come first in depth-first order
    steps = steps[:, torch.argsort(steps[0] * max(1, num_nodes) + steps[1])]
    # Likewise down from the roots: where a node begins and what lies below it.
    start, subtree = torch.zeros_like(length), node_end.clone()
    level = torch.arange(num_nodes, device=device)
    level, above = level[parent >= 0], parent[parent >= 0]
    while len(level):
        start.index_add_(0, level, length[above])
        subtree.scatter_reduce_(0, above, node_end[level], "amax")
        above = parent[above]
        level, above = level[above >= 0], above[above >= 0]
    node = torch.repeat_interleave(length)
    row = torch.arange(len(ids), device=device)
    positions = start[node] + row - node_begin[node]
    # a node's first token follows its parent's last: a parent without tokens passes on its own
    last = torch.where(length > 0, node_end - 1, -1)
    before = _last_above(parent, last)
    pred_row = torch.where(row == node_begin[node], before[node], row - 1)
    response = positions >= prompt_lengths[tree[node]]
    targets = response.nonzero()[:, 0]
    index = response.long().cumsum(0) - 1
    # the rows along every path, of which the response tokens stay
    paths = _spans(node_begin[steps[1]], length[steps[1]])
    owner = torch.repeat_interleave(steps[0], length[steps[1]])
    stays = response[paths]
    counts = torch.bincount(owner[stays], minlength=len(ends))
    leaves = torch.bincount(steps[1], minlength=num_nodes)
    trees = torch.zeros_like(prompt_lengths).index_add_(0, tree, length)
    return TreePack(
        ids=ids,
        positions=positions,
        subtree_end=subtree[node].int(),
        cu_seqlens=_bounds(trees).int(),
        pred_row=pred_row,
        leaves=leaves[node].int(),
        logprob=logprob,
        versions=versions,
        targets=targets,
        paths=index[paths[stays]],
        path_cu_seqlens=_bounds(counts),
    )


def _last_above(parent: Tensor, last: Tensor) -> Tensor:
    """The last row above each node, -1 without one."""
    found, above = torch.full_like(last, -1), parent.clone()
    while bool((above >= 0).any()):
        here = above.clamp(min=0)
        found = torch.where((found < 0) & (above >= 0), last[here], found)
        above = torch.where(above >= 0, parent[here], -1)
    return found


def _spans(begin: Tensor, length: Tensor) -> Tensor:
    """begin[i], begin[i] + 1, ... length[i] of them, for all i."""
    offset = torch.repeat_interleave(begin - (length.cumsum(0) - length), length)
    return offset + torch.arange(len(offset), device=begin.device)


def _bounds(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
