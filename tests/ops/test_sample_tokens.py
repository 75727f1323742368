"""sample_tokens: the kept set is Hugging Face's, the draw is exact, and nothing else changes it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.quantize_nvfp4 import reference as nvfp4
from rlkern.ops.sample_tokens import reference, samples
from rlkern.testing.implementations import implementations
from rlkern.testing.numerics import assert_same_bits, assert_within_budget

OP = "sample_tokens"
INF, NAN = float("inf"), float("nan")
NAMES = ("token", "logprob", "full_logprob", "entropy", "threshold", "last", "count")


def draw(logits, seed=3, first=0, **options):
    """A draw of each row with branch ids and positions of its own."""
    rows = torch.arange(first, first + logits.shape[0], device=logits.device)
    return rlkern.sample_tokens(
        logits, seed=seed, branch_ids=rows, positions=rows // 3 + 11, **options
    )


def kept_rows(out):
    bounds = out.kept_offsets.tolist()
    return [set(out.kept_ids[a:b].tolist()) for a, b in itertools.pairwise(bounds)]


def assert_as_the_reference(what, args, outputs, want):
    for name, got, ref in zip(NAMES, outputs, want, strict=True):
        if not got.is_floating_point() or name == "threshold":
            assert torch.equal(got.cpu(), ref.cpu()), f"{what} {name}: {got}, not {ref}"
            continue
        # the reference computes these in float64
        assert_within_budget(f"{what} {name}", got, ref.double(), ref)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    """Tokens and kept sets equal the reference's; log-probs are as near as float32 is."""
    for name, args in samples.sample_inputs(device, dtype):
        want = reference.forward(*args)
        for kernel in implementations(OP, device):
            assert_as_the_reference(f"{kernel.name} {name}", args, kernel.forward(*args), want)


@pytest.mark.parametrize("isa", ["avx2", "default"])
def test_every_instruction_set_draws_the_same(isa):
    checks.check_instruction_set(__file__, isa)


def test_kept_columns_of_every_kernel(device):
    kept = {"native": torch.ops.rlkern.kept_tokens}
    for kernel in implementations(OP, device):
        if kernel.name == "triton":
            from rlkern.ops.sample_tokens import triton

            kept["triton"] = triton.kept
    for name, args in samples.sample_inputs(device, torch.float32):
        logits, size = args[0], args[-2]
        *_, threshold, last, count = reference.forward(*args[:-1], True)
        offsets = torch.nn.functional.pad(count.cumsum(0), (1, 0))
        rest = logits, threshold, last, offsets, int(offsets[-1]), size
        want = reference.kept(*rest)
        for who, function in kept.items():
            assert torch.equal(function(*rest), want), f"{who} {name}"


def test_random_words_are_philox_with_the_whole_counter():
    """Known answers of Random123 for the counter and key of all ones, and for those of pi."""
    ones = torch.full((1,), -1, dtype=torch.int64)
    got = [int(w) for w in nvfp4.philox(ones, -1, ones)]
    assert got == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]

    def signed(x):
        return x - (1 << 64) if x >= 1 << 63 else x

    lower, upper, key = (
        signed(x) for x in (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822)
    )
    got = [int(w) for w in nvfp4.philox(torch.tensor([lower]), key, torch.tensor([upper]))]
    assert got == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_uniforms_are_scaled_without_a_rounding():
    random = torch.Generator().manual_seed(0)
    high, low = (torch.randint(2**32, (500,), generator=random) for _ in range(2))
    total = torch.randint(2**62, (500,), generator=random) >> torch.randint(
        60, (500,), generator=random
    )
    got = reference.scaled_down(high, low, total).tolist()
    for h, lo, t, g in zip(high.tolist(), low.tolist(), total.tolist(), got, strict=True):
        assert g == (((h >> 1) << 31 | lo >> 1) * t) >> 62


def test_weights_are_exponentials():
    d = -torch.linspace(0, 90, 20001)
    torch.testing.assert_close(
        reference.exp_decay(d).double(), d.double().clamp(min=-87).exp(), rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("kernel", ["native", "reference"])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}])
