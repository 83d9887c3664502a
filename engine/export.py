"""A run's checkpoint as three model folders that stand on their own.

OUTPUT/encoder                 AutoModel and AutoTokenizer load it without any code of ours
OUTPUT/sentence-transformers   SentenceTransformer loads it, with CLS pooling
OUTPUT/bundle                  encoder, LM head and decoders, from which pre-training can go on (engine/bundle.py)

Each has a model card with the losses and the probe of the run, and their plot. Weights come from the checkpoint, in
float32, whatever ZeRO stage, precision and number of ranks wrote it; the model's configuration and tokenizer come from
the folder `model` that save_model_files leaves in the run folder.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quincunx.data_shards.errors import CheckpointError
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.engine.bundle import write_bundle
from quincunx.engine.checkpoint import Checkpoint, consolidated_state_dict, find_newest, find_step
from quincunx.engine.model_card import PLOT_FILE, learned_settings, model_card, plot_losses

if TYPE_CHECKING:
    import torch

MODEL_FOLDER = "model"
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


def save_model_files(run_folder: Path, model: Any, tokenizer_folder: Path) -> None:
    """Keeps the encoder's configuration and the tokenizer in the run folder, so that it can be exported anywhere.

    model: the PretrainModel. tokenizer_folder: that of the shard sets.
    """
    folder = Path(run_folder) / MODEL_FOLDER
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.backend_tokenizer.encode_special_tokens = False  # as its users know it
    tokenizer.model_max_length = model.encoder.max_length
    tokenizer.save_pretrained(folder)
    model.encoder.config.save_pretrained(folder)


def export_run(run_folder: Path, output: Path, normalise: bool = False, step: int | None = None) -> Checkpoint:
    """Exports the newest checkpoint that verifies; replaces what an earlier export left in `output`. Rank 0 only.

    normalise: the sentence-transformers model gives vectors of length 1. step: that step's checkpoint instead.

    Raises:
        CheckpointError: the run has no usable checkpoint (of that step), or its folder `model` is missing.
    """
    run_folder, output = Path(run_folder), Path(output)
    checkpoint = (
        find_newest(run_folder / "checkpoints") if step is None else find_step(run_folder / "checkpoints", step)
    )
    if checkpoint is None:
        raise CheckpointError(f"{run_folder} has no checkpoint: give a run folder of pretrain.py that has saved one")
    if not (run_folder / MODEL_FOLDER / "config.json").is_file():
        raise CheckpointError(f"{run_folder} has no {MODEL_FOLDER}/config.json, which every run writes: restore it")
    weights = consolidated_state_dict(checkpoint.folder)
    settings = checkpoint.state["settings"]
    output.mkdir(parents=True, exist_ok=True)
    plot = plot_losses(run_folder, output / PLOT_FILE)
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
        title = f"{run_folder.resolve().name}: {name}"
        usage = usage.replace("{max_tokens}", str(settings["max_tokens"]))
        dataset_ids = checkpoint.state["dataset_ids"]
        card = model_card(run_folder, title, usage, checkpoint.step, dataset_ids, settings, plot)
        (staging / "README.md").write_text(card, encoding="utf-8")
        if plot:
            shutil.copy(output / PLOT_FILE, staging)
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(staging, output / name)
    return checkpoint


def write_encoder(folder: Path, model_folder: Path, weights: "dict[str, torch.Tensor]") -> None:
    """The Hugging Face encoder folder: configuration and tokenizer of `model_folder`, weights of a PretrainModel.

    It has no pooler: training does not touch one, and random weights would look trained.
    Raises CheckpointError where the weights are not that configuration's.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    encoder = AutoModel.from_config(AutoConfig.from_pretrained(model_folder))
    own = {name.removeprefix(ENCODER_PREFIX): w for name, w in weights.items() if name.startswith(ENCODER_PREFIX)}
    missing, unexpected = encoder.load_state_dict(own, strict=False)
    differing = [*(name for name in missing if not name.startswith("pooler.")), *unexpected]
    if differing:
        raise CheckpointError(f"the checkpoint is not of the model in {model_folder}: {differing[0]} is in one only")
    encoder.config.architectures = [type(encoder).__name__]
    encoder.config.save_pretrained(folder)
    save_file(
        {name: weight.contiguous() for name, weight in own.items()}, folder / "model.safetensors", {"format": "pt"}
    )
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
        "settings": learned_settings(settings),
    }
    write_bundle(folder, {name: w for name, w in weights.items() if not name.startswith("encoder.")}, description)
