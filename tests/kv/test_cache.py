"""TreeKVCache: each verb by example, and all of them at random against a dense dictionary."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlkern import kv

ROOT = Path(__file__).parents[2]


def make(num_pages=64, page_size=4, stale="recompute", chunk=4, layers=2):
    return kv.TreeKVCache(
        num_layers=layers,
        num_kv_heads=1,
        head_dim=2,
        num_pages=num_pages,
        page_size=page_size,
        dtype=torch.float32,
        stale=stale,
        chunk=chunk,
    )


def write(cache, work):
    """What a model would: keys that say which token at which position was fed by which weights."""
    values = torch.stack([work.tokens, work.positions], 1).float()[None, :, None]
    cache.k.flatten(1, 2)[:, work.slots.long()] = values
    cache.v.flatten(1, 2)[:, work.slots.long()] = values + cache.version / 16


def feed(cache, branches, n=None):
    work = cache.append_slots(branches, n)
    write(cache, work)
    return work


def prefilled(cache, length=10, group=0):
    branch = cache.new(torch.arange(100, 100 + length), group=group)
    feed(cache, branch, length - 1)
    return branch


def read(cache, branch):
    """The tokens and positions that lie in the slots of a branch, in every layer."""
    keys = cache.k.flatten(1, 2)[:, cache.slots(branch).long(), 0]
    assert (keys == keys[:1]).all()
    return keys[0].int().tolist()


def check(cache):
    assert cache._tree.check() == ""


def test_a_branch_is_cached_tokens_and_one_pending_token():
    cache = make()
    branch = cache.new(torch.tensor([7, 8, 9]))
    assert cache.cached(branch).tolist() == [0]
    work = feed(cache, branch)
    assert work.tokens.tolist() == [7, 8, 9]
    assert work.positions.tolist() == [0, 1, 2]
    assert work.cu_seqlens.tolist() == [0, 3]
    cache.append(branch, [4])
    assert cache.cached(branch).tolist() == [3]
    assert cache.tokens(branch).tolist() == [7, 8, 9, 4]
    assert feed(cache, branch).tokens.tolist() == [4]
    assert read(cache, branch) == [[7, 0], [8, 1], [9, 2], [4, 3]]


def test_new_takes_packed_sequences():
    cache = make()
    branches = cache.new([1, 2, 3, 4, 5], torch.tensor([0, 2, 2, 5]), group=[0, 1, 0])
    assert [cache.tokens(b).tolist() for b in branches] == [[1, 2], [], [3, 4, 5]]
    work = feed(cache, branches)
    assert work.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert work.branches.tolist() == branches.tolist()


def test_a_fork_at_the_tip_takes_no_pages_and_shares_all():
    cache = make()
    branch = prefilled(cache)
    free = cache.free_pages
    children = cache.fork(branch, 3)
    assert cache.free_pages == free
    for child in children:
        assert cache.tokens(child).tolist() == cache.tokens(branch).tolist()
        assert cache.slots(child).tolist() == cache.slots(branch).tolist()
    # one goes on in the parent's page, the others begin one of their own at the same place
    work = feed(cache, torch.cat([branch, children]))
    assert free - cache.free_pages == 3
    assert {s % 4 for s in work.slots.tolist()} == {9 % 4}
    assert len(set(work.slots.tolist())) == 4
    check(cache)


def test_a_fork_in_the_past_makes_the_token_before_pending():
    cache = make()
    branch = prefilled(cache)
    child = cache.fork(branch, at=6)
    assert cache.cached(child).tolist() == [5]
    assert cache.tokens(child).tolist() == [100, 101, 102, 103, 104, 105]
    work = feed(cache, child)
    assert (work.tokens.tolist(), work.positions.tolist()) == ([105], [5])
    # zero-copy in the middle of a page: the same slots before, another page after
    assert cache.slots(child)[:5].tolist() == cache.slots(branch)[:5].tolist()
    assert cache.slots(child)[5] % 4 == 1
    assert cache.slots(child)[5] != cache.slots(branch)[5]
    check(cache)


def test_a_forced_token_follows_cached_ones():
    """LATR: the second most likely token branches off without feeding anything again."""
    cache = make()
    branch = prefilled(cache)
    feed(cache, branch)  # the pending token too: its logits are here
    child = cache.fork(branch, forced=[55], logprob=torch.tensor([-0.5]))
    cache.append(branch, [44])
    assert cache.cached(child).tolist() == [10]
    assert cache.tokens(child)[-1] == 55
    assert cache.tokens(branch)[-1] == 44
    past = cache.fork(branch, 2, at=3, forced=[1, 2])
    assert [cache.tokens(b).tolist() for b in past] == [[100, 101, 102, 1], [100, 101, 102, 2]]
    assert cache.cached(past).tolist() == [3, 3]
    check(cache)


def test_fork_is_vectorised():
    cache = make()
    a, b = prefilled(cache, 10), prefilled(cache, 6)
    children = cache.fork(torch.cat([a, b]), torch.tensor([2, 1]), at=torch.tensor([4, -1]))
    assert [len(cache.tokens(c)) for c in children] == [4, 4, 6]


def test_pages_come_back_and_chains_merge():
    cache = make()
    branch = prefilled(cache)
    children = cache.fork(branch, 2, at=6)
    feed(cache, children)
    assert cache._tree.num_nodes == 4
    cache.prune(children)
    assert cache._tree.num_nodes == 1
    assert cache.num_pages - cache.free_pages == 3
    check(cache)
    cache.prune(branch)
    assert cache.free_pages == cache.num_pages
    with pytest.raises(ValueError, match=r"TreeKVCache\.tokens: branch 0 does not exist"):
        cache.tokens(branch)


def test_prune_of_a_subtree_spares_pinned_branches():
    cache = make()
    branch = prefilled(cache)
    (child,) = cache.fork(branch)
    (grandchild,) = cache.fork(child)
    (other,) = cache.fork(branch)
    cache.pin(grandchild)
    with pytest.raises(ValueError, match="prune: branch 2 is pinned"):
        cache.prune(grandchild)
    cache.prune(child, subtree=True)
    assert cache.branches().tolist() == [int(branch), int(grandchild), int(other)]
    cache.unpin(grandchild)
    cache.prune(branch, subtree=True)
    assert cache.branches().tolist() == []
    assert cache.free_pages == cache.num_pages


def test_truncate_into_shared_tokens_drops_the_view_alone():
    cache = make()
    branch = prefilled(cache)
    child = cache.fork(branch)
    cache.truncate(child, 4)
    assert cache.cached(child).tolist() == [3]
    assert cache.tokens(child).tolist() == [100, 101, 102, 103]
    assert read(cache, branch) == [[100 + i, i] for i in range(9)]
    check(cache)
    cache.truncate(branch, 4)
    assert cache.num_pages - cache.free_pages == 1


def test_resample_keeps_the_first_offspring_and_frees_who_has_none():
    cache = make()
    roots = torch.cat([prefilled(cache, 5 + i) for i in range(4)])
    after = cache.resample(roots, torch.tensor([2, 0, 2, 2]))
    assert after[0] == roots[2]
    assert after[1] == roots[0]
    assert len(set(after.tolist())) == 4
    assert [len(cache.tokens(b)) for b in after] == [7, 5, 7, 7]
    assert roots[1] not in cache.branches()
    check(cache)


def test_out_of_pages_is_clear_and_changes_nothing():
    cache = make(num_pages=3)
    branch = prefilled(cache, 9)
    children = cache.fork(branch, 4)
    feed(cache, children[:1])
    before = [cache.slots(b).tolist() for b in cache.branches()]
    with pytest.raises(kv.OutOfPages, match="append_slots: needs 3 free pages, has 0") as info:
        cache.append_slots(children[1:])
    assert (info.value.needed, info.value.free) == (3, 0)
    assert [cache.slots(b).tolist() for b in cache.branches()] == before
    assert cache.cached(children[1:]).tolist() == [8, 8, 8]
    check(cache)


@pytest.mark.parametrize("stale", ["recompute", "keep", "forbid"])
def test_stale_tokens(stale):
    cache = make(stale=stale)
    branch = prefilled(cache)
    children = cache.fork(branch, 2)
    cache.bump_version()
    if stale == "keep":
        feed(cache, children)
        versions = cache.export_tree(0).kv_version.tolist()
        assert sorted(set(versions)) == [-1, 0, 1]
        check(cache)
        return
    with pytest.raises(kv.StaleTokens, match="plan: branch 1 has tokens that older weights"):
        cache.plan(children)
    if stale == "forbid":
        with pytest.raises(kv.StaleTokens, match="recompute: branch 1 has tokens"):
            cache.recompute(children)
        return
    work = cache.recompute(torch.cat([children, branch]))
    assert work.positions.tolist() == list(range(9))  # once for all three
    write(cache, work)
    cache.plan(children)
    feed(cache, children)
    check(cache)


@pytest.mark.parametrize("stale", ["recompute", "forbid"])
def test_suspend_across_a_weight_update(stale):
    cache = make(stale=stale)
    branch = prefilled(cache)
    children = cache.fork(branch, 2)
    feed(cache, children)
    marks = {"logprob": torch.tensor([-1.0, -2.0]), "entropy": torch.tensor([0.5, 0.25])}
    cache.append(children, [7, 8], **marks)
    cache.suspend(torch.cat([branch, children]))
    assert cache.free_pages == cache.num_pages
    cache.bump_version(5)
    with pytest.raises(ValueError, match="plan: branch 1 is suspended: resume it first"):
        cache.plan(children)
    cache.resume(children)
    with pytest.raises(kv.StaleTokens, match="lost its keys and values"):
        cache.append_slots(children)
    work = cache.recompute(children)
    assert work.positions.tolist() == [*range(9), 9, 9]
    write(cache, work)
    feed(cache, children)
    assert [read(cache, c)[-1] for c in children] == [[7, 10], [8, 10]]
    exported = cache.export_tree(0)
    assert exported.versions.tolist() == [0] * len(exported.tokens)
    assert -2.0 in exported.logprob.tolist()
    assert 0.25 in exported.entropy.tolist()
    last = [x[-1].item() for x in cache.history(children[1])]
    assert last == [8, -2.0, 0.25, 0]
    check(cache)


def test_a_pinned_branch_keeps_its_pages_through_suspend():
    cache = make()
    branch = prefilled(cache)
    cache.pin(branch)
    cache.suspend(branch)
    assert cache.num_pages - cache.free_pages == 3
    cache.unpin(branch)
    assert cache.free_pages == cache.num_pages


def test_suspended_with_its_pages_a_branch_resumes_as_it_was():
    cache = make()
    branch = prefilled(cache)
    before = cache.slots(branch).tolist()
    cache.suspend(branch, drop=False)
    cache.resume(branch)
    assert cache.slots(branch).tolist() == before
    assert len(cache.recompute(branch).tokens) == 0


def test_a_block_table_copies_at_most_one_page_a_fork():
    cache = make()
    branch = prefilled(cache)
    children = cache.fork(branch, 2, at=6)
    feed(cache, children)
    feed(cache, branch)
    before = cache.k.clone()
    every = torch.cat([branch, children])
    table = cache.block_table(every)
    changed = (cache.k != before) & ~(cache.k.isnan() & before.isnan())
    assert len(changed.any(-1).any(-1).any(-1)[0].nonzero()) <= 2
    for row, b in enumerate(every):
        pages = table.pages[row].long()
        length = int(table.lengths[row])
        keys = cache.k[1, pages[pages >= 0]].flatten(0, 1)[:length, 0]
        tokens = cache.tokens(b)[:length].tolist()
        assert keys.int().tolist() == [[t, i] for i, t in enumerate(tokens)]
    # a second call copies nothing
    again = cache.k.clone()
    cache.block_table(every)
    assert torch.equal(cache.k.nan_to_num(), again.nan_to_num())


def rows_of(plan, batch):
    """Row of the batch -> its keys' slots and its items, through the parts."""
    item_of = {}
    for i, (first, rows, *_rest, part) in enumerate(plan.items.tolist()):
        item_of |= {part + r: (i, first + r) for r in range(rows)}
    found = {}
    for tree_row, row in enumerate(plan.rows.tolist()):
        begin, end = plan.part_offsets[tree_row : tree_row + 2].tolist()
        items = [item_of[p] for p in plan.parts[begin:end].tolist()]
        assert all(r == tree_row for _, r in items)
        slots = [
            s
            for i, _ in items
            for s in plan.slots[plan.items[i, 2] : plan.items[i, 2] + plan.items[i, 3]].tolist()
        ]
        found[row] = (slots, [i for i, _ in items])
    assert sorted(found) == list(range(batch))
    return found