def test_frequencies_are_the_probabilities(kernel, filters):
    """Chi-squared, over more than one chunk of columns, with sequences and positions in turn."""
    random = torch.Generator().manual_seed(5)
    row = torch.full((4200,), -INF)
    some = torch.randperm(4200, generator=random)[:40]
    row[some] = 1.5 * torch.randn(40, generator=random)
    rows = 40000 if kernel == "native" else 1000
    logits = row.expand(rows, -1)
    arguments = samples.arguments(logits, 0.8, **filters, count=False)
    kernels = {k.name: k for k in implementations(OP, "cpu")}
    token, logprob, *_ = kernels[kernel].forward(*arguments)
    keep = kept_rows(draw(row[None], temperature=0.8, **filters, kept=True))[0]
    ids = torch.tensor(sorted(keep))
    p = (row[ids].double() / 0.8).softmax(0)
    observed = torch.stack([(token == i).sum() for i in ids]).double()
    assert observed.sum() == rows
    expected = rows * p
    chi = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(ids) - 1
    # about the 1 - 1e-5 quantile (Wilson and Hilferty)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.3 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi < limit, (chi, limit)
    at = torch.searchsorted(ids, token)
    torch.testing.assert_close(logprob.double(), p.log()[at], rtol=1e-6, atol=1e-6)


def test_sequences_positions_and_seeds_draw_independently():
    """Tokens of neighbours agree as often as independent ones would."""
    n, vocab = 20000, 16
    logits = torch.zeros(n, vocab)
    at = torch.arange(n)
    zero = torch.zeros_like(at)

    def tokens(seed, branches, positions):
        out = rlkern.sample_tokens(
            logits, seed=seed, branch_ids=branches, positions=positions, outputs=()
        )
        return out.token

    runs = [
        tokens(1, at, zero),
        tokens(2, at, zero),
        tokens(1, zero, at),
        tokens(1, at + (1 << 32), zero),
    ]
    runs += [tokens(1, at, zero + 1), tokens(1 + (1 << 32), at, zero), runs[0].roll(1)]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            agree = (a == b).double().mean().item()
            assert abs(agree - 1 / vocab) < 5 * (1 / vocab / n) ** 0.5


def test_batch_and_order_change_nothing(device):
    random = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(12, 4500, generator=random)).to(device)
    branches = torch.arange(12, device=device) * 31
    positions = torch.arange(12, device=device) % 5
    options = {"top_k": 900, "top_p": 0.9, "min_p": 0.001}
    for chosen in ({}, options):
        whole = rlkern.sample_tokens(
            logits, seed=9, branch_ids=branches, positions=positions, **chosen
        )
        order = torch.randperm(12, generator=random).to(device)[:7]
        part = rlkern.sample_tokens(
            logits[order], seed=9, branch_ids=branches[order], positions=positions[order], **chosen
        )
        for name, a, b in zip(whole._fields[:4], whole, part):
            assert_same_bits(name, a[order], b)


