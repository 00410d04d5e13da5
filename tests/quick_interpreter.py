"""Triton's interpreter without what it does anew for every call: a third of its time or more.

For a launch it replaces the builtins of `triton.language` by those of the interpreter. It searches
all members of the package for them, and does so again for each function that a kernel calls.
"""

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter

_call = interpreter.InterpretedFunction.__call__


@cache
def _names_of_builtins(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(package, name)) for name in _names_of_builtins(package)]


def _call_as_the_kernel(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function from a kernel. The launch has replaced the builtins that both see."""
    if function.fn.__module__.startswith("triton."):  # which sees others, too
        return _call(function, *args, **kwargs)
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def install() -> None:
    # The interpreter calls `getmembers` for nothing else.
    namespace = {**vars(inspect), "getmembers": _builtins}
    interpreter.inspect = SimpleNamespace(**namespace)
    interpreter.InterpretedFunction.__call__ = _call_as_the_kernel
