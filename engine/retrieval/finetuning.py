"""A fine-tuning run: settings, data and model checked and opened, and given to the training loop as a job."""

import copy
import dataclasses
from pathlib import Path

import torch

from quincunx.data_shards.artefact import file_digest
from quincunx.data_shards.errors import SettingsError
from quincunx.engine.evaluations import load_probe
from quincunx.engine.host_memory import return_freed_memory
from quincunx.engine.ranks import Environment, choose_device
from quincunx.engine.retrieval.candidates import iterate_candidates
from quincunx.engine.retrieval.collection import read_passages, read_queries
from quincunx.engine.retrieval.cross_encoder import Reranker, load_reranker
from quincunx.engine.retrieval.dual_encoder import DualEncoder, Retriever, load_retriever
from quincunx.engine.retrieval.examples import RerankerPacker, RetrieverPacker, stream_examples
from quincunx.engine.retrieval.finetune_job import FinetuneJob
from quincunx.engine.retrieval.finetune_settings import FinetuneSettings
from quincunx.engine.retrieval.groups import Groups
from quincunx.engine.retrieval.reranker_job import RerankerJob
from quincunx.engine.retrieval.retriever_job import RetrieverJob
from quincunx.engine.settings import load_config
from quincunx.engine.training import run_training


def finetune(settings: FinetuneSettings, environment: Environment) -> int:
    """Runs or resumes a fine-tuning on this rank; returns the process's exit code (engine/training.py)."""
    return run_training(lambda: prepare(settings, environment), settings, environment)


def prepare(settings: FinetuneSettings, environment: Environment) -> FinetuneJob:
    """Checks data and model, and opens them. Raises SettingsError or DataError."""
    cuda = choose_device(settings.device, environment)
    config, micro_batch = load_config(settings, environment.world_size, cuda)
    groups = read_groups(settings)
    torch.manual_seed(settings.seed)
    loaded = load_reranker_to_train(settings) if settings.is_reranker else load_retriever_to_train(settings)
    if not cuda:
        return_freed_memory(sum(parameter.numel() for parameter in loaded.model.parameters()))
    stream = stream_examples(
        make_packer(settings, groups, loaded),
        seed=settings.seed,
        global_batch=settings.global_batch,
        micro_batch=micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
        num_workers=settings.num_workers,
    )
    probe = None
    if settings.probe is not None and settings.probe_every and not settings.is_reranker:
        probe = load_probe(
            Path(settings.probe),
            loaded.tokenizer,
            settings.max_passage_tokens,
            settings.max_query_tokens,
            split=settings.probe_split,
            titles=settings.titles,
            query_prompt=loaded.query_prompt,
            passage_prompt=loaded.passage_prompt,
        )
    return (RerankerJob if settings.is_reranker else RetrieverJob)(
        settings=settings,
        config=config,
        micro_batch=micro_batch,
        total_steps=settings.total_steps(len(groups)),
        cuda=cuda,
        loaded=loaded,
        stream=stream,
        probe=probe,
        dataset_ids=[
            file_digest(settings.candidates),
            groups.passages.digest,
            groups.queries.digest,
            loaded.digest,
        ],
    )


def read_groups(settings: FinetuneSettings) -> Groups:
    """The training queries with their candidates. Raises DataError."""
    return Groups(
        iterate_candidates(settings.candidates),
        read_queries(settings.queries),
        read_passages(settings.corpus, titles=settings.titles),
        num_hard_negatives=settings.num_negatives,
        seed=settings.seed,
        with_scores=settings.stage == "distil",
    )


def make_packer(
    settings: FinetuneSettings, groups: Groups, loaded: Retriever | Reranker
) -> RetrieverPacker | RerankerPacker:
    """What turns queries and their drawn candidates into the stage's micro-batches."""
    if settings.is_reranker:
        return RerankerPacker(groups, loaded.tokenizer, max_tokens=settings.max_pair_tokens)
    return RetrieverPacker(
        groups,
        loaded.tokenizer,
        max_query_tokens=settings.max_query_tokens,
        max_passage_tokens=settings.max_passage_tokens,
        query_prompt=loaded.query_prompt,
        passage_prompt=loaded.passage_prompt,
    )


def load_retriever_to_train(settings: FinetuneSettings) -> Retriever:
    """The dual encoder that training starts from. Raises SettingsError."""
    retriever = load_retriever(
        settings.encoder,
        pooling=settings.pooling,
        normalise=settings.normalise,
        max_query_tokens=settings.max_query_tokens,
        max_passage_tokens=settings.max_passage_tokens,
        dropout=settings.dropout,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    model = retriever.model
    if settings.towers == "shared" and not model.shared:
        raise SettingsError(f"encoder {settings.encoder} has two towers; take --towers separate")
    if settings.towers == "separate" and model.shared:
        model = DualEncoder(model.passage, copy.deepcopy(model.passage), model.pooling, model.normalise)
        retriever = dataclasses.replace(retriever, model=model)
    model.train()
    return retriever


def load_reranker_to_train(settings: FinetuneSettings) -> Reranker:
    """The cross-encoder that training starts from. Raises SettingsError."""
    reranker = load_reranker(
        settings.encoder,
        max_tokens=settings.max_pair_tokens,
        dropout=settings.dropout,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    reranker.model.train()
    return reranker
