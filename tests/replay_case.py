"""Replays a reference case of the published RetroMAE or MASTER code through the model that trains.

    python tests/replay_case.py CASE.safetensors [--kernels triton]

A case holds weights, one batch, every loss, and gradients of their sum, float32 without dropout. Its metadata give
`impl` (retromae or master) and `config` (BERT's configuration as JSON); its tensors are

- `weight.*`: `lm.*` as in Hugging Face's BertForMaskedLM (output projection tied); RetroMAE's enhanced decoder
  `c_head.*`; MASTER's masked decoders `c_head` (mkp), `query_head` (dor), `gpt_head` (gor), `next_head` (npr) and
  `overlap_head` (cmp), numbered BertLayers each;
- `batch.*`: padded inputs and labels (-100: no loss). RetroMAE's `decoder_attention_mask` [B, L, L] is 1 where visible.
  MASTER's released step passes three texts through the encoder (`input_ids`, `next_encoder_*`, `overlap_encoder_*`);
- `out.*`: losses, each a mean over its labels, and sentence vectors; `grad.*`: gradients; `gradnorm.*`: 2-norms.

Prints a line per loss and the largest gradient error; exits 1 where a loss is off by more than 1e-5, or a gradient by
more than 1e-4, relative.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForMaskedLM, BertConfig

from quincunx.data_shards.batches import Batch, Context, Labels, Task, Text, make_labels, make_text
from quincunx.data_shards.tasks import TaskSpec
from quincunx.engine.decoders import BERT_LAYER_NAMES, layer_weights
from quincunx.engine.encoder import PACKED, PackedEncoder, head_weights
from quincunx.engine.model import PretrainModel
from quincunx.kernels.launching import Implementation

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# Gradients that are zero in exact arithmetic (key biases) are noise: below this share of the largest gradient norm an
# error is measured against that largest norm.
NOISE_SHARE = 1e-5


@dataclass(frozen=True)
class Pass:
    """One encoder pass of a published step: names in `batch.*` and `out.*`; decoders by task: ids, labels, mask."""

    ids: str
    labels: str
    mask: str
    loss: str
    vectors: str
    decoders: dict[str, tuple[str, str, str]]


PASSES = {
    "retromae": [
        Pass(
            "encoder_input_ids", "encoder_labels", "encoder_attention_mask", "encoder_loss", "sentence_embedding",
            {"retromae": ("decoder_input_ids", "decoder_labels", "encoder_attention_mask")},
        ),
    ],
    "master": [
        Pass(
            "input_ids", "labels", "attention_mask", "encoder_mlm_loss", "encoder_sentence_embedding",
            {
                "mkp": ("decoder_input_ids", "decoder_labels", "attention_mask"),
                "dor": ("query_input_ids", "query_labels", "query_attention_mask"),
                "gor": ("gpt_input_ids", "gpt_labels", "gpt_attention_mask"),
            },
        ),
        Pass(
            "next_encoder_input_ids", "next_encoder_labels", "next_encoder_attention_mask", "next_encoder_mlm_loss",
            "next_encoder_sentence_embedding",
            {"npr": ("next_decoder_input_ids", "next_decoder_labels", "next_decoder_attention_mask")},
        ),
        Pass(
            "overlap_encoder_input_ids", "overlap_encoder_labels", "attention_mask", "overlap_encoder_mlm_loss",
            "overlap_encoder_sentence_embedding",
            {"cmp": ("overlap_decoder_input_ids", "overlap_decoder_labels", "attention_mask")},
        ),
    ],
}  # fmt: skip
HEADS = {
    "retromae": {"c_head": "retromae"},
    "master": {"c_head": "mkp", "query_head": "dor", "gpt_head": "gor", "next_head": "npr", "overlap_head": "cmp"},
}
HEAD_NAMES = {
    "cls.predictions.transform.dense.weight": "dense.weight",
    "cls.predictions.transform.dense.bias": "dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias",
    "cls.predictions.bias": "bias",
}


def read_case(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a case."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def build_model(impl: str, config: dict, tensors: dict[str, torch.Tensor], kernels: Implementation) -> PretrainModel:
    """PretrainModel with the case's weights and no dropout."""
    bert_config = BertConfig(**{**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    masked_lm = AutoModelForMaskedLM.from_config(bert_config, attn_implementation=PACKED)
    report = masked_lm.load_state_dict(under(tensors, "weight.lm."), strict=False)
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    if report.unexpected_keys or set(report.missing_keys) - tied:
        raise ValueError(f"the case's weights do not fit its config: {report}")
    masked_lm.tie_weights()
    encoder = PackedEncoder(masked_lm.base_model)
    decoders = {
        task: [under(tensors, f"weight.{head}.{i}.") for i in range(count_layers(tensors, head))]
        if impl == "master"
        else [under(tensors, f"weight.{head}.")]
        for head, task in HEADS[impl].items()
    }
    model = PretrainModel(
        encoder,
        [TaskSpec(name=task, decoder="masked" if impl == "master" else "enhanced") for task in decoders],
        max_tokens=bert_config.max_position_embeddings,
        head_weights=head_weights(masked_lm, encoder),
        decoder_layers=max(len(layers) for layers in decoders.values()),
        kernels=kernels,
    )
    for task, layers in decoders.items():
        for ours, theirs in zip(model.decoders[task].layers, layers, strict=True):
            ours.load_state_dict(layer_weights(theirs))
    return model.train()


def count_layers(tensors: dict[str, torch.Tensor], head: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"weight.{head}.")})


