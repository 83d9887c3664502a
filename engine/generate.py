"""Queries or continuations for every passage of a corpus, part by part, resumable, by any number of processes.

The corpus is cut into parts as `build_shards.py` reads it, so that passage ids agree. Rank r of w takes the parts
r, r + w, r + 2w...; a part is written under a temporary name and renamed when it is whole, and a rerun does what is
missing. The output folder holds part-00000.jsonl... and a manifest.json with everything that decides their content.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quincunx.data_shards.documents import Input, ReadReport
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.generations import MANIFEST_NAME, PART_NAME
from quincunx.data_shards.passages import Passage, read_passages
from quincunx.data_shards.readers import list_inputs
from quincunx.data_shards.setting import setting
from quincunx.data_shards.shard_writer import full_disk_is_named
from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest
from quincunx.engine.environment import Environment, choose_device

if TYPE_CHECKING:
    from quincunx.engine.generator import Generator, Sampling

FORMAT = "quincunx-generations"
SCHEMA_VERSION = 1
DEFAULT_NEW_TOKENS = {"queries": 64, "continuation": 128}
# Where and on what it ran; everything else in the settings decides the output.
NOT_CONTENT = ("output", "path", "device", "on_bad_record")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """The settings of launchers/generate.py."""

    task: Literal["queries", "continuation"]
    """What to write for each passage: queries (for the task dor) or one continuation (for gor)."""
    model: str
    """Sequence-to-sequence (doc2query) or causal (GPT-2) model: Hugging Face id, folder, or package:NAME/folder."""
    format: str
    """Corpus format: beir, msmarco, dpr, documents, parquet or python_docs."""
    path: str
    """Corpus: file, folder or pattern; package names for python_docs."""
    tokenizer: str
    """The shards' tokenizer, which decides where passages end: id, folder (SHARDS/tokenizer) or package:NAME/folder."""
    output: str
    """Folder for the parts and their manifest.json."""
    max_tokens: int = 144
    """Most tokens of a passage, [CLS] and [SEP] counted: the same as for build_shards.py."""
    with_titles: bool = True
    """Titles are part of the text: the same as for build_shards.py."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What a record that cannot be read does."""
    num_queries: int = setting(10, low=1)
    """Queries per passage."""
    prompt: str = "{passage}"
    """The model's input; {passage} stands for the passage."""
    temperature: float = setting(1.0, above=0)
    """Divides the logits; above 0."""
    top_k: int = setting(50, low=0)
    """Draw among the likeliest k tokens; 0: all."""
    top_p: float = setting(0.95, above=0, high=1)
    """Draw among the likeliest tokens that together have this probability; above 0, at most 1."""
    max_new_tokens: int | None = setting(None, low=1)
    """Most tokens of one generated text; not given: 64 for queries, 128 for a continuation."""
    seed: int = 0
    """Of all draws."""
    batch_size: int = setting(64, low=1)
    """Texts generated at a time (passages times queries)."""
    part_megabytes: float = setting(1.0, above=0)
    """Corpus bytes of a part, in 10^6: what a killed process has to repeat."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the model; auto: bfloat16 on a GPU, float32 on a CPU."""

    def contradictions(self) -> list[str]:
        return [] if "{passage}" in self.prompt else [f"prompt is {self.prompt}; it must hold {{passage}}"]

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or DEFAULT_NEW_TOKENS[self.task]


def generate_corpus(settings: GenerateSettings, environment: Environment) -> dict[str, int]:
    """Writes this rank's missing parts; all ranks together finish the folder.

    Returns the counts of what this process did: parts, skipped_parts (already there), passages, texts, empty_texts,
    cut_prompts, and the reader's counts.

    Raises:
        SettingsError: a model or tokenizer that cannot be used, or a folder made with other settings.
        DataError: an empty or damaged corpus.
    """
    inputs = list_inputs(settings.format, settings.path)
    tokenizer = load_tokenizer(settings.tokenizer)
    num_parts = max(1, round(sum(source.bytes for source in inputs) / (settings.part_megabytes * 1e6)))

    import torch

    from quincunx.engine.generator import Sampling, load_generator

    device, precision = device_and_precision(settings.device, settings.precision, environment)
    generator = load_generator(settings.model, device, precision)
    sampling = Sampling(
        seed=settings.seed,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_new_tokens=settings.new_tokens,
    )
    generator.prompt_limit(sampling.max_new_tokens)
    manifest = describe(settings, inputs, num_parts, tokenizer_digest(tokenizer), generator.digest, precision)
    output = Path(settings.output)
    open_output(output, manifest)

    report = ReadReport()
    counts = {"parts": 0, "skipped_parts": 0, "passages": 0, "texts": 0, "empty_texts": 0, "cut_prompts": 0}
    for part in range(environment.rank, num_parts, environment.world_size):
        target = output / PART_NAME.format(part)
        if target.exists():
            counts["skipped_parts"] += 1
            continue
        documents = read_passages(
            settings.format,
            settings.path,
            tokenizer,
            settings.max_tokens,
            part,
            num_parts,
            settings.on_bad_record,
            settings.with_titles,
            report,
        )
        passages = [passage for _, of_document in documents for passage in of_document]
        label = f"part {part + 1} of {num_parts}" if environment.is_main else None
        texts = generate_part(generator, passages, settings, sampling, label)
        write_part(target, settings.task, passages, texts)
        counts["parts"] += 1
        counts["passages"] += len(passages)
        counts["texts"] += sum(map(len, texts))
        counts["empty_texts"] += sum(not text for of_passage in texts for text in of_passage)
    if num_parts == counts["parts"] and not counts["passages"]:
        raise DataError(f"the corpus {settings.path} holds no passage: give one with text")
    counts["cut_prompts"] = generator.num_cut_prompts
    if torch.cuda.is_available() and device.startswith("cuda"):
        counts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return counts | dict(report.counts)


