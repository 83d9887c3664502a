"""GLUE's own layouts and their faults, constant predictions, and the file of predictions."""

import json

import numpy as np
import pytest

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.setting import find_problems
from quincunx.engine.retrieval.glue import (
    TASKS,
    GlueSettings,
    find_files,
    measure,
    read_examples,
    write_predictions,
)

COLA = 'gj04\t1\t\tThe boy "ran.\ngj04\t0\t*\tRan boy the .\n'
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said \"no.\tNo, he said.\n0\t9\t10\tA'b\tC\n"
STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tmain\tf\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000\n1\tmain\tf\t2012\t2\tnone\tnone\tA.\tB.\t0.25\n"
)
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow come?\t1\n4\t5\t6\tWho?\tWhen?\t0\n"
TESTS = {
    "cola": "index\tsentence\n0\tBill ran .\n",
    "mrpc": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tA b\tC d\n",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
    "0\tm\tf\t1\t2\tn\tn\tA b\tC d\n",
    "qqp": "id\tquestion1\tquestion2\n0\tA b\tC d\n",
}


def written(tmp_path, text, name="train.tsv"):
    (tmp_path / name).write_bytes(text.encode())
    return tmp_path / name


def refusal(task, path, split="train", **arguments):
    with pytest.raises(DataError) as caught:
        read_examples(task, path, split, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_each_layout_gives_its_sentences_and_labels_with_quotation_marks_kept(tmp_path):
    cola = read_examples("cola", written(tmp_path, COLA), "dev")
    assert cola.sentences == [['The boy "ran.', "Ran boy the ."]]
    assert cola.labels.tolist() == [1, 0] and cola.labels.dtype == np.int64
    mrpc = read_examples(
        "mrpc", written(tmp_path, "\ufeff" + MRPC.replace("\n", "\r\n"), "msr_paraphrase_train.txt"), "train"
    )
    assert mrpc.sentences == [['He said "no.', "A'b"], ["No, he said.", "C"]]
    assert mrpc.labels.tolist() == [1, 0]
    for layout in (STSB, "\n".join(line.partition("\t")[2] for line in STSB.splitlines())):  # with and without index
        stsb = read_examples("stsb", written(tmp_path, layout), "train")
        assert stsb.sentences == [["A plane.", "A."], ["An air plane.", "B."]]
        assert stsb.labels.tolist() == [5.0, 0.25] and stsb.labels.dtype == np.float32
    qqp = read_examples("qqp", written(tmp_path, QQP), "train")
    assert qqp.sentences == [["Why?", "Who?"], ["How come?", "When?"]] and qqp.labels.tolist() == [1, 0]


@pytest.mark.parametrize("task", TASKS)
def test_test_files_have_no_labels(task, tmp_path):
    examples = read_examples(task, written(tmp_path, TESTS[task], "test.tsv"), "test")
    assert examples.labels is None
    assert examples.sentences == ([["Bill ran ."]] if task == "cola" else [["A b"], ["C d"]])
    if task != "cola":
        assert "has no column " + TASKS[task].label in refusal(task, tmp_path / "test.tsv", "dev")
    else:
        assert "test.tsv:1: 2 tab-separated columns where CoLA has 4" in refusal(task, tmp_path / "test.tsv", "dev")


def test_a_test_file_in_another_order_than_its_index_is_refused(tmp_path):
    path = written(tmp_path, "index\tsentence\n0\tgood\n2\tbad\n", "test.tsv")
    assert "test.tsv:3: the index is '2' where 1 comes next" in refusal("cola", path, "test")


def test_jsonl_carries_any_task(tmp_path):
    rows = [{"sentence1": " a", "sentence2": "b\tc", "label": 3.5}, {"sentence1": "d", "sentence2": "e", "label": "1"}]
    path = written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "train.jsonl")
    pairs = read_examples("stsb", path, "train")
    assert pairs.sentences == [["a", "d"], ["b\tc", "e"]] and pairs.labels.tolist() == [3.5, 1.0]
    path = written(tmp_path, '{"sentence1": "a", "label": 1}\n\n{"sentence1": "b", "label": 0}\n', "dev.jsonl")
    assert read_examples("cola", path, "dev").labels.tolist() == [1, 0]
    assert "dev.jsonl:1: sentence2 is NoneType, a string is needed" in refusal("mrpc", path)
    path = written(tmp_path, '{"sentence1": "a", "sentence2": "b", "label": 1}\n', "dev.jsonl")
    assert "dev.jsonl:1: a sentence2, and CoLA reads one sentence" in refusal("cola", path)
    assert "dev.jsonl:1: not JSON" in refusal("cola", written(tmp_path, "{\n", "dev.jsonl"))


