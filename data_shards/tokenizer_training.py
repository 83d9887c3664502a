"""A WordPiece tokenizer trained on the corpus, the same one whenever the texts are the same."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from quincunx.data_shards.tokenizer import prepare_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALPHABET_LIMIT = 1000
PRIVATE_PLANE = 0xF0000  # code points that no text uses
WORDPIECE_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> "PreTrainedTokenizerFast":
    """A BERT tokenizer trained on `texts` (a sample of tens of megabytes is plenty; its words are held in memory).

    The same texts give the same vocabulary of at most `vocab_size` tokens. The library's WordPiece trainer numbers the
    "##" characters in the order of a randomly seeded hash map, and ties between merges go by number, so its vocabulary
    differs from run to run. Its plain BPE trainer does not: we give it every continuing character as a private
    code point and turn those back into "##". The alphabet is the 1,000 most frequent characters; others become [UNK].
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    limit = min(ALPHABET_LIMIT, vocab_size // 3)
    alphabet = sorted(characters, key=lambda character: (-characters[character], character))[:limit]
    continuing = {ord(character): chr(PRIVATE_PLANE + k) for k, character in enumerate(alphabet)}
    originals = {ord(private): chr(code) for code, private in continuing.items()}

    def training_texts() -> Iterator[str]:
        known = set(alphabet)
        for word, count in words.items():
            if known.issuperset(word):
                yield f"{word[0]}{word[1:].translate(continuing)} " * count

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(WORDPIECE_SPECIAL),
        min_frequency=2,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(training_texts(), trainer)
    by_number = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    pieces = [("##" if ord(token[0]) in originals else "") + token.translate(originals) for token, _ in by_number]
    vocabulary = {token: number for number, token in enumerate([*WORDPIECE_SPECIAL, *pieces])}

    return prepare_tokenizer(BertTokenizerFast(vocab=vocabulary, do_lower_case=lowercase), f"train:{vocab_size}")
