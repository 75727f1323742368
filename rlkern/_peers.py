"""Other libraries, imported when a tensor of theirs is made, and looked at before they are used."""

import importlib
import inspect
from collections.abc import Collection
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
