"""Remote shard sets: read by range into a bounded, digest-checked cache, from memory and from a real HTTP server."""

import http.server
import json
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest

from quincunx.data_shards import shard_files
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest
from quincunx.data_shards.verify import verify_shards

READ_ALL = """
import sys
from quincunx.data_shards.shards import open_shards
shards = open_shards(sys.argv[1], cache_dir=sys.argv[2], cache_bytes=int(sys.argv[3]))
print(sum(int(shards.read_block("train", i).token_ids.sum()) for i in range(shards.num_blocks("train"))))
"""


@pytest.fixture(scope="module")
def local_set(tmp_path_factory, tokenizer_folder, write_shard_set, random_documents) -> Path:
    folder = tmp_path_factory.mktemp("set")
    limits = {"block_samples": 64, "shard_bytes": 30_000, "num_buckets": 256}
    write_shard_set(folder, tokenizer_folder, random_documents(0, 250), **limits)
    return folder


@pytest.fixture
def memory_set(local_set):
    files = fsspec.filesystem("memory")
    files.put(str(local_set), "/bucket/set", recursive=True)
    yield "memory://bucket/set"
    files.rm("/bucket", recursive=True)


def read_all(shards) -> int:
    return sum(int(shards.read_block("train", i).token_ids.sum()) for i in range(shards.num_blocks("train")))


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def test_a_remote_set_reads_like_the_local_one_and_then_from_the_cache(local_set, memory_set, tmp_path):
    local, shards = open_shards(local_set), open_shards(memory_set, cache_dir=str(tmp_path))
    assert shards.manifest == local.manifest
    assert shards.statistics.idf.tolist() == local.statistics.idf.tolist()
    assert tokenizer_digest(load_tokenizer(shards.tokenizer_folder)) == local.manifest.tokenizer_digest
    assert shards.passage_ids("train", 2) == local.passage_ids("train", 2)
    total = read_all(shards)
    assert total == read_all(local)
    again = open_shards(memory_set, cache_dir=str(tmp_path))
    for shard in shards.manifest.shards:
        fsspec.filesystem("memory").rm(f"/bucket/set/{shard.name}")
    assert read_all(again) == total, "every block came from the cache"
    fresh = open_shards(memory_set, cache_dir=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"block 0 of shard train-00000-000.tar in memory://bucket/set is missing"):
        fresh.read_block("train", 0)


def test_the_cache_keeps_its_bound_and_the_blocks_used_last(memory_set, tmp_path):
    block_bytes = max(b.size for s in open_shards(memory_set, str(tmp_path / "x")).manifest.shards for b in s.blocks)
    bound = 5 * (block_bytes + 512)
    shards = open_shards(memory_set, cache_dir=str(tmp_path / "cache"), cache_bytes=bound, block_cache_bytes=1)
    assert shards.num_blocks("train") > 10
    for index in range(shards.num_blocks("train")):
        shards.read_block("train", 0)  # used all the time, so never the least recently used
        shards.read_block("train", index)
        assert cached_bytes(tmp_path / "cache") <= bound
    cached = {path.name for path in (tmp_path / "cache").iterdir()}
    entries = [block for shard in shards.manifest.shards for block in shard.blocks]
    assert f"{entries[0].digest}-{entries[0].size + 512}" in cached
    assert f"{entries[1].digest}-{entries[1].size + 512}" not in cached


def test_a_damaged_cache_file_is_fetched_again_and_a_damaged_remote_block_is_refused(memory_set, tmp_path):
    shards = open_shards(memory_set, cache_dir=str(tmp_path), block_cache_bytes=1)
    entry = shards.manifest.shards[0].blocks[1]
    expected = shards.read_block("train", 1).token_ids.tolist()
    cached = tmp_path / f"{entry.digest}-{entry.size + 512}"
    cached.write_bytes(b"x" * (entry.size + 512))
    shards.read_block("train", 0)
    assert shards.read_block("train", 1).token_ids.tolist() == expected
    files = fsspec.filesystem("memory")
    path = f"/bucket/set/{shards.manifest.shards[0].name}"
    data = bytearray(files.cat_file(path))
    data[entry.offset + 100] ^= 1
    files.pipe_file(path, bytes(data))
    cached.unlink()
    shards.read_block("train", 0)
    with pytest.raises(
        DataError, match=r"block 1 of shard train-00000-000.tar in memory://.* does not match its digest"
    ):
        shards.read_block("train", 1)
    with pytest.raises(DataError, match=r"is damaged in train-00000-000\.tar: copy"):
        verify_shards(memory_set)


def test_a_disk_without_room_for_another_file_costs_the_cache_and_not_the_run(local_set, memory_set, small_disk):
    tmp_path = small_disk("size=20m,nr_inodes=12")  # files, and folders
    shards = open_shards(memory_set, cache_dir=str(tmp_path), block_cache_bytes=1)
    assert read_all(shards) == read_all(open_shards(local_set))
    with pytest.raises(OSError, match="No space left"):
        (tmp_path / "another").touch()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class RangeHandler(QuietHandler):
    """Serves byte ranges, as every object store does; Python's own handler does not."""

    served = 0

    def do_GET(self):
        if (wanted := self.headers.get("Range")) is None:
            return super().do_GET()
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()[first : last + 1]
        type(self).served += len(data)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(params=[RangeHandler, QuietHandler], ids=["with_ranges", "without_ranges"])
def url(request, local_set):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(local_set)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_processes_share_one_cache_over_http(url, local_set, tmp_path):
    bound = 60_000  # less than the set, so that they also evict each other's blocks
    command = [sys.executable, "-c", READ_ALL, url, str(tmp_path / "cache"), str(bound)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert {int(output) for output in outputs} == {read_all(open_shards(local_set))}
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.parametrize("url", [RangeHandler], indirect=True)
def test_only_the_blocks_that_are_read_travel(url, tmp_path):
    shards = open_shards(url, cache_dir=str(tmp_path))
    RangeHandler.served = 0
    shards.read_block("train", 3)
    shards.read_block("train", 3)
    sizes = [block.size + 512 for shard in shards.manifest.shards for block in shard.blocks]
    assert RangeHandler.served == sizes[3]


def test_an_unreachable_or_unknown_remote_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files.time, "sleep", lambda seconds: None)
    refusal = r"http://127\.0\.0\.1:9/set/manifest\.json cannot be read after 3 attempts .*: check the address and"
    with pytest.raises(DataError, match=refusal):
        open_shards("http://127.0.0.1:9/set", cache_dir=str(tmp_path))
    with pytest.raises(DataError, match=refusal):
        verify_shards("http://127.0.0.1:9/set")
    with pytest.raises(SettingsError, match="nosuch://bucket cannot be opened"):
        open_shards("nosuch://bucket", cache_dir=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cache_dir .* cannot be made"):
        open_shards("memory://x", cache_dir=str(tmp_path / "file"))


def test_a_file_url_is_the_folder_itself(local_set):
    shards = open_shards(f"file://{local_set}")
    assert json.loads((local_set / "manifest.json").read_text())["dataset_id"] == shards.manifest.dataset_id
    assert shards.tokenizer_folder == str(local_set / "tokenizer")
