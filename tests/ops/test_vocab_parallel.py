"""linear_logprob over a head cut between two processes, against the whole head in one."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ops import checks
from torch import Tensor

import rlkern
from rlkern.ops._logprob import OUTPUTS, Rows, Scalars
from rlkern.ops.linear_logprob.vocab_parallel import Parts, merge
from rlkern.testing.numerics import assert_same_bits

RANKS = 2
ROWS, HIDDEN, HEIGHT = 9, 24, 37
VOCAB = RANKS * HEIGHT
DIFFERENTIABLE = ("logprob", "entropy", "logsumexp", "topk_values", "id_logprob")
COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single"),
    *("all_reduce", "all_to_all", "all_to_all_single", "barrier", "broadcast", "gather", "recv"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send"),
)


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    options: dict


def make(
    *,
    rows: int = ROWS,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    far: float = 0.0,
    ties: bool = False,
    size: int = VOCAB,
    train: tuple[bool, bool] = (True, True),
    targets: Tensor | None = None,
    ids: Tensor | None = None,
    **options,
) -> Problem:
    """The whole head. `far` is added to all logits; `ties`: the second half equals the first."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    hidden, weight, offsets = normal(rows, HIDDEN), normal(VOCAB, HIDDEN), normal(VOCAB) + far
    if ties:
        weight[HEIGHT:], offsets[HEIGHT:] = weight[:HEIGHT], offsets[:HEIGHT]
    weight[size:], offsets[size:] = float("nan"), float("nan")
    if targets is None:
        targets = torch.randint(size, (rows,), generator=random)
    if ids is None:
        ids = torch.randint(size, (rows, 4), generator=random)
    hidden.requires_grad_(train[0])
    weight.requires_grad_(train[1])
    options = {"topk": 6, "ids": ids, "outputs": OUTPUTS, "vocab_size": size} | options
    kept = offsets.requires_grad_(train[1]) if bias else None
    return Problem(hidden, weight, kept, targets, options)


def strange_ids() -> Tensor:
    ids = torch.arange(ROWS * 4).view(ROWS, 4)
    ids[:, 0], ids[2, 1], ids[3, 2], ids[4, 3] = -100, -7, VOCAB, 2**40
    return ids


CASES = {
    "plain": lambda: make(bias=False),
    "bias": lambda: make(temperature=0.7),
    "logprob alone": lambda: make(topk=0, ids=None, outputs=("logprob",)),
    "top flag alone": lambda: make(topk=0, outputs=("is_top1",)),
    "soft cap and scale": lambda: make(softcap=4.0, logit_scale=0.6),
    "masked": lambda: make(vocab_mask=torch.arange(VOCAB) % 3 != 1),
    "a rank all masked": lambda: make(vocab_mask=torch.arange(VOCAB) >= HEIGHT),
    "padded": lambda: make(size=VOCAB - 5),
    "a rank all padding": lambda: make(size=HEIGHT - 3, vocab_mask=torch.arange(VOCAB) % 3 != 1),
    "fewer than topk on a rank": lambda: make(size=HEIGHT + 2, topk=HEIGHT + 1),
    "ignored and out of range": lambda: make(
        targets=torch.tensor([3, -100, HEIGHT, -1, VOCAB, -100, 2**62, -(2**62), VOCAB - 1]),
        ids=strange_ids(),
    ),
    # that number is also a row of the other rank's
    "an ignored token that exists": lambda: make(
        targets=torch.arange(ROWS) % 2 * HEIGHT + 5, ignore_index=5
    ),
    # what stands for it in a rank's own call
    "ignored by -2": lambda: make(targets=torch.tensor([-2, -1, 0] * 3), ignore_index=-2),
    "row temperatures": lambda: make(temperature=torch.linspace(0.5, 2.0, ROWS)),
    "ties": lambda: make(ties=True, topk=9),
    "frozen head": lambda: make(train=(True, False)),
    "frozen hidden states": lambda: make(train=(False, True)),
    "far below zero": lambda: make(far=-200.0),
    "no rows": lambda: make(rows=0),
    "float64": lambda: make(dtype=torch.float64),
    "bfloat16": lambda: make(dtype=torch.bfloat16),
    "bfloat16, rounded": lambda: make(dtype=torch.bfloat16, logits_rounding="bf16", topk=0),
}
# Of values, which are float32 whatever the inputs; then of gradients.
CLOSE = {
    torch.float32: (2e-6, 4e-6),
    torch.float64: (1e-13, 1e-13),
    # each rank's part of a gradient is rounded
    torch.bfloat16: (2e-6, 2e-2),
}


