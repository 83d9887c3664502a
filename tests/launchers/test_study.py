"""Studies: what their recipes may say, and cells that real commands make, whatever kills them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from quincunx.data_shards.errors import SettingsError
from quincunx.launchers.study import main
from quincunx.launchers.study_cells import make_cells
from quincunx.launchers.study_recipe import STUDIES, read_recipe, words_of

ROOT = Path(__file__).parents[2]
RECIPE = {
    "shards": {"tokenizer": "train:300", "max_tokens": 32, "held_out_share": 0.1},
    "pretrain": {
        "encoder": "bert", "from_scratch": True, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_tokens": 32,
        "global_batch": 8, "learning_rate": 1e-3, "steps": 4, "checkpoint_every": 2, "held_out_passages": 8,
        "probe_every": 2, "log_every": 1, "keep_checkpoints": 5, "device": "cpu",
    },
    "finetune": {
        "global_batch": 8, "num_negatives": 1, "max_passage_tokens": 32, "max_query_tokens": 12, "steps": 3,
        "log_every": 1, "device": "cpu",
    },
    "seeds": [0],
    "against": ["none"],
    "variants": {
        "none": {"pretrain": {"steps": 0}},
        "half": {"pretrain": {"tasks": ["mkp"]}, "at_step": 2, "train_share": 0.5},
        "wild": {"pretrain": {"tasks": ["mkp"], "learning_rate": 9e5, "max_bad_steps": 1}},
    },
}  # fmt: skip


@pytest.fixture
def collection(tmp_path, write_beir, invented_words) -> Path:
    """A BEIR folder of 90 passages over 120 invented words; a query is three words of its passage."""
    draw = random.Random(0)
    words, folder = invented_words(draw, 120), tmp_path / "wiki"
    texts = [" ".join(draw.sample(words, 12)) for _ in range(90)]
    queries = [" ".join(text.split()[:3]) for text in texts]
    judged = [(n, n, 1) for n in range(90)]
    write_beir(folder, texts, queries, train=judged[:60], dev=judged[60:])
    return folder


@pytest.fixture
def study(tmp_path, collection):
    """The command line of a study: the recipe above with other values for some keys."""

    def words(output: str = "out", **keys) -> list[str]:
        recipe = tmp_path / "tiny.yaml"
        recipe.write_text(yaml.safe_dump({**RECIPE, **keys}))
        found = ["--recipe", str(recipe), "--collections", str(collection), "--output", str(tmp_path / output)]
        return [*found, "--workers", "2"]

    return words


def start(words: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "launchers" / "study.py"), *words]
    with open(log, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)


def cells(output: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in output.glob("cells/wiki/*/seed-*.json")}


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_every_shipped_recipe_reads(name):
    recipe = read_recipe(name)
    trained = [json.dumps([dict(v.pretrain), v.at_step, v.train_share]) for v in recipe.variants.values()]
    assert len({*trained}) == len(trained) >= 5, "two variants are the same"
    assert len(recipe.seeds) >= 3


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"variant": {}}, "unknown field variant, did you mean variants?"),
        ({"variants": {}}, "has no variants"),
        ({"variants": {"a": {"pretain": {}}}}, "variant a: unknown field pretain, did you mean pretrain?"),
        (
            {"variants": {"a": {"pretrain": {"learning_rat": 1}}}},
            "variant a: Unrecognized options: --learning_rat=1; did you mean",
        ),
        ({"variants": {"a": {"finetune": {"num_negatives": -1}}}}, "variant a: num_negatives is -1"),
        ({"variants": {"a": {"train_share": 2}}}, "train_share is 2: give a number above 0, at most 1"),
        ({"variants": {"a": {"at_step": 3}}}, "at_step is 3, where no checkpoint is written: give a multiple"),
        ({"shards": {"max_tokens": 1}}, "shards: max_tokens is 1"),
        ({"against": ["nobody"]}, "against names nobody; the variants are"),
        ({"seeds": [1, 1]}, "seeds are"),
        ({"measures": ["MRR@x"]}, "MRR@x"),
        ({"base": "nothing"}, "there is no study recipe nothing"),
        ({"variants": {"a": {"pretrain": {"fresh": True}}}}, "pretrain sets fresh, which the study sets: leave it out"),
        ({"variants": {"a": {"at_step": 2, "pretrain": {"keep_checkpoints": 2}}}}, "keep_checkpoints is 2: give 4"),
        ({"base": "master_figure2"}, "its base has a base of its own"),
        ({"seeds": 3}, "seeds is 3; give a list, each a whole number"),
        ({"against": "none"}, "against is 'none'; give a list, each a name"),
        ({"pretrain": None}, "pretrain is None; give `key: value` lines"),
        ({"variants": ["a"]}, "variants is ['a']; give `key: value` lines"),
        ({"variants": {"a": {"at_step": "half"}}}, "variant a: at_step is 'half'; give a whole number"),
        ({"variants": {"a": {"pretrain": {"tasks": ["dor"]}}}}, "its tasks need generated texts, queries: name"),
        ({"variants": {"../a": {}}}, "a variant is named '../a'; give letters"),
        ({"variants": {"bm25.json": {}}}, "a variant is named 'bm25.json'; give letters"),
        ({"variants": {"a": []}}, "variant a: give `key: value` lines"),
        ({"measures": []}, "measures is empty; name at least one"),
        ({"seeds": [-1]}, "seeds are [-1]; give numbers from 0"),
        ({"shards": {"path": "/etc"}}, "shards sets path, which the study sets: leave it out"),
        ({"generate": {"queries": {}}}, "generate queries: give settings of generate.py, the model among them"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_and_nothing_is_written(study, tmp_path, keys, sentence):
    with pytest.raises(SettingsError) as error:
        main(study(**{"against": [], **keys}))
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variants", "sentence"),
    [("  a: {}\n  b: {}\n  a: {}\n", "name a twice: rename one"), ("  ? [a]\n  : {}\n", "have a key that is no name")],
)
def test_a_name_that_stands_twice_or_is_none_is_refused(tmp_path, variants, sentence):
    path = tmp_path / "named.yaml"
    path.write_text("variants:\n" + variants)
    with pytest.raises(SettingsError, match=sentence):
        read_recipe(str(path))


def test_names_of_variants_are_text_as_it_is_written_and_a_merged_key_may_be_overridden(tmp_path):
    path = tmp_path / "rates.yaml"
    variants = "  0.1: &a {pretrain: {steps: 0}, train_share: 0.5}\n  0.10: {<<: *a, train_share: 0.1}\n  on: {}\n"
    path.write_text("base: papers\nvariants:\n" + variants)
    found = read_recipe(str(path)).variants
    assert list(found) == ["0.1", "0.10", "on"]
    assert (found["0.10"].pretrain["steps"], found["0.10"].train_share) == (0, 0.1)


def test_a_base_lends_its_variants(tmp_path):
    path = tmp_path / "wide.yaml"
    wider = {"hidden_size": 256, "num_heads": 4}
    path.write_text(yaml.safe_dump({"base": "papers", "pretrain": wider}))
    wide, papers = read_recipe(str(path)), read_recipe("papers")
    assert wide.variants.keys() == papers.variants.keys() and wide.against == papers.against
    for name, variant in wide.variants.items():
        assert variant.pretrain == {**papers.variants[name].pretrain, **wider}


def test_the_content_of_a_settings_file_is_part_of_a_cell(study, collection, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("steps: 3\nlearning_rate: 1.0e-3\ntasks: [mkp]\n")
    pretrain = {key: value for key, value in RECIPE["pretrain"].items() if key != "steps"}
    study(pretrain={**pretrain, "recipe": str(own)}, variants={"a": {}}, against=[])

    def cell():
        return make_cells(read_recipe(str(tmp_path / "tiny.yaml")), [str(collection)], tmp_path, tmp_path)[0]

    before = cell()
    assert before.made_from["pretrain"]["steps"] == 3
    own.write_text("steps: 3\nlearning_rate: 2.0e-3\ntasks: [mkp]\n")
    assert cell().pretrained != before.pretrained
    assert not [word for word in words_of("pretrain", before.made_from["pretrain"]) if "digest" in word]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--launch", "no_such_launcher --x"], "this machine has no command no_such_launcher"),
        (["--launch", '"'], "which no shell would read"),
        (["--output", ""], "output is empty: give a folder"),
        (["--collections", ""], "names an empty path: give at least one BEIR folder"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(study, flags, sentence):
    with pytest.raises(SettingsError, match=sentence):
        main([*study()[:-2], *flags])


def test_an_output_that_is_a_file_or_holds_other_cells_is_refused(study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be written"):
        main(study("file"))
    earlier = tmp_path / "out" / "cells" / "wiki" / "none" / "seed-1.json"  # of another seed
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    with pytest.raises(SettingsError, match=r"holds cells that this command does not name .*none/seed-1"):
        main([*study(), "--report_only"])
    assert not (tmp_path / "out" / "report.md").exists()


def test_a_collection_without_dev_judgements_is_refused(study, collection):
    (collection / "qrels" / "dev.tsv").unlink()
    with pytest.raises(SettingsError, match=r"wiki has no qrels/dev.tsv: give a BEIR folder"):
        main(study())


def test_cells_come_from_real_commands_and_are_not_made_again(study, tmp_path):
    process = start(study(), tmp_path / "log")
    assert process.wait(500) == 0, (tmp_path / "log").read_text()
    found = cells(tmp_path / "out")
    assert found.keys() == {"none", "half", "wild"} and found["wild"]["diverged"]
    assert len(found["none"]["per_query"]) == 30 and found["half"]["probe"]["step"] == [0, 2, 4]
    assert found["half"]["held_out"].keys() == {"mlm", "mkp"} and 0 < found["half"]["measures"]["R@100"]["mean"] <= 1
    # The fine-tuning starts where the pre-training of `none` ends: nowhere.
    assert found["none"]["before"]["mrr@10"] == pytest.approx(found["half"]["before"]["mrr@10"], abs=0.5)
    settings = [yaml.safe_load(path.read_text()) for path in (tmp_path / "out/work/wiki").glob("half-*/settings.yaml")]
    lines = Path(settings[0]["candidates"]).read_text().splitlines()
    assert len(lines) == 30, "half of the 60 training queries"
    page = (tmp_path / "out" / "report.md").read_text()
    assert "3 of 3 cells. Diverged, and left out of every table: wiki wild seed 0." in page
    assert "half against none" in page

    shutil.rmtree(tmp_path / "out" / "work")  # the records alone say what is done
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob("*.json")}
    assert main(study()) == 0
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob("*.json")}
    assert not (tmp_path / "out" / "work").exists()

    bm25 = tmp_path / "out" / "cells" / "wiki" / "bm25.json"
    whole = bm25.read_text()
    bm25.write_text(whole[:100])
    with pytest.raises(SettingsError, match=r"bm25.json is damaged: remove it"):
        main([*study(), "--report_only"])
    bm25.unlink()
    assert main([*study(), "--report_only"]) == 0 and "half against none" in (tmp_path / "out/report.md").read_text()
    assert main(study()) == 0 and json.loads(bm25.read_text()) == json.loads(whole), "the remedy: it is made again"
    assert (tmp_path / "out" / "report.md").read_text() == page
    times[bm25] = bm25.stat().st_mtime_ns

    with pytest.raises(SettingsError, match=r"made otherwise \(finetune.steps was 3 and is 4\): give another --output"):
        main(study(finetune={**RECIPE["finetune"], "steps": 4}))
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob("*.json")}


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_with_the_same_table(study, tmp_path):
    variants = {"none": {"pretrain": {"steps": 0}}, "mkp": {"pretrain": {"tasks": ["mkp"]}}}
    assert start(study("whole", variants=variants), tmp_path / "log").wait(500) == 0
    words, draw = study("killed", variants=variants), random.Random(os.getpid())
    kills = 0
    while kills < 40:
        process = start(words, tmp_path / "log")
        try:
            code = process.wait(draw.uniform(5, 40))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert code == 0, (tmp_path / "log").read_text()[-3000:]
        break
    assert kills > 1, "it was never killed"
    whole, killed = cells(tmp_path / "whole"), cells(tmp_path / "killed")
    for name, record in whole.items():
        for key in ("measures", "per_query", "before", "probe", "held_out"):
            assert killed[name][key] == record[key], f"{name}: {key}"


@pytest.mark.slow
def test_a_study_that_is_asked_to_stop_saves_and_goes_on(study, tmp_path):
    variants = {"mkp": {"pretrain": {"tasks": ["mkp"], "steps": 2000, "checkpoint_every": 1000, "probe_every": 2000}}}
    process = start(study(variants=variants, against=[]), tmp_path / "log")
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("work/wiki/pretrain-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(8)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    checkpoints = list((tmp_path / "out").glob("work/wiki/pretrain-*/checkpoints/step-*"))
    assert checkpoints and 0 < int(checkpoints[0].name.removeprefix("step-")) < 2000
    assert not list((tmp_path / "out").glob("cells/wiki/*/seed-*.json"))