@pytest.mark.parametrize(
    ("task", "text", "clause"),
    [
        ("mrpc", MRPC + "2\t1\t2\ta\tb\n", ":4: the label is '2', MRPC's are 0 and 1"),
        ("mrpc", MRPC + "\t1\t2\ta\tb\n", ":4: the label is '', MRPC's are 0 and 1"),
        ("qqp", QQP + "1\t2\t3\ta\tb\t0.5\n", ":4: the label is '0.5', QQP's are 0 and 1"),
        ("cola", COLA + "x\tyes\t\ta\n", ":3: the label is 'yes', CoLA's are 0 and 1"),
        ("stsb", STSB.replace("0.25", "5.25"), ":3: the label is '5.25', STS-B's are numbers from 0 to 5"),
        ("stsb", STSB.replace("0.25", "nan"), ":3: the label is 'nan', STS-B's are numbers from 0 to 5"),
        ("qqp", QQP + "1\t2\t3\ta\tb\n", ":4: 5 tab-separated columns where QQP has 6 (id, qid1, qid2"),
        ("mrpc", MRPC + "alone\n", ":4: 1 tab-separated columns where MRPC has 5"),
        ("mrpc", QQP, ":1: the header has no column #1 String nor #2 String nor Quality: give a train file of MRPC"),
        ("mrpc", MRPC.splitlines()[0] + "\n", "holds no examples"),
        ("mrpc", "", "holds no examples"),
        ("mrpc", MRPC.replace("\n0\t", "\n1\t"), "all 2 labels of "),
        ("stsb", STSB.replace("0.25", "5"), "STS-B's are numbers from 0 to 5: give a file with different ones"),
    ],
)  # fmt: skip
def test_wrong_labels_and_columns_are_one_sentence_with_file_and_line(task, text, clause, tmp_path):
    assert clause in refusal(task, written(tmp_path, text))


def test_a_jsonl_label_that_is_no_number_of_the_task_is_refused(tmp_path):
    for value in (True, None, [1], "x", 2):
        row = json.dumps({"sentence1": "a", "sentence2": "b", "label": value})
        assert "train.jsonl:1: the label is" in refusal("qqp", written(tmp_path, row + "\n", "train.jsonl"))


def test_broken_rows_are_left_out_only_on_demand_counted_and_never_of_a_test_file(tmp_path):
    broken = QQP + "7\t8\t9\tA question with\na line break\tB?\t1\n"
    path = written(tmp_path, broken)
    assert ":4: 4 tab-separated columns where QQP has 6" in refusal("qqp", path) and "--skip_broken_rows" in refusal(
        "qqp", path
    )
    examples = read_examples("qqp", path, "train", skip_broken=True)
    assert examples.labels.tolist() == [1, 0] and examples.num_broken == 2
    path = written(tmp_path, TESTS["qqp"] + "1\ta\n", "test.tsv")
    assert ":3: 2 tab-separated columns where QQP has 3" in refusal("qqp", path, "test", skip_broken=True)


def test_files_are_found_in_the_folder_or_as_given(tmp_path):
    data = str(tmp_path)
    assert "data is not given" in find_problems(GlueSettings())[0]
    assert "data absent is not a folder" in find_problems(GlueSettings(data="absent"))[0]
    with pytest.raises(
        DataError, match=r"there is no train file \(.*train.tsv nor .*train.jsonl\): give --data a folder"
    ):
        find_files(GlueSettings(data=data))
    train, dev = written(tmp_path, MRPC, "train.tsv"), written(tmp_path, "", "dev.jsonl")
    assert find_files(GlueSettings(data=data)) == {"train": train, "dev": dev}
    other = written(tmp_path, MRPC, "other.txt")
    assert find_files(GlueSettings(data=data, dev=str(other)))["dev"] == other
    assert find_files(GlueSettings(train=str(train), dev=str(other))) == {"train": train, "dev": other}
    with pytest.raises(DataError, match="there is no test file"):
        find_files(GlueSettings(data=data, test=str(tmp_path / "absent.tsv")))


def test_a_model_that_always_says_the_same_has_no_correlation_and_no_warning(recwarn):
    labels = np.array([0, 1, 1], np.int64)
    same = np.tile(np.array([1.0, 0.0], np.float32), (3, 1))
    assert measure("cola", same, labels) == {"mcc": 0.0}
    assert measure("qqp", same, labels) == {"accuracy": pytest.approx(1 / 3), "f1": 0.0}
    assert measure("stsb", np.ones(3, np.float32), labels.astype(np.float32)) == {"pearson": 0.0, "spearman": 0.0}
    assert not list(recwarn)


def test_predictions_are_written_as_glue_takes_them(tmp_path):
    path = tmp_path / "MRPC.tsv"
    write_predictions(path, "mrpc", np.array([[0.2, 0.1], [-1, 3]], np.float32))
    assert path.read_text() == "index\tprediction\n0\t0\n1\t1\n"
    write_predictions(path, "stsb", np.array([-0.2, 5.01, 3.14159], np.float32))
    assert path.read_text() == "index\tprediction\n0\t0.000\n1\t5.000\n2\t3.142\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["MRPC.tsv"]
