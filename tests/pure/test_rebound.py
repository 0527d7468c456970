"""Copies of a host's functions: every way of reading a process-wide name, and nothing else changes."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kinoloom.trainers.host.rebound import Rebinder

STATE = """
training = False
calls = []

def is_training():
    return training

def poll():
    raise KeyboardInterrupt
"""
KERNELS = """
import functools
import host_package.state
from host_package import state
from host_package import state as renamed
from host_package.state import training
from host_package.state import is_training as asked, poll

def by_path(): return host_package.state.training
def by_module(): return state.training
def by_alias(): return renamed.training
def by_value(): return training
def by_text(): return getattr(state, "training")
def by_function(): return asked()
def by_attribute(): return host_package.state.is_training()
def by_local_import():
    import host_package.state
    from host_package.state import training as own
    return host_package.state.training and own
def by_lambda(): return (lambda: [state.training for _ in range(1)][0])()

def logged(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        state.calls.append(function.__name__)
        return function(*args, **kwargs)
    return run

@logged
def by_decorated(): return state.training

class Helper:
    @staticmethod
    def ask(): return state.training
def by_helper_class(): return Helper.ask()

def by_recursion(n=1): return other(n - 1) if n else state.training
def other(n): return by_recursion(n)

def by_closure_over_lists():
    return made()
def make(table): return lambda: state.training and bool(table) and make.called
make.called = True
made = make(([1], [2]))

def unrelated(): return len(state.calls)
"""
LAYERS = """
import torch
import host_package.kernels as kernels
from host_package.kernels import by_path, poll

class Base(torch.nn.Module):
    scale = 1.0
    @property
    def training_view(self): return by_path()
    @classmethod
    def seen(cls): return kernels.by_module()
    def forward(self, x):
        poll()
        return x * (2.0 if self.training_view and self.seen() else 0.0) + self.offset()
    def offset(self): return 1.0 if by_path() else 0.0

class Child(Base):
    def forward(self, x, *, twice=True): return super().forward(x) * (2 if twice else 1)
    def offset(self): return 10.0

class Plain(torch.nn.Module):
    def forward(self, x): return x + kernels.unrelated()
"""
WAYS = [line.split("def ")[1].split("(")[0] for line in KERNELS.splitlines() if line.startswith("def by_")]
VALUES = {"host_package.state": {"training": True, "poll": lambda: None}}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "host_package"
    folder.mkdir()
    for name, text in {"__init__": "", "state": STATE, "kernels": KERNELS, "layers": LAYERS}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("host_package.layers")
    yield sys.modules["host_package"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "host_package"]:
        del sys.modules[name]


@pytest.mark.parametrize("way", [*WAYS, "by_decorated"])
def test_every_way_of_reading_a_name_finds_the_other_value(package: ModuleType, way: str) -> None:
    function = getattr(package.kernels, way)
    private = Rebinder("host_package", VALUES).value(function)
    assert private() is True
    assert function() is False and package.state.training is False


def test_what_reads_no_name_is_shared_with_the_host(package: ModuleType) -> None:
    rebinder = Rebinder("host_package", VALUES)
    assert rebinder.value(package.kernels.unrelated) is package.kernels.unrelated
    assert rebinder.cls(package.layers.Plain) is package.layers.Plain
    assert rebinder.value(len) is len


def test_copies_see_what_the_host_changes_later(package: ModuleType) -> None:
    private = Rebinder("host_package", VALUES).value(package.kernels.by_decorated)
    private()
    assert package.state.calls == ["by_decorated"]
    package.state.calls = []
    private()
    assert package.state.calls == ["by_decorated"]


def test_methods_of_a_layer_and_of_its_bases_are_copies(package: ModuleType) -> None:
    rebinder, x = Rebinder("host_package", VALUES), torch.ones(2)
    base, child = package.layers.Base(), package.layers.Child()
    for layer in (base, child):
        with pytest.raises(KeyboardInterrupt):
            layer(x)
        layer.__class__ = rebinder.cls(type(layer))
    assert base(x).tolist() == [3.0, 3.0]
    assert child(x).tolist() == [24.0, 24.0]  # its own offset, which reads nothing, and not the base's copy
    assert child(x, twice=False).tolist() == [12.0, 12.0]
    assert isinstance(child, package.layers.Child) and type(child).__name__ == "Child"
    with pytest.raises(KeyboardInterrupt):
        package.layers.Child()(x)


def test_what_another_package_overrides_in_a_layer_stays_overridden(package: ModuleType) -> None:
    class Theirs(package.layers.Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    layer = Theirs()
    layer.__class__ = Rebinder("host_package", VALUES).cls(Theirs)
    assert layer(torch.ones(2)).tolist() == [-3.0, -3.0]


def test_a_method_whose_module_is_not_registered_is_copied(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = {"state": package.state, "__name__": "loaded_from_a_file"}
    exec("def offset(self): return 5.0 if state.is_training() else 0.0", scope)
    monkeypatch.setattr(package.layers.Base, "offset", scope["offset"])
    layer = package.layers.Base()
    layer.__class__ = Rebinder("host_package", VALUES).cls(package.layers.Base)
    assert layer(torch.ones(2)).tolist() == [7.0, 7.0]


@pytest.mark.parametrize("way", ["by_path", "by_attribute"])
def test_copies_compile_whole(package: ModuleType, way: str) -> None:
    private = Rebinder("host_package", VALUES).value(getattr(package.kernels, way))
    compiled = torch.compile(lambda x: x * 2 if private() else x, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(1)).tolist() == [2.0]
