"""Some devices have no float64 (Apple's MPS): nothing asks for it there. Such a device cannot be had in these tests."""

import re

import pytest
import source
import torch

from cud_trainer.models.layers import widest_float

# Files whose float64 tensors never leave the host.
ON_THE_HOST = {
    "cud_trainer/circuits/signature.py": "edge scores of `EdgeAttributions` are on the CPU",
    "cud_trainer/difficulty/circuit_metrics.py": "the same",
    "cud_trainer/difficulty/cud/bank.py": "a bank of anchors is read and written on the CPU",
    "cud_trainer/difficulty/cud/formula.py": "vectors made of edge scores",
    "cud_trainer/difficulty/cud/features.py": "features that `run_batches` has brought to the CPU",
    "cud_trainer/scoring/calibration.py": "what is saved",
    "evaluation/report/circuits.py": "edge scores",
}


def test_the_widest_float_of_a_device():
    assert [widest_float(device) for device in ("cpu", "cuda:1", "mps")] == [
        torch.float64,
        torch.float64,
        torch.float32,
    ]


@pytest.mark.parametrize("folder", ["cud_trainer", "evaluation"])
def test_no_float64_is_asked_for_on_a_device(folder):
    for path in source.files(folder):
        name, text = str(path.relative_to(source.ROOT)), path.read_text(encoding="utf-8")
        for line in text.splitlines():
            asks = re.search(r"\.double\(\)|(dtype=|\bto\(|\btype\()torch\.(float64|double)", line)
            safe = ".cpu().double()" in line or "torch.Generator" in line or "generator=generator" in line
            host = re.search(r"\.double\(\)(\.abs\(\))?\.numpy\(\)", line)  # numpy takes no other
            host = host or name in ON_THE_HOST or re.search(r"torch\.zeros\(len\(\w+\), dtype=torch\.float64\)$", line)
            assert not asks or safe or host, f"{name}: {line.strip()}"
