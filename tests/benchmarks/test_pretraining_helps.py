"""The table of pre-trainings: its statistics against numbers worked out by hand, its variants, and what is skipped."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import pretraining_helps  # noqa: E402
from pretraining_helps import Experiment, list_variants, main, mean_cosine, parse_options  # noqa: E402
from pretraining_tables import as_markdown, over_seeds, summarise  # noqa: E402

from quincunx.data_shards.errors import SettingsError  # noqa: E402
from quincunx.engine.retrieval.measures import Evaluation  # noqa: E402
from quincunx.engine.settings import PretrainSettings, find_problems  # noqa: E402
from quincunx.launchers import pretrain  # noqa: E402
from quincunx.launchers.command_line import parse_settings  # noqa: E402


def evaluation(*values: float) -> Evaluation:
    return Evaluation({"RR@10": sum(values) / len(values)}, {"RR@10": dict(zip("abcd", values, strict=True))})


CELLS = {
    "none": {0: {"wiki": evaluation(0.5, 0.5, 0.0, 1.0)}, 1: {"wiki": evaluation(0.5, 0.5, 0.5, 0.5)}},
    "mlm": {0: {"wiki": evaluation(1.0, 0.5, 0.25, 0.75)}},
    "master": {0: {"wiki": evaluation(1.0, 1.0, 0.5, 0.5)}, 1: {"wiki": evaluation(0.5, 1.0, 0.5, 1.0)}},
    "quincunx": {},
}


def test_means_and_spreads_are_over_seeds():
    table = summarise(CELLS, ("none", "mlm"))["summary"]["wiki"]
    assert list(table) == ["none", "mlm", "master"], "what has no result yet has no row"
    master = table["master"]["measures"]["RR@10"]
    assert master["seeds"] == {0: 0.75, 1: 0.75} and master["mean"] == 0.75 and master["spread"] == 0.0
    none = table["none"]["measures"]["RR@10"]
    assert none["seeds"] == {0: 0.5, 1: 0.5} and none["against"].keys() == {"mlm"}
    uneven = {"none": {0: CELLS["none"][0], 1: CELLS["master"][0]}}
    row = summarise(uneven, ("none",))["summary"]["wiki"]["none"]["measures"]["RR@10"]
    assert row["mean"] == 0.625 and row["spread"] == pytest.approx(0.25 / math.sqrt(2)) and row["against"] == {}
    assert table["mlm"]["measures"]["RR@10"]["spread"] is None and table["mlm"]["queries"] == 4


def test_tests_are_paired_over_queries_whose_values_are_averaged_over_seeds_first():
    assert over_seeds([cell["wiki"] for cell in CELLS["none"].values()]).per_query == {
        "RR@10": {"a": 0.5, "b": 0.5, "c": 0.25, "d": 0.75}
    }
    table = summarise(CELLS, ("none", "mlm"))["summary"]["wiki"]
    test = table["master"]["measures"]["RR@10"]["against"]["none"]
    # master's means over seeds: 0.75, 1, 0.5, 0.75; none's as above: differences 0.25, 0.5, 0.25, 0.
    assert (test["mean"], test["other_mean"], test["difference"]) == (0.75, 0.5, 0.25)
    assert (test["wins"], test["losses"], test["ties"]) == (3, 0, 1)
    # t = 0.25 / (sqrt(1/24) / 2) = 2.4495 on 3 degrees of freedom; p from its closed form there.
    t = 0.25 / (math.sqrt(1 / 24) / 2)
    x = t / math.sqrt(3)
    assert test["t_test_p"] == pytest.approx(1 - 2 / math.pi * (math.atan(x) + x / (1 + x * x)), rel=1e-9)
    # Of the 16 signs of (0.25, 0.5, 0.25, 0), 4 give a sum as far from 0 as 1. Tolerance: 5 deviations of 10,000 draws.
    assert test["randomisation_p"] == pytest.approx(4 / 16, abs=5 * math.sqrt(0.25 * 0.75 / 10_000))
    assert 0 <= test["low"] < 0.25 < test["high"] <= 0.5


def test_the_page_shows_every_number_of_the_table():
    results = {
        "table": "main",
        "commit": "0" * 40,
        "uncommitted": 0,
        "machine": {"cpu": "a CPU", "cores": 2, "threads": "1", "gpu": None},
        "versions": {"torch": "2"},
        "settings": {
            "encoder": "small", "steps": 3, "finetune_steps": 4, "pooling": "cls", "seeds": [0, 1],
            "pretrain": {"global_batch": 8}, "finetune": {},
        },
        "variants": {"none": {"tasks": None}, "mlm": {"tasks": ["mlm"]}, "master": {"tasks": ["mlm", "mkp"]}},
        "bm25": {"wiki": {"RR@10": 0.125}},
        "untuned": {"mlm": {"cls": {"RR@10": 0.3, "mean_cosine": 0.9}}},
        "losses": {"mlm": {"mlm": [7.0, 6.0]}},
        **summarise(CELLS, ("none", "mlm")),
    }  # fmt: skip
    page = as_markdown(results)
    for line in (
        "| master | 2 | 0.7500 ± 0.0000 |",
        "| mlm | 1 | 0.6250 |",
        "| BM25 |  | 0.1250 |",
        "Tasks: none: no pre-training; mlm: mlm; master: mlm, mkp.",
        "| mlm | 0.3000 | - | 0.9000 | - |",
        "| mlm | 7.000 > 6.000 |",
        "pre-training 3 steps (global_batch 8); fine-tuning 4 steps (defaults), cls pooling; seeds 0, 1 of both.",
    ):
        assert line in page
    assert "| master | +0.2500 [" in page.split("Against none:")[1].split("Against mlm:")[0]
    assert "| mlm |" not in page.split("Against mlm:")[1].split("##")[0]


@pytest.mark.parametrize("generations", [False, True])
@pytest.mark.parametrize("table", ["main", "master6", "retromae6"])
def test_every_variant_is_a_valid_pre_training(table, generations):
    variants, baselines = list_variants(table, generations)
    assert {*baselines} <= {variant.name for variant in variants}
    described = [json.dumps(variant.pretraining) for variant in variants]
    assert len({*described}) == len(variants), "two variants train the same"
    for variant in variants:
        if variant.pretraining is None:
            continue
        words = [
            word
            for name, value in {"steps": 2, "epochs": None, **variant.pretraining}.items()
            for word in (f"--{name}", json.dumps(value) if not isinstance(value, str) else value)
        ]
        settings = parse_settings(
            PretrainSettings,
            "",
            ["--recipe", "retromae", *words],
            config_flag="--recipe",
            config_folder=pretrain.RECIPES,
        )
        assert find_problems(settings) == [] and variant.tasks == ["mlm", *settings.tasks]
        assert generations or not {"dor", "gor"} & {*settings.tasks}
        assert settings.shared_decoder == (variant.name == "one-shared-decoder")


def test_masters_table_has_its_rows_and_retromaes_has_its_rates():
    tasks = {variant.name: variant.tasks[1:] for variant in list_variants("master6", True)[0]}
    assert tasks["full"] == tasks["one-shared-decoder"] == ["mkp", "cmp", "npr", "dor", "gor"]
    assert tasks["without-cpr"] == ["npr", "dor", "gor"]
    assert tasks["without-rpr"] == ["mkp", "cmp", "dor", "gor"]
    assert tasks["without-por"] == ["mkp", "cmp", "npr"]
    settings = [variant.pretraining for variant in list_variants("retromae6", False)[0]]
    for decoder in ("enhanced", "masked"):
        rates = {s.get("decoder_mask_rate", 0.5) for s in settings if s["decoder"] == decoder}
        assert rates == {0.15, 0.3, 0.5, 0.7, 0.9}
    assert {s.get("encoder_mask_rate", 0.3) for s in settings} == {0.15, 0.3, 0.5, 0.7, 0.9}


def test_the_mean_cosine_is_that_of_all_pairs():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert mean_cosine(vectors) == pytest.approx((0 + math.sqrt(0.5) + math.sqrt(0.5)) / 3)


@pytest.fixture
def command(tmp_path) -> list[str]:
    for name in ("docs", "wiki"):
        (tmp_path / name / "qrels").mkdir(parents=True)
    (tmp_path / "docs" / "docs.jsonl").write_text('{"doc_id": "1", "paragraphs": ["One.", "Two."]}\n')
    (tmp_path / "wiki" / "corpus.jsonl").write_text('{"_id": "p", "text": "One."}\n')
    (tmp_path / "wiki" / "queries.jsonl").write_text('{"_id": "q", "text": "one?"}\n')
    for split in ("train", "test"):
        (tmp_path / "wiki" / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq\tp\t1\n")
    words = "--corpora docs --train wiki --collections wiki --encoder bert-base-uncased --steps 2 --finetune_steps 2"
    words += " --seeds 0 1 --variants none master --output run --results results.json --pretrain max_tokens=64"
    return [str(tmp_path / word) if word in ("docs", "wiki", "run", "results.json") else word for word in words.split()]


def results_of(command: list[str]) -> Path:
    return Path(command[command.index("--results") + 1])


def test_finished_stages_are_skipped_and_an_unfinished_one_goes_on(command, monkeypatch, capfd):
    """Commands are replaced by one that writes a result at once; Pipeline, which decides, is the real one."""
    value = {"query_id": "q", "values": {"RR@10": 1.0, "nDCG@10": 1.0, "R@100": 1.0}}
    fake = (
        "import json, sys; from pathlib import Path; a = sys.argv; out = Path(a[a.index('--output') + 1])\n"
        "trained = {'pretrain.py': 'export/encoder', 'finetune.py': 'export/retriever'}.get(Path(a[1]).name)\n"
        "target = out / trained / 'x' if trained else (out if out.suffix else out / 'x')\n"
        "target.parent.mkdir(parents=True, exist_ok=True)\n"
        "means = {name: {'mean': 1.0} for name in ('RR@10', 'nDCG@10', 'R@100')}\n"
        "target.write_text(json.dumps({'measures': means}))\n"
        f"'--per_query' in a and Path(a[a.index('--per_query') + 1]).write_text({json.dumps(value)!r})\n"
    )
    made = []

    def run(self, words, lock):
        made.append(words)
        return subprocess.run([sys.executable, "-c", fake, *words[1:]]).returncode

    monkeypatch.setattr("quincunx.engine.retrieval.pipeline.Stopping.run", run)
    monkeypatch.setattr(sys, "argv", ["pretraining_helps.py", *command])
    assert main() == 0
    names = [Path(words[1]).name for words in made]
    # Shards, BM25 for mining, mine, BM25 on wiki; master pre-trained twice; four cells fine-tuned and evaluated.
    assert names.count("build_shards.py") == names.count("mine.py") == 1 and names.count("pretrain.py") == 2
    assert names.count("finetune.py") == names.count("encode.py") == 4 and names.count("evaluate.py") == 5
    results = json.loads(results_of(command).read_text())
    assert results["summary"]["wiki"]["master"]["measures"]["R@100"]["seeds"] == {"0": 1.0, "1": 1.0}
    assert results["variants"]["master"]["tasks"] == ["mlm", "mkp", "cmp", "npr"]
    assert results_of(command).with_suffix(".md").read_text().startswith("# Does pre-training help?")

    made.clear()
    assert main() == 0
    assert not made
    run_folder = Path(command[command.index("--output") + 1])
    stamp = run_folder / "master" / "seed-1" / "stages" / "finetune.json"
    stamp.unlink()  # as a kill would leave it: begun, and not finished
    assert main() == 0
    assert [Path(words[1]).name for words in made] == ["finetune.py"]


def test_a_wrong_setting_is_found_before_anything_runs(command, monkeypatch):
    monkeypatch.setattr(pretraining_helps.Pipeline, "run", lambda self: pytest.fail("it ran"))
    for words, clause in (
        (["--finetune", "learning_rat=1"], "learning_rat"),
        (["--pretrain", "decoder_init=none"], "decoder_init must be"),
        (["--variants", "nothing"], "no variant nothing"),
        (["--results", "table.txt"], "ending in .json"),
        (["--encode", "float16"], "NAME=VALUE"),
        (["--collections", "nowhere"], "nowhere/qrels/test.tsv is not there"),
    ):
        monkeypatch.setattr(sys, "argv", ["pretraining_helps.py", *command, *words])
        with pytest.raises(SettingsError, match=clause):
            main()


def test_all_variants_of_a_table_differ_in_their_pre_training_alone(command):
    options = parse_options([*command, "--table", "master6"])
    experiment = Experiment(options)
    commands = []
    for variant in list_variants("master6", True)[0]:
        stages = experiment.cell(variant, 0).stages
        words = json.dumps([list(stage.command) for stage in stages[1:]])
        commands.append(words.replace(f"/{variant.name}/", "/"))
    assert len({*commands}) == 1


@pytest.mark.slow
def test_the_whole_experiment_runs_on_a_tiny_encoder(tmp_path, monkeypatch):
    """Every command is the real one; the encoder is a BERT of 2 x 32, which learns nothing in two steps."""
    import torch
    from transformers import BertConfig, BertModel

    from quincunx.data_shards.tokenizer_training import train_wordpiece

    draw = random.Random(0)
    words = ["".join(draw.choice("aeioubdgkmnprst") for _ in range(draw.randint(3, 7))) for _ in range(150)]
    texts = [" ".join(draw.sample(words, 20)) for _ in range(120)]
    documents = [{"doc_id": f"d{n}", "paragraphs": texts[4 * n : 4 * n + 4]} for n in range(30)]
    (tmp_path / "wiki" / "qrels").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name, rows in (
        ("docs/docs.jsonl", documents),
        ("wiki/corpus.jsonl", [{"_id": f"p{n}", "title": "", "text": text} for n, text in enumerate(texts)]),
        ("wiki/queries.jsonl", [{"_id": f"q{n}", "text": " ".join(text.split()[:3])} for n, text in enumerate(texts)]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, numbers in (("train", range(80)), ("test", range(80, 120))):
        judged = "".join(f"q{n}\tp{n}\t1\n" for n in numbers)
        (tmp_path / "wiki" / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    torch.manual_seed(0)
    tokenizer = train_wordpiece(texts, 300)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")

    words = (
        "--table master6 --variants full one-shared-decoder --corpora docs --train wiki --collections wiki "
        "--encoder encoder --steps 2 --finetune_steps 2 --seeds 0 --device cpu --untuned --output run "
        "--results results.json --shards tasks=1 workers=1 held_out_share=0.2 --pretrain max_tokens=40 global_batch=4 "
        "held_out_passages=8 --finetune global_batch=4 num_negatives=1 max_passage_tokens=40 max_query_tokens=12"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretraining_helps.py", *words.split()])
    assert main() == 0
    results = json.loads((tmp_path / "results.json").read_text())
    found = results["summary"]["wiki"]
    assert found["full"]["queries"] == 40 and 0 < found["full"]["measures"]["R@100"]["mean"] <= 1
    assert found["one-shared-decoder"]["measures"]["RR@10"]["against"].keys() == {"full"}
    assert results["bm25"]["wiki"]["RR@10"] > 0.9
    for name in ("full", "one-shared-decoder"):
        assert -1 <= results["untuned"][name]["cls"]["mean_cosine"] <= 1 and "mean" in results["untuned"][name]
        assert results["losses"][name].keys() == {"mlm", "mkp", "cmp", "npr"}
    export = tmp_path / "run" / "one-shared-decoder" / "seed-0" / "pretrain" / "export" / "bundle"
    assert json.loads((export / "bundle.json").read_text())["shared_decoder"]
    with safetensors.safe_open(export / "decoders.safetensors", "pt") as weights:
        assert {name.split(".")[1] for name in weights.keys() if name.startswith("decoders.")} == {"shared"}  # noqa: SIM118
    page = (tmp_path / "results.md").read_text()
    assert "Before fine-tuning" in page and "Against full:" in page

    monkeypatch.setattr("quincunx.engine.retrieval.pipeline.Stopping.run", lambda *words: pytest.fail("it ran again"))
    assert main() == 0
