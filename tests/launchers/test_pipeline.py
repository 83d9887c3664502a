"""The chain as processes on 60 invented passages, killed on the way; and its recipes, which need no process."""

import json
import random
import sys
from pathlib import Path

import pytest
import yaml

from quincunx.data_shards.errors import SettingsError
from quincunx.launchers.pipeline import build_chain, chosen, main, plain_words
from quincunx.launchers.pipeline_recipe import RECIPES, read_recipe

ROOT = Path(__file__).parent.parent.parent
NUM_PASSAGES = 60
NUM_QUERIES = {"train": 24, "dev": 16}
TRAINING = {"global_batch": 8, "num_negatives": 2, "learning_rate": 2e-3, "steps": 8}
SHORT = {
    "data": {}, "splits": {"train": {}, "dev": {"probe_queries": 8, "probe_passages": 20}},
    "execution": {"device": "cpu", "systems": ["bm25", "retriever1"]},
    "finetune": {"max_query_tokens": 16, "max_passage_tokens": 32, "max_pair_tokens": 48, "tracking": "none",
                 "log_every": 1, "checkpoint_every": 4, "probe_every": 4, "warmup_share": 0.1},
    "bm25": {"depth": 20}, "search": {"depth": 20}, "mine": {"depth": 10, "num_negatives": 5, "random_fill": 3},
    "retriever1": {**TRAINING, "steps": 40}, "evaluate": {"measures": ["MRR@10", "R@20"]},
}  # fmt: skip
WHOLE = {
    **SHORT, "splits": {**SHORT["splits"], "test": {"corpus": "CORPUS", "queries": "QUERIES", "qrels": "QRELS"}},
    "execution": {"device": "cpu"}, "retriever1": TRAINING, "retriever2": TRAINING, "rerank": {"depth": 10},
    "reranker": {**TRAINING, "gradient_candidates": 2}, "distil": TRAINING,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A BEIR folder of passages of invented words and queries of three words of one, and encoder/, a BERT of 2 x 32."""
    import torch
    from transformers import BertConfig, BertModel

    from quincunx.data_shards.tokenizer_training import train_wordpiece

    folder, draw = tmp_path_factory.mktemp("beir"), random.Random(0)
    words = ["".join(draw.choice("aeioubdgkmnprst") for _ in range(draw.randint(3, 7))) for _ in range(150)]
    passages = [" ".join(draw.sample(words, draw.randint(8, 14))) for _ in range(NUM_PASSAGES)]
    write_lines(folder / "corpus.jsonl", [{"_id": f"p{n}", "text": text} for n, text in enumerate(passages)])
    (folder / "qrels").mkdir()
    queries, place = [], 0
    for split, number in NUM_QUERIES.items():
        lines = ["query-id\tcorpus-id\tscore"]
        for _ in range(number):
            queries.append({"_id": f"q{place}", "text": " ".join(draw.sample(passages[place].split(), 3))})
            lines.append(f"q{place}\tp{place}\t1")
            place += 1
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    write_lines(folder / "queries.jsonl", queries)
    torch.manual_seed(0)
    tokenizer = train_wordpiece(passages, 300)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes), add_pooling_layer=False
    )
    model.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    return folder


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def recipe_file(path: Path, recipe: dict, tiny: Path) -> Path:
    places = {"CORPUS": tiny / "corpus.jsonl", "QUERIES": tiny / "queries.jsonl", "QRELS": tiny / "qrels" / "dev.tsv"}
    text = yaml.safe_dump({**recipe, "models": {"encoder": str(tiny / "encoder")}})
    for word, place in places.items():
        text = text.replace(word, str(place))
    path.write_text(text)
    return path


def command(recipe: Path, tiny: Path, output: Path, *more: str) -> list[str]:
    launcher = str(ROOT / "launchers" / "pipeline.py")
    flags = {"recipe": recipe, "set": f"data.folder={tiny}", "output": output}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [sys.executable, launcher, *words, *more]


def stamps(folder: Path) -> dict[str, dict]:
    found = (path for path in (folder / "stages").glob("*.json") if not path.name.endswith(".begun.json"))
    return {stamp["name"]: stamp for stamp in map(json.loads, (path.read_text() for path in found))}


def test_the_chain_killed_while_it_trains_goes_on_there_and_does_nothing_twice(tiny, tmp_path, harness):
    argv = command(recipe_file(tmp_path / "short.yaml", SHORT, tiny), tiny, tmp_path / "chain")
    folder = tmp_path / "chain"
    process = harness.begin(argv, tmp_path / "first.log")
    try:
        harness.wait_until(lambda: harness.committed(folder / "retriever1"), 240, "a checkpoint of retriever1")
    finally:
        harness.kill_all(process)
    assert set(stamps(folder)) == {"split.train", "split.dev", "search.bm25.train", "mine.bm25"}
    trained = len(harness.lines(folder / "retriever1"))
    assert 4 <= trained < 40

    process = harness.begin(argv, tmp_path / "second.log")
    try:
        assert process.wait(240) == 0, (tmp_path / "second.log").read_text()
    finally:
        harness.kill_all(process)
    log = (tmp_path / "second.log").read_text()
    assert "[4/11] mine.bm25: done before" in log
    assert "[5/11] retriever1: not finished" in log
    attempts = {name: stamp["attempts"] for name, stamp in stamps(folder).items()}
    assert attempts.pop("retriever1") == 2
    assert set(attempts.values()) == {1} and len(attempts) == 10
    steps = [record["step"] for record in records(folder / "retriever1", "train")]
    assert steps == list(range(1, 41))  # nothing lost, nothing twice
    assert "resumed" in [record["event"] for record in records(folder / "retriever1", "event")]
    result = json.loads((folder / "evaluate.retriever1.dev" / "result.json").read_text())
    assert result["queries"]["judged"] == NUM_QUERIES["dev"]
    assert (folder / "report" / "report.html").stat().st_size > 10_000

    before = stamps(folder)
    assert main(argv[2:]) == 0
    assert stamps(folder) == before


def records(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.slow
def test_the_whole_chain_runs_and_a_changed_reranker_leaves_the_retrievers_alone(tiny, tmp_path, harness):
    argv = command(recipe_file(tmp_path / "whole.yaml", WHOLE, tiny), tiny, tmp_path / "chain")
    folder = tmp_path / "chain"
    log = tmp_path / "log"
    for more in ([], ["--set", "reranker.steps=4"]):
        process = harness.begin([*argv, *more], log)
        try:
            assert process.wait(1200) == 0, log.read_text()
        finally:
            harness.kill_all(process)
    again = {name for name, stamp in stamps(folder).items() if stamp["reason"] != "not done yet"}
    assert {"reranker", "score", "rerank.dev", "distil", "evaluate.distil.test", "report"} <= again
    assert not {name for name in again if "retriever" in name or "bm25" in name or name.startswith("split")}
    assert stamps(folder)["reranker"]["reason"] == "steps was 8 and is 4"
    for system in ("bm25", "start", "retriever1", "retriever2", "reranker", "distil"):
        for split in ("dev", "test"):
            assert (folder / f"evaluate.{system}.{split}" / "result.json").exists()
    # dev and test are the same queries and passages here
    results = [
        json.loads((folder / f"evaluate.distil.{split}" / "result.json").read_text()) for split in ("dev", "test")
    ]
    assert results[0]["measures"] == results[1]["measures"]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_makes_a_chain_whose_settings_its_launchers_accept(name, tmp_path):
    recipe = read_recipe(name, ["data.folder=somewhere"])
    stages = build_chain(recipe, tmp_path)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names) and names[-1] == "report"
    for place, stage in enumerate(stages):
        made = {other.work for other in stages[:place]}
        own = {tmp_path, tmp_path / "stages"}  # the recipe and the stamps, which pipeline.py writes
        inside = [path for path in stage.inputs.values() if tmp_path in path.parents and path.parent not in own]
        assert all(made & {path, *path.parents} for path in inside), f"{stage.name} reads what a later stage makes"
    assert (RECIPES / f"{name}.md").is_file()


def test_the_small_recipe_is_the_whole_chain_in_its_order(tmp_path):
    names = [stage.name for stage in build_chain(read_recipe("small", ["data.folder=x"]), tmp_path)]
    order = ["search.bm25.train", "mine.bm25", "retriever1", "encode.retriever1", "search.retriever1.train",
             "mine.retriever1", "retriever2", "mine.retriever2", "reranker", "score", "distil", "evaluate.bm25.dev",
             "evaluate.start.dev", "evaluate.retriever1.dev", "rerank.dev", "evaluate.distil.test",
             "report"]  # fmt: skip
    assert [name for name in names if name in order] == order


def test_a_section_left_out_leaves_its_stage_out(tmp_path, tiny):
    recipe = read_recipe(str(recipe_file(tmp_path / "short.yaml", SHORT, tiny)), [f"data.folder={tiny}"])
    names = {stage.name for stage in build_chain(recipe, tmp_path / "out")}
    assert "retriever1" in names and not names & {"retriever2", "reranker", "score", "distil", "encode.start"}


def test_pretraining_and_its_shards_come_first_when_the_recipe_has_them(tmp_path):
    corpus = ["shards.format=beir", "shards.path=x", "shards.tokenizer=bert-base-uncased", "pretrain.recipe=retromae"]
    stages = build_chain(read_recipe("small", ["data.folder=x", *corpus]), tmp_path)
    names = [stage.name for stage in stages]
    assert names.index("shards") < names.index("pretrain") < names.index("search.bm25.train")
    for stage in stages:
        if stage.name in ("retriever1", "retriever2", "reranker", "distil"):
            assert stage.inputs["encoder"] == tmp_path / "pretrain" / "export" / "encoder"
        if stage.name == "encode.start":
            assert stage.inputs["model"] == tmp_path / "pretrain" / "export" / "encoder"


def test_every_unknown_section_and_key_is_named_with_the_nearest_one():
    wrong = ["data.folder=x", "retreiver1.steps=3", "distil.learnin_rate=1", "splits.dev.quries=x", "mine.run=x"]
    with pytest.raises(SettingsError) as error:
        read_recipe("small", wrong)
    message = str(error.value)
    for clause in ("section retreiver1, did you mean retriever1?", "distil.learnin_rate, did you mean learning_rate?",
                   "splits.dev.quries, did you mean queries?", "mine.run"):  # fmt: skip
        assert clause in message


def test_a_value_that_a_later_stage_would_refuse_is_refused_before_anything_runs(tmp_path):
    argv = ["--recipe", "small", "--output", str(tmp_path / "chain"), "--set", "data.folder=x"]
    with pytest.raises(SettingsError, match=r"stage distil: learning_rate must be a finite number, given high"):
        main([*argv, "distil.learning_rate=high"])
    with pytest.raises(SettingsError, match=r"stage reranker: num_negatives is 0"):
        main([*argv, "reranker.num_negatives=0"])
    for assignment in ("score.depth=5", "bm25.index=hnsw", "search.k1=2", "mine.skip_top=500",
                       "evaluate.measures=[foo]", "encode.part_rows=0", "rerank.pairs_a_part=0", "splits.dev.sample=0",
                       "splits.dev.relevant_from=0"):  # fmt: skip
        with pytest.raises(SettingsError, match=r"stage \S+: "):
            main([*argv, assignment])
    for key in ("search.page", "encode.kind", "search.embeddings"):
        with pytest.raises(SettingsError, match=f"sets what does not exist: {key}"):
            main([*argv, f"{key}=8080"])
    assert not (tmp_path / "chain").exists()


def test_another_probe_does_not_train_again(tmp_path):
    def stages(*assignments):
        chain = build_chain(read_recipe("small", ["data.folder=x", *assignments]), tmp_path)
        return {stage.name: (stage.settings, stage.inputs) for stage in chain}

    one, other = stages(), stages("splits.dev.probe_queries=7")
    assert one["split.dev"] != other["split.dev"] and one["retriever1"] == other["retriever1"]


def test_what_a_recipe_says_of_encoding_holds_for_the_untrained_encoder_too(tmp_path):
    recipe = read_recipe("small", ["data.folder=x", "encode.max_tokens=33", "search.max_tokens=11"])
    chain = {stage.name: stage for stage in build_chain(recipe, tmp_path)}
    assert chain["encode.start"].settings["max_tokens"] == 33
    assert chain["search.start.dev"].settings["max_tokens"] == 11


@pytest.mark.parametrize(
    ("assignments", "clause"),
    [
        (["data.folder=x", "splits.dev.probe_queries=abc"], "splits.dev.probe_queries is 'abc'; it must be a whole"),
        (["data.folder=x", "splits.dev.probe_queries=null"], "splits.dev.probe_queries is None"),
        (["data.corpus=5"], "data.corpus is 5; it must be"),
        (["data.folder=x", "execution.systems=bm25"], "execution.systems is 'bm25'; it must be"),
        (["data.folder=x", "execution.launch=8"], "execution.launch is 8"),
        (["data.folder=x", "splits.a/b.folder=y"], "split 'a/b', which names files"),
        (["steps=3"], "is not section.key=value"),
        (["data.folder=x", "data.folder.deeper=1"], "folder is a setting, not a section"),
        (["data.titles=true"], "the corpus of split train is named nowhere"),
        (["data.folder=x", "execution.systems=[bm25, colbert]"], "execution.systems has colbert"),
        (["data.folder=x", "splits.test.probe_queries=5"], "probe_queries are given for more than one split"),
        (["data.folder=x", "pretrain.recipe=master"], "pretrain needs section shards"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(assignments, clause):
    with pytest.raises(SettingsError, match=clause):
        read_recipe("small", assignments)


def test_a_stage_needs_the_one_before_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": {"folder": "x"}, "splits": {"train": {}, "dev": {}}, "retriever2": {}}))
    with pytest.raises(SettingsError, match="retriever2 needs section retriever1"):
        read_recipe(str(path))


def test_from_and_only_choose_stages_and_name_the_nearest_one(tmp_path):
    stages = build_chain(read_recipe("small", ["data.folder=x"]), tmp_path)
    assert [stage.name for stage in chosen(stages, ["evaluate.*.dev"], None)] == [
        f"evaluate.{system}.dev" for system in ("bm25", "start", "retriever1", "retriever2", "reranker", "distil")
    ]
    assert chosen(stages, [], "distil")[0].name == "distil"
    with pytest.raises(SettingsError, match=r"--from distill: there is no such stage, did you mean distil\?"):
        chosen(stages, [], "distill")
    with pytest.raises(SettingsError, match="--only nothing"):
        chosen(stages, ["nothing"], None)


def test_commas_of_an_assignment_stay_in_it():
    words = ["--set", "evaluate.measures=[MRR@10,R@50]", "retriever1.steps=3", "--from", "distil", "--dry_run"]
    plain = plain_words(words)
    assert plain[:3] == ["--from_stage", "distil", "--dry_run"]
    assert json.loads(plain[3].removeprefix("--set=")) == ["evaluate.measures=[MRR@10,R@50]", "retriever1.steps=3"]


def test_facts_of_the_machine_do_not_make_a_stage_another(tmp_path):
    base = ["data.folder=x"]
    other = [*base, "execution.launch=torchrun --nproc_per_node 2", "execution.device=auto", "score.batch_tokens=100",
             "finetune.micro_batch=2"]  # fmt: skip
    first, second = (build_chain(read_recipe("small", settings), tmp_path) for settings in (base, other))
    assert [stage.settings for stage in first] == [stage.settings for stage in second]
    assert [stage.command for stage in first] != [stage.command for stage in second]


def test_the_grade_that_counts_as_relevant_holds_for_mining_too(tmp_path):
    chain = build_chain(read_recipe("small", ["data.folder=x", "splits.train.relevant_from=2"]), tmp_path)
    mining = [stage.settings["relevant_from"] for stage in chain if stage.name.startswith("mine.")]
    assert mining and set(mining) == {2}


def test_the_report_is_made_again_when_the_recipe_is_another(tmp_path):
    *_, report = build_chain(read_recipe("small", ["data.folder=x"]), tmp_path)
    assert report.name == "report" and report.inputs["recipe"] == tmp_path / "recipe.json"
