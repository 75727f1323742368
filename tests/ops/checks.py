"""The checks that every op passes, called from its test file."""

import importlib
import os
import subprocess
import sys

import torch
from torch import Tensor

from rlkern.ops._logprob import Stats
from rlkern.testing.implementations import Implementation, implementations, schema_names
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts(op: str) -> tuple:
    """An op's reference and samples modules."""
    names = ("reference", "samples")
    return tuple(importlib.import_module(f"rlkern.ops.{op}.{name}") for name in names)


def kernels(op: str, device: str) -> list[Implementation]:
    return implementations(op, device)


def _tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check_budget(op: str, device: str, dtype: torch.dtype) -> None:
    """Every kernel, every sample, forward and backward, against float64 within the budget."""
    reference, samples = parts(op)
    for name, args in samples.sample_inputs(device, dtype):
        truth = _tuple(reference.forward(*to_double(args)))
        torchs = _tuple(reference.forward(*args))
        for kernel in kernels(op, device):
            what = f"{op} {kernel.name} {dtype} {name!r}"
            ours = _tuple(kernel.forward(*args))
            for i, (got, want, peer) in enumerate(zip(ours, truth, torchs, strict=True)):
                assert_within_budget(f"{what} output {i}", got, want, peer)
            if kernel.backward is None:
                continue
            # every kernel starts from the statistics that its own forward saved
            grads64 = samples.backward_inputs(to_double(args), truth)
            wants = _tuple(reference.backward(*to_double(grads64)))
            peers = _tuple(reference.backward(*samples.backward_inputs(args, torchs)))
            gots = _tuple(kernel.backward(*samples.backward_inputs(args, ours)))
            for i, (got, want, peer) in enumerate(zip(gots, wants, peers, strict=True)):
                assert_within_budget(f"{what} gradient {i}", got, want, peer)


def assert_stats_within_budget(what, ours, truth, torchs, float32_ulps=16.0) -> None:
    """Floats within the budget; is_top1 equal, and top-k ids but for near ties."""
    for name, got, want, peer in zip(Stats._fields, ours, truth, torchs, strict=True):
        if got.is_floating_point():
            assert_within_budget(f"{what} {name}", got, want, peer, float32_ulps)
    ours, truth = Stats(*ours), Stats(*truth)
    assert torch.equal(ours.is_top1.cpu(), truth.is_top1.cpu()), f"{what} is_top1"
    if truth.topk_ids.numel() == 0:
        return
    # told apart from both neighbours; of the last one's next nothing is known
    step = truth.topk_values.nan_to_num(neginf=-1e30).diff(dim=1).abs() > 1e-4
    edge = torch.ones_like(truth.topk_ids[:, :1], dtype=torch.bool)
    clear = torch.cat([edge, step], 1) & torch.cat([step, ~edge], 1)
    wrong = clear & (ours.topk_ids != truth.topk_ids)
    assert not bool(wrong.any()), f"{what} topk_ids"


def check_opcheck(op: str, device: str) -> None:
    """schema, fake and dispatch agree, on every sample."""
    reference, samples = parts(op)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = [getattr(torch.ops.rlkern, name).default for name in schema_names(op)]
    for _, args in samples.sample_inputs(device, torch.float32):
        torch.library.opcheck(ops[0], args, test_utils=tests)
        if len(ops) > 1:
            inputs = samples.backward_inputs(args, _tuple(reference.forward(*args)))
            torch.library.opcheck(ops[1], inputs, test_utils=tests)


def check_deterministic(op: str, device: str, dtype: torch.dtype) -> None:
    """Two runs, and runs with one and two threads, give the same bits."""
    _, samples = parts(op)
    threads = torch.get_num_threads()
    for name, args in samples.sample_inputs(device, dtype):
        for kernel in kernels(op, device):
            # the interpreter runs one program after another: it would show no race
            interpreted = kernel.name == "triton" and device == "cpu"
            if kernel.name == "reference" or interpreted:
                continue
            runs = []
            # a launcher may call torch's matmul, which promises no such thing
            for count in (2, 1, 2) if kernel.name == "native" else (2, 2):
                torch.set_num_threads(count)
                run = _tuple(kernel.forward(*args))
                if kernel.backward is not None:
                    run += _tuple(kernel.backward(*samples.backward_inputs(args, run)))
                runs.append(run)
            torch.set_num_threads(threads)
            for other in runs[1:]:
                for i, (a, b) in enumerate(zip(runs[0], other)):
                    assert_same_bits(f"{op} {kernel.name} {name!r} result {i}", a, b)


def check_instruction_set(
    test_file: str, isa: str, name: str = "test_every_kernel_is_within_the_budget"
) -> None:
    """A test of three dtypes again with the kernels that this CPU would not choose.

    An instruction set that the CPU lacks falls to the next.
    """
    test = f"{test_file}::{name}"
    env = os.environ | {"RLKERN_CPU_ISA": isa, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", test, "-k", "cpu", "-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "3 passed" in run.stdout


def check_native_on_cuda(op: str, test_file: str, name: str) -> None:
    """A test of three dtypes again with the CUDA C++ kernels, which own nothing by default."""
    env = os.environ | {"RLKERN_BACKEND": "native"}
    ask = f"import rlkern; print(rlkern._library.OWNERS[{op!r}]['CUDA'])"
    owner = subprocess.check_output([sys.executable, "-c", ask], text=True, env=env)
    assert "kernel='native'" in owner, owner
    command = [sys.executable, "-m", "pytest", f"{test_file}::{name}", "-m", "gpu"]
    command += ["-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "3 passed" in run.stdout


def compiled(function):
    """torch.compile without the code generator: graph capture and autograd, in seconds."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_same_counts(what: str, ours: Tensor, want: Tensor) -> None:
    """Of a quantiser: whole numbers equal, sums of float32 squares near."""
    assert torch.equal(ours[:3], want[:3]), f"{what} counts: {ours[:3]}, not {want[:3]}"
    torch.testing.assert_close(
        ours[3:], want[3:], rtol=1e-5, atol=1e-38, equal_nan=True, msg=f"{what} {ours} {want}"
    )


def random_sign(like: Tensor, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)