def test_a_filter_by_row_that_keeps_all_is_no_filter(device):
    logits = torch.randn(4, 4300, device=device)
    off = torch.zeros(4, device=device)
    plain = draw(logits)
    by_row = draw(
        logits, temperature=off + 1, top_k=off.long(), top_p=off + 1, min_p=off, greedy=off > 0
    )
    for name, a, b in zip(plain._fields[:4], plain, by_row):
        assert_same_bits(name, a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


def huggingface(z, k, p, min_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    if k:
        z = process.TopKLogitsWarper(k)(None, z)
    if p < 1:
        z = process.TopPLogitsWarper(p)(None, z)
    if min_p:
        z = process.MinPLogitsWarper(min_p)(None, z)
    return z


@pytest.mark.parametrize(
    ("k", "p", "min_p"),
    [
        (0, 0.9, 0.0),
        (50, 1.0, 0.0),
        (0, 1.0, 0.05),
        (300, 0.7, 0.0),
        (40, 0.95, 0.02),
        (0, 0.3, 0.2),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_kept_sets_and_probabilities_are_hugging_faces(k, p, min_p, temperature):
    random = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(8, 5003, generator=random)
    # float64: of its own cumulative sums, only the rounding of float32 is not ours
    want = huggingface(logits.double() / temperature, k, p, min_p)
    out = draw(logits, temperature=temperature, top_k=k, top_p=p, min_p=min_p, kept=True)
    for row, keep in enumerate(kept_rows(out)):
        assert keep == set((want[row] > -INF).nonzero()[:, 0].tolist())
    log_p = want.log_softmax(-1).gather(-1, out.token[:, None])[:, 0]
    torch.testing.assert_close(out.logprob.double(), log_p, rtol=1e-6, atol=2e-6)


def test_ties_of_top_k_stay_and_ties_of_top_p_go_by_id(device):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], device=device)
    assert kept_rows(draw(logits, top_k=2, kept=True)) == [{1, 2, 3, 4}]
    p = logits.double().softmax(-1)[0]
    between = (p[1] + 1.5 * p[2]).item()
    assert kept_rows(draw(logits, top_p=between, kept=True)) == [{1, 2, 3}]
    # top-p is of what top-k left
    assert kept_rows(draw(logits, top_k=1, top_p=0.9, kept=True)) == [{1}]


def test_greedy_takes_the_first_of_the_largest(device):
    logits = torch.tensor([[0.0, 5.0, 5.0], [7.0, 1.0, 7.0], [1.0, 1.0, 2.0]], device=device)
    for options in ({"greedy": True}, {"temperature": 0.0}, {"greedy": True, "top_p": 0.1}):
        assert draw(logits, **options).token.tolist() == [1, 0, 2]
    cold = torch.tensor([0.0, 1.0, 0.0], device=device)
    out = draw(logits, temperature=cold)
    assert out.token[[0, 2]].tolist() == [1, 2]
    want = logits.double().log_softmax(-1).gather(-1, out.token[:, None])[:, 0]
    torch.testing.assert_close(out.full_logprob.double(), want, rtol=1e-6, atol=1e-6)
    # nothing but the largest is left
    assert draw(logits[2:], greedy=True, top_k=1).logprob.tolist() == [0.0]


def test_outputs_against_float64(device):
    logits = 4 * torch.randn(16, 9001, device=device)
    out = draw(logits, temperature=0.7)
    log_p = (logits.double() / 0.7).log_softmax(-1)
    picked = log_p.gather(-1, out.token[:, None])[:, 0]
    torch.testing.assert_close(out.logprob.double(), picked, rtol=1e-6, atol=2e-6)
    assert_same_bits("logprob", out.logprob, out.full_logprob)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-6, atol=2e-6)
    few = draw(logits, outputs=("entropy",))
    assert few.logprob is None
    assert few.full_logprob is None
    assert few.kept_ids is None


def test_the_kept_set_replays_in_sparse_linear_logprob():
    hidden, weight = torch.randn(6, 32), torch.randn(900, 32)
    out = draw(hidden @ weight.T, temperature=0.8, top_k=40, top_p=0.9, kept=True)
    replay = rlkern.sparse_linear_logprob(
        hidden, weight, out.token, out.kept_ids, out.kept_offsets, temperature=0.8
    )
    torch.testing.assert_close(replay.logprob, out.logprob, rtol=1e-5, atol=1e-5)


def test_rows_without_a_distribution(device):
    logits = torch.zeros(4, 300, device=device)
    logits[0], logits[1, 7], logits[2, 9] = -INF, NAN, INF
    for options in ({}, {"top_k": 5}, {"greedy": True}):
        out = draw(logits, kept=True, **options)
        assert out.token[:3].tolist() == [-1, -1, -1]
        assert out.token[3] >= 0
        for value in (out.logprob, out.full_logprob, out.entropy):
            assert value[:3].isnan().all()
            assert value[3].isfinite()
        assert out.kept_offsets[:4].tolist() == [0, 0, 0, 0]


def test_padding_is_not_read(device):
    logits = torch.randn(3, 2100, device=device)
    padded = torch.cat([logits, torch.full((3, 40), NAN, device=device)], 1)
    for options in ({}, {"top_p": 0.9}):
        a, b = draw(logits, **options), draw(padded, vocab_size=2100, **options)
        for name, x, y in zip(a._fields[:4], a, b):
            assert_same_bits(name, x, y)


def test_opcheck(device):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, args in samples.sample_inputs(device, torch.float32):
        # it takes NaN for a difference
        if not name.startswith("without"):
            torch.library.opcheck(torch.ops.rlkern.sample_tokens.default, args, test_utils=tests)
    logits = torch.randn(2, 30, device=device)
    bar = torch.zeros(2, device=device)
    last = torch.full((2,), -1, device=device)
    offsets = torch.nn.functional.pad((logits > 0).sum(-1).cumsum(0), (1, 0))
    args = logits, bar, last, offsets, int(offsets[-1]), 30
    torch.library.opcheck(torch.ops.rlkern.kept_tokens.default, args, test_utils=tests)


def test_compiles_whole(device):
    logits = torch.randn(4, 700, device=device)

    def step(logits):
        return draw(logits * 2, top_p=0.9, temperature=0.7)[:4]

    for a, b in zip(checks.compiled(step)(logits), step(logits)):
        assert_same_bits("compiled", a, b)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 5000),
    scale=st.sampled_from([0.0, 0.5, 3.0, 100.0]),
    step=st.sampled_from([0.0, 0.5]),
    masked=st.sampled_from([0.0, 0.5, 0.99]),
    k=st.integers(0, 5000),
    p=st.floats(1e-6, 1.0),
    min_p=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    temperature=st.floats(0.05, 5.0),
    dtype=st.sampled_from(checks.DTYPES),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_distribution(rows, vocab, scale, step, masked, k, p, min_p, temperature, dtype, seed):
    random = torch.Generator().manual_seed(seed % 2**31)
    logits = scale * torch.randn(rows, vocab, generator=random)
    if step:
        logits = (logits / step).round() * step
    logits[torch.rand(logits.shape, generator=random) < masked] = -INF
    args = samples.arguments(logits.to(dtype), temperature, k, p, min_p, seed=seed)
    want = reference.forward(*args)
    assert_as_the_reference("native", args, torch.ops.rlkern.sample_tokens(*args), want)


