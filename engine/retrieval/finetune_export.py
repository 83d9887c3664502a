"""A fine-tuning run's newest checkpoint as a model folder that stands on its own.

OUTPUT/retriever   SentenceTransformer and load_retriever load it
OUTPUT/reranker    sentence-transformers' CrossEncoder and load_reranker load it

Weights come from the checkpoint, in float32; configuration and tokenizer from the run's folder `model`, which holds the
model that the run started from.
"""

from pathlib import Path
from typing import Any

from quincunx.data_shards.errors import CheckpointError
from quincunx.data_shards.setting import names_of
from quincunx.engine.checkpoint import Checkpoint, consolidated_state_dict, find_newest
from quincunx.engine.export import MODEL_FOLDER, PLOT_FILE, plot_losses, probe_table
from quincunx.engine.retrieval.cross_encoder import load_reranker, save_reranker
from quincunx.engine.retrieval.dual_encoder import load_retriever, save_retriever
from quincunx.engine.retrieval.finetune_settings import FinetuneSettings

RETRIEVER_USAGE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
scores = model.similarity(model.encode_query(["a query"]), model.encode_document(["a passage", "another"]))
```"""
RERANKER_USAGE = """```python
from sentence_transformers import CrossEncoder

scores = CrossEncoder(".").predict([("a query", "a passage")])
```"""


def find_trained(run_folder: Path, launcher: str) -> tuple[Checkpoint, Path]:
    """(the newest checkpoint that verifies, the folder of the model that the run started from).

    Raises CheckpointError where there is none; launcher: what makes such runs, for the message.
    """
    checkpoint = find_newest(run_folder / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{run_folder} has no checkpoint: give a run folder of {launcher} that has saved one")
    model_folder = run_folder / MODEL_FOLDER
    if not model_folder.is_dir():
        raise CheckpointError(f"{run_folder} has no folder {MODEL_FOLDER}, which every run writes: restore it")
    return checkpoint, model_folder


def export_finetuned(run_folder: Path, output: Path) -> list[Path]:
    """Exports the newest checkpoint that verifies; replaces an earlier export. Returns the card and the plot.

    Raises:
        CheckpointError: the run has no usable checkpoint, or its folder `model` is missing.
    """
    run_folder, output = Path(run_folder), Path(output)
    checkpoint, model_folder = find_trained(run_folder, "finetune.py")
    weights, settings = consolidated_state_dict(checkpoint.folder), checkpoint.state["settings"]
    output.mkdir(parents=True, exist_ok=True)
    plot = plot_losses(run_folder, output / PLOT_FILE)
    if settings["stage"] == "reranker":
        loaded, save, name, usage = load_reranker(str(model_folder)), save_reranker, "reranker", RERANKER_USAGE
        options = {"max_tokens": settings["max_pair_tokens"]}
    else:
        loaded, save, name, usage = load_retriever(str(model_folder)), save_retriever, "retriever", RETRIEVER_USAGE
        options = {key: settings[key] for key in ("max_query_tokens", "max_passage_tokens")}
        options |= {"query_prompt": loaded.query_prompt, "passage_prompt": loaded.passage_prompt}
    folder = output / name
    card = finetuned_card(run_folder, checkpoint, usage, plot)
    save(folder, loaded.model, weights, loaded.tokenizer, card=card, **options)
    paths = [folder / "README.md"]
    if plot:
        (folder / PLOT_FILE).write_bytes((output / PLOT_FILE).read_bytes())
        paths.append(folder / PLOT_FILE)
    return paths


def finetuned_card(run_folder: Path, checkpoint: Checkpoint, usage: str, plot: bool) -> str:
    """README.md of a fine-tuned model, in the Hugging Face hub's format."""
    import yaml

    settings = checkpoint.state["settings"]
    reranker = settings["stage"] == "reranker"
    metadata: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "text-ranking" if reranker else "sentence-similarity",
        "tags": ["dense-retrieval", "quincunx", settings["stage"]],
    }
    private = names_of(FinetuneSettings, "machine", "data")
    learned = {key: value for key, value in settings.items() if key not in private}
    names = ("candidates", "corpus", "queries", "starting model")
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {run_folder.resolve().name}",
        f"A {'reranker (cross-encoder)' if reranker else 'dense retriever'}, stage {settings['stage']}, fine-tuned "
        f"with quincunx for {checkpoint.step} steps of {settings['global_batch']} queries with "
        f"{settings['num_negatives']} negatives each, starting from `{settings['encoder']}`.",
        f"## Use\n\n{usage}",
        "## Training data\n\nBy the digests of their content; titles "
        + ("stand before the passages.\n\n" if settings["titles"] else "are left out.\n\n")
        + "\n".join(f"- {name}: `{digest}`" for name, digest in zip(names, checkpoint.state["dataset_ids"])),
    ]
    if table := probe_table(run_folder):
        parts.append(f"## Retrieval probe\n\nExact search over a small judged collection.\n\n{table}")
    if plot:
        parts.append(f"## Loss\n\n![Losses over the run]({PLOT_FILE})")
    parts.append(f"## Settings\n\n```yaml\n{yaml.safe_dump(learned, sort_keys=False)}```")
    return "\n\n".join(parts) + "\n"
