import json
from dataclasses import replace

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.settings import (
    BUNDLED,
    PretrainSettings,
    auto_keys,
    choose_micro_batch,
    fill_config,
    find_config_problems,
    find_conflicts,
    load_deepspeed_json,
    precision_of,
)
from quincunx.engine.training import misspelt_keys

SETTINGS = PretrainSettings(steps=10, global_batch=64, micro_batch=8, max_grad_norm=0.7, adam_betas=(0.9, 0.98))


def test_the_five_jsons_are_filled_from_the_run_and_leave_no_auto():
    names = sorted(path.stem for path in BUNDLED.glob("*.json"))
    assert names == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    for name in names:
        config = load_deepspeed_json(name)
        assert not find_conflicts(config, SETTINGS)
        filled = fill_config(config, SETTINGS, micro_batch=8, world_size=2, cuda=False)
        assert not auto_keys(filled)
        assert filled["train_batch_size"] == 64 and filled["gradient_accumulation_steps"] == 4
        assert filled["gradient_clipping"] == 0.7 and filled["optimizer"]["params"]["betas"] == [0.9, 0.98]
        assert filled["optimizer"]["params"]["torch_adam"] is ("offload" not in name)
        assert precision_of(filled) == "float32" and filled["zero_optimization"]["stage"] == int(name[4])
        assert config == load_deepspeed_json(f"ds_configs/{name}.json"), "filling leaves what was read alone"


def test_a_micro_batch_comes_from_recipe_then_json_then_the_rank_s_share():
    alone = PretrainSettings(steps=1, global_batch=80)
    assert choose_micro_batch({"train_micro_batch_size_per_gpu": 5}, SETTINGS, 2) == (8, [])
    assert choose_micro_batch({"train_micro_batch_size_per_gpu": 5}, alone, 2) == (5, [])
    assert choose_micro_batch({"train_micro_batch_size_per_gpu": "auto"}, alone, 2) == (20, [])
    assert choose_micro_batch({}, PretrainSettings(steps=1, global_batch=2048), 8) == (32, [])


def test_batches_that_cannot_be_divided_name_what_could():
    _, problems = choose_micro_batch({}, SETTINGS, 3)
    assert problems == ["global_batch 64 is not divisible by the 3 ranks; nearest: 63 or 66"]
    _, problems = choose_micro_batch({"train_micro_batch_size_per_gpu": 7}, PretrainSettings(global_batch=12), 1)
    assert problems == [
        "micro_batch 7 does not divide the 12 examples of a rank; the largest that do: 1, 2, 3, 4, 6, 12"
    ]


def test_a_number_where_auto_is_expected_is_a_conflict_even_when_it_agrees():
    assert find_conflicts({"gradient_clipping": 0.7, "zero_optimization": {"stage": 2}}, SETTINGS) == [
        'the DeepSpeed JSON sets gradient_clipping to 0.7, which max_grad_norm decides; write "auto"'
    ]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "must hold one JSON object"), (None, "none of ours")]
)
def test_a_file_that_is_no_configuration_is_refused(content, message, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        load_deepspeed_json(str(path))


def test_an_auto_that_nothing_fills_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}))
    assert find_config_problems(replace(SETTINGS, deepspeed=str(path)), world_size=1) == [
        'the DeepSpeed JSON has "auto" where nothing fills it: zero_optimization.reduce_bucket_size'
    ]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"optimizer": "AdamW"}, 'has "AdamW" as optimizer; it must be an object'),
        ({"fp16": True}, "has true as fp16; it must be an object"),
        ({"torch_autocast": {"enabled": True}}, "enables torch_autocast; enable bf16 instead"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage True; allowed: 1, 2, 3"),
        ({"train_micro_batch_size_per_gpu": "4"}, 'has "4" as train_micro_batch_size_per_gpu; allowed: a whole number'),
    ],
)
def test_what_deepspeed_would_ignore_or_misread_is_an_error(extra, message):
    clauses = find_conflicts({"zero_optimization": {"stage": 2}} | extra, SETTINGS)
    assert [message in clause for clause in clauses] == [True], clauses


def test_a_mistyped_path_is_not_taken_for_one_of_ours(tmp_path):
    with pytest.raises(SettingsError, match="no such file"):
        load_deepspeed_json(str(tmp_path / "zero2.json"))


def test_a_misspelt_key_is_named_with_the_nearest_and_other_sections_are_not():
    given = {"gradient_cliping": 3, "flops_profiler": {}, "zero_optimization": {"stage": 2}, "wandb": {}}
    assert misspelt_keys(given) == ["the DeepSpeed JSON has gradient_cliping; did you mean gradient_clipping?"]
