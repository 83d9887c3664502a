"""Errors of a user end a launcher with one sentence and a code; ours keep their traceback."""

import pytest

from quincunx.data_shards.errors import CheckpointError, DataError, SettingsError, exit_with_one_sentence


@pytest.mark.parametrize(("kind", "code"), [(SettingsError, 2), (DataError, 3), (CheckpointError, 4)])
def test_a_users_error_is_one_sentence_and_its_code(kind, code, capsys):
    def main():
        raise kind("give another")

    with pytest.raises(SystemExit) as ended:
        exit_with_one_sentence(main)
    assert ended.value.code == code and capsys.readouterr().err == "error: give another\n"


def test_other_errors_keep_their_traceback():
    def main():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        exit_with_one_sentence(main)


def test_the_code_that_main_returns_is_the_exit_code():
    for returned, code in ((None, 0), (0, 0), (75, 75)):
        with pytest.raises(SystemExit) as ended:
            exit_with_one_sentence(lambda returned=returned: returned)
        assert ended.value.code == code
