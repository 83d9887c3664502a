"""A run's checkpoint as three model folders that stand on their own.

OUTPUT/encoder                 AutoModel and AutoTokenizer load it without any code of ours
OUTPUT/sentence-transformers   SentenceTransformer loads it, with CLS pooling
OUTPUT/bundle                  encoder, LM head and decoders, from which pre-training can go on (`--encoder BUNDLE`)

A bundle is the encoder's folder with decoders.safetensors (LM head, every decoder, their position table if they have
one) and bundle.json (which tasks, how the decoders are built, what they were trained on).

Each has a model card with the losses and the probe of the run, and their plot. Weights come from the checkpoint, in
float32, whatever ZeRO stage, precision and number of ranks wrote it; the model's configuration and tokenizer come from
the folder `model` of the run folder.
"""

import contextlib
import io
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quincunx.data_shards.errors import CheckpointError
from quincunx.data_shards.setting import names_of
from quincunx.engine.checkpoint import Checkpoint, committed, find_newest, step_name, verify
from quincunx.engine.report import draw_curves, table
from quincunx.engine.run_folder import MODEL_FOLDER
from quincunx.engine.settings import PretrainSettings
from quincunx.engine.tracking import numbers, read_metrics

if TYPE_CHECKING:
    import torch

PLOT_FILE = "loss.png"
ENCODER_PREFIX = "encoder.model."
ENCODER_USAGE = """## Use

```python
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained(".")
batch = tokenizer(["a passage"], return_tensors="pt", truncation=True, max_length={max_tokens})
vector = model(**batch).last_hidden_state[:, 0]  # the [CLS] vector: not the pooler's, not a mean
```"""
SENTENCE_USAGE = """## Use

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer(".").encode(["a passage", "another"])  # the [CLS] vectors
```"""
BUNDLE_USAGE = """## Use

```shell
deepspeed launchers/pretrain.py --deepspeed ds_configs/zero2.json --encoder THIS_FOLDER ...
```

goes on pre-training with this encoder, LM head and decoders. AutoModel loads the encoder alone."""


