"""Other libraries, imported when a tensor of theirs is made, and looked at before they are used."""

import importlib
import inspect
from collections.abc import Collection, Sequence
from importlib import metadata
from typing import Any, NamedTuple


class Peer(NamedTuple):
    package: str
    """As pip knows it."""
    tested: str
    """The versions whose signatures are known."""

    def version(self) -> str:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return "of an unknown version"

    def find(self, op: str, path: str, arguments: Collection[str]) -> Any:
        """The class or function `path` names, which can be called with these named arguments.

        Raises:
            RuntimeError: not installed, or a version where it is missing or wants other arguments.
        """
        module, _, name = path.rpartition(".")
        try:
            held = importlib.import_module(module)
        except ImportError as error:
            raise RuntimeError(
                f"{op}: needs {self.package} {self.tested} (pip install {self.package}): {error}"
            ) from error
        found = getattr(held, name, None)
        try:
            inspect.signature(found).bind(**dict.fromkeys(arguments))
        except TypeError as error:
            why = "there is none" if found is None else error
            raise RuntimeError(
                f"{op}: expected {path}({', '.join(arguments)}) as in {self.package} "
                f"{self.tested}, got {self.package} {self.version()}: {why}"
            ) from error
        return found

    def takes(self, op: str, path: str, parameters: Sequence[str]) -> Any:
        """The class, function or method `path` names, which has these parameters and no others.

        Stricter than `find`: for what is replaced, or registered in a place that calls it.

        Raises:
            RuntimeError: not installed, or a version where it is missing or is called otherwise.
        """
        found = self.resolve(op, path)
        got = None if found is None else list(inspect.signature(found).parameters)
        if got != list(parameters):
            what = "none" if got is None else f"({', '.join(got)})"
            raise RuntimeError(
                f"{op}: expected {path}({', '.join(parameters)}) as in {self.package} "
                f"{self.tested}, got {self.package} {self.version()}: {what}. Install a tested "
                f"version, or report this one"
            )
        return found

    def resolve(self, op: str, path: str) -> Any:
        """Modules as far as they go, attributes from there; None where there is none."""
        package, *rest = path.split(".")
        try:
            held = importlib.import_module(package)
        except ImportError as error:
            raise RuntimeError(
                f"{op}: needs {self.package} {self.tested} (pip install {self.package}): {error}"
            ) from error
        for at, name in enumerate(rest):
            if inspect.ismodule(held):
                inner = ".".join([package, *rest[: at + 1]])
                try:
                    held = importlib.import_module(inner)
                    continue
                except ModuleNotFoundError as error:
                    if error.name != inner:
                        raise RuntimeError(
                            f"{op}: {self.package} {self.version()} could not import {inner}: "
                            f"{error}"
                        ) from error
            held = getattr(held, name, None)
        return held
