"""Tests of benchmark."""

import json
import platform
import subprocess
import sys

import pytest
import torch

import common
import vit
from tests.shared import REPO, cli, refused, succeed


def test_benchmark_prints_its_table_as_json(synthetic, tmp_path):
    done = succeed(
        "benchmark",
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
    refused(cli("benchmark", "--data-dir", "nowhere", cwd=tmp_path), "nowhere")
    refused(cli("benchmark", "--data-dir", synthetic, "--img-size", 30, cwd=tmp_path), "divisible by 16")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a switch of glibc")
def test_freed_memory_is_kept_for_the_next_tensors():
    """Page faults, counted by the kernel, of 20 tensors of 64 MiB (16,384 pages), one after the other.
    Without the switch each costs all of its pages; with it the first one does, and one more wherever a small
    block took the hole's end."""
    code = (
        "import resource, torch, engine; engine.keep_freed_memory({keep}); faults = lambda: resource.getrusage("
        "resource.RUSAGE_SELF).ru_minflt; before = faults()\n"
        "for _ in range(20): torch.ones(2**24)\n"
        "print(faults() - before)"
    )
    kept, returned = (
        int(
            subprocess.run(
                [sys.executable, "-c", code.format(keep=keep)],
                cwd=REPO,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for keep in (True, False)
    )
    assert kept < 10 * 2**14 and (
        returned > 18 * 2**14 or returned < kept
    )  # fewer where the system gives huge pages


def test_start_script_tells_time_memory_and_failure():
    import benchmark

    seconds, memory = benchmark.start_script("-c", "import time; x = b'1' * 2**26; time.sleep(0.3)")
    assert 0.3 <= seconds < 20 and (memory is None or 64 < memory < 400)
    with pytest.raises(common.InputError, match="the reason"):
        benchmark.start_script("-c", "import sys; sys.exit('the reason')")


def test_step_flops_against_torch_counter():
    """The formula against torch's own count of a forward and backward pass (which skips the gradient by the
    image)."""
    from torch.utils.flop_counter import FlopCounterMode

    import benchmark

    for name, size in (("scratch", 64), ("ti16", 224)):
        model = vit.build_vit(name, img_size=size)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(torch.randn(1, 3, size, size, requires_grad=True)).sum().backward()
        assert benchmark.step_flops(vit.CONFIGS[name], size) == pytest.approx(
            counter.get_total_flops(), rel=1e-3
        )
