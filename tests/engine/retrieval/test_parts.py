"""Parts over ranks, through files only; ranks are threads here and real processes in tests/launchers/test_score.py."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.environment import Environment
from quincunx.engine.retrieval.files import write_manifest
from quincunx.engine.retrieval.parts import cut_rows, is_made, is_planned, making, part_is_done, run_parts


def place(rank=0, world_size=1):
    return Environment(
        launcher="python", rank=rank, world_size=world_size, local_rank=rank, master_addr="", master_port=0
    )


def rows_of(part):
    return np.arange(part.start, part.stop, dtype=np.float32)


def whole(files):
    return np.concatenate([np.load(file) for file in files])


@pytest.mark.parametrize("world_size", [1, 3, 9])
def test_any_number_of_ranks_makes_the_same_whole(tmp_path, world_size):
    parts = cut_rows(23, 5)
    assert [part.rows for part in parts] == [5, 5, 5, 5, 3]

    def one_rank(rank):
        return run_parts(tmp_path / "p", parts, rows_of, {"model": "m"}, place(rank, world_size))

    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(one_rank, range(world_size)))
    np.testing.assert_array_equal(whole(results[0]), np.arange(23))
    assert results[1:] == [None] * (world_size - 1)


def test_only_what_is_missing_or_damaged_is_made_again(tmp_path):
    parts = cut_rows(20, 4)
    made = []

    def make(part):
        made.append(part.number)
        return rows_of(part)

    run_parts(tmp_path, parts, make, {}, place())
    (tmp_path / "part-00001.npy").unlink()
    (tmp_path / "part-00002.json").unlink()
    damaged = tmp_path / "part-00004.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    assert [part_is_done(tmp_path, part) for part in parts] == [True, False, False, True, False]
    made.clear()
    np.testing.assert_array_equal(whole(run_parts(tmp_path, parts, make, {}, place())), np.arange(20))
    assert made == [1, 2, 4]


def test_parts_of_other_work_are_refused_and_kept(tmp_path):
    parts = cut_rows(8, 4)
    run_parts(tmp_path, parts, rows_of, {"model": "a", "depth": 3}, place())
    with pytest.raises(DataError, match=r"holds parts of other work \(differs in model\)"):
        run_parts(tmp_path, parts, rows_of, {"model": "b", "depth": 3}, place())
    with pytest.raises(DataError, match="differs in how its rows are cut"):
        run_parts(tmp_path, cut_rows(8, 2), rows_of, {"model": "a", "depth": 3}, place())
    assert is_planned(tmp_path, parts, {"model": "a", "depth": 3})
    assert not is_planned(tmp_path, parts, {"model": "b", "depth": 3})
    assert all(part_is_done(tmp_path, part) for part in parts)


def test_a_folder_of_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "manifest.json").write_text("somebody's")
    with pytest.raises(DataError, match=r"holds other files \(such as manifest.json\)"):
        run_parts(tmp_path, cut_rows(4, 2), rows_of, {}, place())
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_stage_begins_once_and_says_so_where_it_cannot(tmp_path):
    output = tmp_path / "out"
    with making(output, "run", {"depth": 1}) as missing:
        assert missing
        output.write_text("mine")
    assert (tmp_path / ".out.begun").exists()  # a kill has cut off the manifest
    with making(output, "run", {"depth": 1}) as missing:
        assert missing
        write_manifest(output, "run", {}, {"depth": 1})
    with making(output, "run", {"depth": 1}) as missing:
        assert not missing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.manifest.json"]
    for bad in (output / "below", tmp_path / ("x" * 250)):
        with pytest.raises(SettingsError, match="cannot be written"), making(bad, "run", {}):
            raise AssertionError


def test_rank_0_says_whose_parts_do_not_come(tmp_path):
    with pytest.raises(DataError, match=r"2 of 4 parts are missing from .* \(of ranks \[1\]\)"):
        run_parts(tmp_path, cut_rows(8, 2), rows_of, {}, place(0, 2), patience_seconds=0.5)


def test_a_part_with_another_number_of_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="came out with 1 rows instead of 2"):
        run_parts(tmp_path, cut_rows(8, 2), lambda part: rows_of(part)[:1], {}, place())
    parts = cut_rows(4, 2)
    run_parts(tmp_path / "other", parts, rows_of, {}, place())
    np.save(tmp_path / "other" / "part-00001.npy", np.zeros(3, np.float32))
    with pytest.raises(DataError, match=r"1 of 2 parts are missing"):
        run_parts(tmp_path / "other", parts, rows_of, {}, place(0, 2), patience_seconds=0.3)


def test_a_rank_that_comes_when_all_is_finished_begins_nothing(tmp_path):
    def never(part):
        raise AssertionError(part)

    assert run_parts(tmp_path / "p", cut_rows(8, 2), never, {}, place(1, 2), is_finished=lambda: True) is None
    assert not (tmp_path / "p").exists()


def test_an_output_is_made_only_by_the_same_inputs_and_settings(tmp_path):
    output = tmp_path / "out"
    assert not is_made(output, "run", {"depth": 1})
    output.write_text("mine")
    with pytest.raises(DataError, match="is there already, without a manifest"):
        is_made(output, "run", {"depth": 1})
    assert not is_made(output, "run", {"depth": 1}, begun=True)
    write_manifest(output, "run", {}, {"depth": 1, "counts": 7})
    assert is_made(output, "run", {"depth": 1})
    with pytest.raises(DataError, match=r"was made otherwise \(differs in depth\)"):
        is_made(output, "run", {"depth": 2})
    output.write_text("changed")
    with pytest.raises(DataError, match="does not match"):
        is_made(output, "run", {"depth": 1})
    output.unlink()
    with pytest.raises(DataError, match="is missing, its manifest is there"):
        is_made(output, "run", {"depth": 1})
