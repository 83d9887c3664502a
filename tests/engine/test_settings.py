import dataclasses

import pytest

from quincunx.data_shards.setting import find_problems, local_names, names_of
from quincunx.engine.settings import PretrainSettings, find_idle_settings

GOOD = PretrainSettings(steps=10)


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
    assert find_idle_settings(GOOD) == []
    assert find_idle_settings(changed(decoder_layers=3)) == [
        "decoder_layers has no effect: an enhanced decoder has one layer"
    ]
    assert find_idle_settings(changed(decoder="masked", decoder_layers=3)) == []


def test_weights_of_shard_sets_are_read_from_the_end_of_their_names():
    settings = changed(shards=["a:3", "s3://bucket/b", "https://host:443/c:2", "d"])
    assert settings.shard_weights() == [("a", 3), ("s3://bucket/b", 1), ("https://host:443/c", 2), ("d", 1)]


def test_the_length_of_a_run_in_epochs_is_rounded_to_steps():
    assert GOOD.total_steps(10**6) == 10
    assert PretrainSettings(epochs=2.5, global_batch=100).total_steps(1010) == 25
    assert PretrainSettings(epochs=0.001, global_batch=100).total_steps(10) == 1


def test_the_digest_follows_what_is_learned_and_nothing_else():
    assert changed(output="elsewhere", log_every=3).digest() == GOOD.digest()
    assert changed(learning_rate=2e-4).digest() != GOOD.digest()


def test_every_setting_has_a_role():
    roles = ("learned", "stream", "model", "data", "machine")
    assert sorted(names_of(GOOD, *roles)) == sorted(field.name for field in dataclasses.fields(GOOD))
    assert names_of(GOOD, "stream") == ["global_batch", "seed", "neighbour", "max_tokens"]
    assert names_of(GOOD, "data") == ["shards"]
    assert {"output", "probe", "shards", "cache"} <= local_names(GOOD) and "seed" not in local_names(GOOD)
