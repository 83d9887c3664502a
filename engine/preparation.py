"""Everything a run needs before its ranks talk to each other, and every error that can be found that early.

What a user got wrong in the settings and the DeepSpeed JSON comes first, as one SettingsError with all of it; then the
machine, the shards, the model. Each rank does this alone; order and random weights are functions of the seed.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.order import Order
from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shards import ShardSet, open_shards
from quincunx.data_shards.stream import Stream
from quincunx.data_shards.tasks import check_tasks_against
from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest
from quincunx.engine.bundle import is_bundle, load_bundle
from quincunx.engine.deepspeed_config import check_settings, fill_config
from quincunx.engine.environment import Environment
from quincunx.engine.held_out import HeldOut, load_held_out
from quincunx.engine.host_memory import return_freed_memory
from quincunx.engine.model import PretrainModel, build_model
from quincunx.engine.probe import Probe, load_probe
from quincunx.engine.settings import PretrainSettings, total_steps
from quincunx.kernels.enhanced_attention import TRITON_HEAD_SIZES
from quincunx.kernels.launching import choose


@dataclass(frozen=True)
class Prepared:
    """The parts of a run, on one rank, before the process group starts."""

    config: dict[str, Any]
    """The DeepSpeed JSON, filled."""
    micro_batch: int
    total_steps: int
    cuda: bool
    shard_sets: list[ShardSet]
    stream: Stream
    held_out: HeldOut | None
    probe: Probe | None
    model: PretrainModel
    dataset_ids: list[str]
    model_digest: str


def prepare(settings: PretrainSettings, environment: Environment) -> Prepared:
    """Checks settings, JSON, shards and model, and opens them. Raises SettingsError or DataError."""
    config, micro_batch = check_settings(settings, environment.world_size)
    cuda = choose_device(settings, environment)
    config = fill_config(config, settings, micro_batch, environment.world_size, cuda)
    report = print if environment.is_main else lambda line: None
    kernels = choose_kernels(settings, cuda)

    pairs = settings.shard_weights()
    shard_sets = [open_shards(path, settings.cache, int(settings.cache_gb * 1e9)) for path, _ in pairs]
    fields = [shard_set.manifest.fields["train"] for shard_set in shard_sets]
    check_tasks_against(fields, settings.tasks, settings.neighbour)
    check_tokenizer(settings, shard_sets)
    packers = {split: make_packer(settings, shard_sets, split) for split in ("train", "heldout")}
    order = Order(
        settings.seed,
        [shard_set.block_samples("train") for shard_set in shard_sets],
        [weight for _, weight in pairs],
    )
    stream = Stream(
        packers["train"],
        order,
        global_batch=settings.global_batch,
        micro_batch=micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
        num_workers=settings.num_workers,
    )
    model = make_model(settings, shard_sets[0], report)
    report(f"kernels: {describe_kernels(settings, kernels, model)}")
    if not cuda:
        return_freed_memory(sum(parameter.numel() for parameter in model.parameters()))
    held_out = None
    if settings.held_out_every:
        held_out = load_held_out(packers["heldout"], packers["train"], settings.held_out_passages, micro_batch)
    return Prepared(
        config=config,
        micro_batch=micro_batch,
        total_steps=total_steps(settings, sum(order.num_samples)),
        cuda=cuda,
        shard_sets=shard_sets,
        stream=stream,
        held_out=held_out,
        probe=make_probe(settings, shard_sets[0]),
        model=model,
        dataset_ids=[shard_set.manifest.dataset_id for shard_set in shard_sets],
        model_digest=digest_of(model),
    )


def choose_device(settings: PretrainSettings, environment: Environment) -> bool:
    """Whether to train on a GPU. Raises SettingsError where this machine has none for this rank."""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return False
    if not torch.cuda.is_available():
        raise SettingsError(
            "device is cuda and this machine has no GPU that torch can use; take --device cpu or another machine"
        )
    if environment.local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"rank {environment.rank} is number {environment.local_rank + 1} on its machine, which has "
            f"{torch.cuda.device_count()} GPUs; start at most one rank per GPU, or take --device cpu"
        )
    return True


def choose_kernels(settings: PretrainSettings, cuda: bool) -> str:
    """Which kernels run, triton or torch. Raises SettingsError where Triton is demanded and cannot run."""
    try:
        return choose(settings.kernels, "cuda" if cuda else "cpu")
    except ValueError as error:
        raise SettingsError(str(error)) from error


def describe_kernels(settings: PretrainSettings, kernels: str, model: PretrainModel) -> str:
    """What computes the LM-head loss and the decoders' attention. Raises SettingsError for heads Triton cannot take."""
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
            f"kernels is triton, and the encoder's heads have {head_size} channels; the attention kernel takes "
            f"{', '.join(map(str, TRITON_HEAD_SIZES))}, set kernels to auto or torch"
        )
    return f"triton for the LM-head loss, torch for attention (heads of {head_size} channels)"


def check_tokenizer(settings: PretrainSettings, shard_sets: list[ShardSet]) -> None:
    """Raises SettingsError where a pre-trained encoder does not read the tokens that the shards hold."""
    if settings.from_scratch:
        return
    ours = tokenizer_digest(load_tokenizer(settings.encoder))
    for shard_set in shard_sets:
        if shard_set.manifest.tokenizer_digest != ours:
            raise SettingsError(
                f"{shard_set.path} was built with another tokenizer than encoder {settings.encoder} has; "
                f"build the shards with --tokenizer {settings.encoder}, or take --from_scratch"
            )


def make_packer(settings: PretrainSettings, shard_sets: list[ShardSet], split: str) -> Packer:
    return Packer(
        shard_sets,
        settings.task_specs(),
        encoder_mask_rate=settings.encoder_mask_rate,
        decoder_mask_rate=settings.decoder_mask_rate,
        corruption=settings.corruption,
        neighbour=settings.neighbour,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        split=split,
    )


def make_model(settings: PretrainSettings, shard_set: ShardSet, report: Callable[[str], None]) -> PretrainModel:
    """The run's model, its random weights drawn from the seed, so that they are the same on every rank."""
    from quincunx.engine.encoder import ScratchShape

    shape = None
    if settings.from_scratch:
        shape = ScratchShape(
            hidden=settings.hidden_size,
            layers=settings.num_layers,
            heads=settings.num_heads,
            intermediate=settings.intermediate_size or 4 * settings.hidden_size,
            max_positions=settings.max_positions or settings.max_tokens,
        )
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.encoder,
        settings.task_specs(),
        max_tokens=settings.max_tokens,
        decoder_layers=settings.decoder_layers,
        decoder_init=settings.decoder_init,
        query_stream=settings.query_stream,
        dropout=settings.dropout,
        from_scratch=shape,
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


def make_probe(settings: PretrainSettings, shard_set: ShardSet) -> Probe | None:
    if settings.probe is None or not settings.probe_every:
        return None
    return load_probe(settings.probe, load_tokenizer(shard_set.tokenizer_folder), settings.max_tokens)


def digest_of(model: PretrainModel) -> str:
    """16 hex digits of the names and shapes of a model's parameters, before DeepSpeed partitions them."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
