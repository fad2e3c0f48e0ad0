"""Following a pickle without unpickling it.

A pickle is a program for a stack machine. The ones that hold data are short and call only a few constructors, so they
are followed here by a machine of our own: it knows the operations such a pickle needs, a name in it is no more than a
name, and a call of one of the known constructors only notes what it was called with. Nothing is imported, called or
allocated on behalf of the file. Python's own Unpickler would take the memory that a few bytes of memo index claim, even
with its `find_class` overridden.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

# an array takes about 50 operations; more only serve to make readers work
_MAX_OPERATIONS = 500
_MARK = object()

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINSTRING", "SHORT_BINSTRING"),  # bytes of Python 2, which genops gives as Latin-1
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLE_LENGTHS = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class Name:
    """A constructor that the pickle names."""

    name: str


class PickleMachine:
    """Follows one pickle after the other; what names and calls stand for is told by a subclass.

    known: The names that may occur, (module, name) -> what `call` is given.
    """

    known: ClassVar[Mapping[tuple[str, str], str]] = {}

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """What the pickle at the stream's position stands for; the stream is then behind it.

        Raises:
            ValueError: If it is damaged, or needs what the machine does not know.
        """
        self._stack, self._memo = [], {}
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if count == _MAX_OPERATIONS:
                raise ValueError(f"more than {_MAX_OPERATIONS} operations")
            if operation.name != "STOP":
                self.step(operation.name, argument)
            elif len(self._stack) != 1:
                raise ValueError("something is left over")
        return self.popped(1)[0]

    def step(self, operation: str, argument: Any) -> None:
        """One operation.

        Raises:
            ValueError: If data do not need it, or not on what is there.
        """
        if operation in _LITERALS:
            self.push(argument)
        elif operation in _CONSTANTS:
            self.push(_CONSTANTS[operation])
        elif operation == "MARK":
            self.push(_MARK)
        elif operation in _TUPLE_LENGTHS:
            self.push(self.popped(_TUPLE_LENGTHS[operation]))
        elif operation == "TUPLE":
            self.push(self.popped_to_mark())
        elif operation == "GLOBAL":
            self.push(self._named(*argument.split(" ", 1)))
        elif operation == "STACK_GLOBAL":
            self.push(self._named(*self.popped(2)))
        elif operation == "REDUCE":
            function, arguments = self.popped(2)
            if not isinstance(function, Name):
                raise ValueError(f"met a call of {kind_of(function)}")
            self.push(self.call(function.name, arguments))
        elif operation == "BUILD":
            self.push(self.with_state(*self.popped(2)))
        elif operation in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if operation == "MEMOIZE" else argument] = self.top()
        elif operation in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError("it recalls what it never noted")
            self.push(self._memo[argument])
        elif operation not in ("PROTO", "FRAME"):
            raise ValueError(f"met the operation {operation}")

    def call(self, name: str, arguments: Any) -> Any:
        """What a call of one of the `known` names stands for."""
        raise ValueError(f"met a call of {name} with {kind_of(arguments)}")

    def with_state(self, target: Any, state: Any) -> Any:
        """What is completed as its `__setstate__` would."""
        raise ValueError(f"met a state {kind_of(state)} for {kind_of(target)}")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def popped(self, count: int) -> tuple[Any, ...]:
        """The last `count` values, taken from the stack."""
        stack = self._stack
        items = tuple(stack[len(stack) - count :]) if 0 <= count <= len(stack) else (_MARK,)
        if any(item is _MARK for item in items):
            raise ValueError("it takes more than it has put down")
        del stack[len(stack) - count :]
        return items

    def popped_to_mark(self) -> tuple[Any, ...]:
        """The values behind the last mark, taken from the stack with it."""
        marks = [i for i, value in enumerate(self._stack) if value is _MARK] or [len(self._stack)]
        items = self.popped(len(self._stack) - marks[-1] - 1)
        self._stack.pop()
        return items

    def top(self) -> Any:
        (value,) = self.popped(1)
        self.push(value)
        return value

    def _named(self, module: Any, name: Any) -> Name:
        if not are((module, name), str, str):
            raise ValueError(f"met a name of {kind_of((module, name))}")
        if (module, name) not in self.known:
            raise ValueError(f"met {f'{module}.{name}'[:100]!r}")
        return Name(self.known[module, name])


def are(values: Any, *kinds: type | tuple[type, ...]) -> bool:
    """Whether it is a tuple of values of these kinds."""
    if not isinstance(values, tuple) or len(values) != len(kinds):
        return False
    return all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))


def kind_of(value: Any) -> str:
    """For messages; never shows contents, which may be endless."""
    if isinstance(value, tuple):
        return f"({', '.join(kind_of(item) if not isinstance(item, tuple) else 'tuple' for item in value[:10])})"
    return value.name if isinstance(value, Name) else type(value).__name__.lstrip("_")
