"""All tests of the project: pytest test_all.py (three minutes on two cores; no data, no network).

They live in tests/, one file a room; `pytest tests/test_vit.py` runs one of them. This file gathers them, so
that one command runs all. Expected values come from brute force, closed form, counts by hand, or an
independent library (timm, scipy, scikit-learn, torchvision, PIL), never from recorded output. Tests on real
files skip where ../shared is absent.
"""

import importlib
from pathlib import Path

import pytest

ROOMS = sorted(p.stem for p in Path(__file__).with_name("tests").glob("test_*.py"))


def gather(into):
    """Put every test of tests/ into the dict `into`; RuntimeError if two files define the same name."""
    for room in ROOMS:
        pytest.register_assert_rewrite(f"tests.{room}")
        module = importlib.import_module(f"tests.{room}")
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ or is_fixture(value):
                if name.startswith("test_") or is_fixture(value):
                    if name in into:
                        raise RuntimeError(f"tests/{room}.py defines {name}, which another file defines too")
                    into[name] = value


def is_fixture(value):
    return type(value).__name__ == "FixtureFunctionDefinition" or hasattr(value, "_pytestfixturefunction")


gather(globals())
