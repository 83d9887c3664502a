"""Encodes passages (or queries) into a folder of embeddings.

    python launchers/encode.py --model exported/sentence-transformers --corpus data/scifact --output embeddings/scifact
    torchrun --nproc_per_node 8 launchers/encode.py ...     # each process takes its share of the parts

The same command again continues where it was stopped, on any number of processes. See docs/search.md.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.engine.ranks import Environment, device_and_precision, discover_environment, one_voice
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Settings of encoding."""

    model: str
    """Retriever: a sentence-transformers folder, a plain encoder, a Hugging Face name, or package:NAME/FOLDER."""
    corpus: str = setting(role="data")
    """Passages: BEIR folder, tsv, JSONL or Parquet. With --kind query: queries in any format of search.py."""
    output: str
    """Folder to write the embeddings into."""
    kind: Literal["passage", "query"] = "passage"
    """Which side of the model reads the texts."""
    remake: bool = False
    """Make the output anew if it is there; what was there is moved aside."""
    format: str | None = None
    """Format of the corpus (None: told by its name)."""
    titles: bool = True
    """Titles belong to the passages' text."""
    pooling: Literal["cls", "mean"] | None = None
    """None: as the model says; a plain encoder has cls."""
    normalise: Literal["model", "yes", "no"] = "model"
    """Vectors of length 1 (model: as the model says; a plain encoder's are)."""
    max_tokens: int | None = setting(None, low=1)
    """Longest text; longer ones are cut (None: the model's own limit)."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the vectors on disk."""
    part_rows: int = setting(10_000, low=1)
    """Texts of one part: what a kill loses at most."""
    batch_tokens: int | None = setting(None, low=1)
    """Maximum number of tokens of one forward (None: 8192, on a CPU 4096)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the process's GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward; auto is bfloat16 (autocast) on a GPU and float32 elsewhere."""


def main() -> None:
    environment = discover_environment()
    with one_voice(environment):
        encode(parse_settings(EncodeSettings, __doc__.split("\n")[0]), environment)


def encode(settings: EncodeSettings, environment: Environment) -> None:
    """This rank's share, and on rank 0 the rest."""
    from quincunx.engine.retrieval.collection import read_passages, read_queries
    from quincunx.engine.retrieval.dual_encoder import load_retriever
    from quincunx.engine.retrieval.embeddings import open_embeddings, write_embeddings

    device, precision = device_and_precision(settings.device, settings.precision, environment)
    retriever = load_retriever(
        settings.model,
        pooling=settings.pooling,
        normalise={"model": None, "yes": True, "no": False}[settings.normalise],
        max_tokens={settings.kind: settings.max_tokens},
    )
    read = partial(read_passages, titles=settings.titles) if settings.kind == "passage" else read_queries
    collection = read(settings.corpus, format=settings.format)
    finished = write_embeddings(
        settings.output,
        retriever,
        collection,
        settings.kind,
        environment=environment,
        details={"model": settings.model, "corpus": settings.corpus, "titles": settings.titles},
        device=device,
        precision=precision,
        **{name: getattr(settings, name) for name in ("dtype", "part_rows", "batch_tokens", "remake")},
    )
    if not environment.is_main:
        return
    vectors, rest = open_embeddings(settings.output, kind=settings.kind), ": they were there, nothing to do"
    made = f"{len(vectors):,} vectors of {vectors.width} channels, {settings.dtype}, in {len(vectors.parts)} parts"
    print(f"{settings.output}: {made}{'' if finished else rest}")
    print(f"  of model {retriever.digest}, collection {collection.digest}")


if __name__ == "__main__":
    exit_with_one_sentence(main)