def device_and_precision(device: str, precision: str, environment: Environment) -> tuple[str, str]:
    """(torch's device, float32 or bfloat16) of this rank for encoding and generating, which train nothing.

    precision auto: bfloat16 on a GPU, float32 elsewhere. Raises SettingsError as choose_device.
    """
    cuda = choose_device(device, environment)
    precision = precision if precision != "auto" else "bfloat16" if cuda else "float32"
    return f"cuda:{environment.local_rank}" if cuda else "cpu", precision


def generate_part(
    generator: "Generator", passages: list[Passage], settings: GenerateSettings, sampling: "Sampling", label: str | None
) -> list[list[str]]:
    """The texts of each passage, in order; batched by length. label: of the progress bar, None: no bar."""
    from tqdm import tqdm

    prompts = [settings.prompt.replace("{passage}", passage.text) for passage in passages]
    token_ids = generator.tokenize(prompts, sampling.max_new_tokens) if passages else []
    num_sequences = settings.num_queries if settings.task == "queries" else 1
    by_length = sorted(range(len(passages)), key=lambda i: len(token_ids[i]))
    step = max(1, settings.batch_size // num_sequences)
    texts: list[list[str]] = [[] for _ in passages]
    with tqdm(total=len(passages), desc=label, unit="passage", disable=label is None, mininterval=1) as bar:
        for start in range(0, len(by_length), step):
            batch = by_length[start : start + step]
            ids = [passages[i].passage_id for i in batch]
            generated = generator.generate(ids, [token_ids[i] for i in batch], num_sequences, sampling)
            for i, of_passage in zip(batch, generated):
                texts[i] = [tidy(text, settings.task, generator.is_seq2seq) for text in of_passage]
            bar.update(len(batch))
    return texts


def tidy(text: str, task: str, is_seq2seq: bool) -> str:
    """On one line; of a query by a causal model, which writes on, the first line only."""
    if task == "queries" and not is_seq2seq:
        text = text.partition("\n")[0]
    return " ".join(text.split())


def write_part(target: Path, task: str, passages: list[Passage], texts: list[list[str]]) -> None:
    """One JSON line per passage, in order, all or nothing."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with full_disk_is_named(target.parent), open(temporary, "w", encoding="utf-8") as file:
        for passage, of_passage in zip(passages, texts, strict=True):
            value = [text for text in of_passage if text] if task == "queries" else of_passage[0]
            file.write(json.dumps({"passage_id": passage.passage_id, task: value}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def describe(
    settings: GenerateSettings,
    inputs: list[Input],
    num_parts: int,
    tokenizer_digest: str,
    model_digest: str,
    precision: str,
) -> dict[str, Any]:
    """The manifest: what decides the output, and the versions that made it."""
    content = {name: value for name, value in asdict(settings).items() if name not in NOT_CONTENT}
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "num_parts": num_parts,
        "settings": content | {"max_new_tokens": settings.new_tokens, "precision": precision},
        "model_digest": model_digest,
        "tokenizer_digest": tokenizer_digest,
        "sources": [{"name": source.name, "bytes": source.bytes, "digest": source.digest} for source in inputs],
        "versions": {name: version(name) for name in ("quincunx", "torch", "transformers", "tokenizers")},
    }


def open_output(output: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder and its manifest, or checks that the manifest there is the same but for versions.

    Raises:
        SettingsError: the folder is of another run, or holds something else.
    """
    path = output / MANIFEST_NAME
    if not path.exists():
        if output.exists() and any(not name.startswith(".") for name in os.listdir(output)) and not path.exists():
            raise SettingsError(
                f"{output} holds files but no {MANIFEST_NAME} of a generation run: give an empty folder"
            )
        output.mkdir(parents=True, exist_ok=True)
        temporary = output / f".{MANIFEST_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(temporary, path)
        return
    before = json.loads(path.read_text())
    changed = list(differences(before, manifest))
    if changed:
        raise SettingsError(
            f"{output} was begun with other settings ({'; '.join(changed)}): give them again, or another output folder"
        )


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What decides the output and is not the same in two manifests."""
    for name in ("num_parts", "model_digest", "tokenizer_digest", "sources"):
        if before.get(name) != now[name]:
            yield name if name == "sources" else f"{name} {before.get(name)}, now {now[name]}"
    for name, value in now["settings"].items():
        if name in ("model", "tokenizer"):
            continue  # names and places; their digests are compared
        if before.get("settings", {}).get(name) != value:
            yield f"{name} {before.get('settings', {}).get(name)!r}, now {value!r}"
