"""Copies another package's functions and classes, with other values for some global names of that package.

ComfyUI keeps in process-wide names whether it is training and whether a prompt was cancelled. A private model needs
other values than the prompts beside it, so its layers get copies of the functions that read those names.
"""

import builtins
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn


class Rebinder:
    """Makes copies for one package. `values` maps a module's name and a name in it to the value that copies see.

    A function is copied if it reads one of these names or calls a function of the package that does. All other
    functions are shared with the package and may change its module-level state.
    """

    def __init__(self, package: str, values: dict[str, dict[str, Any]]) -> None:
        self.package, self.values = package, values
        self.names = {name for own in values.values() for name in own}
        self._made: dict[Any, Any] = {}
        self._reads: dict[Callable, bool] = {}
        self._builtins = {**vars(builtins), "__import__": self._import}

    def cls(self, cls: type) -> type:
        """`cls`, or a subclass with copies of the methods, inherited ones too, that read the names.

        Subclasses of other packages count as the package's, or its copies would stand before what they override.
        """
        if cls not in self._made:
            own = [c for c in cls.__mro__ if any(self._belongs(base.__module__) for base in c.__mro__)]
            names = {name for c in own for name, value in vars(c).items() if any(map(self.reads, _functions(value)))}
            private = cls
            for c in reversed(own) if names else []:
                private = type(cls.__name__, (private,), {"__module__": cls.__module__})
                for name in names & vars(c).keys():
                    setattr(private, name, self._method(vars(c)[name], {c: private}))
            self._made[cls] = private
        return self._made[cls]

    def value(self, value: Any) -> Any:
        """The value that copies use instead of a function, a module or a helper class of the package."""
        if isinstance(value, types.FunctionType) and self.reads(value):
            return self._copy(value, {})
        if isinstance(value, types.ModuleType) and self._belongs(value.__name__):
            return self._made.setdefault(value, _View(value, self))
        if isinstance(value, type) and self._belongs(value.__module__) and not issubclass(value, (Tensor, nn.Module)):
            return self.cls(value)
        return value

    def replaced(self, module: types.ModuleType, name: str) -> Any:
        """The value that copies use for `name` of a module. AttributeError if the module has no such name."""
        value = getattr(module, name)
        own = self.values.get(module.__name__, {})
        return own[name] if name in own else self.value(value)

    def reads(self, function: types.FunctionType) -> bool:
        """Whether a function of the package, or a function that it calls, reads one of the replaced names."""
        if function not in self._reads:
            seen, todo = {function}, [function]
            while todo and not any(self._mentions(f) for f in todo):
                todo = list({f for caller in todo for f in self._called(caller)} - seen)
                seen.update(todo)
            self._reads[function] = bool(todo)
        return self._reads[function]

    def _belongs(self, module: str | None) -> bool:
        return (module or "").partition(".")[0] == self.package

    def _mentions(self, function: types.FunctionType) -> bool:
        return self._belongs(function.__module__) and not self.names.isdisjoint(_names(function.__code__))

    def _called(self, function: types.FunctionType) -> Iterator[types.FunctionType]:
        """Functions of the package that a function may call: globals, attributes of modules and values of closures."""
        names = _names(function.__code__)
        found = [function.__globals__[name] for name in names & function.__globals__.keys()]
        found += [sys.modules[name] for name in names if self._belongs(name) and name in sys.modules]
        found += [value for cell in function.__closure__ or () for value in _content(cell)]
        seen: set[int] = set()
        while found:
            value = found.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, types.ModuleType) and self._belongs(value.__name__):
                found += [vars(value)[name] for name in names & vars(value).keys()]
            elif isinstance(value, type) and not issubclass(value, (Tensor, nn.Module)):
                found += [f for method in vars(value).values() for f in _functions(method)]
            elif isinstance(value, types.FunctionType) and self._belongs(value.__module__):
                yield value

    def _copy(self, function: types.FunctionType, classes: dict[type, type]) -> types.FunctionType:
        """A function with replaced globals. `classes` maps a method's class to the subclass that `super()` uses."""
        key = (function, *classes)
        if key not in self._made:
            scope = {**function.__globals__, "__builtins__": self._builtins}
            scope.pop("__name__", None)  # with it torch.compile would look up globals in the original module
            cells = tuple(types.CellType() for _ in function.__closure__ or ())
            copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
            copy.__kwdefaults__, copy.__qualname__ = function.__kwdefaults__, function.__qualname__
            vars(copy).update(vars(function))
            self._made[key] = copy  # stored before the functions it calls are copied: they may call it
            for name in _names(function.__code__) & scope.keys():
                scope[name] = self._global(name, scope[name])
            for cell, before in zip(cells, function.__closure__ or (), strict=True):
                for value in _content(before):
                    private = classes.get(value) if isinstance(value, type) else None
                    cell.cell_contents = private or self.value(value)
        return self._made[key]

    def _global(self, name: str, value: Any) -> Any:
        """The value that copies use for a global, also if it was imported from the module where it is replaced."""
        for source, own in self.values.items():
            if name in own and getattr(sys.modules.get(source), name, _MISSING) is value:
                return own[name]
        return self.value(value)

    def _method(self, method: Any, classes: dict[type, type]) -> Any:
        if isinstance(method, (staticmethod, classmethod)):
            return type(method)(self._method(method.__func__, classes))
        if isinstance(method, property):
            return property(*(part and self._method(part, classes) for part in (method.fget, method.fset, method.fdel)))
        return self._copy(method, classes) if isinstance(method, types.FunctionType) else method

    def _import(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Runs an import statement inside a copy."""
        return self.value(builtins.__import__(name, *args, **kwargs))


class _View(types.ModuleType):
    """A view of a module for copies: it reads the live module, except for names that the Rebinder replaces."""

    def __init__(self, module: types.ModuleType, rebinder: Rebinder) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _rebinder=rebinder)

    def __getattr__(self, name: str) -> Any:
        found = self._rebinder.replaced(self._module, name)
        if found is not vars(self._module).get(name):
            self.__dict__[name] = found
        return found


_MISSING = object()


@cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Names and string constants in a function's code and in functions defined inside it."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    texts = [const for const in code.co_consts if isinstance(const, str) and const.isidentifier()]
    return frozenset(code.co_names).union(texts, *inner)


def _functions(method: Any) -> list[types.FunctionType]:
    """The plain functions behind a class attribute, such as a property's getter and setter."""
    parts = [method, getattr(method, "__func__", None), *(getattr(method, n, None) for n in ("fget", "fset", "fdel"))]
    return [part for part in parts if isinstance(part, types.FunctionType)]


def _content(cell: types.CellType) -> list[Any]:
    """A closure cell's value as a list, [] if the cell is still empty."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []
