"""The full bundle: a Hugging Face encoder folder that also holds what pre-training needs to go on from it.

config.json, model.safetensors, tokenizer files   the encoder, as AutoModel loads it
decoders.safetensors                               LM head, every decoder, their position table if they have one
bundle.json                                        which tasks, how the decoders are built, what they were trained on

`--encoder BUNDLE` starts from all of it: the encoder is loaded as any folder is, then load_bundle fills the rest.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quincunx.data_shards.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BUNDLE_FILE = "bundle.json"
WEIGHTS_FILE = "decoders.safetensors"
FORMAT = "quincunx-bundle"
FORMAT_VERSION = 1


def write_bundle(folder: Path, weights: "dict[str, torch.Tensor]", description: dict[str, Any]) -> None:
    """Adds the LM head and decoders to an encoder folder.

    weights: every parameter of the PretrainModel outside the encoder, by its name there. description: plain values for
    bundle.json; load_bundle reads `tasks` ({name: "masked" | "enhanced"}) and `shared_decoder` (absent: false).
    """
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    content = {"format": FORMAT, "version": FORMAT_VERSION, **description}
    (folder / BUNDLE_FILE).write_text(json.dumps(content, indent=1) + "\n")


def is_bundle(name: str) -> bool:
    """Whether the `encoder` setting names a bundle."""
    return (Path(name) / BUNDLE_FILE).is_file()


def load_bundle(model: Any, folder: Path, report: Callable[[str], None] = print) -> None:
    """Fills a PretrainModel's LM head and decoders from a bundle; the encoder has been loaded from it already.

    report: told which decoders of the run the bundle lacks; they keep their fresh weights.

    Raises:
        CheckpointError: a damaged bundle, one of a newer version, weights of another shape or decoder kind, or one
            decoder for all tasks on one side and one for each on the other.
    """
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / BUNDLE_FILE).read_text())
        version, tasks = content["version"], content["tasks"]
        weights = load_file(folder / WEIGHTS_FILE)
    except Exception as error:  # safetensors has an error class of its own for a damaged file
        raise CheckpointError(f"the bundle {folder} cannot be read ({error}): export it again") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the bundle {folder} has format {version}, this quincunx reads {FORMAT_VERSION}: update it"
        )
    shared = content.get("shared_decoder", False)
    if tasks and model.tasks and shared != model.shared_decoder:
        raise CheckpointError(
            f"the bundle {folder} has one decoder for {'all tasks' if shared else 'each task'}, the recipe does not: "
            f"set --shared_decoder {str(shared).lower()}, or start from the plain encoder folder"
        )
    if shared and tasks:  # its decoder serves any task
        tasks = dict.fromkeys([task.name for task in model.tasks], next(iter(tasks.values())))
    for task in model.tasks:
        if tasks.get(task.name, task.decoder) != task.decoder:
            raise CheckpointError(
                f"the bundle {folder} has a decoder of kind {tasks[task.name]} for {task.name}, the recipe asks for "
                f"{task.decoder}: set --decoder {tasks[task.name]}, or start from the plain encoder folder"
            )
    fresh = [task.name for task in model.tasks if task.name not in tasks]
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    fresh_decoders = tuple(f"decoders.{model.decoder_name(task)}." for task in fresh)
    wanted = {name for name in own if not name.startswith(fresh_decoders)}
    wrong = [name for name in sorted(wanted) if name not in weights or weights[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(
            f"the bundle {folder} does not fit the recipe's decoders ({wrong[0]} is missing or of another shape): use "
            f"its settings, which stand in {BUNDLE_FILE}, or start from the plain encoder folder"
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    if fresh:
        report(f"the bundle {folder} has no decoder for {', '.join(fresh)}: they start from fresh weights")
