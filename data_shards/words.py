"""Where words and sentences start: text to token ids and word starts with any tokenizer, and sentences by rule.

Masks are drawn over whole words, so every token carries one bit: it starts a word. WordPiece tokenizers decide that
by their own pre-tokenisation (as the papers do: a word is a token and the "##" tokens after it). Byte-level BPE
(RoBERTa, ModernBERT) and SentencePiece (XLM-R) glue punctuation or whole runs of Chinese, Japanese or Thai into one
pre-token; there a word also starts at a change between letters and punctuation, and at every token of a script that is
written without spaces (see `word_starts`).

Sentences are found for most languages that end them with a mark: good enough to cut passages at natural places; nothing
depends on a sentence being one.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
# Words before a full stop that do not end a sentence, in lower case, without the last full stop.
ABBREVIATIONS = frozenset(
    """
    mr mrs ms dr prof rev hon st sr jr gen col lt capt sgt gov sen rep pres
    no nos vol vols fig figs eq eqs sec secs ch chap pp p ed eds al ca cf approx dept est inc ltd co corp
    e.g i.e viz vs resp incl ex op cit ibid
    jan feb mar apr jun jul aug sep sept oct nov dec
    z.b d.h bzw nr bd abb usw mme mlle m
    """.split()  # noqa: SIM905 (a table is read more easily than a list of quotes)
)
# A full stop needs white space and something that can open a sentence; the marks of CJK, Arabic and Indic scripts
# need neither. A blank line always ends a sentence.
BOUNDARY = re.compile(
    r"""
      (?P<stop> [.!?…]+ [\"'”’»)\]]* ) (?P<gap>\s+) (?= [\"'“‘«(\[¿¡]* [^\W_a-zß-öø-ÿ] | [\"“‘«¿¡•*-] )
    | [。！？｡]+ [」』”’）]* \s*
    | [؟۔।॥]+ \s+
    | \n \s* \n \s*
    """,
    re.VERBOSE,
)
LAST_WORD = re.compile(r"[^\s(\[\"'“‘]*$")


class Tokens(NamedTuple):
    """A tokenised text without special tokens, n tokens.

    token_ids    int32 [n]
    word_starts  bool [n], True if a token is the first of a word
    ends         int32 [n], index after the token's last character in the text, never decreasing
    """

    token_ids: np.ndarray
    word_starts: np.ndarray
    ends: np.ndarray


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

    SentencePiece models hold "</s>" among their ordinary pieces; if a text spells one, it becomes the unknown token.
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


def sentence_starts(text: str) -> list[int]:
    """Index of the first character of every sentence, in order; the first is 0. [] for an empty text.

    The white space between two sentences belongs to the first.
    """
    if not text:
        return []
    starts = [0]
    for match in BOUNDARY.finditer(text):
        if match.end() >= len(text):
            break
        if match["stop"] == "." and _is_abbreviation(text, match.start()):
            continue
        starts.append(match.end())
    return starts


def _is_abbreviation(text: str, stop: int) -> bool:
    """Whether the full stop at `stop` follows an abbreviation or an initial ("J. Smith", "U.S. Army")."""
    word = LAST_WORD.search(text, max(0, stop - 12), stop)[0]
    return word.lower() in ABBREVIATIONS or re.fullmatch(r"(?:[^\W\d_]\.)*[^\W\d_]", word) is not None
