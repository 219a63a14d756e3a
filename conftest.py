"""Shared fixtures, for `pytest test_all.py` and for `pytest tests/test_vit.py` alike."""

pytest_plugins = ["tests.fixtures"]
