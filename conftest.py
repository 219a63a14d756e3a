"""Shared fixtures, for `pytest test_all.py` and for `pytest tests/test_vit.py` alike."""


def pytest_configure(config):
    """pytest-xdist's first process runs no test, so it need not import torch, which the others wait for."""
    shared_out = config.getoption("dist", "no") != "no" and not config.option.collectonly
    if hasattr(config, "workerinput") or not shared_out:
        config.pluginmanager.import_plugin("tests.fixtures")