def export_run(run_folder: Path, output: Path, normalise: bool = False, step: int | None = None) -> Checkpoint:
    """Exports the newest checkpoint that verifies; replaces what an earlier export left in `output`. Rank 0 only.

    normalise: the sentence-transformers model gives vectors of length 1. step: that step's checkpoint instead.

    Raises:
        CheckpointError: the run has no usable checkpoint (of that step), or its folder `model` is missing.
    """
    checkpoint, weights, plot = open_export(run_folder, output, step)
    settings = checkpoint.state["settings"]
    dataset_ids = checkpoint.state["dataset_ids"]
    data = "Shard sets, by the digest of their manifest:\n\n" + "\n".join(f"- `{digest}`" for digest in dataset_ids)
    for name, usage in (
        ("encoder", ENCODER_USAGE),
        ("sentence-transformers", SENTENCE_USAGE),
        ("bundle", BUNDLE_USAGE),
    ):
        staging = output / f".{name}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write_encoder(staging, run_folder / MODEL_FOLDER, weights)
        if name == "sentence-transformers":
            add_pooling(staging, settings["max_tokens"], normalise)
        elif name == "bundle":
            add_decoders(staging, weights, checkpoint)
        card = model_card(
            run_folder,
            f"{run_folder.resolve().name}: {name}",
            about_pretraining(checkpoint),
            usage.replace("{max_tokens}", str(settings["max_tokens"])),
            data,
            learned_settings(PretrainSettings, settings),
            pipeline="sentence-similarity",
            tags=["pre-training", *settings["tasks"]],
            plot=plot,
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
        if plot:
            shutil.copy(output / PLOT_FILE, staging)
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(staging, output / name)
    return checkpoint


def find_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step. Raises CheckpointError if there is none that verifies, naming those that exist."""
    if not (folder / step_name(step)).is_dir():
        kept = ", ".join(str(int(path.name.removeprefix("step-"))) for path in committed(folder)) or "none"
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has those of steps {kept}")
    return verify(folder / step_name(step))


def consolidated_state_dict(folder: Path) -> dict[str, Any]:
    """The model's float32 weights on the CPU, from a checkpoint of any ZeRO stage and world size."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)


def open_export(run_folder: Path, output: Path, step: int | None) -> "tuple[Checkpoint, dict[str, torch.Tensor], bool]":
    """(the checkpoint to export, its weights in float32, whether the run's losses are plotted as OUTPUT/loss.png).

    step: of the checkpoint; None takes the newest that verifies.

    Raises:
        CheckpointError: the run has no usable checkpoint (of that step), or its folder `model` is missing.
    """
    checkpoints = run_folder / "checkpoints"
    checkpoint = find_newest(checkpoints) if step is None else find_step(checkpoints, step)
    if checkpoint is None:
        raise CheckpointError(
            f"{run_folder} has no checkpoint: give a run folder of pretrain.py or finetune.py that has saved one"
        )
    if not any((run_folder / MODEL_FOLDER).rglob("config.json")):
        raise CheckpointError(f"{run_folder} has no folder {MODEL_FOLDER}, which every run writes: restore it")
    output.mkdir(parents=True, exist_ok=True)
    return checkpoint, consolidated_state_dict(checkpoint.folder), plot_losses(run_folder, output / PLOT_FILE)


def about_pretraining(checkpoint: Checkpoint) -> str:
    """A card's paragraph on what was trained."""
    settings = checkpoint.state["settings"]
    tasks = "masked language modelling"
    if settings["tasks"]:
        tasks += f" and {', '.join(settings['tasks'])}, with {settings['decoder']} decoders"
    scratch = " with random weights" if settings["from_scratch"] else ""
    return (
        f"A dense-retrieval encoder, pre-trained with quincunx for {checkpoint.step} steps of "
        f"{settings['global_batch']} passages, starting from `{settings['encoder']}`{scratch}. Tasks: {tasks}. It is "
        "pre-trained, not fine-tuned: train it on queries and passages before you judge its retrieval."
    )


def write_encoder(folder: Path, model_folder: Path, weights: "dict[str, torch.Tensor]") -> None:
    """The Hugging Face encoder folder: configuration and tokenizer of `model_folder`, weights of a PretrainModel.

    It has no pooler: training does not touch one, and random weights would look trained.
    Raises CheckpointError where the weights are not that configuration's.
    """
    from transformers import AutoConfig, AutoModel

    from quincunx.engine.encoder import quiet_transformers

    encoder = AutoModel.from_config(AutoConfig.from_pretrained(model_folder))
    own = {name.removeprefix(ENCODER_PREFIX): w for name, w in weights.items() if name.startswith(ENCODER_PREFIX)}
    missing, unexpected = encoder.load_state_dict(own, strict=False)
    differing = [*(name for name in missing if not name.startswith("pooler.")), *unexpected]
    if differing:
        raise CheckpointError(f"the checkpoint is not of the model in {model_folder}: {differing[0]} is in one only")
    with quiet_transformers():
        encoder.save_pretrained(folder, state_dict=own)
    for path in model_folder.iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)


def add_pooling(folder: Path, max_tokens: int, normalise: bool) -> None:
    """Makes an encoder folder a sentence-transformers one: CLS pooling, and vectors of length 1 where asked for."""
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalise
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True)
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    for name, content in (
        ("modules.json", listed),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def add_decoders(folder: Path, weights: "dict[str, torch.Tensor]", checkpoint: Checkpoint) -> None:
    """Makes an encoder folder the full bundle."""
    settings = checkpoint.state["settings"]
    description = {
        "tasks": dict.fromkeys(settings["tasks"], settings["decoder"]),
        "shared_decoder": settings.get("shared_decoder", False),
        "step": checkpoint.step,
        "dataset_ids": checkpoint.state["dataset_ids"],
        "settings": learned_settings(PretrainSettings, settings),
    }
    write_bundle(folder, {name: w for name, w in weights.items() if not name.startswith("encoder.")}, description)


def write_bundle(folder: Path, weights: "dict[str, torch.Tensor]", description: dict[str, Any]) -> None:
    """Adds LM head and decoders to an encoder's folder, which makes it a bundle.

    weights: every parameter of the PretrainModel outside the encoder, by its name there. description: plain values for
    bundle.json; load_bundle reads `tasks` ({name: "masked" | "enhanced"}) and `shared_decoder` (absent: false).
    """
    from safetensors.torch import save_file

    from quincunx.engine.model import BUNDLE_FILE, BUNDLE_VERSION, DECODERS_FILE

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / DECODERS_FILE)
    content = {"format": "quincunx-bundle", "version": BUNDLE_VERSION, **description}
    (folder / BUNDLE_FILE).write_text(json.dumps(content, indent=1) + "\n")


