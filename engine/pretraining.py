"""Pre-training as a job for the loop: everything it needs before its ranks talk to each other, and its step.

What a user got wrong in the settings and the DeepSpeed JSON comes first, as one SettingsError with all of it; then the
machine, the shards, the model. Each rank does this alone; order and random weights are functions of the seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quincunx.data_shards.batches import Batch, to_device
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shards import ShardSet, open_shards
from quincunx.data_shards.stream import Order, Stream
from quincunx.data_shards.tasks import TaskSpec, shares_served
from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest
from quincunx.engine.evaluations import load_held_out, load_probe, run_held_out, run_probe
from quincunx.engine.model import SENTENCE_LOSSES, PretrainModel, PretrainOutput, build_model, is_bundle, load_bundle
from quincunx.engine.ranks import Environment, choose_device
from quincunx.engine.settings import Machine, PretrainSettings, load_machine
from quincunx.engine.training import Evaluation, run_training
from quincunx.kernels.enhanced_attention import TRITON_HEAD_SIZES
from quincunx.kernels.launching import choose


@dataclass(frozen=True)
class PretrainJob:
    """A pre-training, on one rank; fields and methods as engine/training.py has them."""

    settings: PretrainSettings
    machine: Machine
    model: PretrainModel
    stream: Stream
    data: dict[str, list]
    loss_weights: dict[str, float]
    evaluations: list[Evaluation]
    tokenizer_folder: Path

    def write_model_files(self, folder: Path) -> None:
        tokenizer = load_tokenizer(self.tokenizer_folder)
        tokenizer.backend_tokenizer.encode_special_tokens = False  # as its users know it
        tokenizer.model_max_length = self.model.encoder.max_length
        tokenizer.save_pretrained(folder)
        self.model.encoder.config.save_pretrained(folder)

    def forward_passes(
        self, engine: Any, batches: list[Batch], label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator[PretrainOutput]:
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            output = engine(to_device(batch, label_counts.device), label_counts)
            yield output._replace(flops=self.model.flops(batch))


def pretrain(settings: PretrainSettings, environment: Environment) -> int:
    """Runs or resumes a pre-training on this rank; returns the process's exit code (engine/training.py)."""
    return run_training(lambda: prepare(settings, environment), environment)


def prepare(settings: PretrainSettings, environment: Environment) -> PretrainJob:
    """Checks shards and model, and opens them. Raises SettingsError or DataError."""
    machine = load_machine(settings, environment.world_size, choose_device(settings.device, environment))
    report = print if environment.is_main else lambda line: None
    paths, weights = zip(*settings.shard_weights(), strict=True)
    shard_sets = [open_shards(path, settings.cache, int(settings.cache_gb * 1e9)) for path in paths]
    fields = [shard_set.manifest.fields["train"] for shard_set in shard_sets]
    tasks = settings.task_specs(shares_served(fields, weights, settings.tasks, settings.neighbour))
    check_tokenizer(settings, shard_sets)
    packers = {
        split: Packer(
            shard_sets,
            tasks,
            encoder_mask_rate=settings.encoder_mask_rate,
            decoder_mask_rate=settings.decoder_mask_rate,
            corruption=settings.corruption,
            neighbour=settings.neighbour,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            split=split,
        )
        for split in ("train", "heldout")
    }
    order = Order(settings.seed, [shard_set.block_samples("train") for shard_set in shard_sets], weights)
    stream = Stream(
        packers["train"],
        order,
        global_batch=settings.global_batch,
        micro_batch=machine.micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
        num_workers=settings.num_workers,
    )
    model = make_model(settings, tasks, shard_sets[0], report)
    report(f"kernels: {describe_kernels(settings, machine.cuda, model)}")
    loss = " + ".join(name if name == "mlm" else f"{weight:.2g} {name}" for name, weight in model.loss_weights.items())
    report(f"loss {loss} ({settings.decoder}); {order.describe(settings.global_batch)}")
    for sentence in settings.idle():
        report(f"warning: {sentence}")
    return PretrainJob(
        settings=settings,
        machine=machine,
        model=model,
        stream=stream,
        data={"dataset_ids": [found.manifest.dataset_id for found in shard_sets], "dataset_weights": [*weights]},
        loss_weights=model.loss_weights,
        evaluations=make_evaluations(settings, model, packers, machine.micro_batch, shard_sets[0]),
        tokenizer_folder=shard_sets[0].tokenizer_folder,
    )


def make_evaluations(
    settings: PretrainSettings, model: PretrainModel, packers: dict[str, Packer], micro_batch: int, shard_set: ShardSet
) -> list[Evaluation]:
    """The held-out losses, if passages are held out, and the probe, if one is given."""
    found = []
    if settings.held_out_every:
        held_out = load_held_out(packers["heldout"], packers["train"], settings.held_out_passages, micro_batch)
        if held_out is not None:
            measure = partial(run_held_out, model, held_out)
            found.append(Evaluation("held_out", settings.held_out_every, measure, shown=False))
    if settings.probe is not None and settings.probe_every:
        probe = load_probe(settings.probe, load_tokenizer(shard_set.tokenizer_folder), settings.max_tokens)
        found.append(Evaluation("probe", settings.probe_every, partial(run_probe, model, probe), shown=True))
    return found


def describe_kernels(settings: PretrainSettings, cuda: bool, model: PretrainModel) -> str:
    """What computes the LM-head loss and the decoders' attention. Raises SettingsError for a Triton that cannot run."""
    try:
        kernels = choose(settings.kernels, "cuda" if cuda else "cpu")
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if kernels == "torch" or settings.decoder == "masked":  # masked decoders' attention is torch's own
        return kernels
    config = model.encoder.config
    head_size = config.hidden_size // config.num_attention_heads
    if settings.query_stream == "embedded":
        return "triton for the LM-head loss, torch for attention (query_stream is embedded)"
    if head_size in TRITON_HEAD_SIZES:
        return "triton"
    if settings.kernels == "triton":
        raise SettingsError(
            f"kernels is triton, but the encoder's heads have {head_size} channels and the attention kernel "
            f"takes {', '.join(map(str, TRITON_HEAD_SIZES))}; set kernels to auto or torch"
        )
    return f"triton for the LM-head loss, torch for attention (heads of {head_size} channels)"


def check_tokenizer(settings: PretrainSettings, shard_sets: list[ShardSet]) -> None:
    """Raises SettingsError if a pre-trained encoder does not read the tokens that the shards hold."""
    if settings.from_scratch:
        return
    ours = tokenizer_digest(load_tokenizer(settings.encoder))
    for shard_set in shard_sets:
        if shard_set.manifest.tokenizer_digest != ours:
            raise SettingsError(
                f"{shard_set.path} was built with another tokenizer than encoder {settings.encoder} has; "
                f"build the shards with --tokenizer {settings.encoder}, or take --from_scratch"
            )


def make_model(
    settings: PretrainSettings, tasks: list[TaskSpec], shard_set: ShardSet, report: Callable[[str], None]
) -> PretrainModel:
    """The run's model, its random weights drawn from the seed, so that they are the same on every rank."""
    sizes = {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "intermediate_size": settings.intermediate_size,
        "max_position_embeddings": settings.max_positions or settings.max_tokens,
    }
    if unknown := [name for name in settings.sentence_losses if name not in SENTENCE_LOSSES]:
        known = ", ".join(SENTENCE_LOSSES) or "there are none yet"
        raise SettingsError(f"sentence_losses names {', '.join(unknown)}; known: {known} (engine/model.py)")
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.encoder,
        tasks,
        max_tokens=settings.max_tokens,
        decoder_layers=settings.decoder_layers,
        decoder_init=settings.decoder_init,
        query_stream=settings.query_stream,
        shared_decoder=settings.shared_decoder,
        sentence_losses=settings.sentence_losses,
        dropout=settings.dropout,
        from_scratch=sizes if settings.from_scratch else None,
        vocab_size=shard_set.manifest.vocab_size,
        pad_token_id=shard_set.manifest.special_ids["pad"],
        gradient_checkpointing=settings.gradient_checkpointing,
        kernels=settings.kernels,
    )
    if not model.lm_head.bias.any():
        start_at_unigram(model.lm_head.bias, shard_set.statistics.token_counts)
    if is_bundle(settings.encoder) and not settings.from_scratch:
        load_bundle(model, Path(settings.encoder), report)
    return model


def start_at_unigram(bias_V: torch.nn.Parameter, token_counts: np.ndarray) -> None:
    """Sets a fresh LM head's bias to the log frequencies of the corpus's tokens.

    The first loss then stands near the unigram cross-entropy instead of log V, and the first hundred steps need not
    teach word frequencies to the embeddings, which an encoder brings trained (docs/log.md has the curves).
    """
    counts = torch.ones(len(bias_V), dtype=torch.float64)
    counts[: len(token_counts)] += torch.from_numpy(token_counts.astype(np.float64))
    with torch.no_grad():
        bias_V.copy_((counts / counts.sum()).log())
