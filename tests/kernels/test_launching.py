"""Which implementation of the kernels runs where."""

import types

import pytest
import torch

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.pretraining import describe_kernels
from quincunx.engine.settings import PretrainSettings
from quincunx.kernels import launching


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    """As on a user's machine: these tests' own process interprets kernels."""
    monkeypatch.setattr(launching, "INTERPRETED", False)


def test_auto_takes_torch_where_there_is_no_card_and_torch_is_always_to_be_had():
    assert launching.choose("auto", "cpu") == "torch"
    assert launching.choose("torch", "cpu") == "torch"


def test_triton_on_a_cpu_is_a_settings_error_that_says_what_to_do():
    with pytest.raises(SettingsError, match=r"triton cannot run: tensors are on cpu.*set kernels to torch or auto"):
        describe_kernels(PretrainSettings(kernels="triton"), False, model_with(64))


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "torch"), ((8, 0), "triton"), ((9, 0), "triton")])
def test_auto_takes_triton_from_ampere_on(capability, chosen, monkeypatch):
    card = types.SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert launching.choose("auto", "cuda:0") == chosen


def test_triton_on_an_old_card_or_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(major=7, minor=5))
    with pytest.raises(ValueError, match=r"compute capability 7\.5, kernels need 8\.0"):
        launching.choose("triton", "cuda:0")
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton package is not installed"):
        launching.choose("triton", "cuda:0")
    assert launching.choose("auto", "cuda:0") == "torch"


def model_with(head_size: int):
    config = types.SimpleNamespace(hidden_size=2 * head_size, num_attention_heads=2)
    return types.SimpleNamespace(encoder=types.SimpleNamespace(config=config))


def test_the_line_at_the_start_says_what_really_runs(monkeypatch):
    """Attention is torch's where heads or the query stream are not the kernel's; demanded Triton is then an error."""
    card = types.SimpleNamespace(major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    for settings, head_size, line in (
        (PretrainSettings(), 64, "triton"),
        (PretrainSettings(), 48, "triton for the LM-head loss, torch for attention (heads of 48 channels)"),
        (PretrainSettings(decoder="masked"), 48, "triton"),
        (PretrainSettings(query_stream="embedded"), 64, "torch for attention (query_stream is embedded)"),
    ):
        assert describe_kernels(settings, True, model_with(head_size)).endswith(line)
    assert describe_kernels(PretrainSettings(), False, model_with(48)) == "torch"
    with pytest.raises(SettingsError, match=r"heads have 48 channels and the attention kernel takes 32, 64, 128; set"):
        describe_kernels(PretrainSettings(kernels="triton"), True, model_with(48))
