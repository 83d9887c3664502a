"""Our shards through webdataset's own reader: for looking at them, and for other people's pipelines.

    dataset = wds.WebDataset(urls, shardshuffle=False).decode(decode_member).compose(split_blocks)

Training does not read this way (shards.py says why): a tar reader cannot know what is missing.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from quincunx.data_shards.shards import Block, decode_block


def decode_member(key: str, data: bytes) -> Block | list[str] | None:
    """A handler for `.decode()`: Block for "block", passage ids for "ids", None (not ours) for anything else.

    Raises:
        DataError: a block that does not match its own checksum.
    """
    extension = key.rsplit(".", 1)[-1]
    if extension == "block":
        return decode_block(data)
    if extension == "ids":
        return data.decode("utf-8").split("\n")
    return None


def split_blocks(blocks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One dict a sample: __key__, passage_id, has_next, and a Text (token ids, word starts) for each text it has."""
    for member in blocks:
        block: Block = member["block"]
        for i, passage_id in enumerate(member["ids"]):
            texts = {name: block.text(name, i) for name in block.fields}
            yield {
                "__key__": f"{member['__key__']}/{i:05d}",
                "passage_id": passage_id,
                "has_next": bool(block.has_next[i]),
                **{name: text for name, text in texts.items() if len(text.token_ids)},
            }
