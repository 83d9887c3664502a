"""Packs samples into a batch: gathers their texts from blocks and has every task's words hidden.

A batch is a pure function of the rows (dataset, epoch, sample id) and the settings: which other rows stand beside a
row, on which rank or worker, changes nothing. The compiled loops here and in masks.py release the GIL.
"""

from collections.abc import Sequence

import numpy as np
import torch

from quincunx.data_shards.batches import Batch, Context, Labels, Task, make_labels, make_text
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.hashing import ALWAYS, compiled, dataset_seed
from quincunx.data_shards.masks import (
    Packed,
    Vocabulary,
    corrupt,
    hide_texts,
    pack_texts,
    text_keys,
    threshold_texts,
)
from quincunx.data_shards.shards import ShardSet, token_dtype
from quincunx.data_shards.stream import Rows
from quincunx.data_shards.tasks import (
    CORRUPTION_CODE,
    DECODER_CORRUPTION_CODE,
    ENCODER_CODE,
    TaskSpec,
    field_of,
)

PASSAGE, NEXT = 0, 1
"""The first two texts of the tables: of the sample, and of the next passage of its document."""


class Packer:
    """Makes packed batches from the samples of shard sets.

    shard_sets: one per dataset of the mixture, all of one tokenizer. tasks: in the order of the recipe.
    encoder_mask_rate, decoder_mask_rate: shares of a text's ordinary tokens, in (0, 1). corruption: how hidden tokens
    are written, in the encoder's and in masked decoders' texts: "80-10-10" or "mask". neighbour: npr decodes the
    document's "next" passage, or with "halves" the second half of the passage, the encoder and all other passage tasks
    working on the first. max_tokens: longest sequence with [CLS] and [SEP]; a longer text is cut before the word that
    does not fit. split: "train" or "heldout".

    Raises:
        SettingsError: shard sets of different tokenizers.
    """

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        tasks: Sequence[TaskSpec],
        *,
        encoder_mask_rate: float,
        decoder_mask_rate: float,
        corruption: str,
        neighbour: str,
        max_tokens: int,
        seed: int,
        split: str = "train",
    ):
        manifests = [shard_set.manifest for shard_set in shard_sets]
        for shard_set, manifest in zip(shard_sets, manifests):
            if manifest.tokenizer_digest != manifests[0].tokenizer_digest:
                raise SettingsError(
                    f"{shard_set.path} and {shard_sets[0].path} were built with different tokenizers; build them with "
                    "the same one"
                )
        self.shard_sets, self.tasks, self.split = list(shard_sets), list(tasks), split
        self.encoder_mask_rate, self.decoder_mask_rate = encoder_mask_rate, decoder_mask_rate
        self.only_mask, self.halves = corruption == "mask", neighbour == "halves"
        self.limit = max_tokens - 2
        self.vocabulary = _vocabulary(self.shard_sets)
        self.seeds = np.array([dataset_seed(seed, dataset) for dataset in range(len(shard_sets))], np.int64)
        samples = [shard_set.block_samples(split) for shard_set in shard_sets]
        self.block_starts = np.append(0, np.cumsum(np.concatenate(samples)))
        """int64, the first sample of each block, the blocks of all shard sets laid end to end."""
        self.first_blocks = np.cumsum([0, *map(len, samples)])
        wanted = [field_of(task.name, neighbour) for task in tasks]
        self.sources = {"passage": "passage", "next": "passage" if "next" in wanted else None}
        """The block's field that each text is read from; None if no task needs it as it is stored."""
        self.sources |= {field: field for field in wanted if field not in self.sources}

    def pack(self, rows: Rows) -> Batch:
        """The batch of some rows of the order (R of them).

        Raises:
            DataError: a block that cannot be read.
        """
        texts, num_cut = self.gather(rows)
        passages = texts["passage"]
        hidden = self.hide(passages, rows, ENCODER_CODE, "uniform", self.encoder_mask_rate)
        encoder = self.corrupted(passages, rows, CORRUPTION_CODE, hidden)
        contexts, tasks = {}, {}
        for task in self.tasks:
            text = texts[task.kind.field]
            input_ids, labelled, rule = self.decode(task, text, rows, hidden)
            name = task.kind.field if task.decoder == "enhanced" else task.name
            if name not in contexts:
                contexts[name] = Context(make_text(input_ids, text.cu_seqlens), torch.from_numpy(text.rows))
            tasks[task.name] = Task(name, _labels(text, labelled), *map(torch.from_numpy, rule))
        encoder_text = make_text(encoder, passages.cu_seqlens)
        return Batch(encoder_text, _labels(passages, hidden), contexts, tasks, rows, num_cut)

    def decode(
        self, task: TaskSpec, text: Packed, rows: Rows, hidden: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
        """What a task's decoder reads and recovers: ids int32 [T], labelled bool [T]; enhanced: Task's rule, else ().

        hidden: bool [T], the tokens of the passages that the encoder does not see.
        """
        code, draw, rate = task.kind.code, task.kind.draw, self.decoder_mask_rate
        if task.decoder == "masked":
            if draw == "complement":
                labelled = text.ordinary & ~hidden
            else:
                labelled = self.hide(text, rows, code, draw, rate)
            return self.corrupted(text, rows, DECODER_CORRUPTION_CODE + code, labelled), labelled, ()
        if draw == "keyword":
            thresholds = threshold_texts(text, rows.datasets[text.rows], rate, self.vocabulary)
        else:
            kept = np.where(hidden, ALWAYS, 0) if draw == "complement" else int((1.0 - rate) * ALWAYS + 0.5)
            thresholds = np.where(text.ordinary, kept, ALWAYS).astype(np.int32)
        rule = (self.keys(text, rows, code).view(np.int32), text.word_ids, thresholds)
        return text.input_ids, text.ordinary, rule

    def names(self, rows: Rows) -> dict[str, list]:
        """What names the passages of some rows: their columns."""
        return {name: column.tolist() for name, column in rows._asdict().items()}

    def gather(self, rows: Rows) -> tuple[dict[str, Packed], int]:
        """The texts of the rows as they are stored, by name, and how many of them were cut at max_tokens."""
        shape = (len(self.sources), len(rows.sample_ids), self.limit)
        tokens, starts = np.empty(shape, token_dtype(self.vocabulary.size)), np.empty(shape, bool)
        lengths = np.zeros(shape[:2], np.int32)
        tables, num_cut = (tokens, starts, lengths), 0
        numbers = rows.sample_ids + self.block_starts[self.first_blocks[rows.datasets]]
        blocks = np.searchsorted(self.block_starts, numbers, side="right") - 1
        by_block = np.argsort(blocks, kind="stable")
        for places in np.split(by_block, np.flatnonzero(np.diff(blocks[by_block])) + 1):
            number, dataset = blocks[places[0]], rows.datasets[places[0]]
            block = self.shard_sets[dataset].read_block(self.split, int(number - self.first_blocks[dataset]))
            fields = np.array([block.row(field) for field in self.sources.values()])
            indices = numbers[places] - self.block_starts[number]
            num_cut += _gather_block(
                block.token_ids, block.word_starts, block.offsets, block.has_next, fields, indices, places, *tables
            )
        if self.halves:
            _split_halves(*tables)
        named = zip(self.sources, *tables)
        return {name: pack_texts(*table, self.vocabulary) for name, *table in named}, num_cut

    def keys(self, text: Packed, rows: Rows, code: int) -> np.ndarray:
        """uint32 [S], what everything that `code` draws for a text is hashed from."""
        datasets, epochs, sample_ids = rows.at(text.rows)
        return text_keys(self.seeds[datasets], epochs, sample_ids, code)

    def hide(self, text: Packed, rows: Rows, code: int, draw: str, rate: float) -> np.ndarray:
        """bool [T], the tokens that a "uniform" or "keyword" draw hides."""
        keys, datasets = self.keys(text, rows, code), rows.datasets[text.rows]
        return hide_texts(text, keys, datasets, rate, draw == "keyword", self.vocabulary)

    def corrupted(self, text: Packed, rows: Rows, code: int, hidden: np.ndarray) -> np.ndarray:
        """int32 [T], the ids with the hidden ones replaced as the setting `corruption` says."""
        if self.only_mask:
            return np.where(hidden, np.int32(self.vocabulary.mask_id), text.input_ids)
        return corrupt(text, hidden, self.keys(text, rows, code), self.vocabulary)


def _labels(text: Packed, labelled: np.ndarray) -> Labels:
    return make_labels(np.flatnonzero(labelled), text.input_ids[labelled])


def _vocabulary(shard_sets: list[ShardSet]) -> Vocabulary:
    """One tokenizer's special ids and every dataset's idf.

    [UNK] stands for a word of the text, so it is hidden and recovered as one; but it replaces no hidden token.
    """
    manifest = shard_sets[0].manifest
    special = manifest.special_ids
    is_special = np.zeros(manifest.vocab_size, bool)
    is_special[[token_id for token_id in special["all"] if token_id != special["unk"]]] = True
    tables = [shard_set.statistics.idf for shard_set in shard_sets]
    return Vocabulary(
        size=manifest.vocab_size,
        cls_id=special["cls"],
        sep_id=special["sep"],
        mask_id=special["mask"],
        is_special=is_special,
        ordinary_ids=np.setdiff1d(np.arange(manifest.vocab_size), special["all"]).astype(np.int32),
        idf=np.concatenate(tables),
        idf_starts=np.cumsum([0, *(len(table) for table in tables)]),
    )


@compiled
def _gather_block(token_ids, word_starts, offsets, has_next, fields, indices, places, tokens, starts, lengths):
    """Copies texts of samples `indices` of one block to rows `places` of the tables; returns how many it has cut.

    fields: number of the block's field that each text of the tables is read from, or -1.
    """
    limit = tokens.shape[2]
    num_cut = 0
    for n in range(len(indices)):
        row = places[n]
        for text in range(len(fields)):
            sample, field = indices[n], fields[text]
            if field < 0 or (text == NEXT and not has_next[sample]):
                continue
            at = field * len(has_next) + sample + (text == NEXT)
            low, length = offsets[at], offsets[at + 1] - offsets[at]
            if length > limit:
                num_cut += 1
                length = limit
                while length and not word_starts[low + length]:
                    length -= 1
                if not length:  # one word fills the sequence
                    length = limit
            lengths[text, row] = length
            for i in range(length):
                tokens[text, row, i] = token_ids[low + i]
                starts[text, row, i] = word_starts[low + i]
    return num_cut


@compiled
def _split_halves(tokens, starts, lengths):
    """Cuts each passage at the word start nearest to its middle and makes the second half the next passage's text."""
    for row in range(lengths.shape[1]):
        length = lengths[PASSAGE, row]
        cut = 0
        for i in range(1, length):
            if starts[PASSAGE, row, i] and abs(2 * i - length) < abs(2 * cut - length):
                cut = i
        lengths[NEXT, row] = 0
        if cut:
            lengths[NEXT, row] = length - cut
            lengths[PASSAGE, row] = cut
            for i in range(length - cut):
                tokens[NEXT, row, i] = tokens[PASSAGE, row, cut + i]
                starts[NEXT, row, i] = starts[PASSAGE, row, cut + i]