def test_a_plan_reads_shared_chunks_once():
    cache = make(chunk=4)
    branch = prefilled(cache, 11)  # 10 cached: two chunks and a half
    children = cache.fork(branch, 3)
    feed(cache, children)
    cache.append(children, [1, 2, 3])
    feed(cache, children)
    other = prefilled(cache, 6)
    empty = cache.new([5])
    batch = torch.cat([children[:2], empty, other, children[2:]])
    plan = cache.plan(batch)
    assert plan.trees.tolist() == [0, 5, 7]
    assert plan.items[:, 1].tolist() == [3, 3, 1, 1, 1, 1, 1]
    assert plan.items[:, 4].tolist() == [0, 1, 2, 2, 2, 0, 1]
    assert plan.max_rows == 3
    found = rows_of(plan, len(batch))
    for row, b in enumerate(batch):
        assert found[row][0] == cache.slots(b).tolist()
    assert found[2] == ([], [])
    alone = rows_of(cache.plan(batch, share=False), len(batch))
    assert {r: s for r, (s, _) in alone.items()} == {r: s for r, (s, _) in found.items()}


def test_a_plan_of_new_tokens_reads_the_path_to_each_of_them():
    cache = make(chunk=4)
    branch = cache.new(range(7))
    cache.append_slots(branch, 5)
    child = cache.fork(branch, 1, at=4)
    cache.append(child, [9, 9, 9], torch.tensor([0, 3]))
    batch = torch.cat([child, branch])
    work = cache.append_slots(batch)
    count = work.cu_seqlens.diff()
    assert count.tolist() == [4, 2]
    plan = cache.plan(batch, count)
    found = rows_of(plan, 6)
    paths = [cache.slots(b).tolist() for b in batch]
    ends = [(0, 4), (0, 5), (0, 6), (0, 7), (1, 6), (1, 7)]
    assert [found[r][0] for r in range(6)] == [paths[b][:end] for b, end in ends]
    # the first chunk is read once for the rows of each side of the fork that have all of it
    assert sorted(plan.items[plan.items[:, 4] == 0, 1].tolist()) == [2, 4]
    with pytest.raises(ValueError, match=r"plan: branch . has no such length"):
        cache.plan(batch, [8, 1])


