"""Peak rates: published ones by the names that drivers give, and a measured one of the CPU."""

import subprocess
import sys
import time

import pytest

from agrpo_megatron.hardware.rates import GPUS, device_rate, measured_cpu_rate, published_rate


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("h100-pcie", "tf32", 378),
        ("NVIDIA H800", "bf16", 989),
        ("NVIDIA H800 PCIe", "bf16", 756),
        ("H100 SXM", "fp32", 66.9),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA GH200 480GB", "bf16", 990),
        ("NVIDIA B200", "fp8", 4500),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "bf16", 503.8),
    ],
)
def test_published_rates_are_found_by_the_drivers_name(device, precision, tera):
    found = published_rate(device, precision)
    assert found is not None
    assert found.flops == tera * 1e12


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("NVIDIA A100-SXM4-80GB", "fp8"),  # no such tensor cores
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),  # another chip
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
        ("NVIDIA H100 CNX", "bf16"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),  # a part of one
        ("AMD Instinct MI300X", "bf16"),
    ],
)
def test_what_is_not_published_is_not_guessed(device, precision):
    assert published_rate(device, precision) is None


def test_text_names_the_assumption():
    found = device_rate("bf16", gpu="NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.text == "H100 SXM bf16 dense peak 989 TFLOP/s, published"


def test_lower_precision_is_never_slower():
    for gpu in GPUS:
        assert gpu.fp32 <= gpu.tf32 <= gpu.bf16 <= (gpu.fp8 or gpu.bf16), gpu.name


def test_cpu_is_measured_once_and_shortly():
    measured_cpu_rate.cache_clear()
    began = time.process_time()
    first = measured_cpu_rate("fp32")
    assert time.process_time() - began < 4  # of all threads; 0.2 s of wall time each
    assert 1e8 < first.flops < 1e14
    assert "fp32" in first.text
    assert device_rate("fp32", gpu=None) is first


def test_importing_it_loads_no_torch():
    code = "import sys, agrpo_megatron.hardware.rates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
