"""Shared fixtures, for `pytest test_all.py` and for `pytest tests/vit.py` alike."""

pytest_plugins = ["tests.fixtures"]
