import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.sentence_folder import folder_written_whole


def write_half(folder):
    with folder_written_whole(folder) as staging:
        (staging / "weights").write_text("half")
        raise ZeroDivisionError


def test_a_folder_takes_its_place_whole_or_the_old_one_stays(tmp_path):
    for content in ("old", "new"):
        with folder_written_whole(tmp_path / "model") as folder:
            (folder / "weights").write_text(content)
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be written"), folder_written_whole(tmp_path / "file" / "model"):
        raise AssertionError
