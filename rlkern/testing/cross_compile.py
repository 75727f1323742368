"""Compiles every Triton kernel of an op for GPUs that are not here, and reads off what it takes.

    python -m rlkern.testing.cross_compile linear_logprob        # a JSON object a line

The op's launchers run on CPU tensors with the launch itself replaced by a recorder: what is
compiled is exactly what the launchers would start. Run in a process of its own, without
TRITON_INTERPRET.
"""

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90, 100, 120)
# Shared memory that one block may use (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
ALL_TARGETS = 16
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Launch(tuple):
    """(kernel, signature, constexprs, options, divisible): hashable, so that equal launches compile
    once. `divisible` holds the arguments that are multiples of 16, as Triton would specialise."""


def record(run: Callable[[], object]) -> Iterator[Launch]:
    """The kernels that `run` would launch."""
    launches: dict[Launch, None] = {}

    def recorder(self, *args, grid, warmup, **kwargs):
        names = [p.name for p in self.params]
        values = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        signature, constexprs, divisible = {}, {}, []
        for parameter in self.params:
            value = values.get(parameter.name, parameter.default)
            is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
            specialised = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (is_one and specialised):
                signature[parameter.name] = "constexpr"
                constexprs[parameter.name] = value
                continue
            signature[parameter.name] = _type_of(value)
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            specialised &= not parameter.do_not_specialize_on_alignment
            if specialised and isinstance(address, int) and address % 16 == 0:
                divisible.append(parameter.name)
        key = (self, *(tuple(sorted(d.items())) for d in (signature, constexprs, options)))
        key = (*key, tuple(divisible))
        launches[Launch(key)] = None

    original = JITFunction.run
    JITFunction.run = recorder
    try:
        run()
    finally:
        JITFunction.run = original
    yield from launches


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(launch: Launch, capability: int) -> dict:
    """Compiles to a cubin; its registers, shared memory and bytes of local memory (spills)."""
    kernel, signature, constexprs, options, divisible = launch
    names = [p.name for p in kernel.params]
    typed = dict(signature)
    source = ASTSource(
        fn=kernel,
        signature={name: typed[name] for name in names},
        constexprs={(names.index(k),): v for k, v in constexprs},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(options))
    usage = _resources(compiled.asm["cubin"])
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
        **usage,
    }


def _resources(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    fields = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": fields["REG"], "local_bytes": fields["STACK"] + fields["LOCAL"]}


def launches_of(op: str, dtype: torch.dtype) -> list[Launch]:
    """Every distinct launch of an op's forward and backward over its samples."""
    module = importlib.import_module(f"rlkern.ops.{op}.triton")
    samples = importlib.import_module(f"rlkern.ops.{op}.samples")
    reference = importlib.import_module(f"rlkern.ops.{op}.reference")
    found: dict[Launch, None] = {}
    for _, args in samples.sample_inputs("cpu", dtype):
        found |= dict.fromkeys(record(lambda args=args: module.forward(*args)))
        if hasattr(module, "backward"):
            grads = samples.backward_inputs(args, reference.forward(*args))
            found |= dict.fromkeys(record(lambda grads=grads: module.backward(*grads)))
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    options = parser.parse_args()
    seen: dict[str, int] = {}
    for launch in launches_of(options.op, getattr(torch, options.dtype)):
        name = launch[0].__name__
        number = seen[name] = seen.get(name, -1) + 1
        # of a kernel with many variants the later ones are compiled for the targets in turn
        turn = options.capability[number % len(options.capability)]
        for capability in options.capability if number < ALL_TARGETS else [turn]:
            print(json.dumps({"op": options.op, **compile_launch(launch, capability)}), flush=True)


if __name__ == "__main__":
    main()
