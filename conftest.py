"""Shared fixtures, for `pytest test_all.py` and for `pytest tests/test_vit.py` alike."""

import os

# Before numpy is imported, here and in the workers: each has one core, on which the threads of a product
# would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """pytest-xdist's first process runs no test, so it need not import torch, which the others wait for."""
    shared_out = config.getoption("dist", "no") != "no" and not config.option.collectonly
    if hasattr(config, "workerinput") or not shared_out:
        config.pluginmanager.import_plugin("tests.fixtures")
