"""What an integration has changed in another library, and the way back."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Handle:
    """Of `enable()`: `disable()`, or leaving its `with` block, puts everything back, once."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    @property
    def enabled(self) -> bool:
        return bool(self._undo)

    def disable(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()

    def undone_by(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def replace(self, package: str, old: Any, new: Any, keep: tuple[str, ...] = ()) -> None:
        """`new` wherever a loaded module of `package` has bound `old` to a name.

        Other modules bind a function by importing its name: one assignment would miss them.
        Modules imported later find `new` where they import it from; undoing walks through them too.

        keep: modules where `old` stays, which define it.
        """
        _rebind(package, old, new, keep)
        self._undo.append(lambda: _rebind(package, new, old, ()))

    def put(self, registry: dict[str, Any], name: str, value: Any) -> None:
        had, before = name in registry, registry.get(name)
        registry[name] = value

        def undo() -> None:
            if had:
                registry[name] = before
            else:
                registry.pop(name, None)

        self._undo.append(undo)

    def set(self, held: Any, name: str, value: Any) -> None:
        """An attribute of one object."""
        had, before = name in vars(held), getattr(held, name, None)
        setattr(held, name, value)

        def undo() -> None:
            if had:
                setattr(held, name, before)
            else:
                delattr(held, name)

        self._undo.append(undo)


def _rebind(package: str, old: Any, new: Any, keep: tuple[str, ...]) -> None:
    for name, module in list(sys.modules.items()):
        if name != package and not name.startswith(f"{package}."):
            continue
        if name in keep:
            continue
        # not getattr: lazy modules would import what they name
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, attribute, new)
