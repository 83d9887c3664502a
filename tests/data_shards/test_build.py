"""Builds: what a set holds, what is refused, what is made again, and tasks that run elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quincunx.data_shards import build as build_module
from quincunx.data_shards.artefact import Work, work_folder
from quincunx.data_shards.build import build_shards
from quincunx.data_shards.build_merge import write_pairs
from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.build_task import TaskPlan, is_held_out, run_task
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.shards import FIELDS, ShardSet, open_shards
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.data_shards.verify import verify_shards


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def copy(build_case, tmp_path) -> Path:
    """The reference, to be damaged."""
    return Path(shutil.copytree(build_case.reference, tmp_path / "set"))


def read_samples(shards: ShardSet, split: str) -> list[tuple[str, bool, dict[str, list[int]]]]:
    """(passage id, has_next, token ids by field) of every sample."""
    samples = []
    for number in range(shards.num_blocks(split)):
        block = shards.read_block(split, number)
        for i, passage_id in enumerate(shards.passage_ids(split, number)):
            texts = {name: block.text(name, i).token_ids.tolist() for name in FIELDS}
            samples.append((passage_id, bool(block.has_next[i]), texts))
    return samples


def test_the_set_holds_the_corpus_split_joined_and_counted(build_case):
    shards, tokenizer = open_shards(build_case.reference), load_tokenizer(build_case.tokenizer)
    documents = {document["doc_id"]: document for document in read_jsonl(build_case.folder / "docs.jsonl")}
    held_out = {doc_id for doc_id in documents if is_held_out(doc_id, 0.1)}
    assert 3 <= len(held_out) <= 30
    tokens: dict[str, list[int]] = {doc_id: [] for doc_id in documents}
    for split, expected in (("heldout", held_out), ("train", documents.keys() - held_out)):
        samples = read_samples(shards, split)
        owners = [passage_id.split("#")[0] for passage_id, _, _ in samples]
        assert set(owners) == expected
        for (passage_id, has_next, texts), owner, following in zip(samples, owners, [*owners[1:], None]):
            assert 1 <= len(texts["passage"]) <= 62 and has_next == (owner == following)
            tokens[owner] += texts["passage"]
            number, queries = int(owner[3:]), tokenizer.decode(texts["queries"])
            if passage_id.endswith("#0") and number % 3 == 0:
                assert queries == f"what is title {number} [SEP] second query"
                assert tokenizer.decode(texts["continuation"]) == "so on"
            else:
                assert queries == ""
    for doc_id, document in documents.items():
        text = " ".join([document["title"], *document["paragraphs"]])
        assert tokens[doc_id] == tokenizer(text, add_special_tokens=False)["input_ids"], "no token is lost"
    counts = shards.manifest.counts
    assert counts["joined_generations"] == 40 and counts["unknown_generations"] == 1
    assert counts["train_documents"] + counts["heldout_documents"] == 120
    assert shards.statistics.num_passages == shards.num_samples("train")
    assert not work_folder(build_case.reference).exists()
    assert not (build_case.reference / "probe").exists() and not (build_case.reference / "pairs").exists()
    assert "pairs" not in shards.manifest.settings


def test_a_set_whose_manifest_is_damaged_is_refused_and_made_anew_on_request(build_case, copy):
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes()[:500] + b"\xff")
    damaged = build_case.contents(copy)
    with pytest.raises(DataError, match=r"manifest\.json .* --remake"):
        build_case.build(build_case.settings(copy))
    build_case.build(build_case.settings(copy, remake=True))
    build_case.check(copy)
    assert build_case.contents(copy.with_name("set.old-1")) == damaged


def test_another_set_in_the_output_folder_is_refused_until_remade(build_case, copy):
    other = build_case.settings(copy, max_tokens=48, tasks=1, shard_bytes=10**9, generations=[])
    refusal = r"was made from other inputs or settings \(.*max_tokens was 64 and is 48; .*corpus differs\).* --remake"
    with pytest.raises(SettingsError, match=refusal):
        build_case.build(other)
    build_case.check(copy)
    for changes, refusal in (
        ({"probe_queries": 200}, "no held-out passage .* has a natural query"),
        ({"pairs": True}, "no training passage .* has a natural query"),
        ({"held_out_share": 0.999999}, "gives no training passage"),
    ):
        with pytest.raises(DataError, match=refusal):
            build_case.build(replace(other, remake=True, **changes))
        build_case.check(copy.with_name("set.old-1"))
        assert not copy.exists()
    manifest = build_case.build(replace(other, remake=True))
    verify_shards(str(copy))
    assert {path.name for path in copy.glob("*.tar")} == {shard.name for shard in manifest.shards}


def given(build_case, tmp_path: Path, documents: list[dict]) -> BuildSettings:
    """Settings of two tasks for these documents."""
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    path = str(tmp_path / "docs.jsonl")
    return build_case.settings(tmp_path / "out", path=path, generations=[], held_out_share=0.0, tasks=2)


def test_duplicate_passage_ids_are_named_and_nothing_is_published(build_case, tmp_path):
    documents = read_jsonl(build_case.folder / "docs.jsonl")
    twin = {"doc_id": "twin", "title": "", "paragraphs": ["Short."]}
    with pytest.raises(DataError, match=r"'twin#0' \(3 times\), 'doc9#0' \(2 times\)"):
        build_case.build(given(build_case, tmp_path, [twin, *documents, twin, twin, documents[9]]))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_empty_corpus_a_bad_line_and_a_missing_file_are_one_sentence_each(build_case, tmp_path):
    empty = given(build_case, tmp_path, [{"doc_id": name, "title": "", "paragraphs": []} for name in "ab"])
    with pytest.raises(DataError, match=r"holds no passage \(0 bad records, 2 empty passages\)"):
        build_case.build(replace(empty, output=str(tmp_path / "empty")))
    documents = [{"doc_id": f"a{i}", "title": "", "paragraphs": ["Some text."]} for i in range(9)]
    stopping = given(build_case, tmp_path, documents)
    with open(stopping.path, "a") as file:
        file.write('{"doc_id": \n')
    with pytest.raises(DataError, match=r"docs\.jsonl:10: not JSON .*on_bad_record skip"):
        build_case.build(stopping)
    assert (work_folder(tmp_path / "out") / "scratch" / "part-00000.json").exists()
    skipping = replace(stopping, on_bad_record="skip")  # takes up the work
    assert build_case.build(skipping).counts["bad_records"] == 1
    assert "docs.jsonl:10" in json.loads((tmp_path / "out" / "build.json").read_text())["bad_record_examples"][0]
    with pytest.raises(DataError, match="no documents corpus at"):
        build_case.build(replace(skipping, path=str(tmp_path / "nowhere.jsonl")))


def test_a_full_disk_is_one_sentence_and_the_build_continues_when_there_is_room(build_case, small_disk):
    tmp_path = small_disk("size=900k")
    with pytest.raises(DataError, match=r"the disk of .* is full .*run the same command again"):
        build_case.build(build_case.settings(tmp_path / "out"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path)], check=True)
    build_case.build(build_case.settings(tmp_path / "out"))
    build_case.check(tmp_path / "out")


def test_shards_that_are_lost_or_cut_are_made_again_by_their_tasks_alone(build_case, copy, monkeypatch):
    shards = sorted(copy.glob("train-*.tar"))
    shards[0].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:-600])
    started: list[int] = []
    monkeypatch.setattr(build_module, "run_task", lambda plan, task: started.append(task) or run_task(plan, task))
    build_case.build(build_case.settings(copy))
    assert started == sorted({int(path.name.split("-")[1]) for path in (shards[0], shards[3])})
    build_case.check(copy)
    assert os.listdir(copy.parent) == ["set"]
    (copy / "statistics.npz").unlink()
    with pytest.raises(DataError, match=r"statistics\.npz is missing: run the command that made it with --remake"):
        build_case.build(build_case.settings(copy))


def test_a_shard_that_comes_out_differently_is_not_put_in_its_place(build_case, copy, monkeypatch):
    shard = min(copy.glob("train-*.tar"))
    shard.unlink()
    monkeypatch.setattr(build_module, "file_digest", lambda path: "other")
    with pytest.raises(
        DataError, match=r"differs from the manifest's .*: copy it again, or make the whole .* --remake"
    ):
        build_case.build(build_case.settings(copy))
    assert not shard.exists()


def read_qrels(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text().splitlines()[1:]]


def test_a_tokenizer_is_trained_and_a_probe_and_pairs_are_cut_from_docstrings(build_case, tmp_path):
    output = tmp_path / "out"
    settings = BuildSettings(
        format="python_docs", path="tqdm", output=str(output), tokenizer="train:1000", held_out_share=0.3,
        probe_queries=5, pairs=True, workers=1, num_buckets=4096, progress=False,
    )  # fmt: skip
    manifest = build_case.build(settings)
    assert 300 <= manifest.vocab_size <= 1000 and manifest.fields["train"]["queries"] > 0
    shards = open_shards(output)
    ids = {
        split: {i for block in range(shards.num_blocks(split)) for i in shards.passage_ids(split, block)}
        for split in ("train", "heldout")
    }
    for name, split, qrels in (("probe", "heldout", "test"), ("pairs", "train", "train")):
        corpus = read_jsonl(output / name / "corpus.jsonl")
        assert {row["_id"] for row in corpus} == ids[split] and all(row["text"] for row in corpus)
        judged = read_qrels(output / name / "qrels" / f"{qrels}.tsv")
        assert {row[1] for row in judged} <= ids[split]
        assert {row[0] for row in judged} == {row["_id"] for row in read_jsonl(output / name / "queries.jsonl")}
        assert len(judged) == 5 if name == "probe" else judged
    with pytest.raises(SettingsError, match="pairs was True and is left out"):
        build_case.build(replace(settings, pairs=False))


def test_pairs_to_fine_tune_on_hold_no_held_out_passage_and_none_of_their_queries(tmp_path):
    """One query belongs to a training and a held-out passage, another to two training passages."""
    queries = {
        "heldout": {"h": "Shared line here.", "h.1": "Only held out."},
        "train": {"a": "shared  line here.", "a.1": "Twice.", "b": "Twice.", "b.1": "", "b.2": "Once."},
    }
    plan = TaskPlan("corpus", Work(tmp_path, tmp_path), {"tasks": 1, "pairs": True})
    plan.work.scratch("tasks").mkdir(parents=True)
    for split, of_split in queries.items():
        rows = [{"passage_id": id, "text": f"words of {id}", "query": query} for id, query in of_split.items()]
        plan.task_file(0, f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    counts = write_pairs(plan, tmp_path / "pairs")

    assert counts == {"queries": 2, "judgements": 3, "left_out": 1}
    judged = read_qrels(tmp_path / "pairs" / "qrels" / "train.tsv")
    assert judged == [["q-a.1", "a.1", "1"], ["q-a.1", "b", "1"], ["q-b.2", "b.2", "1"]]
    asked = {row["_id"]: row["text"] for row in read_jsonl(tmp_path / "pairs" / "queries.jsonl")}
    assert asked == {"q-a.1": "Twice.", "q-b.2": "Once."}
    assert [row["_id"] for row in read_jsonl(tmp_path / "pairs" / "corpus.jsonl")] == ["a", "a.1", "b", "b.1", "b.2"]


def put_on_the_path(folder: Path, monkeypatch, **commands: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


SBATCH = """
# Runs every element of the job array at once on this machine; srun and squeue stand beside it.
script="${@: -1}"
array=$(grep -o -- '--array=0-[0-9]*' "$script" | grep -o '[0-9]*$')
if grep -q merge_stats "$script"; then echo "Submitted batch job 2"; exit 0; fi
for i in $(seq 0 "$array"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=localhost RUN_OFFSET=0 bash "$script" >> "$QUEUE_LOG" 2>&1 || exit 1
done
echo "Submitted batch job 1"
"""


@pytest.mark.slow
def test_slurm_jobs_write_the_same_bytes_and_a_rerun_completes_the_set(build_case, tmp_path, monkeypatch):
    """The queue's commands are stand-ins that run the job script here; script, tasks and shards are the real ones."""
    commands = {
        "sbatch": SBATCH,
        "srun": 'while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"',
        "scontrol": "echo localhost",
        "squeue": "cat $QUEUE_STATE",
    }
    (tmp_path / "state").write_text("")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    put_on_the_path(tmp_path / "bin", monkeypatch, **commands)
    monkeypatch.setenv("QUEUE_LOG", str(tmp_path / "queue.log"))
    monkeypatch.setenv("QUEUE_STATE", str(tmp_path / "state"))
    said: list[str] = []
    slurm = build_case.settings(
        tmp_path / "out", executor="slurm", slurm_partition="cpu", slurm_args=["account=lab"], tasks=6
    )
    assert build_shards(slurm, [], say=said.append) is None
    assert "Run the same command again" in said[-1]
    scratch = work_folder(tmp_path / "out") / "scratch"
    script = (scratch / "datatrove" / "launch_script.slurm").read_text()
    assert "--partition=cpu" in script and "--account=lab" in script
    results = sorted(scratch.glob("part-?????.json"))
    assert len(results) == 6, (tmp_path / "queue.log").read_text()[-2000:]
    results[2].unlink()
    (scratch / "tasks" / "00002-error").write_text("docs.jsonl:7: not JSON")
    (tmp_path / "state").write_text("1 cpu quincunx R\n")
    assert build_shards(slurm, [], say=said.append) is None
    assert not results[2].exists(), "the queue still has the job"
    (tmp_path / "state").write_text("")
    with pytest.raises(DataError, match=r"task 00002: docs\.jsonl:7: not JSON"):
        build_shards(slurm, [], say=said.append)
    assert build_shards(slurm, [], say=said.append) is None
    build_shards(slurm, [], say=said.append)
    build_case.check(tmp_path / "out")


def test_slurm_that_is_not_there_or_refuses_the_job_is_one_sentence(build_case, tmp_path, monkeypatch):
    slurm = build_case.settings(tmp_path / "out", executor="slurm", slurm_partition="cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="executor slurm needs sbatch on this machine: give --executor local"):
        build_case.build(slurm)
    put_on_the_path(tmp_path, monkeypatch, sbatch="exit 5")
    refusal = r"refused the job \(exit 5\).* --slurm_partition, --slurm_time and --slurm_args"
    with pytest.raises(SettingsError, match=refusal):
        build_case.build(slurm)


def test_work_that_slurm_has_is_kept_and_not_given_to_another_command(build_case, copy, tmp_path, monkeypatch):
    put_on_the_path(tmp_path, monkeypatch, sbatch="echo Submitted batch job 1")
    slurm = build_case.settings(copy, executor="slurm", slurm_partition="cpu", remake=True)
    assert build_case.build(slurm) is None
    assert (work_folder(copy) / "scratch" / "slurm_job").read_text() == "1"
    verify_shards(str(copy.with_name("set.old-1")))
    with pytest.raises(SettingsError, match=r"was begun with other inputs or settings \(tasks was 6 and is 3\)"):
        build_case.build(replace(slurm, remake=False, tasks=3))
