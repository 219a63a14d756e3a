"""Tests of device."""

import pytest

import device
from common import InputError
from tests.shared import CPU


def test_pick_device():
    assert device.pick_device("cpu") == CPU
    assert device.pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    "name", ["abacus", "meta", "hpu", "privateuseone", "cuda:999", "cpu:1", "CPU", "", "xla"]
)
def test_other_devices_are_refused(name):
    with pytest.raises(InputError, match="--device"):
        device.pick_device(name)
