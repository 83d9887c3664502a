"""Masked and enhanced decoders against Hugging Face's BertLayer and against dense, fully computed versions."""

import numpy as np
import pytest
import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from quincunx.data_shards.batches import Task, make_labels, make_text
from quincunx.data_shards.errors import SettingsError
from quincunx.engine.decoders import (
    DecoderStream,
    EnhancedDecoder,
    MaskedDecoder,
    copy_last_layers,
    decode_enhanced,
)

LENGTHS = [9, 3, 14, 2]
TEXT = make_text(np.arange(5, 5 + sum(LENGTHS)), np.cumsum([0, *LENGTHS]))
WIDTH = 16
CONFIG = BertConfig(
    hidden_size=WIDTH, num_attention_heads=2, intermediate_size=40, initializer_range=0.3, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, attn_implementation="eager",
)  # fmt: skip


@pytest.fixture
def task():
    """A task over four sequences; every token but the first and last of a sequence is labelled, so one has none."""
    rng = np.random.default_rng(0)
    cu_seqlens = np.cumsum([0, *LENGTHS]).astype(np.int32)
    inner = np.ones(cu_seqlens[-1], bool)
    inner[cu_seqlens[:-1]] = inner[cu_seqlens[1:] - 1] = False
    positions = np.flatnonzero(inner)
    thresholds = np.where(inner, 2**29, 2**30).astype(np.int32)
    return Task(
        "passage",
        make_labels(positions, rng.integers(5, 50, len(positions))),
        keys=torch.arange(7, 7 + len(LENGTHS), dtype=torch.int32),
        word_ids=torch.arange(cu_seqlens[-1], dtype=torch.int32),
        keep_thresholds=torch.from_numpy(thresholds),
    )


def decode(decoder, context, h, table, task):
    """One enhanced decoder on its own."""
    return decode_enhanced([decoder], [DecoderStream(task, TEXT, h, context)], table, "torch")[0]


def random_rows(count, seed):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def bert_layers(count):
    torch.manual_seed(3)
    layers = [BertLayer(CONFIG) for _ in range(count)]
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return layers


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_masked_decoder_is_bert_layers_read_at_the_labelled_rows(num_layers, task):
    layers = bert_layers(5)
    decoder = MaskedDecoder(CONFIG, 0.0, num_layers)
    copy_last_layers(decoder, layers)
    context = random_rows(sum(LENGTHS), 0)
    ours = decoder(context, TEXT, task.labels)
    parts = []
    for sequence in context.split(LENGTHS):
        hidden = sequence[None]
        for layer in layers[-num_layers:]:
            hidden = layer(hidden)
        parts.append(hidden[0])
    theirs = torch.cat(parts)[task.labels.positions]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(ours.square().sum(), context)[0]
    expected = torch.autograd.grad(theirs.square().sum(), context)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_the_low_rank_query_equals_projecting_the_whole_query_stream(task):
    decoder = EnhancedDecoder(CONFIG, 0.0)
    torch.nn.init.normal_(decoder.layers[0].query_bias)
    context, h, table = random_rows(sum(LENGTHS), 0), random_rows(len(LENGTHS), 1), random_rows(20, 2)
    low_rank = decode(decoder, context, h, table, task)
    query = h[TEXT.sequences] + table[TEXT.positions]
    whole = decoder.decode_embedded(query, DecoderStream(task, TEXT, h, context))
    torch.testing.assert_close(low_rank, whole, rtol=1e-5, atol=1e-5)
    inputs = [context, h, table, *decoder.parameters()]
    for a, b in zip(
        torch.autograd.grad(low_rank.square().sum(), inputs), torch.autograd.grad(whole.square().sum(), inputs)
    , strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_enhanced_row_does_not_see_its_own_token(task):
    """Changing the context at one position leaves that row's output as it was, and changes some other row's."""
    decoder = EnhancedDecoder(CONFIG, 0.0)
    context, h, table = random_rows(sum(LENGTHS), 0), random_rows(len(LENGTHS), 1), random_rows(20, 2)
    before = decode(decoder, context, h, table, task)
    row = 5
    position = task.labels.positions[row]
    changed = context.detach().clone()
    changed[position] += 5
    after = decode(decoder, changed, h, table, task)
    same = (before == after).all(-1)
    assert same[row]
    sequence = TEXT.sequences[task.labels.positions]
    assert not same[sequence == sequence[row]].all()
    assert same[sequence != sequence[row]].all()
    changed[TEXT.starts] += 5  # position 0 reaches every row
    assert (after != decode(decoder, changed, h, table, task)).any(-1).all()


def test_decoders_of_several_tasks_run_together_as_they_would_alone(task):
    """Three tasks, two of them over one context, one over fewer sequences: outputs and all gradients."""
    torch.manual_seed(5)
    decoders = [EnhancedDecoder(CONFIG, 0.0) for _ in range(3)]
    for decoder in decoders:
        torch.nn.init.normal_(decoder.layers[0].query_bias)
    shared, h, table = random_rows(sum(LENGTHS), 0), random_rows(len(LENGTHS), 1), random_rows(20, 2)
    short_text = make_text(np.arange(5, 17), np.array([0, 7, 12]))
    short = Task(
        "next",
        make_labels(np.array([1, 2, 9]), np.array([6, 7, 8])),
        keys=torch.tensor([11, -5], dtype=torch.int32),
        word_ids=torch.arange(12, dtype=torch.int32),
        keep_thresholds=torch.full((12,), 2**29, dtype=torch.int32),
    )
    other, other_h = random_rows(12, 3), random_rows(2, 4)
    streams = [
        DecoderStream(task, TEXT, h, shared),
        DecoderStream(short, short_text, other_h, other),
        DecoderStream(task, TEXT, h, shared),
    ]
    together = decode_enhanced(decoders, streams, table, "torch")
    alone = [decode_enhanced([d], [s], table, "torch")[0] for d, s in zip(decoders, streams, strict=True)]
    inputs = [shared, h, table, other, other_h, *(p for decoder in decoders for p in decoder.parameters())]
    gradients = []
    for outputs in (together, alone):
        loss = sum((i + 1) * output.square().sum() for i, output in enumerate(outputs))
        gradients.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_copying_more_layers_than_there_are_is_refused():
    with pytest.raises(SettingsError, match="needs 3 encoder layers, but the encoder has 2"):
        copy_last_layers(MaskedDecoder(CONFIG, 0.0, 3), bert_layers(2))
    with pytest.raises(SettingsError, match="BERT-like"):
        copy_last_layers(MaskedDecoder(CONFIG, 0.0, 1), [torch.nn.Linear(WIDTH, WIDTH)])
