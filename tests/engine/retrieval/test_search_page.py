"""The search page as a browser, a script and a terminal see it: escaped, for this machine only, readable on a phone."""

import dataclasses
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import quote

import pytest
import uvicorn

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.bm25 import bm25_finder
from quincunx.engine.retrieval.collection import make_collection
from quincunx.engine.retrieval.search_page import make_app, search_on_terminal, serve_page

PASSAGES = {
    "tides": "The moon pulls the sea towards it, and so the tide rises twice a day. " + "Harbours wait for it. " * 40,
    "<b>evil</b>": 'A tide of <script>alert(1)</script> & "quotes" in a passage.',
    "volcano": "Lava flows from a volcano when pressure below grows.",
}


@pytest.fixture(scope="module")
def finder():
    return bm25_finder(make_collection(PASSAGES, PASSAGES.values(), "three <passages>"), 1.5, 0.75)


@pytest.fixture(scope="module")
def address(finder):
    server = uvicorn.Server(uvicorn.Config(make_app(finder, 10), log_level="warning"))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def get(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode("utf-8"), answer.headers


def test_the_page_shows_the_passages_found_with_their_scores_escaped(address):
    content, headers = get(f"{address}/?q=tide+%3Ci%3E&k=5")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "2 passages in" in content and "volcano" not in content
    assert "BM25 (k1 1.5, b 0.75)" in content and "three &lt;passages&gt;, 3 passages" in content
    assert "&lt;b&gt;evil&lt;/b&gt;" in content and "&lt;<mark>" not in content
    assert "<script" not in content and "<b>" not in content and 'value="tide &lt;i&gt;"' in content
    assert "<mark>tide</mark>" in content and "<details>" in content
    assert "http://" not in content and "https://" not in content and "src=" not in content, "an asset from elsewhere"


def test_the_page_without_a_query_is_a_text_box(address):
    content, headers = get(address)
    assert "autofocus" in content and "<ol>" not in content
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_the_api_answers_what_the_page_shows(address, finder):
    content, headers = get(f"{address}/api?q=tide&k=1")
    answer = json.loads(content)
    assert headers["Content-Type"].startswith("application/json")
    assert {name: answer[name] for name in ("query", "model", "collection", "index")} == {
        "query": "tide",
        "model": "BM25 (k1 1.5, b 0.75)",
        "collection": "three <passages>",
        "index": "bm25",
    }
    (result,) = answer["results"]
    scores, rows = finder.find(["tide"], 1)
    assert (result["rank"], result["id"]) == (1, list(PASSAGES)[rows[0, 0]])
    assert result["score"] == pytest.approx(float(scores[0, 0])) and result["text"] == PASSAGES[result["id"]]
    assert answer["seconds"] > 0
    assert json.loads(get(f"{address}/api?q=nothingofthesort")[0])["results"] == []


@pytest.mark.parametrize("query", ["q=", "q=%00%ff", "q=" + quote("潮 tide \ud83c\udf0a", errors="ignore")])
def test_odd_requests_are_answered(address, query):
    content, _ = get(f"{address}/?{query}")
    assert content.endswith("</html>")


def test_another_host_another_path_and_a_number_out_of_range_are_refused(address):
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    connection.request("GET", "/api?q=tide", headers={"Host": "evil.example:80"})
    assert connection.getresponse().status == 400
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{address}/etc/passwd")
    with pytest.raises(urllib.error.HTTPError, match="422"):
        get(f"{address}/?q=tide&k=101")


def test_a_port_that_is_taken_is_refused_in_one_sentence(address, finder):
    port = int(address.rpartition(":")[2])
    with pytest.raises(SettingsError, match=rf"cannot bind 127\.0\.0\.1:{port} .*choose another --page"):
        serve_page(finder, port, 10)


def test_the_terminal_survives_bytes_that_are_no_text_and_passes_no_escape_sequence_on(monkeypatch, capsys):
    finder = bm25_finder(make_collection(["red"], ["\x1b[31mred\x1b[0m tide"], "one"), 1.5, 0.75)
    asked, lines = [], iter([b"tide \xff\xfe".decode("utf-8", "surrogateescape"), ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))

    def find(queries, depth):
        asked.extend(queries)
        return finder.find(queries, depth)

    search_on_terminal(dataclasses.replace(finder, find=find), 2)
    shown = capsys.readouterr().out
    assert asked == ["tide \ufffd\ufffd"]  # a tokenizer takes no half surrogates
    assert "red" in shown and "1 passages in" in shown and "\x1b" not in shown


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
def test_chromium_renders_the_results_and_runs_no_script_of_a_passage(address, tmp_path):
    command = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", "--dump-dom", f"{address}/?q=tide&k=5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("<article>") == 2 and done.stdout.count("<mark>tide</mark>") >= 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in done.stdout.replace("<mark>", "").replace("</mark>", "")
