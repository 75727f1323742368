"""Defines ops and decides, once, which kernel owns each of their dispatch keys.

Every op has a reference in plain torch. A compiled library or a Triton kernel may own a device's
key instead; a second claim on an owned key raises, because torch would silently replace the first.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from rlkern import _native

_LOG = logging.getLogger("rlkern")
_LIBRARY = torch.library.Library("rlkern", "FRAGMENT")

if _native.BACKEND != "auto":
    _LOG.info("RLKERN_BACKEND=%s", _native.BACKEND)


class Owner(NamedTuple):
    kernel: str  # native, triton or reference
    reason: str


OWNERS: dict[str, dict[str, Owner]] = {}
"""op name -> dispatch key -> who computes it, and why."""


def define(schema: str, fake: Callable) -> str:
    """Defines `rlkern::<schema>` and its fake (shapes and dtypes only); returns the op's name."""
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"rlkern::{name}", fake, lib=_LIBRARY)
    OWNERS[name] = {}
    return name


def fill(name: str, reference: Callable, triton: str | None = None) -> None:
    """Gives `name` an owner on every device.

    `triton` is "module:function" of the launcher, imported at the first call. The compiled
    libraries have registered their kernels by now; only keys that nobody owns are filled.
    """
    for key in ("CPU", "CUDA"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"rlkern::{name}", key):
            library = f"_C_{key.lower()}"
            _claim(name, key, Owner("native", f"{library} has a kernel for it"))
            continue
        kernel, why = _choose(key, triton)
        function = reference if kernel == "reference" else _lazy(triton)
        _claim(name, key, Owner(kernel, why))
        _LIBRARY.impl(name, function, key)
    _claim(name, "other", Owner("reference", "no kernel for this device"))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")


def _claim(name: str, key: str, owner: Owner) -> None:
    present = OWNERS[name].get(key)
    if present is not None:
        raise RuntimeError(
            f"rlkern::{name} on {key} is owned by {present.kernel}; {owner.kernel} claims it too"
        )
    OWNERS[name][key] = owner


def _choose(key: str, triton: str | None) -> tuple[str, str]:
    backend, missing = _native.BACKEND, _native.MISSING[key]
    if backend == "reference":
        return "reference", "RLKERN_BACKEND=reference"
    if key == "CPU" and backend != "triton":
        if backend == "native" and missing:
            raise RuntimeError(f"RLKERN_BACKEND=native: {missing}")
        return "reference", missing or "no C++ kernel for this op"
    if triton is None:
        return "reference", "no Triton kernel for this op"
    if importlib.util.find_spec("triton") is None:
        return "reference", "triton is not installed (pip install triton)"
    if key == "CPU":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("RLKERN_BACKEND=triton on CPU needs TRITON_INTERPRET=1")
        return "triton", "RLKERN_BACKEND=triton, interpreted"
    return "triton", "default on CUDA" if backend == "auto" else missing or "no CUDA C++ kernel"


def _lazy(target: str) -> Callable:
    """`module:function`, imported at the first call: Triton costs a second to import."""
    module, _, function = target.partition(":")

    def call(*args):
        return getattr(importlib.import_module(module), function)(*args)

    return call
