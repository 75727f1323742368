"""branch_select: LATR's test and ROSE's diversity, on distributions made by hand and at random."""

import pytest
import torch
from ops import checks

import rlkern
from rlkern.ops.branch_select import reference, samples
from rlkern.testing.implementations import implementations
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

OP = "branch_select"
INF = float("inf")


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        branch, diversity = reference.forward(*args)
        _, exact = reference.forward(*to_double(args))
        for kernel in implementations(OP, device):
            got, amount = kernel.forward(*args)
            assert torch.equal(got, branch), f"{kernel.name} {name}"
            assert_within_budget(f"{kernel.name} {name}", amount, exact, diversity)


def test_latr_s_test(device):
    p = torch.tensor(
        [[0.5, 0.4, 0.1], [0.5, 0.3, 0.2], [0.1, 0.45, 0.45], [0.9, 0.05, 0.05]], device=device
    )
    logits = p.log() + 3
    out = rlkern.branch_select(logits, m=3, tau_abs=0.25, tau_rel=0.15)
    assert out.branch.int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert out.ids[0].tolist() == [0, 1, 2]
    torch.testing.assert_close(out.logprob.exp(), p.sort(-1, descending=True).values)
    torch.testing.assert_close(out.entropy, -(p * p.log()).sum(-1))
    assert out.diversity is None
    # each half alone
    wide = rlkern.branch_select(logits, m=3, tau_abs=0.25)
    assert wide.branch.int().tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]]
    near = rlkern.branch_select(logits, m=3, tau_rel=0.32)
    assert near.branch.int().tolist() == [[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_diversity_is_the_cosines_between_candidates(device, dtype):
    logits = torch.randn(6, 300, device=device).to(dtype)
    embedding = torch.randn(300, 50, device=device).to(dtype) + 0.2
    out = rlkern.branch_select(logits, embedding=embedding, temperature=0.8, top=20)
    p = (logits.double() / 0.8).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    for row in range(6):
        # the ids as they were chosen: bfloat16 logits tie
        ids = rlkern.branch_select(logits, m=20, temperature=0.8).ids[row]
        e = torch.nn.functional.normalize(embedding[ids].double(), dim=-1)
        cosine = (e @ e.T).fill_diagonal_(0)
        want = -entropy[row] * (p[row, ids] @ cosine @ p[row, ids])
        torch.testing.assert_close(out.diversity[row].double(), want, rtol=1e-5, atol=1e-6)


def test_synonyms_are_less_diverse_than_strangers(device):
    logits = torch.zeros(1, 2, device=device)
    same, apart = torch.ones(2, 3, device=device), torch.eye(2, 3, device=device)
    log2 = torch.tensor(2.0).log()
    got = [rlkern.branch_select(logits, embedding=e).diversity.item() for e in (same, apart)]
    torch.testing.assert_close(torch.tensor(got), torch.tensor([-log2 / 2, 0.0]))


def test_rows_with_fewer_tokens_than_candidates(device):
    logits = torch.full((1, 9), -INF, device=device)
    logits[0, 4] = 1.0
    out = rlkern.branch_select(logits, m=3, embedding=torch.ones(9, 4, device=device))
    assert out.ids.tolist() == [[4, -1, -1]]
    assert not out.branch.any()
    assert abs(out.diversity.item()) < 1e-6


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_deterministic(device):
    checks.check_deterministic(OP, device, torch.bfloat16)


def test_compiles_whole(device):
    logits, embedding = torch.randn(4, 60, device=device), torch.randn(60, 8, device=device)

    def step(logits, embedding):
        out = rlkern.branch_select(logits * 2, embedding=embedding, tau_abs=0.1)
        return out.branch, out.diversity

    for a, b in zip(checks.compiled(step)(logits, embedding), step(logits, embedding)):
        assert_same_bits("compiled", a, b)


LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": 1}, TypeError, "logits to be a Tensor, got int"),
        ({"logits": LOGITS.int()}, TypeError, "logits of dtype float32"),
        ({"logits": LOGITS[0]}, ValueError, r"logits of shape \(R, V\)"),
        ({"m": 6}, ValueError, r"m to be in \[1, 5\], got 6"),
        ({"m": 2.0}, TypeError, "m to be an int, got float"),
        ({"top": 0}, ValueError, "top to be at least 1, got 0"),
        ({"tau_abs": "x"}, TypeError, "tau_abs to be a number, got str"),
        ({"embedding": LOGITS[0]}, ValueError, r"embedding of shape \(V, H\)"),
        ({"vocab_size": 6}, ValueError, r"vocab_size in \[1, V\]"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"logits": LOGITS} | change
    with pytest.raises(error, match=f"^branch_select: .*{message}"):
        rlkern.branch_select(arguments.pop("logits"), **arguments)
