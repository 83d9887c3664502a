"""GLUE's CoLA, MRPC, STS-B and QQP from local files, on transformers' Trainer; the defaults are BERT's.

BERT (Devlin and others, 2019, section 4.1 and appendix A.3), whose settings MASTER (appendix C) takes over: batches of
32, 3 epochs, the best learning rate on dev of 5e-5, 4e-5, 3e-5 and 2e-5, dropout 0.1; the tokens, the warm-up and
epsilon are those of its published code. The tsv files know no quoting: a quotation mark is a character of its sentence.
docs/glue.md shows a line of each. The measures are scikit-learn's and scipy's.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.records import BadRecordError, check_text, parse_objects, read_lines
from quincunx.data_shards.setting import setting
from quincunx.engine.ranks import Environment, choose_device

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, kw_only=True)
class GlueSettings:
    """Settings of a GLUE run."""

    task: Literal["cola", "mrpc", "stsb", "qqp"] = "mrpc"
    """What is learned: acceptability of a sentence (cola), paraphrase (mrpc), similarity from 0 to 5 (stsb), duplicate
    questions (qqp)."""
    data: str = setting("", role="data")
    """Folder with train.tsv, dev.tsv and perhaps test.tsv as in the GLUE download, or the same as .jsonl."""
    train: str | None = setting(None, role="data")
    """Training file (default: the folder's), such as msr_paraphrase_train.txt."""
    dev: str | None = setting(None, role="data")
    """File that is measured on (default: the folder's)."""
    test: str | None = setting(None, role="data")
    """File that predictions are written for (default: the folder's, if it has one)."""
    skip_broken_rows: bool = False
    """Leave out rows of train and dev with a wrong number of columns, and say how many; the published QQP has some."""
    encoder: str = "bert-base-uncased"
    """Model to start from: a pre-training run's export/encoder, a Hugging Face name or folder."""
    output: str = "runs/glue"
    """Folder of checkpoints, dev.json, classifier/ and predictions. The same command on the same folder resumes."""
    max_tokens: int = setting(128, low=8)
    """Longest sentence or pair in tokens, special tokens included; a longer pair loses tokens of its longer side."""
    epochs: float = setting(3.0, above=0, below=10**6)
    """Length of the run in passes over the training data (BERT: 3)."""
    batch: int = setting(32, low=1)
    """Examples of one optimizer step, over all ranks (BERT: 32)."""
    learning_rate: float = setting(2e-5, above=0, below=10**6)
    """Peak learning rate (BERT: the best on dev of 5e-5, 4e-5, 3e-5 and 2e-5)."""
    warmup_share: float = setting(0.1, low=0, below=1)
    """Share of the steps over which the rate rises linearly from 0; it then falls linearly to 0."""
    weight_decay: float = setting(0.01, low=0)
    """AdamW's decoupled weight decay; none on biases and norms."""
    adam_eps: float = setting(1e-6, above=0)
    """AdamW's epsilon (BERT's code: 1e-6)."""
    seed: int = setting(42, low=0, below=2**32)
    """Of the order, the new head and dropout."""
    dev_every: int = setting(500, low=1)
    """Steps between measurements on dev, and between checkpoints."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: cuda fails if there is no GPU, auto takes one if there is."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        problems = []
        if not self.data and not (self.train and self.dev):
            problems.append(f"data is not given; name the folder of {self.task}'s files, or give train and dev")
        if self.data and not Path(self.data).is_dir():
            problems.append(
                f"data {self.data} is not a folder; name the one that holds {self.task}'s train.tsv and dev.tsv"
            )
        return problems


HIGHEST_SCORE = 5


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks."""

    title: str
    sentences: tuple[str, ...]
    """Columns of its sentences, one or two."""
    label: str
    """Column of its label."""
    classes: tuple[str, ...]
    """Names of the labels 0 and 1; empty for a score from 0 to HIGHEST_SCORE."""
    measures: tuple[str, ...]
    """Names of what GLUE's leaderboard and MASTER's Table 8 report."""
    header: tuple[str, ...] = ()
    """Columns of train and dev files, which have no header line where this is given."""

    @property
    def allowed(self) -> str:
        return "0 and 1" if self.classes else f"numbers from 0 to {HIGHEST_SCORE}"


TASKS = {
    "cola": Task(
        "CoLA", ("sentence",), "label", ("unacceptable", "acceptable"), ("mcc",),
        header=("source", "label", "note", "sentence"),
    ),
    "mrpc": Task(
        "MRPC", ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"), ("accuracy", "f1"),
    ),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
    "qqp": Task(
        "QQP", ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"), ("accuracy", "f1"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """The examples of one file, in its order."""

    sentences: list[list[str]]
    """One list a sentence column, one or two."""
    labels: np.ndarray | None
    """int64 [N] classes or float32 [N] scores; None in a test file."""
    num_broken: int
    """Rows left out, with another number of columns than the file's others."""


def find_files(settings: GlueSettings) -> dict[str, Path]:
    """The file of each split: as given, else SPLIT.tsv or SPLIT.jsonl of the folder; there may be no test file.

    Raises DataError if there is no file for train or dev, or not the one that was given.
    """
    found = {}
    for split in SPLITS:
        given = getattr(settings, split)
        in_folder = [f"{settings.data}/{split}.tsv", f"{settings.data}/{split}.jsonl"] if settings.data else []
        names = [given] if given else in_folder
        if path := next((name for name in names if Path(name).is_file()), None):
            found[split] = Path(path)
        elif given or split != "test":
            looked_for = " nor ".join(names)
            raise DataError(f"there is no {split} file ({looked_for}): give --data a folder that has one, or --{split}")
    return found


def read_examples(name: str, path: str | Path, split: str, *, skip_broken: bool = False) -> Examples:
    """Reads a train, dev or test file of the task `name` (a key of TASKS).

    skip_broken: rows of train and dev files with a wrong number of columns are left out and counted, not refused. The
        published QQP files have some, where a question holds a line break.

    Raises:
        DataError: no such file, a column that is missing, a row with a wrong number of columns, a label that is missing
            or not one of the task's, labels that are all alike, or no examples. Names file and line.
    """
    task, path, is_test = TASKS[name], Path(path), split == "test"
    broken: list[str] = []
    is_jsonl = path.name.removesuffix(".gz").endswith(".jsonl")
    rows = list(_jsonl_rows(task, path) if is_jsonl else _tsv_rows(task, path, split, broken))
    if broken and (is_test or not skip_broken):
        raise DataError(broken[0] + ("" if is_test else ", or pass --skip_broken_rows"))
    if not rows:
        raise DataError(f"{path} holds no examples: give a {split} file of {task.title} with at least one")
    columns = [list(column) for column in zip(*(sentences for _, sentences, _ in rows))]
    if is_test:
        return Examples(columns, None, 0)
    labels = np.array(
        [_label(task, label, place) for place, _, label in rows], np.int64 if task.classes else np.float32
    )
    if (labels == labels[0]).all():
        raise DataError(
            f"all {len(labels)} labels of {path} are {labels[0]:g}, {task.title}'s are {task.allowed}: give a file "
            "with different ones"
        )
    return Examples(columns, labels, len(broken))


def _tsv_rows(task: Task, path: Path, split: str, broken: list[str]) -> Iterator[tuple[str, list[str], str]]:
    """(place, sentences, label as written) of every row. broken: gets a sentence on every row of a wrong length."""
    is_test, count = split == "test", 0
    header = () if is_test else task.header
    for number, line in enumerate(read_lines(path), 1):
        cells, place = line.rstrip("\r\n").split("\t"), f"{path}:{number}"
        if cells == [""]:
            continue
        if not header:
            header = cells
            wanted = task.sentences if is_test else (*task.sentences, task.label)
            if missing := [column for column in wanted if column not in header]:
                raise DataError(
                    f"{place}: the header has no column {' nor '.join(missing)}: give a {split} file of {task.title}, "
                    "tab-separated"
                )
        elif len(cells) != len(header):
            columns = f"{len(cells)} tab-separated columns where {task.title} has {len(header)} ({', '.join(header)})"
            broken.append(f"{place}: {columns}: fix or remove the line")
        else:
            row = dict(zip(header, cells))
            index = row.get("index", row.get("id", str(count)))
            if is_test and index != str(count):
                raise DataError(
                    f"{place}: the index is {index!r} where {count} comes next, and predictions are numbered "
                    "from 0 in the file's order: give the test file as GLUE publishes it"
                )
            count += 1
            yield place, [row[column].strip() for column in task.sentences], row.get(task.label, "")


def _jsonl_rows(task: Task, path: Path) -> Iterator[tuple[str, list[str], Any]]:
    """(place, sentences, label) of every line with sentence1, sentence2 (if the task has two) and label."""
    names = ["sentence1", "sentence2"][: len(task.sentences)]

    def parse(record: dict) -> tuple[list[str], Any]:
        if len(names) == 1 and record.get("sentence2"):
            raise BadRecordError(f"a sentence2, and {task.title} reads one sentence")
        return [check_text(record.get(name), name) for name in names], record.get("label")

    for place, row in parse_objects(path, parse):
        yield place, *row


def _label(task: Task, given: Any, place: str) -> float:
    """A label as a number. Raises DataError if it is none, or not one of the task's."""
    try:
        value = float(str(given))  # str: true is no number
    except ValueError:
        value = -1.0
    if not (value in (0, 1) if task.classes else 0 <= value <= HIGHEST_SCORE):
        raise DataError(f"{place}: the label is {given!r}, {task.title}'s are {task.allowed}: fix the line")
    return value


def run_glue(settings: GlueSettings, environment: Environment) -> int:
    """Trains, measures dev, exports OUTPUT/classifier and writes OUTPUT/TASK.tsv; goes on from OUTPUT's checkpoint.

    Raises SettingsError for a model that cannot serve and DataError for files that cannot be read.
    """
    task, output, read = TASKS[settings.task], Path(settings.output), {}
    for split, path in find_files(settings).items():
        read[split] = read_examples(settings.task, path, split, skip_broken=settings.skip_broken_rows)
        if environment.is_main and read[split].num_broken:
            print(f"warning: {read[split].num_broken} rows of {path} are broken and left out", flush=True)
    trainer = make_trainer(settings, read, environment.world_size, choose_device(settings.device, environment))
    from transformers.trainer_utils import get_last_checkpoint

    folder = output / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    found = trainer.evaluate()
    trainer.save_model(str(output / "classifier"))
    answers = None
    if "test" in read:
        answers = trainer.predict(as_rows(read["test"], trainer.processing_class, settings.max_tokens)).predictions
    if environment.is_main:
        measures = {name: found[f"eval_{name}"] for name in ("loss", *task.measures)}
        print(f"{task.title}, dev: " + ", ".join(f"{name} {value:.4f}" for name, value in measures.items()))
        with written_whole(output / "dev.json") as file:
            file.write(json.dumps(measures, indent=1) + "\n")
        if answers is not None:
            write_predictions(output / f"{task.title}.tsv", settings.task, answers)
    return 0


def make_trainer(settings: GlueSettings, read: dict[str, Examples], num_ranks: int, cuda: bool) -> Any:
    """transformers' Trainer on the training file, with the task's measures on the dev file."""
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from quincunx.engine.encoder import fetch_pretrained
    from quincunx.engine.retrieval.cross_encoder import has_fitting_head

    if settings.batch % num_ranks:
        raise SettingsError(f"batch {settings.batch} is not divisible by the {num_ranks} ranks: give a multiple")
    names = TASKS[settings.task].classes or ("score",)
    has_fitting_head(settings.encoder, fetch_pretrained(AutoConfig.from_pretrained, settings.encoder), len(names))
    set_seed(settings.seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    model = fetch_pretrained(AutoModelForSequenceClassification.from_pretrained, settings.encoder, **labels)
    tokenizer = fetch_pretrained(AutoTokenizer.from_pretrained, settings.encoder)
    arguments = TrainingArguments(
        output_dir=str(Path(settings.output) / "checkpoints"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch // num_ranks,
        per_device_eval_batch_size=128,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        adam_epsilon=settings.adam_eps,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.dev_every,
        save_steps=settings.dev_every,
        save_total_limit=2,
        logging_steps=50,
        report_to=[],
        use_cpu=not cuda,
        bf16=cuda,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=as_rows(read["train"], tokenizer, settings.max_tokens),
        eval_dataset=as_rows(read["dev"], tokenizer, settings.max_tokens),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: measure(settings.task, found.predictions, found.label_ids),
    )


def as_rows(examples: Examples, tokenizer: Any, max_tokens: int) -> list[dict[str, Any]]:
    """The examples as the Trainer's data set: tokenised, with their labels if they have any."""
    columns = dict(tokenizer(*examples.sentences, truncation=True, max_length=max_tokens))
    if examples.labels is not None:
        columns["labels"] = examples.labels.tolist()
    return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]


def measure(name: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's measures, 1 is perfect: {"mcc"}, {"accuracy", "f1"} or {"pearson", "spearman"}.

    logits: float [N, 2] of a task with classes, float [N] of STS-B, whose scores are taken as they are, not cut to
    0 ... 5. labels: [N]. A correlation with predictions that are all alike is 0.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if not TASKS[name].classes:
        scores = logits.reshape(-1).astype(np.float64)
        if np.ptp(scores) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        wanted = labels.astype(np.float64)
        return {"pearson": float(pearsonr(scores, wanted)[0]), "spearman": float(spearmanr(scores, wanted)[0])}
    classes = logits.argmax(axis=1)
    if name == "cola":
        return {"mcc": float(matthews_corrcoef(labels, classes))}
    f1 = f1_score(labels, classes, zero_division=0)
    return {"accuracy": float(accuracy_score(labels, classes)), "f1": float(f1)}


def write_predictions(path: str | Path, name: str, logits: np.ndarray) -> None:
    """Writes a test file's predictions as GLUE takes them: a header, then index and prediction, tab-separated.

    A class is 0 or 1; a score has three decimals and is cut to 0 ... 5. The index is the row's place in the file,
    from 0.
    """
    if TASKS[name].classes:
        answers = map(str, logits.argmax(1))
    else:
        answers = (f"{score:.3f}" for score in logits.reshape(-1).clip(0, HIGHEST_SCORE))
    with written_whole(path) as file:
        file.write("index\tprediction\n")
        file.writelines(f"{index}\t{answer}\n" for index, answer in enumerate(answers))