def pack(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> tuple[Text, Labels]:
    """A padded text without its padding, and its labels."""
    lengths = mask.sum(1).numpy()
    real = mask.bool().numpy()
    if not (real == (np.arange(real.shape[1]) < lengths[:, None])).all():
        raise ValueError("the case pads elsewhere than on the right")
    if (labels.numpy()[~real] != -100).any():
        raise ValueError("the case labels padding")
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    packed_labels = labels.numpy()[real]
    positions = np.flatnonzero(packed_labels != -100)
    return make_text(ids.numpy()[real], cu_seqlens), make_labels(positions, packed_labels[positions])


def to_batch(batch: dict[str, torch.Tensor], step: Pass, task_names: Sequence[str]) -> Batch:
    """The batch of one encoder pass; the tasks of other passes are there without rows."""
    contexts, tasks = {}, {}
    for name in task_names:
        if name in step.decoders:
            text, labels = pack(*(batch[key] for key in step.decoders[name]))
        else:
            none = np.zeros(0, np.int64)
            text, labels = make_text(none, np.zeros(1, np.int64)), make_labels(none, none)
        contexts[name] = Context(text, torch.arange(len(text.starts)))
        visible = batch["decoder_attention_mask"].bool() if name == "retromae" else None
        tasks[name] = Task(name, labels, visibility=visible)
    return Batch(*pack(batch[step.ids], batch[step.labels], batch[step.mask]), contexts, tasks)


def gradients_by_published_name(impl: str, model: PretrainModel) -> dict[str, torch.Tensor]:
    """Our gradients under the published parameter names."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    named = {f"lm.bert.{name}": gradient for name, gradient in under(ours, "encoder.model.").items()}
    named |= {f"lm.{theirs}": ours[f"lm_head.{mine}"] for theirs, mine in HEAD_NAMES.items()}
    for head, task in HEADS[impl].items():
        for i in range(len(model.decoders[task].layers)):
            prefix = f"{head}.{i}." if impl == "master" else f"{head}."
            for mine, theirs in BERT_LAYER_NAMES.items():
                parts = ours[f"decoders.{task}.layers.{i}.{mine}"].chunk(len(theirs))
                named |= {prefix + name: part for name, part in zip(theirs, parts, strict=True)}
    return named


def relative_error(ours: torch.Tensor, reference: torch.Tensor, floor: float = 0.0) -> float:
    """2-norm of the difference over the reference's, float64; `floor` > 0 replaces the reference's norm."""
    ours, reference = ours.double(), reference.double()
    return float((ours - reference).norm() / (floor or reference.norm()))


def replay(path: Path, kernels: Implementation) -> bool:
    """Replays the case at `path` and prints how far it is off; True where all is within tolerance."""
    metadata, tensors = read_case(path)
    impl, config = metadata["impl"], json.loads(metadata["config"])
    model = build_model(impl, config, tensors, kernels)
    batch, out = under(tensors, "batch."), under(tensors, "out.")
    good, total = True, 0.0

    def report(name: str, ours: torch.Tensor) -> None:
        nonlocal good
        error = relative_error(ours, out[name])
        good &= error <= LOSS_TOLERANCE
        values = f"{ours.item():.7f}  reference {out[name].item():.7f}" if ours.numel() == 1 else "(vectors)"
        print(f"{name:36} {values}  relative error {error:.1e}")

    for step in PASSES[impl]:
        packed = to_batch(batch, step, [task.name for task in model.tasks])
        # The exponential of torch's CPU flash attention has 20 bits: gradients would be up to 1.3e-4 off.
        with sdpa_kernel(SDPBackend.MATH):
            output = model(packed, torch.tensor(packed.num_labels()))
        output.loss.backward()
        total += output.loss.detach().double()
        losses = dict(zip(model.loss_weights, output.nll_sums / output.counts, strict=True))
        report(step.loss, losses["mlm"])
        for task in step.decoders:
            report("decoder_loss" if impl == "retromae" else f"{task}_loss", losses[task])
        with torch.no_grad():
            report(step.vectors, model.encode(packed.encoder))
    report("total_loss", total)

    references, norms = under(tensors, "grad."), under(tensors, "gradnorm.")
    ours = gradients_by_published_name(impl, model)
    largest = max(float(x) for x in [*(g.double().norm() for g in references.values()), *norms.values()])
    errors = {}
    for name, reference in references.items():
        is_noise = float(reference.double().norm()) < NOISE_SHARE * largest
        errors[name] = relative_error(ours[name], reference, largest if is_noise else 0.0)
    for name, norm in norms.items():
        # In float32 as the case's: over a large tensor that norm is itself 1e-4 off.
        errors[name + " (norm)"] = relative_error(ours[name].norm(), norm)
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} gradients, largest relative error {errors[worst]:.1e} ({worst})")
    good &= bool(references) and all(error <= GRADIENT_TOLERANCE for error in errors.values())
    print("within tolerance" if good else f"OFF: losses allow {LOSS_TOLERANCE}, gradients {GRADIENT_TOLERANCE}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay a reference case through the model that trains.")
    parser.add_argument("case", type=Path, help="a case's .safetensors file")
    parser.add_argument(
        "--kernels",
        choices=["auto", "triton", "torch"],
        default="auto",
        help="triton without a GPU needs TRITON_INTERPRET=1, and a small case",
    )
    arguments = parser.parse_args()
    return 0 if replay(arguments.case, arguments.kernels) else 1


if __name__ == "__main__":
    sys.exit(main())
