"""Tests of benchmark."""

import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common.console import InputError
from studies import benchmark
from tests.shared import CPU, REPO, cli, refused, succeed
from vit import CONFIGS, build_vit


def test_benchmark_prints_its_table_as_json(synthetic, tmp_path, monkeypatch):
    for name, config in CONFIGS.items():  # one narrow block each: a step of a whole ViT-B/16 takes seconds
        monkeypatch.setitem(CONFIGS, name, {**config, "depth": 1, "embed_dim": 48, "num_heads": 3})
    enlarge = benchmark.enlarge
    monkeypatch.setattr(benchmark, "enlarge", lambda folder, target, count: enlarge(folder, target, 2))
    done = succeed(
        "studies.benchmark",
        "--data-dir",
        synthetic,
        "--quick",
        "--img-size",
        32,
        "--images",
        8,
        "--workers",
        0,
        cwd=tmp_path,
    )
    result = json.loads(done.out.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == [
        "decode_small",
        "decode_original",
        "train_step_scratch",
        "train_step_ti16",
        "train_step_b16",
        "evaluate_scratch",
        "epoch_scratch",
        "epoch_scratch_originals",
        "frozen_stage",
    ]
    for row in result["rows"]:
        assert row.keys() == {
            "name",
            "unit",
            "ours",
            "baseline",
            "ratio",
            "ratio_min",
            "ratio_max",
            "peak_mib",
        }
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["unit"] == "images/s"
        assert row["ratio"] == pytest.approx(row["ours"] / row["baseline"])  # one turn
    assert set(result["fraction_of_peak"]) == {"train_step_scratch", "train_step_ti16", "train_step_b16"}
    assert result["matmul_peak_gflops"] > 0 and result["device"].startswith("cpu")
    refused(cli("studies.benchmark", "--data-dir", "nowhere", cwd=tmp_path), "nowhere")
    refused(
        cli("studies.benchmark", "--data-dir", synthetic, "--img-size", 30, cwd=tmp_path), "divisible by 16"
    )
    for words in (("--images", 0), ("--repeats", 0), ("--workers", -1), ("--originals", "nowhere")):
        refused(cli("studies.benchmark", *words, cwd=tmp_path), words[0])
    refused(
        cli("studies.benchmark", "--data-dir", synthetic, "--originals", tmp_path, cwd=tmp_path), tmp_path
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a switch of glibc")
def test_freed_memory_is_kept_for_the_next_tensors():
    """What stays resident of 64 MiB that were written and freed: with the switch all, without it nothing."""
    code = """
import ctypes, resource, sys, types
for name in ("torch", "torch.distributed"):  # the switch needs none, and it takes seconds
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch"].distributed = sys.modules["torch.distributed"]
from common import device
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for keep in (False, True):
    device.keep_freed_memory(keep)
    before = resident()
    block = libc.malloc(ctypes.c_size_t(2**26))
    ctypes.memset(ctypes.c_void_p(block), 1, 2**26)
    libc.free(block)
    print(resident() - before)
"""
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=REPO)
    returned, kept = (int(number) / 2**26 for number in printed.split())
    assert returned < 0.1 and kept > 0.9


def test_start_script_tells_time_memory_and_failure():
    seconds, memory = benchmark.start_script(
        "-c", "import sys, time; time.sleep(float(sys.argv[2]))", wait=0.3
    )
    assert seconds >= 0.3 and (memory is None or memory > 0)
    with pytest.raises(InputError, match="the reason"):
        benchmark.start_script("-c", "import sys; sys.exit('the reason')")


@pytest.mark.skipif(sys.platform != "linux", reason="where the kernel tells")
def test_peak_resident_counts_what_was_freed():
    block = bytearray(b"1") * 2**26
    assert benchmark.peak_resident("self") >= 64
    del block
    assert benchmark.peak_resident("self") >= 64 and benchmark.peak_resident("nobody") is None


def test_compare_takes_medians_of_turns(monkeypatch, capsys):
    """Seconds by hand for three turns and the one before, which is not counted."""
    seconds = iter([9, 9, 1, 4, 2, 4, 4, 4])
    monkeypatch.setattr(benchmark, "timed", lambda function, device: function() or next(seconds))
    calls, args = [], SimpleNamespace(device=CPU, repeats=3)
    sides = (lambda: calls.append("ours")), (lambda: calls.append("baseline"))
    row = benchmark.compare("name", 8, *sides, args, scale=2.0, warm=lambda: calls.append("warm"))
    assert calls == ["warm", "ours", "baseline"] * 4
    assert (row["ours"], row["baseline"], row["ratio"]) == (8 / 2, 8 / 8, 4)
    assert (row["ratio_min"], row["ratio_max"]) == (2, 8)
    assert capsys.readouterr().out.startswith("| name | 4.0 | 1.0 | 4.00 | 2.00 to 8.00 | ")


def test_step_flops_against_torch_counter(shipped_scratch):
    """The formula against torch's own count of a forward and backward pass (which skips the gradient by the
    image)."""
    from torch.utils.flop_counter import FlopCounterMode

    for name, size in (("scratch", 64), ("ti16", 224)):
        model = build_vit(name, img_size=size)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(torch.randn(1, 3, size, size, requires_grad=True)).sum().backward()
        assert benchmark.step_flops(CONFIGS[name], size) == pytest.approx(counter.get_total_flops(), rel=1e-3)
