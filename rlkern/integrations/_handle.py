"""What an integration has changed in another library, and the way back."""

import sys
from collections.abc import Callable, Iterable
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

    def replace(self, package: str, *pairs: tuple[Any, Any]) -> None:
        """(old, new): new wherever a loaded module of `package` has bound old to a name.

        Other modules bind a function by importing its name: one assignment would miss them.
        Modules imported later find `new` where they import it from; undoing walks through them too.
        """
        pairs = tuple((old, new) for old, new in pairs if old is not new)
        _rebind(package, pairs)
        self._undo.append(lambda: _rebind(package, [(new, old) for old, new in pairs]))

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


def _rebind(package: str, pairs: Iterable[tuple[Any, Any]]) -> None:
    news = {id(old): new for old, new in pairs}
    for name, module in list(sys.modules.items()):
        if name != package and not name.startswith(f"{package}."):
            continue
        # not getattr: lazy modules would import what they name
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in news:
                setattr(module, attribute, news[id(value)])
