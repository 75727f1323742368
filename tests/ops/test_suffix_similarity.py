"""suffix_similarity: the words of bits say what a plain dynamic programme says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.suffix_similarity import reference, samples
from rlkern.testing.implementations import implementations
from rlkern.testing.numerics import assert_same_bits

OP = "suffix_similarity"


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (x != y)))
    return row[-1]


def subsequence(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        row, above = [0], row
        for j, y in enumerate(b, 1):
            row.append(above[j - 1] + 1 if x == y else max(row[-1], above[j]))
    return row[-1]


def suffix_anywhere(a, b):
    places = range(len(b) + 1)
    return max(
        n for n in range(len(a) + 1) if any(b[at : at + n] == a[len(a) - n :] for at in places)
    )


def plain(a, b, mode):
    if not a and not b:
        return 0.0 if mode == "edit" else 1.0
    longer = max(len(a), len(b))
    if mode == "edit":
        return levenshtein(a, b) / longer
    if mode == "suffix":
        return max(suffix_anywhere(a, b), suffix_anywhere(b, a)) / longer
    return 2 * subsequence(a, b) / (len(a) + len(b))


MODES = ["edit", "suffix", "rouge"]
ROWS = st.lists(st.integers(-1, 3), max_size=64)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=150, deadline=None)
@given(a=ROWS, b=ROWS, same=st.integers(0, 64))
def test_equals_a_plain_programme(mode, a, b, same):
    b = (b + a[:same])[:64]
    width = max(len(a), len(b))
    # what lies before the last tokens is not read
    rows = [torch.tensor([[-1] * (width - len(x)) + x], dtype=torch.int64) for x in (a, b)]
    rows = [row.view(1, width) for row in rows]
    lengths = [torch.tensor([len(x)]) for x in (a, b)]
    out = rlkern.suffix_similarity(*rows, mode=mode, lengths_a=lengths[0], lengths_b=lengths[1])
    torch.testing.assert_close(out.item(), plain(a, b, mode), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_every_kernel_gives_the_reference_s_bits(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        want = reference.forward(*args)
        for kernel in implementations(OP, device):
            assert_same_bits(f"{kernel.name} {name}", kernel.forward(*args), want)


def test_what_latr_compares(device):
    def of(a, b, mode):
        rows = (torch.tensor([x], device=device) for x in (a, b))
        return rlkern.suffix_similarity(*rows, mode=mode).item()

    assert of([1, 2, 3, 4], [1, 9, 3, 4], "edit") == 0.25
    assert of([1, 2, 3, 4], [2, 3, 4, 5], "edit") == 0.5
    # the end of a, in the middle of b
    assert of([9, 2, 3, 4], [2, 3, 4, 5], "suffix") == 0.75
    assert of([1, 2, 3, 4], [1, 9, 3, 8], "rouge") == 0.5


def test_a_whole_word_of_64_tokens(device):
    a = torch.arange(64, device=device)[None]
    assert rlkern.suffix_similarity(a, a, mode="edit").item() == 0
    assert rlkern.suffix_similarity(a, a, mode="suffix").item() == 1
    assert rlkern.suffix_similarity(a, a, mode="rouge").item() == 1
    assert rlkern.suffix_similarity(a, a + 64, mode="edit").item() == 1
    assert rlkern.suffix_similarity(a, a + 64, mode="rouge").item() == 0


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_deterministic(device):
    checks.check_deterministic(OP, device, torch.float32)


def test_compiles_whole(device):
    a, b = (torch.randint(5, (9, 30), device=device) for _ in range(2))

    def step(a, b):
        return rlkern.suffix_similarity(a, b + 1, mode="rouge") * 2

    assert_same_bits("compiled", checks.compiled(step)(a, b), step(a, b))


TOKENS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens_a": 3}, TypeError, "tokens_a to be a Tensor, got int"),
        ({"tokens_b": TOKENS.float()}, TypeError, "tokens_b of dtype int64 or int32"),
        ({"tokens_a": TOKENS[0]}, ValueError, r"tokens_a of shape \(N, r\)"),
        ({"tokens_b": TOKENS[:, :4]}, ValueError, r"tokens_b of shape \(N, r\) = \(2, 5\)"),
        ({"mode": "cosine"}, ValueError, "mode to be one of edit, rouge, suffix"),
        ({"lengths_a": torch.tensor([5, 6])}, ValueError, r"lengths_a in \[0, 5\], got 6"),
        ({"lengths_b": torch.tensor([5])}, ValueError, r"lengths_b of shape \(N,\)"),
        (
            {"tokens_a": TOKENS.repeat(1, 13), "tokens_b": TOKENS.repeat(1, 13)},
            ValueError,
            "tokens_a of at most 64 columns, got 65",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"tokens_a": TOKENS, "tokens_b": TOKENS} | change
    with pytest.raises(error, match=f"^suffix_similarity: .*{message}"):
        rlkern.suffix_similarity(arguments.pop("tokens_a"), arguments.pop("tokens_b"), **arguments)