def held_out_table(run_folder: Path) -> str:
    """Markdown: each task's held-out loss and accuracy before and after, beside its unigram; "" if none was taken."""
    losses, accuracies, unigrams = (
        curves(run_folder, "held_out", f"held_out/{measure}/") for measure in ("loss", "accuracy", "unigram")
    )
    if not unigrams:
        return ""
    steps = next(iter(unigrams.values()))[0]
    at_first, at_last = f"loss at step {steps[0]}", f"loss at step {steps[-1]}"
    rows = []
    for task, (_, unigram) in unigrams.items():
        loss, right = losses[task][1], accuracies[task][1]
        values = (f"{loss[0]:.3f}", f"{loss[-1]:.3f}", f"{unigram[-1]:.3f}", f"{right[0]:.1%}", f"{right[-1]:.1%}")
        rows.append((task, *values))
    return table(("task", at_first, at_last, "unigram", "accuracy before", "after"), rows)


def probe_table(run_folder: Path) -> str:
    """Markdown: the retrieval probe's measures before and after; "" where none was taken."""
    measures = curves(run_folder, "probe", "probe/")
    if not measures:
        return ""
    steps = measures["mrr@10"][0]
    named = (("MRR@10", measures["mrr@10"][1]), ("nDCG@10", measures["ndcg@10"][1]))
    rows = [(title, f"{values[0]:.3f}", f"{values[-1]:.3f}") for title, values in named]
    return table(("measure", f"step {steps[0]}", f"step {steps[-1]}"), rows)


def learned_settings(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what was learned; folders and other facts of the machine stay private.

    kind: the settings' class.
    """
    private = names_of(kind, "machine", "data")
    return {name: value for name, value in settings.items() if name not in private}


def model_card(
    run_folder: Path,
    title: str,
    about: str,
    usage: str,
    data: str,
    learned: dict[str, Any],
    *,
    pipeline: str,
    tags: list[str],
    plot: bool,
) -> str:
    """README.md in the Hugging Face hub's format.

    title: the model's name. about: what it is. usage: a Markdown section with the code that loads this folder. data:
    what it was trained on. learned: the run's settings. pipeline, tags: the hub's. plot: whether loss.png stands beside
    the card.
    """
    import yaml

    metadata = {
        "library_name": "sentence-transformers",
        "pipeline_tag": pipeline,
        "tags": ["dense-retrieval", "quincunx", *tags],
    }
    front = yaml.safe_dump(metadata, sort_keys=False)
    parts = [f"---\n{front}---\n\n# {title}", about, usage, f"## Training data\n\n{data}"]
    if held_out := held_out_table(run_folder):
        parts.append(
            "## Held-out losses\n\nNats per labelled token, on passages never trained on. A task's unigram is the "
            "cross-entropy of the same tokens under their frequencies in training; tasks label different words, so "
            f"compare a loss with its own unigram only.\n\n{held_out}"
        )
    if probe := probe_table(run_folder):
        parts.append(f"## Retrieval probe\n\nExact search over a small judged collection.\n\n{probe}")
    if plot:
        parts.append(f"## Loss\n\n![Losses over the run]({PLOT_FILE})")
    parts.append(f"## Settings\n\n```yaml\n{yaml.safe_dump(learned, sort_keys=False)}```")
    return "\n\n".join(parts) + "\n"


def curves(run_folder: Path, kind: str, prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """{TASK: (steps, values)} of every metric `prefix`TASK in the records of `kind`, steps ascending."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for record in read_metrics(run_folder):
        if record["kind"] == kind:
            for name, value in numbers(record).items():
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)][record["step"]] = value
    return {name: tuple(map(list, zip(*sorted(points.items()), strict=True))) for name, points in found.items()}


def plot_losses(run_folder: Path, path: Path) -> bool:
    """Writes a PNG with panels of the losses in training and held out, and of their unigrams, over steps.

    Returns False, and writes nothing, if the run has recorded no loss.
    """
    panels = {
        "loss in training": curves(run_folder, "train", "loss/"),
        "loss held out": curves(run_folder, "held_out", "held_out/loss/"),
        "unigram held out": curves(run_folder, "held_out", "held_out/unigram/"),
    }
    panels["loss in training"].pop("total", None)
    panels = {title: lines for title, lines in panels.items() if lines}
    if panels:
        draw_curves(panels).savefig(path, dpi=120)
    return bool(panels)
