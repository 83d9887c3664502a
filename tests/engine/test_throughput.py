import pytest
import torch

from quincunx.engine.throughput import PEAK_FLOPS, peak_flops_of


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H100 PCIe", "H100 PCIE"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_card_is_known_by_whole_words_of_its_name(card, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    peak = peak_flops_of(torch.device("cuda", 0), 2, "bfloat16")
    assert peak == (known and 2 * PEAK_FLOPS[known])
    assert peak_flops_of(torch.device("cuda", 0), 2, "float32") is None
