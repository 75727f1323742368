"""Does this installation compute what the references say? `python -m rlkern --self-test`.

Every op's registered kernels run over the op's own samples on every device here, and are held
against the reference in plain torch. A smoke test of a build on a machine, with nothing installed
but torch and numpy: the error budgets are held in tests/.
"""

import importlib
import time
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _library, _native
from rlkern.kv._host import load as load_tree
from rlkern.testing.implementations import OPS, schema_names

# Of the largest element: sums in another order, and a rounding or two of a 16-bit result.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = (torch.float32, torch.bfloat16)


class Row(NamedTuple):
    name: str
    device: str
    kernel: str
    samples: int
    worst: float  # over the tolerance
    problem: str  # '' when all is well


def check_op(op: str, device: str) -> Row:
    """One op's forward and, where it has one, backward, over its samples."""
    reference, samples = (
        importlib.import_module(f"rlkern.ops.{op}.{part}") for part in ("reference", "samples")
    )
    names = schema_names(op)
    key = "CUDA" if device == "cuda" else "CPU"
    kernel = ", ".join(dict.fromkeys(_library.OWNERS[name][key].kernel for name in names))
    ops = [getattr(torch.ops.rlkern, name) for name in names]
    count, worst, what = 0, 0.0, "samples"
    try:
        for dtype in DTYPES:
            for sample, args in samples.sample_inputs(device, dtype):
                what = f"{sample!r}, {dtype}"
                # some ops write into their arguments
                ours, theirs = _copy(args), _copy(args)
                outputs = _tuple(ops[0](*ours))
                wants = _tuple(reference.forward(*theirs))
                worst = max(worst, _compare((*outputs, *ours), (*wants, *theirs)))
                if len(ops) > 1:
                    # each from what it has saved itself
                    gradients = _tuple(ops[1](*samples.backward_inputs(args, outputs)))
                    wanted = _tuple(reference.backward(*samples.backward_inputs(args, wants)))
                    worst = max(worst, _compare(gradients, wanted))
                count += 1
    except Exception as error:
        # the table goes on: which ops fail together tells the cause
        message = f"{what}: {error}".strip().split("\n")[0]
        return Row(op, device, kernel, count, float("nan"), message)
    return Row(op, device, kernel, count, worst, "")


def _tuple(outputs) -> tuple:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _copy(args: tuple) -> tuple:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def _compare(got: tuple, want: tuple) -> float:
    """The largest error over its tolerance; raises where it is above 1."""
    worst = 0.0
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if isinstance(w, Tensor)]
    for i, (ours, theirs) in enumerate(pairs):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            kinds = [f"{tuple(x.shape)} {x.dtype}" for x in (ours, theirs)]
            raise AssertionError(f"result {i} is {kinds[0]}, the reference's {kinds[1]}")
        if theirs.numel() == 0:
            continue
        if theirs.dtype not in TOLERANCE:
            # codes and indices
            if theirs.is_floating_point():
                ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
            differ = int((ours != theirs).sum())
            if differ:
                raise AssertionError(f"result {i} differs in {differ} of {theirs.numel()} elements")
            continue
        a, b = ours.double(), theirs.double()
        scale = b[b.isfinite()].abs().amax().clamp(min=1.0) if bool(b.isfinite().any()) else 1.0
        error = ((a - b).abs() / scale).nan_to_num(nan=float("inf"))
        error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, error)
        at = int(error.argmax())
        worst = max(worst, float(error.flatten()[at]) / TOLERANCE[theirs.dtype])
        if worst > 1:
            values = (x.flatten()[at].item() for x in (a, b))
            raise AssertionError("result {} has {:.7g}, the reference {:.7g}".format(i, *values))
    return worst


def check_library(name: str) -> Row | None:
    """A compiled library that is here and could not be loaded; None where it is not here."""
    path = _native.path_of(name)
    if path is None:
        return None
    try:
        if name == "_C_host":
            load_tree()
        else:
            torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return Row(name, "", "", 0, float("nan"), str(error.__cause__ or error).split("\n")[0])
    return Row(name, "", "loaded", 0, 0.0, "")


def main() -> int:
    """Prints the table; 0 when every row is well, else 1. Leaves one thread."""
    # small shapes: threads would wait for each other, on a busy machine for long
    torch.set_num_threads(1)
    began = time.perf_counter()
    libraries = ["_C_cpu", "_C_host"] + ["_C_cuda"] * (torch.version.cuda is not None)
    rows = [row for name in libraries if (row := check_library(name))]
    width = max(map(len, OPS))
    print(f"{'':<{width}}  device  kernel     samples  error / tolerance")
    for row in rows:
        _print(row, width)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for op in OPS:
            rows.append(check_op(op, device))
            _print(rows[-1], width)
    bad = [row for row in rows if row.problem]
    print(f"{len(rows) - len(bad)} of {len(rows)} well, {time.perf_counter() - began:.0f} s")
    missing = _native.MISSING["CPU"]
    if missing:
        print(f"\nOn CPU the references in plain torch compute the ops: {missing}.")
    if bad:
        print(
            "\nWhat failed must not be relied on. RLKERN_BACKEND=reference computes every op in "
            "plain torch meanwhile.\nPlease report these lines with what `python -m rlkern` prints."
        )
    return 1 if bad else 0


def _print(row: Row, width: int) -> None:
    line = f"{row.name:<{width}}  {row.device:<6}  {row.kernel:<9}"
    if row.problem:
        print(f"{line}  FAILED: {row.problem}", flush=True)
    elif row.samples:
        print(f"{line}  {row.samples:>7}  {row.worst:.3f}", flush=True)
    else:
        print(line.rstrip(), flush=True)
