"""Queries or continuations for every passage of a corpus, part by part, resumable, by any number of processes.

The corpus is cut into parts as `build_shards.py` reads it, so that passage ids agree. The output folder holds
part-00000.jsonl... and a manifest.json with everything that decides their content (data_shards/artefact.py).
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from quincunx.data_shards.artefact import artefact
from quincunx.data_shards.build_settings import SHORTEST_PASSAGE, CorpusFormat
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.generations import KIND
from quincunx.data_shards.passages import Passage, split_documents
from quincunx.data_shards.readers import list_inputs, read_documents
from quincunx.data_shards.records import ReadReport
from quincunx.data_shards.setting import as_plain, setting
from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest
from quincunx.engine.ranks import Environment, device_and_precision

if TYPE_CHECKING:
    from quincunx.engine.generator import Generator, Sampling

DEFAULT_NEW_TOKENS = {"queries": 64, "continuation": 128}
# Where and on what it ran; everything else in the settings decides the output.
NOT_CONTENT = ("output", "path", "device", "on_bad_record", "model", "tokenizer", "remake")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """The settings of launchers/generate.py."""

    task: Literal["queries", "continuation"]
    """What to write for each passage: queries (for the task dor) or one continuation (for gor)."""
    model: str
    """Sequence-to-sequence (doc2query) or causal (GPT-2) model: Hugging Face id, folder, or package:NAME/folder."""
    format: CorpusFormat
    """Corpus format (docs/corpora.md)."""
    path: str
    """Corpus: file, folder or pattern; package names for python_docs."""
    tokenizer: str
    """The shards' tokenizer, which decides where passages end: id, folder (SHARDS/tokenizer) or package:NAME/folder."""
    output: str
    """Folder for the parts and their manifest.json."""
    remake: bool = False
    """Make the output anew if it is there; what was there is moved aside."""
    max_tokens: int = setting(144, low=SHORTEST_PASSAGE)
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

    Returns the counts of what this process did: parts, passages, texts, empty_texts, cut_prompts, and the reader's
    counts.

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
    content = {name: value for name, value in as_plain(settings).items() if name not in NOT_CONTENT}
    # Names and places of model and tokenizer do not decide the texts: their digests do.
    made_from = {
        "num_parts": num_parts,
        "settings": content | {"max_new_tokens": settings.new_tokens, "precision": precision},
        "model_digest": generator.digest,
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "sources": [source.describe() for source in inputs],
    }
    report = ReadReport(settings.on_bad_record)
    counts = {"parts": 0, "passages": 0, "texts": 0, "empty_texts": 0, "cut_prompts": 0}
    place = {"rank": environment.rank, "world_size": environment.world_size}
    with artefact(settings.output, KIND, made_from, remake=settings.remake, **place) as work:
        if work is None:
            return counts
        for part in work.missing(num_parts):
            documents = read_documents(settings.format, settings.path, part, num_parts, report)
            split_up = split_documents(documents, tokenizer, settings.max_tokens, settings.with_titles, report)
            passages = [passage for _, of_document in split_up for passage in of_document]
            label = f"part {part + 1} of {num_parts}" if environment.is_main else None
            texts = generate_part(generator, passages, settings, sampling, label)
            with work.part(part, ".jsonl", mode="w") as file:
                for passage, of_passage in zip(passages, texts, strict=True):
                    value = [text for text in of_passage if text] if settings.task == "queries" else of_passage[0]
                    record = {"passage_id": passage.passage_id, settings.task: value}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            counts["parts"] += 1
            counts["passages"] += len(passages)
            counts["texts"] += sum(map(len, texts))
            counts["empty_texts"] += sum(not text for of_passage in texts for text in of_passage)
        if num_parts == counts["parts"] and not counts["passages"]:
            raise DataError(f"the corpus {settings.path} holds no passage: give one with text")
        if work.leads:
            work.wait()
            names = ("quincunx", "torch", "transformers", "tokenizers")
            work.details = {"versions": {name: version(name) for name in names}}
    counts["cut_prompts"] = generator.num_cut_prompts
    if torch.cuda.is_available() and device.startswith("cuda"):
        counts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return counts | dict(report.counts)


def generate_part(
    generator: "Generator", passages: list[Passage], settings: GenerateSettings, sampling: "Sampling", label: str | None
) -> list[list[str]]:
    """The texts of each passage, in order, each on one line; batched by length.

    label: of the progress bar, None: no bar.
    """
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
                if settings.task == "queries" and not generator.is_seq2seq:  # a causal model writes on
                    of_passage = [text.partition("\n")[0] for text in of_passage]
                texts[i] = [" ".join(text.split()) for text in of_passage]
            bar.update(len(batch))
    return texts