def test_export_is_depth_first_with_the_pending_tokens():
    cache = make()
    branch = prefilled(cache, 5, group=3)
    children = cache.fork(branch, 2)
    feed(cache, children)
    cache.append(children, [1, 2])
    cache.prune(branch)
    prefilled(cache, 4, group=4)
    out = cache.export_tree(3)
    assert out.parent.tolist() == [-1, 0, 1, 0, 3]
    assert out.start.tolist() == [0, 4, 5, 4, 5]
    assert out.length.tolist() == [4, 1, 1, 1, 1]
    assert out.subtree_end.tolist() == [8, 6, 6, 8, 8]
    assert out.kv_version.tolist() == [0, 0, -1, 0, -1]
    assert out.tokens.tolist() == [100, 101, 102, 103, 104, 1, 104, 2]
    assert out.branches.tolist() == children.tolist()
    assert out.branch_node.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.fork(99), ValueError, "fork: branch 99 does not exist, or no longer"),
        (lambda c: c.fork([0, 0]), ValueError, "fork: branch 0 is given twice"),
        (lambda c: c.fork(0, at=0), ValueError, "fork: branch 0 has no such length"),
        (lambda c: c.fork(0, at=11), ValueError, "fork: branch 0 has no such length"),
        (lambda c: c.fork(0, [1, 2]), ValueError, "fork: expected n of length 1, got 2"),
        (lambda c: c.fork(0, 2, forced=[1]), ValueError, "expected forced of length 2, got 1"),
        (lambda c: c.fork(0.5), TypeError, "expected integers, got float64"),
        (lambda c: c.fork(torch.ones(1)), TypeError, "expected integers, got torch.float32"),
        (lambda c: c.truncate(0, 11), ValueError, "truncate: branch 0 has no such length"),
        (lambda c: c.append_slots(0, 2), ValueError, "append_slots: branch 0 has no such"),
        (lambda c: c.append(0, [1, 2]), ValueError, "append: expected tokens of length 1, got 2"),
        (lambda c: c.unpin(0), ValueError, "unpin: branch 0 is pinned, or not pinned"),
        (lambda c: c.resample(0, 1), ValueError, "resample: branch 0 has no such"),
        (lambda c: c.bump_version(-1), ValueError, "expected a version that is not lower"),
        (lambda c: c.new([1], torch.tensor([0, 2])), ValueError, "to rise from 0 to T = 1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, message):
    cache = make()
    prefilled(cache)
    with pytest.raises(error, match=message):
        call(cache)
    check(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pages": 0}, "expected num_pages to be positive"),
        ({"stale": "never"}, "expected stale to be one of forbid, keep, recompute, got 'never'"),
        ({"num_pages": 2**28}, r"num_pages \* page_size below 2\^31"),
    ],
)
def test_a_bad_cache_is_refused(change, message):
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_pages": 4}
    with pytest.raises(ValueError, match=message):
        kv.TreeKVCache(**sizes | change)