def compute(
    problem: Problem,
    group: dist.ProcessGroup | None = None,
    part: slice | None = None,
    compiled: Callable = lambda function: function,
) -> tuple[dict, dict, tuple[int, int]]:
    """Outputs by name, gradients by name, and how many collectives each of the passes took."""
    hidden, weight, bias, targets, options = problem
    part = part or slice(None)
    weight = weight.detach()[part].requires_grad_(weight.requires_grad)
    if bias is not None:
        bias = bias.detach()[part].requires_grad_(bias.requires_grad)
    if "vocab_mask" in options:
        options = options | {"vocab_mask": options["vocab_mask"][part]}
    _CALLS.clear()
    run = compiled(partial(rlkern.linear_logprob, tp_group=group, **options))
    values = run(hidden, weight, targets, bias=bias)._asdict()
    forward = len(_CALLS)
    values = {name: x for name, x in values.items() if x is not None}
    random = torch.Generator().manual_seed(4)
    chosen = [values[name] for name in DIFFERENTIABLE if name in values]
    upstream = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in chosen]
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    grads = ()
    if chosen:
        grads = torch.autograd.grad(chosen, list(leaves.values()), upstream)
    values = {name: x.detach() for name, x in values.items()}
    return values, dict(zip(leaves, grads)), (forward, len(_CALLS) - forward)


_CALLS: list[str] = []


def count_collectives() -> None:
    def counting(name: str, call):
        def run(*args, **kwargs):
            _CALLS.append(name)
            return call(*args, **kwargs)

        return run

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, counting(name, getattr(dist, name)))


def work(rank: int, folder: str) -> None:
    """A rank's results of every case, left in a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    alone = [dist.new_group([r]) for r in range(RANKS)][rank]
    rows = slice(rank * HEIGHT, (rank + 1) * HEIGHT)
    with_compiler = compute(CASES["bias"](), dist.group.WORLD, rows, checks.compiled)
    count_collectives()
    results = {name: compute(case(), dist.group.WORLD, rows) for name, case in CASES.items()}
    results["compiled"] = with_compiler
    results["a group of one"] = compute(CASES["bias"](), alone)
    results["no group"] = compute(CASES["bias"]())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(work, args=(folder,), nprocs=RANKS)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_process_gives(ranks, name):
    problem = CASES[name]()
    values, grads, _ = compute(problem)
    for_values, for_grads = CLOSE[problem.hidden.dtype]
    if name == "far below zero":
        # logsumexps of -200 are rounded to 1.5e-5
        for_values, for_grads = 3e-5, 3e-5
    (got, _, _), (other, _, _) = (rank[name] for rank in ranks)
    for key, want in values.items():
        close = {"rtol": for_values, "atol": for_values, "equal_nan": True}
        torch.testing.assert_close(got[key], want, **close, msg=lambda m, k=key: f"{k}: {m}")
        assert_same_bits(key, got[key], other[key])
    parts = [rank[name][1] for rank in ranks]
    assert parts[0].keys() == parts[1].keys() == grads.keys()
    for key, want in grads.items():
        pair = [part[key] for part in parts]
        if key == "hidden":
            assert_same_bits("grad_hidden", *pair)
        found = pair[0] if key == "hidden" else torch.cat(pair)
        close = {"rtol": for_grads, "atol": for_grads * float(want.abs().max() if len(want) else 1)}
        torch.testing.assert_close(found, want, **close, msg=lambda m, k=key: f"grad_{k}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_one_collective_in_the_forward_and_one_for_hidden_in_the_backward(ranks, name):
    for rank in ranks:
        values, grads, passes = rank[name]
        differentiated = bool(set(values) & set(DIFFERENTIABLE))
        assert passes == (1, int("hidden" in grads and differentiated))


@pytest.mark.parametrize(("name", "same"), [("a group of one", "no group"), ("compiled", "bias")])
def test_same_bits(ranks, name, same):
    for rank in ranks:
        for got, want in zip(rank[name][:2], rank[same][:2]):
            assert got.keys() == want.keys()
            for key in want:
                assert_same_bits(key, got[key], want[key])


def test_the_merge_of_a_row_does_not_depend_on_the_others():
    def random(*shape: int) -> Tensor:
        return -torch.rand(3, 501, *shape) * 9

    flags = (torch.rand(3, 501) < 0.5).float()
    numbers = (random(3), random(), -random(), random().exp(), flags, random(2))
    parts = Parts(*numbers, torch.randint(HEIGHT, (3, 501, 2)))
    rows = Rows(torch.randint(3 * HEIGHT, (501,)), torch.randint(VOCAB, (501, 2)), None, None)
    scalars = Scalars(1.0, 1.0, 0.0, -100, 3 * HEIGHT, False)
    whole = merge(parts, rows, scalars, HEIGHT, 2)
    for some in (slice(0, 1), slice(3, 20), slice(490, 501)):
        fewer = Rows(rows.targets[some], rows.ids[some], None, None)
        part = merge(Parts(*(x[:, some] for x in parts)), fewer, scalars, HEIGHT, 2)
        for name, got, want in zip(part._fields, part, whole):
            assert_same_bits(name, got, want[some])


def test_a_group_of_another_kind_is_refused():
    problem = make()
    with pytest.raises(TypeError, match="linear_logprob: expected tp_group to be a ProcessGroup"):
        rlkern.linear_logprob(*problem[:2], problem.targets, tp_group=2)
