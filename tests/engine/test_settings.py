"""The settings' own rules, and the DeepSpeed JSON beside them."""

import dataclasses
import json

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.setting import find_problems, local_names, names_of
from quincunx.engine import settings as settings_module
from quincunx.engine.settings import (
    BUNDLED,
    PretrainSettings,
    auto_keys,
    find_config_problems,
    load_deepspeed_json,
    load_machine,
    precision_of,
)
from quincunx.engine.training import misspelt_keys

GOOD = PretrainSettings(steps=10, global_batch=64, max_grad_norm=0.7, adam_betas=(0.9, 0.98))


def changed(**values) -> PretrainSettings:
    return dataclasses.replace(GOOD, **values)


def test_the_defaults_are_in_range_once_a_length_is_given():
    assert find_problems(GOOD) == []
    assert find_problems(PretrainSettings()) == [
        "give the run's length as steps or as epochs, and set the other to None (--steps None)"
    ]


@pytest.mark.parametrize(
    ("values", "clause"),
    [
        ({"tasks": ["mlm"]}, "tasks has unknown mlm"),
        ({"tasks": ["mkp", "mkp"]}, "names a task twice"),
        ({"task_weights": [1.0, 2.0]}, "task_weights has 2 numbers for 1 tasks"),
        ({"sentence_losses": {"contrastive": -1}}, "sentence_losses is {'contrastive': -1}; it must be at least 0"),
        ({"encoder_mask_rate": 1.0}, "encoder_mask_rate is 1.0; it must be above 0 and below 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"global_batch": 0}, "global_batch is 0; it must be at least 1"),
        ({"shards": ["a:0"]}, "weight must be at least 1"),
        ({"hidden_size": 64}, "hidden_size can only be set together with from_scratch"),
        ({"from_scratch": True, "hidden_size": 64}, "from_scratch needs num_layers, num_heads"),
        ({"from_scratch": True, "hidden_size": 64, "num_layers": 2, "num_heads": 5}, "not divisible by num_heads"),
        ({"steps": -1}, "steps is -1; it must be at least 0"),
        ({"steps": None, "epochs": float("inf")}, "epochs is inf; it must be finite"),
        ({"task_weights": [float("inf")]}, "task_weights is [inf]; it must be finite"),
        ({"seed": 2**32}, "at least 0 and below 4294967296"),
        ({"probe": "nowhere"}, "is not a BEIR folder"),
    ],
)
def test_a_value_out_of_range_is_one_clause(values, clause):
    problems = find_problems(changed(**values))
    assert len(problems) == 1 and clause in problems[0]


def test_a_setting_without_effect_warns():
    assert GOOD.idle() == []
    assert changed(decoder_layers=3).idle() == ["decoder_layers has no effect: an enhanced decoder has one layer"]
    assert changed(decoder="masked", decoder_layers=3).idle() == []


def test_weights_of_shard_sets_are_read_from_the_end_of_their_names():
    settings = changed(shards=["a:3", "s3://bucket/b", "https://host:443/c:2", "d"])
    assert settings.shard_weights() == [("a", 3), ("s3://bucket/b", 1), ("https://host:443/c", 2), ("d", 1)]


def test_the_length_of_a_run_in_epochs_is_rounded_to_steps():
    assert GOOD.total_steps(10**6) == 10
    assert PretrainSettings(epochs=2.5, global_batch=100).total_steps(1010) == 25
    assert PretrainSettings(epochs=0.001, global_batch=100).total_steps(10) == 1


def test_every_setting_has_a_role():
    roles = ("learned", "stream", "model", "data", "machine")
    assert sorted(names_of(GOOD, *roles)) == sorted(field.name for field in dataclasses.fields(GOOD))
    assert names_of(GOOD, "stream") == ["global_batch", "seed", "neighbour", "max_tokens"]
    assert names_of(GOOD, "data") == ["shards"]
    assert {"output", "probe", "shards", "cache"} <= local_names(GOOD) and "seed" not in local_names(GOOD)


def test_the_five_jsons_are_filled_from_the_run_and_leave_no_auto(monkeypatch):
    monkeypatch.setattr(settings_module, "bfloat16_supported", lambda: True)
    names = sorted(path.stem for path in BUNDLED.glob("*.json"))
    assert names == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    for name in names:
        settings = changed(deepspeed=f"ds_configs/{name}.json", micro_batch=8)
        assert find_config_problems(settings, world_size=2) == []
        filled = load_machine(settings, world_size=2, cuda=False).config
        assert not auto_keys(filled) and "scheduler" not in filled
        assert filled["train_batch_size"] == 64 and filled["gradient_accumulation_steps"] == 4
        parameters = filled["optimizer"]["params"]
        assert parameters["betas"] == [0.9, 0.98] and parameters["torch_adam"] is parameters["fused"] is True
        assert filled["gradient_clipping"] == 0.7 and filled["optimizer"]["type"] == "AdamW"
        assert precision_of(filled) == "float32" and filled["zero_optimization"]["stage"] == int(name[4])
        on_gpu = load_machine(settings, world_size=2, cuda=True).config
        assert precision_of(on_gpu) == "bfloat16" and not auto_keys(on_gpu)


@pytest.fixture
def problems(tmp_path):
    """What is wrong with a DeepSpeed JSON, of which `content` is given (a string: as it stands), beside GOOD."""

    def find(content: dict | str, world_size: int = 1, **values) -> list[str]:
        path = tmp_path / "x.json"
        whole = {"zero_optimization": {"stage": 2}} | content if isinstance(content, dict) else content
        path.write_text(whole if isinstance(whole, str) else json.dumps(whole))
        try:
            return find_config_problems(changed(deepspeed=str(path), **values), world_size)
        except SettingsError as error:
            return [str(error)]

    return find


@pytest.mark.parametrize(
    ("in_json", "given", "global_batch", "world_size", "expected"),
    [(5, None, 80, 2, 5), ("auto", 8, 80, 2, 8), ("auto", None, 80, 2, 20), (None, None, 2048, 8, 32)],
)
def test_a_micro_batch_comes_from_recipe_then_json_then_the_rank_s_share(
    in_json, given, global_batch, world_size, expected, tmp_path
):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": in_json}))
    settings = changed(deepspeed=str(path), micro_batch=given, global_batch=global_batch)
    assert load_machine(settings, world_size, cuda=False).micro_batch == expected


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold one JSON object"),
        ({"optimizer": "AdamW"}, 'has "AdamW" as optimizer; it must be an object'),
        ({"fp16": True}, "has true as fp16; it must be an object"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "enables fp16 and bf16; choose one"),
        ({"optimizer": {"type": "Lamb"}}, "has optimizer.type Lamb; allowed: AdamW"),
        ({"torch_autocast": {"enabled": True}}, "enables torch_autocast; enable bf16 instead"),
        ({"checkpoint": {"load_universal": True}}, "sets checkpoint.load_universal, which resuming decides"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage True; allowed: 1, 2, 3"),
        ({"train_micro_batch_size_per_gpu": "4"}, 'has "4" as train_micro_batch_size_per_gpu; allowed: a whole number'),
        ({"gradient_clipping": 0.7}, 'sets gradient_clipping to 0.7, which max_grad_norm decides; write "auto"'),
        ({"scheduler": {"type": "OneCycle"}}, 'which warmup_share and steps decides; write "auto"'),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            'has "auto" for keys that quincunx does not fill: zero_optimization.reduce_bucket_size',
        ),
        (
            {"train_micro_batch_size_per_gpu": 7},
            "micro_batch 7 does not divide the 64 examples of a rank; the largest that do: 1, 2, 4, 8, 16, 32, 64",
        ),
    ],
)
def test_what_deepspeed_would_ignore_or_misread_is_one_clause(content, clause, problems):
    found = problems(content)
    assert len(found) == 1 and clause in found[0], found


def test_batches_that_cannot_be_divided_name_what_could(problems):
    assert problems({}, world_size=3) == ["global_batch 64 is not divisible by the 3 ranks; nearest: 63 or 66"]


def test_a_file_that_is_not_there_is_refused_also_if_one_of_ours_has_its_name(tmp_path):
    with pytest.raises(SettingsError, match=r"zero2.json: no such file, and none of ours \(zero1, zero2"):
        load_deepspeed_json(str(tmp_path / "zero2.json"))


def test_a_misspelt_key_is_named_with_the_nearest_and_other_sections_are_not():
    given = {"gradient_cliping": 3, "flops_profiler": {}, "zero_optimization": {"stage": 2}, "wandb": {}}
    assert misspelt_keys(given) == ["the DeepSpeed JSON has gradient_cliping; did you mean gradient_clipping?"]