def test_without_its_library_the_cache_says_how_to_build_it():
    code = (
        "import sys; sys.modules['rlkern._C_host'] = None\n"
        "from rlkern import kv\n"
        "kv.TreeKVCache(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "RuntimeError: rlkern.kv needs _C_host" in run.stderr
    assert "pip install pybind11" in run.stderr
    assert "make setup" in run.stderr


class Dense(RuleBasedStateMachine):
    """Every branch with all its tokens, against the cache."""

    def __init__(self):
        super().__init__()
        self.cache = make(num_pages=24, page_size=4, stale="keep", layers=1)
        self.tokens: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self.next = 0

    def fresh(self, count):
        self.next += count
        return list(range(self.next - count, self.next))

    def pick(self, data, most=4):
        return data.draw(
            st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, max_size=most, unique=True)
        )

    @rule(lengths=st.lists(st.integers(0, 14), min_size=1, max_size=3))
    def new(self, lengths):
        sequences = [self.fresh(n) for n in lengths]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        packed = [token for sequence in sequences for token in sequence]
        for b, sequence in zip(self.cache.new(packed, bounds).tolist(), sequences):
            self.tokens[b], self.cached[b] = sequence, 0

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), n=st.integers(0, 3), past=st.booleans(), forced=st.booleans())
    def fork(self, data, n, past, forced):
        (b,) = self.pick(data, 1)
        known = len(self.tokens[b])
        at = data.draw(st.integers(1, known)) if past and known else None
        extra = self.fresh(n) if forced and n else None
        children = self.cache.fork(b, n, at=at, forced=extra).tolist()
        for i, child in enumerate(children):
            self.tokens[child] = self.tokens[b][:at] + ([extra[i]] if extra else [])
            keep = known if at is None else at if extra else at - 1
            self.cached[child] = min(self.cached[b], keep)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def prune(self, data):
        gone = self.pick(data)
        self.cache.prune(gone)
        for b in gone:
            del self.tokens[b], self.cached[b]

    @precondition(lambda self: any(self.tokens.values()))
    @rule(data=st.data())
    def truncate(self, data):
        batch = [b for b in self.pick(data) if self.tokens[b]]
        lengths = [data.draw(st.integers(1, len(self.tokens[b]))) for b in batch]
        self.cache.truncate(batch, lengths)
        for b, t in zip(batch, lengths):
            self.tokens[b] = self.tokens[b][:t]
            self.cached[b] = min(self.cached[b], t - 1)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def resample(self, data):
        batch = self.pick(data)
        index = st.integers(0, len(batch) - 1)
        parents = data.draw(st.lists(index, min_size=len(batch), max_size=len(batch)))
        after = self.cache.resample(batch, parents).tolist()
        moved = {b: (self.tokens[batch[p]], self.cached[batch[p]]) for b, p in zip(after, parents)}
        for b in batch:
            del self.tokens[b], self.cached[b]
        for b, (tokens, cached) in moved.items():
            self.tokens[b], self.cached[b] = list(tokens), cached

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def append(self, data):
        batch = self.pick(data)
        new = self.fresh(len(batch))
        self.cache.append(batch, new)
        for b, t in zip(batch, new):
            self.tokens[b].append(t)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def append_slots(self, data):
        batch = self.pick(data, 8)
        before = [self.cache.slots(b).tolist() for b in batch]
        refused = None
        try:
            feed(self.cache, batch)
        except kv.OutOfPages as error:
            refused = error
        if refused:
            assert refused.needed > refused.free == self.cache.free_pages
            assert [self.cache.slots(b).tolist() for b in batch] == before
            return
        for b in batch:
            self.cached[b] = len(self.tokens[b])

    @rule()
    def bump(self):
        self.cache.bump_version()

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def read_through_pages(self, data):
        batch = self.pick(data)
        table = self.cache.block_table(batch)
        for row, b in enumerate(batch):
            pages = table.pages[row].long()
            keys = self.cache.k[0, pages[pages >= 0]].flatten(0, 1)[: self.cached[b], 0]
            want = [[t, i] for i, t in enumerate(self.tokens[b][: self.cached[b]])]
            assert keys.int().tolist() == want

    @invariant()
    def the_same_as_the_dictionary(self):
        check(self.cache)
        assert self.cache.branches().tolist() == sorted(self.tokens)
        pages = set()
        for b, tokens in self.tokens.items():
            assert self.cache.tokens(b).tolist() == tokens
            assert self.cache.cached(b).item() == self.cached[b]
            want = [[t, i] for i, t in enumerate(tokens[: self.cached[b]])]
            assert read(self.cache, b) == want
            pages |= {s // 4 for s in self.cache.slots(b).tolist()}
        assert len(pages) == self.cache.num_pages - self.cache.free_pages


Dense.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestDense = Dense.TestCase
