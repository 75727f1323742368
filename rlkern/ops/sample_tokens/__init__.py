"""The next token of each row, its log-probs, and the tokens that it was drawn from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops.sample_tokens import op as _op  # noqa: F401

_OP = "sample_tokens"
OUTPUTS = ("logprob", "full_logprob", "entropy")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# masses of more columns would overflow (csrc/include/rlkern/math/sample.h)
_MOST_COLUMNS = 2**22
_LARGEST = torch.finfo(torch.float32).max


class SampleOutput(NamedTuple):
    """The tokens, and what was asked for; None for the rest."""

    token: Tensor
    """(R,) int64"""
    logprob: Tensor | None = None
    """(R,) float32, under the distribution that the token was drawn from"""
    full_logprob: Tensor | None = None
    """(R,) float32, under softmax(logits / temperature)"""
    entropy: Tensor | None = None
    """(R,) float32, of softmax(logits / temperature), in nats"""
    kept_ids: Tensor | None = None
    """(N,) int64, row after row, ascending"""
    kept_offsets: Tensor | None = None
    """(R + 1,) int64"""


def sample_tokens(
    logits: Tensor,
    *,
    seed: int,
    branch_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    greedy: bool | Tensor = False,
    vocab_size: int | None = None,
    outputs: Sequence[str] = OUTPUTS,
    kept: bool = False,
) -> SampleOutput:
    """Draws a token a row from softmax(logits / temperature), cut by top-k, top-p and min-p.

        p = softmax(logits / temperature)
        K = all tokens; then, each on what is left:
            top_k: the k most probable; further ones that tie with the last of them stay
            top_p: in the order of p, of equal ones the lower id first, those before which there
                is less than top_p of the (renormalised) mass: the one that crosses it stays
            min_p: those of at least min_p max p
        token ~ p restricted to K;  logprob = log p[token] - log p(K);  full_logprob = log p[token]

    Equivalent torch program (Hugging Face's order; sorts the vocabulary, and the draw depends on
    the rows beside it)::

        z = logits.float() / temperature
        for warper in (TopKLogitsWarper(k), TopPLogitsWarper(p), MinPLogitsWarper(min_p)):
            z = warper(None, z)
        token = z.softmax(-1).multinomial(1)[:, 0]

    Random numbers are a function of (seed, branch id, position) alone (Philox4x32-10): batch, order
    of rows, pruning and device do not change a sample. Two rows with the same three draw alike.
    What is summed are integers, so every kernel draws the same token of the same logits.

    Args:
        logits: (R, V) float32, bfloat16 or float16, any strides; -inf marks a token that may not
            occur. At most 2^22 columns.
        seed: any int of 64 bits.
        branch_ids: (R,) int64 or int32: which sequence a row belongs to.
        positions: (R,) int64 or int32: where in the sequence the token will stand.
        temperature: a number or an (R,) tensor, 0 or above. 0 means greedy, with the log-probs and
            the filters of temperature 1.
        top_k: an int or an (R,) integer tensor; 0 keeps all, as does V or more.
        top_p: a number or an (R,) tensor in (0, 1]; 1 keeps all.
        min_p: a number or an (R,) tensor in [0, 1]; 0 keeps all.
        greedy: takes the most probable token, the lowest id of equal ones; a bool or an (R,) bool
            tensor. Log-probs are those that a draw of that token would have.
        vocab_size: how many entries of the vocabulary exist; the rest is padding, which may hold
            anything, NaN included.
        outputs: which of "logprob", "full_logprob" and "entropy" to return; may be empty.
        kept: return K as well: kept_ids and kept_offsets for `sparse_linear_logprob`. Their number
            is read from the device, which waits for it.

    Returns:
        SampleOutput. A row with NaN, +inf, or -inf alone has token -1, NaN log-probs and entropy,
        and keeps nothing. No gradient goes through any of it.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or number that does not fit. The values
            of per-row tensors are checked on the CPU only.

    Probabilities are exact to 2^-31 of the most probable kept token among each 2048 columns: below
    2^-32 of it a token is never drawn. logprob and full_logprob have no such cut.
    """
    _check.tensor(_OP, "logits", logits)
    _check.dtype(_OP, "logits", logits, _DTYPES)
    _check.ndim(_OP, "logits", logits, "(R, V)")
    rows, columns = logits.shape
    size = _logprob.check_vocab_size(_OP, vocab_size, columns)
    if not 0 < size <= _MOST_COLUMNS:
        _check.fail(_OP, "logits", f"to have between 1 and {_MOST_COLUMNS} columns", size)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{_OP}: expected seed to be an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        _check.fail(_OP, "seed", "to have at most 64 bits", seed)
    if isinstance(outputs, str):
        _check.fail(_OP, "outputs", f"to be a tuple of {OUTPUTS}", repr(outputs))
    for name in outputs:
        _check.one_of(_OP, "outputs", name, OUTPUTS)
    branch_ids = _row_ids("branch_ids", branch_ids, logits)
    positions = _row_ids("positions", positions, logits)

    temperature = _per_row("temperature", temperature, logits, 0.0, _LARGEST)
    greedy = _greedy(greedy, logits)
    if isinstance(temperature, Tensor):
        cold = temperature == 0
        greedy = cold if greedy is None else greedy | cold
        inverse = torch.where(cold, 1.0, 1.0 / temperature).clamp(max=_LARGEST)
    else:
        if temperature == 0:
            greedy, temperature = logits.new_ones((rows,), dtype=torch.bool), 1.0
        warmth = logits.new_full((rows,), temperature, dtype=torch.float32)
        inverse = (1.0 / warmth).clamp(max=_LARGEST)
    top_k = _top_k(top_k, logits, size)
    top_p = _filter("top_p", top_p, logits, 1.0)
    min_p = _filter("min_p", min_p, logits, 0.0)
    # in float64: devices differ in the last bit of a logarithm
    log_min_p = None if min_p is None else min_p.double().log().float()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    logits = logits.detach()
    token, logprob, full_logprob, entropy, threshold, last, count = torch.ops.rlkern.sample_tokens(
        logits,
        branch_ids,
        positions,
        inverse.contiguous(),
        greedy,
        top_k,
        top_p,
        log_min_p,
        seed,
        size,
        kept,
    )
    found = {"logprob": logprob, "full_logprob": full_logprob, "entropy": entropy}
    chosen = {name: found[name] for name in outputs}
    if kept:
        offsets = torch.nn.functional.pad(count.cumsum(0), (1, 0))
        number = int(offsets[-1])
        ids = torch.ops.rlkern.kept_tokens(logits, threshold, last, offsets, number, size)
        chosen |= {"kept_ids": ids, "kept_offsets": offsets}
    return SampleOutput(token, **chosen)


def _row_ids(name: str, value: Tensor, logits: Tensor) -> Tensor:
    _check.tensor(_OP, name, value)
    _check.dtype(_OP, name, value, _check.INTEGERS)
    _check.shape(_OP, name, value, (logits.shape[0],), "(R,)")
    _check.same_device(_OP, name, value, "logits", logits.device)
    return value.long().contiguous()


def _greedy(value: bool | Tensor, logits: Tensor) -> Tensor | None:
    if isinstance(value, Tensor):
        _check.dtype(_OP, "greedy", value, (torch.bool,))
        _check.shape(_OP, "greedy", value, (logits.shape[0],), "(R,)")
        _check.same_device(_OP, "greedy", value, "logits", logits.device)
        return value.contiguous()
    if not isinstance(value, bool):
        raise TypeError(f"{_OP}: expected greedy to be a bool, got {type(value).__name__}")
    return logits.new_ones((logits.shape[0],), dtype=torch.bool) if value else None


def _per_row(
    name: str, value: float | Tensor, logits: Tensor, least: float, most: float
) -> float | Tensor:
    """The number, or a float32 tensor of the rows, within its bounds; below least 0 is outside."""
    if isinstance(value, Tensor):
        _check.dtype(_OP, name, value, _check.FLOATS)
        _check.shape(_OP, name, value, (logits.shape[0],), "(R,)")
        _check.same_device(_OP, name, value, "logits", logits.device)
        value = value.detach().float().contiguous()
        if value.is_cpu and not torch.compiler.is_compiling():
            inside = (value >= least) & (value <= most)
            if not bool(inside.all()):
                _fail_range(name, least, most, value[~inside][0].item())
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = type(value).__name__
        raise TypeError(f"{_OP}: expected {name} to be a number or a Tensor, got {kind}")
    if not least <= value <= most:
        _fail_range(name, least, most, value)
    return float(value)


def _fail_range(name: str, least: float, most: float, got: float) -> None:
    bounds = "at least 0 and finite" if most == _LARGEST else f"in [{least:g}, {most:g}]"
    _check.fail(_OP, name, f"to be {bounds}", got)


def _filter(name: str, value: float | Tensor, logits: Tensor, off: float) -> Tensor | None:
    # top_p is above 0: the least float stands for that
    least = torch.finfo(torch.float32).tiny if off else 0.0
    value = _per_row(name, value, logits, least, 1.0)
    if isinstance(value, Tensor):
        return value
    if value == off:
        return None
    return logits.new_full((logits.shape[0],), value, dtype=torch.float32)


def _top_k(value: int | Tensor, logits: Tensor, size: int) -> Tensor | None:
    if isinstance(value, Tensor):
        value = _row_ids("top_k", value, logits)
        if value.is_cpu and not torch.compiler.is_compiling() and bool((value < 0).any()):
            _check.fail(_OP, "top_k", "to be at least 0", int(value.min()))
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        kind = type(value).__name__
        raise TypeError(f"{_OP}: expected top_k to be an int or a Tensor, got {kind}")
    if value < 0:
        _check.fail(_OP, "top_k", "to be at least 0", value)
    if value == 0 or value >= size:
        return None
    return logits.new_full((logits.shape[0],), value, dtype=torch.int64)
