"""A GLUE run's newest checkpoint as a classifier that stands on its own, and its answers to the task's test file.

OUTPUT/classifier   AutoModelForSequenceClassification loads it
OUTPUT/TASK.tsv     index and prediction, as GLUE takes them (CoLA.tsv, MRPC.tsv, STS-B.tsv, QQP.tsv)

Weights come from the checkpoint, in float32; configuration and tokenizer from the run's folder `model`, which holds the
model that the run started from.
"""

from pathlib import Path
from typing import Any

import torch

from quincunx.data_shards.setting import names_of
from quincunx.engine.checkpoint import Checkpoint, consolidated_state_dict
from quincunx.engine.model_card import PLOT_FILE, first_and_last, plot_losses
from quincunx.engine.retrieval.cross_encoder import load_reranker, save_reranker, score_tokenised
from quincunx.engine.retrieval.finetune_export import find_trained
from quincunx.engine.retrieval.glue_batches import tokenise_examples
from quincunx.engine.retrieval.glue_data import TASKS, read_examples
from quincunx.engine.retrieval.glue_metrics import write_predictions
from quincunx.engine.retrieval.glue_settings import GlueSettings
from quincunx.engine.retrieval.progress import progress_bar

USAGE = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSequenceClassification.from_pretrained(".")
logits = model(**tokenizer({sentences}, truncation=True, return_tensors="pt")).logits
```"""


def export_glue(run_folder: Path, output: Path, test: Path | None, device: str) -> list[Path]:
    """Exports the newest checkpoint that verifies; replaces an earlier export. Returns what MLflow should show.

    test: file to predict, or None. device: where it is predicted.

    Raises:
        CheckpointError: the run has no usable checkpoint, or its folder `model` is missing.
        DataError: the test file cannot be read.
    """
    run_folder, output = Path(run_folder), Path(output)
    checkpoint, model_folder = find_trained(run_folder, "glue.py")
    settings = checkpoint.state["settings"]
    task, max_tokens = TASKS[settings["task"]], settings["max_tokens"]
    loaded = load_reranker(str(model_folder), num_labels=len(task.classes) or 1, max_tokens=max_tokens)
    weights = consolidated_state_dict(checkpoint.folder)
    output.mkdir(parents=True, exist_ok=True)
    folder, plot = output / "classifier", plot_losses(run_folder, output / PLOT_FILE)
    card = glue_card(run_folder, checkpoint, plot)
    save_reranker(folder, loaded.model, weights, loaded.tokenizer, max_tokens=max_tokens, card=card)
    paths = [folder / "README.md"]
    if plot:
        (folder / PLOT_FILE).write_bytes((output / PLOT_FILE).read_bytes())
        paths.append(folder / PLOT_FILE)
    if test is not None:
        loaded.model.load_state_dict(weights)
        paths.append(predict_test(loaded, settings["task"], test, output / f"{task.title}.tsv", max_tokens, device))
    return paths


def predict_test(loaded: Any, name: str, test: Path, path: Path, max_tokens: int, device: str) -> Path:
    """Writes the predictions for a test file to `path`, which it returns."""
    examples = read_examples(name, test, "test")
    ids, types, _ = tokenise_examples(loaded.tokenizer, examples.firsts, examples.seconds, max_tokens)
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    with progress_bar(len(examples), f"predicting {test.name}", "examples") as bar:
        logits = score_tokenised(loaded.model, ids, types, place, progress=bar.update)
    write_predictions(path, name, logits)
    return path


def glue_card(run_folder: Path, checkpoint: Checkpoint, plot: bool) -> str:
    """README.md of a classifier, in the Hugging Face hub's format."""
    import yaml

    settings = checkpoint.state["settings"]
    task = TASKS[settings["task"]]
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["glue", settings["task"], "quincunx"],
    }
    private = names_of(GlueSettings, "machine", "data")
    learned = {key: value for key, value in settings.items() if key not in private}
    sentences = ", ".join(['["a sentence"]', '["another"]'][: len(task.sentences)])
    answers = " and ".join(f"{label} ({name})" for label, name in enumerate(task.classes)) or "a score from 0 to 5"
    digests = zip(("train", "dev"), checkpoint.state["dataset_ids"], strict=True)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {run_folder.resolve().name}",
        f"A model for GLUE's {task.title}, fine-tuned with quincunx for {checkpoint.step} steps of "
        f"{settings['global_batch']} examples, starting from `{settings['encoder']}`. It answers {answers}.",
        f"## Use\n\n{USAGE.format(sentences=sentences)}",
        "## Data\n\nBy the digests of the files:\n\n"
        + "\n".join(f"- {split}: `{digest}`" for split, digest in digests),
    ]
    if (ends := first_and_last(run_folder, "dev")) is not None:
        first, last = ends
        rows = [f"| measure | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        for name in (name for name in last if name.startswith("dev/")):
            rows.append(f"| {name.removeprefix('dev/')} | {first[name]:.4f} | {last[name]:.4f} |")
        parts.append("## On dev\n\n" + "\n".join(rows))
    if plot:
        parts.append(f"## Loss\n\n![The loss over the run]({PLOT_FILE})")
    parts.append(f"## Settings\n\n```yaml\n{yaml.safe_dump(learned, sort_keys=False)}```")
    return "\n\n".join(parts) + "\n"
