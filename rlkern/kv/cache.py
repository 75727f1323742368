"""Pages of keys and values, and the tree that says which tokens of which branch lie where."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlkern import _check
from rlkern.kv import _host
from rlkern.ops.tree_attention import TreePlan

_STALE = ("recompute", "keep", "forbid")  # in the order of csrc/host/tree.h

Ids = int | Sequence[int] | Tensor
"""Branches, or numbers for them: a Tensor of any integer type, a list, or one of them."""


class Work(NamedTuple):
    """Tokens to feed, in segments [cu_seqlens[i], cu_seqlens[i + 1]) of branches[i]."""

    slots: Tensor  # int32 [T], where keys and values go: page * page_size + slot in the page
    positions: Tensor  # int32 [T]
    tokens: Tensor  # int32 [T]
    cu_seqlens: Tensor  # int64 [S + 1], on the CPU
    branches: Tensor  # int64 [S], on the CPU


class BlockTable(NamedTuple):
    """A plain paged view, for kernels that know nothing of trees."""

    pages: Tensor  # int32 [B, blocks]; -1 past the end
    lengths: Tensor  # int32 [B], cached tokens


class History(NamedTuple):
    """The tokens of one branch, cached or not; on the CPU."""

    tokens: Tensor  # int32 [T]
    logprob: Tensor  # float32 [T], as given to new, fork or append
    entropy: Tensor  # float32 [T], likewise
    versions: Tensor  # int32 [T], of the weights when the token was given


class TreeExport(NamedTuple):
    """The nodes of a group in depth-first order: the rollout as training packs it.

    A branch's pending tokens are a node of their own, with kv_version -1. All on the CPU.
    """

    parent: Tensor  # int32 [N], -1 for a root
    start: Tensor  # int32 [N], position of the node's first token
    length: Tensor  # int32 [N]
    subtree_end: Tensor  # int32 [N], the row after the last token at or below the node
    kv_version: Tensor  # int64 [N], of the weights that computed the node's keys and values
    tokens: Tensor  # int32 [T], node after node
    logprob: Tensor  # float32 [T], as given to new, fork or append
    entropy: Tensor  # float32 [T], likewise
    versions: Tensor  # int32 [T], of the weights when the token was given
    branches: Tensor  # int64 [B]
    branch_node: Tensor  # int32 [B], where a branch ends; -1: it has no tokens


class TreeKVCache:
    """A KV cache of branches that share their common prefixes, in pages with reference counts.

    A branch is *cached tokens and the tokens after them*: between two steps that is one, the
    pending token, which the next step feeds. One step of a batch:

        work = cache.append_slots(branches)        # the pending tokens count as cached from here on
        plan = cache.plan(branches)
        for layer: write k, v of work.tokens to work.slots; attend along plan
        cache.append(branches, next_tokens)        # and these are pending

    Verbs take all branches of a step at once. Branch ids are never used again. No verb moves keys
    or values: forks share pages, also from the middle of one on; `block_table` alone copies, at
    most one page a fork. A verb that is refused changes nothing.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        num_pages, page_size: the pool; a page holds the tokens of page_size aligned positions.
        dtype, device: of the pages. The tree itself lives on the host.
        stale: what happens to tokens that older weights computed, after bump_version:
            "recompute": reading them raises StaleTokens until `recompute` has listed them,
            "keep": they are read as they are, "forbid": reading them raises.
        chunk: tokens of an item of a plan; results of tree attention depend on it in their last
            bits. Default: 64 on CPU, 256 elsewhere.

    k and v are (num_layers, num_pages, page_size, num_kv_heads, head_dim), uninitialised.

    Raises:
        OutOfPages (a RuntimeError with `needed` and `free`): append_slots and resume, where there
            are too few pages. Prune or suspend branches, and call again.
        StaleTokens (a RuntimeError): see `stale`.
        ValueError, TypeError: arguments that do not fit, by name.
        RuntimeError: the compiled tree is missing; the message says how to build it.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        stale: str = "recompute",
        chunk: int | None = None,
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "num_pages": num_pages,
            "page_size": page_size,
        }
        for name, value in sizes.items():
            _check.positive("TreeKVCache", name, value)
        if num_pages * page_size >= 2**31:
            _check.fail("TreeKVCache", "num_pages * page_size", "below 2^31", num_pages * page_size)
        _check.one_of("TreeKVCache", "stale", stale, _STALE)
        self._tree = _host.load().Tree(num_pages, page_size, _STALE.index(stale))
        self.page_size, self.stale = page_size, stale
        self.device = torch.device(device)
        self.chunk = default_chunk(self.device) if chunk is None else chunk
        _check.positive("TreeKVCache", "chunk", self.chunk)
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    # Branches.

    def new(
        self,
        tokens: Sequence[int] | Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        group: Ids = 0,
        logprob: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> Tensor:
        """A branch for each sequence of packed tokens (one sequence without cu_seqlens).

        Nothing is cached yet: `append_slots` gives slots for the prefill. -> int64 [S].
        """
        ids = _ints(tokens, np.int32)
        offsets = _offsets("new", cu_seqlens, len(ids))
        groups = _spread("new", "group", group, len(offsets) - 1)
        marks = _marks("new", logprob, entropy, len(ids))
        return _give(self._tree.create(ids, offsets, groups, *marks))

    def fork(
        self,
        branches: Ids,
        n: Ids = 1,
        *,
        at: Ids | None = None,
        forced: Ids | None = None,
        logprob: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> Tensor:
        """n[i] children of each branch, one after another. -> int64 [sum n].

        at: the child has the branch's first `at` tokens; the last of them is pending, so that the
            next step computes its logits again. Default, and -1: all there is, as it is.
        forced: int [sum n], a token for each child after those, with its `logprob`. All `at` tokens
            stay cached and the forced one is pending: nothing is fed twice.
        """
        ids = _ints(branches)
        counts = _spread("fork", "n", n, len(ids))
        positions = _spread("fork", "at", -1 if at is None else at, len(ids))
        tokens = np.empty(0, np.int32)
        if forced is not None:
            tokens = _spread("fork", "forced", forced, int(counts.sum())).astype(np.int32)
        marks = _marks("fork", logprob, entropy, len(tokens))
        return _give(self._tree.fork(ids, counts, positions, tokens, *marks))

    def prune(self, branches: Ids, *, subtree: bool = False) -> None:
        """Ends branches and frees what nobody else reads.

        subtree: with all that was forked from them, but for pinned branches. Without it, their
        forks live on as forks of their parents.
        """
        self._tree.prune(_ints(branches), subtree)

    def truncate(self, branches: Ids, lengths: Ids) -> None:
        """Rolls back to the first lengths[i] tokens, the last of which becomes pending."""
        ids = _ints(branches)
        self._tree.truncate(ids, _spread("truncate", "lengths", lengths, len(ids)))

    def resample(self, branches: Ids, parents: Ids) -> Tensor:
        """Row i goes on from branches[parents[i]]. -> int64 [B], the rows' branches.

        A branch's first offspring keeps its id, the others are forks; without offspring it is
        pruned, unless pinned. Index logits, random states and metrics with `parents`.
        """
        ids = _ints(branches)
        return _give(self._tree.resample(ids, _spread("resample", "parents", parents, len(ids))))

    def pin(self, branches: Ids) -> None:
        """Keeps branches and their pages through prune and suspend, until as many `unpin`."""
        self._tree.pin(_ints(branches), True)

    def unpin(self, branches: Ids) -> None:
        self._tree.pin(_ints(branches), False)

    def suspend(self, branches: Ids, *, drop: bool | None = None) -> None:
        """Puts branches aside, with their tokens, log-probs and versions.

        drop: frees the pages that no other branch needs. Default: unless stale is "keep".
        """
        self._tree.suspend(_ints(branches), self.stale != "keep" if drop is None else drop)

    def resume(self, branches: Ids) -> None:
        """Takes suspended branches up again, with new pages for those that they have lost.

        What was in them must be computed again: `recompute` lists it.
        """
        self._tree.resume(_ints(branches))

    # Tokens.

    def append(
        self,
        branches: Ids,
        tokens: Ids,
        cu_seqlens: Tensor | None = None,
        *,
        logprob: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> None:
        """Tokens at the end of each branch: one each, or packed with cu_seqlens."""
        ids, new = _ints(branches), _ints(tokens, np.int32)
        if cu_seqlens is None:
            _same_length("append", "tokens", new, len(ids))
            offsets = np.arange(len(ids) + 1)
        else:
            offsets = _offsets("append", cu_seqlens, len(new))
            _same_length("append", "cu_seqlens", offsets, len(ids) + 1)
        self._tree.append(ids, new, offsets, *_marks("append", logprob, entropy, len(new)))

    def append_slots(self, branches: Ids, n: Ids | None = None) -> Work:
        """Slots for the next n[i] tokens of each branch, by default for all that are not cached.

        They count as cached from here on: write their keys and values before anybody reads them.
        """
        ids = _ints(branches)
        counts = _spread("append_slots", "n", -1 if n is None else n, len(ids))
        return self._work(self._tree.append_slots(ids, counts))

    def bump_version(self, version: int | None = None) -> None:
        """The weights have changed; default: the version after the present one."""
        self._tree.set_version(self._tree.version + 1 if version is None else version)

    def recompute(self, branches: Ids) -> Work:
        """What these branches must compute again, each node once, parents before children.

        That is what resume has given new pages, and, where stale is "recompute", what older weights
        computed. It counts as computed from here on; segments name one branch that has them.
        """
        return self._work(self._tree.recompute(_ints(branches)))

    # Reading.

    def plan(self, branches: Ids, n: Ids = 1, *, share: bool = True) -> TreePlan:
        """The work list of attention, one for all layers.

        n: a row of the batch for each of the last n[i] cached tokens of each branch, which reads
            the path up to that token: what append_slots gave is n = work.cu_seqlens.diff().
        share=False reads every row's whole path for itself, with the same results.
        """
        ids = _ints(branches)
        counts = _spread("plan", "n", n, len(ids))
        *parts, max_rows = self._tree.plan(ids, counts, self.chunk, share)
        if self.device.type == "cpu":
            rows, items, *rest = map(_give, parts)
        else:  # one copy to the device
            whole = torch.from_numpy(np.concatenate(parts)).to(self.device)
            rows, items, *rest = whole.split([len(part) for part in parts])
        return TreePlan(rows, items.view(-1, 6), *rest, self.chunk, max_rows)

    def block_table(self, branches: Ids) -> BlockTable:
        """Whole pages of each branch, for plain paged kernels.

        Where a branch began in the middle of a page, the tokens before are copied into its own
        page, once for it and all below it. What was appended must have been written by now.
        """
        pages, lengths, source, target = self._tree.block_table(_ints(branches))
        if len(source):
            where = torch.from_numpy(np.stack([source, target])).to(self.device)
            for pool in (self.k, self.v):
                slots = pool.flatten(1, 2)
                slots[:, where[1]] = slots[:, where[0]]
        return BlockTable(*(torch.from_numpy(x).to(self.device) for x in (pages, lengths)))

    def export_tree(self, group: int) -> TreeExport:
        """The nodes of all branches of a group, with their tokens, for training."""
        *nodes, tokens, branches, branch_node = self._tree.export_group(group)
        return TreeExport(*map(_give, (*nodes, *tokens, branches, branch_node)))

    def tokens(self, branch: int) -> Tensor:
        """All tokens of a branch, cached or not. -> int32 [T]."""
        return self.history(branch).tokens

    def history(self, branch: int) -> History:
        """All tokens of a branch, with what was told of them."""
        return History(*map(_give, self._tree.tokens(int(branch))))

    def slots(self, branch: int) -> Tensor:
        """Where each cached token of a branch lies. -> int32 [cached]."""
        return _give(self._tree.slots(int(branch)))

    def cached(self, branches: Ids) -> Tensor:
        """How many tokens of each branch are cached. -> int64 [B]."""
        return _give(self._tree.info(_ints(branches))[:, 0].copy())

    def branches(self) -> Tensor:
        """All branches, suspended ones too. -> int64 [B]."""
        return _give(self._tree.branches())

    @property
    def num_pages(self) -> int:
        return self._tree.num_pages

    @property
    def free_pages(self) -> int:
        return self._tree.free_pages

    @property
    def version(self) -> int:
        return self._tree.version

    def _work(self, arrays: tuple[np.ndarray, ...]) -> Work:
        slots, positions, tokens, offsets, branches = arrays
        fed = slots, positions, tokens
        if self.device.type == "cpu":
            there = map(_give, fed)
        else:  # one copy to the device
            there = torch.from_numpy(np.stack(fed)).to(self.device).unbind()
        return Work(*there, _give(offsets), _give(branches))


def default_chunk(device: torch.device) -> int:
    """Tokens of an item of a plan."""
    return 64 if device.type == "cpu" else 256


def _give(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def _ints(values: Ids, dtype: type = np.int64) -> np.ndarray:
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.dtype == torch.bool:
            raise TypeError(f"TreeKVCache: expected integers, got {values.dtype}")
        values = values.detach().cpu().numpy()
    array = np.atleast_1d(np.asarray(values))
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"TreeKVCache: expected integers, got {array.dtype}")
    return np.ascontiguousarray(array.reshape(-1), dtype)


def _same_length(verb: str, argument: str, array: np.ndarray, length: int) -> None:
    if len(array) != length:
        _check.fail(f"TreeKVCache.{verb}", argument, f"of length {length}", len(array))


def _spread(verb: str, argument: str, values: Ids, length: int) -> np.ndarray:
    """One number for each, or one for all."""
    if isinstance(values, int):
        return np.full(length, values, np.int64)
    array = _ints(values)
    _same_length(verb, argument, array, length)
    return array


def _offsets(verb: str, cu_seqlens: Tensor | None, tokens: int) -> np.ndarray:
    if cu_seqlens is None:
        return np.array([0, tokens])
    bounds = _ints(cu_seqlens)
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != tokens or (np.diff(bounds) < 0).any():
        _check.fail(
            f"TreeKVCache.{verb}", "cu_seqlens", f"to rise from 0 to T = {tokens}", bounds.tolist()
        )
    return bounds


def _marks(
    verb: str, logprob: Tensor | None, entropy: Tensor | None, length: int
) -> list[np.ndarray]:
    arrays = []
    for name, values in (("logprob", logprob), ("entropy", entropy)):
        array = np.empty(0, np.float32)
        if values is not None:
            tensor = torch.as_tensor(values, dtype=torch.float32)
            array = tensor.detach().cpu().numpy().reshape(-1)
            _same_length(verb, name, array, length)
        arrays.append(array)
    return arrays