ROWS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "expected logits to be a Tensor, got list"),
        ({"logits": torch.zeros(2, 3).double()}, TypeError, "logits of dtype float32 or bfloat16"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits of shape \(R, V\)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits to have between 1 and"),
        ({"seed": 1.5}, TypeError, "seed to be an int, got float"),
        ({"seed": 2**63}, ValueError, "seed to have at most 64 bits"),
        ({"branch_ids": ROWS[:1]}, ValueError, r"branch_ids of shape \(R,\) = \(2,\), got \(1,\)"),
        ({"positions": ROWS.float()}, TypeError, "positions of dtype int64 or int32"),
        ({"temperature": -1.0}, ValueError, "temperature to be at least 0 and finite, got -1.0"),
        ({"temperature": "hot"}, TypeError, "temperature to be a number or a Tensor, got str"),
        ({"temperature": torch.tensor([1.0, NAN])}, ValueError, "temperature .* got nan"),
        ({"top_k": -1}, ValueError, "top_k to be at least 0, got -1"),
        ({"top_k": 2.0}, TypeError, "top_k to be an int or a Tensor, got float"),
        ({"top_k": torch.tensor([3, -2])}, ValueError, "top_k to be at least 0, got -2"),
        ({"top_p": 0.0}, ValueError, "top_p to be in"),
        ({"top_p": torch.tensor([0.5, 1.5])}, ValueError, "top_p to be in .* got 1.5"),
        ({"min_p": 1.1}, ValueError, r"min_p to be in \[0, 1\], got 1.1"),
        ({"greedy": 1}, TypeError, "greedy to be a bool, got int"),
        ({"greedy": ROWS}, TypeError, "greedy of dtype bool"),
        ({"vocab_size": 9}, ValueError, r"vocab_size in \[1, V\]"),
        ({"outputs": "logprob"}, ValueError, "outputs to be a tuple"),
        ({"outputs": ("nll",)}, ValueError, "outputs to be one of"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    good = {"logits": torch.zeros(2, 3), "seed": 1, "branch_ids": ROWS, "positions": ROWS}
    arguments = good | change
    with pytest.raises(error, match=f"^sample_tokens: .*{message}"):
        rlkern.sample_tokens(arguments.pop("logits"), **arguments)
