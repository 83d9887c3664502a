import os
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from quincunx.engine.training import learning_rate_at, parameter_groups

CODE = """
import sys
from torch.utils.cpp_extension import load
from quincunx.engine.training import compile_once

class Builder:
    name = "tiny_operator"
    def load(self, verbose):
        module = load(name=self.name, sources=[sys.argv[1]], verbose=verbose)
        print(module.twice(21), flush=True)

compile_once(Builder(), is_main=True)
"""
SOURCE = """
#include <Python.h>
static PyObject* twice(PyObject*, PyObject* number) { return PyLong_FromLong(2 * PyLong_AsLong(number)); }
static PyMethodDef methods[] = {{"twice", twice, METH_O, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny_operator", "", -1, methods};
PyMODINIT_FUNC PyInit_tiny_operator() { return PyModule_Create(&module); }
"""


def test_the_rate_rises_linearly_and_falls_linearly_to_almost_nothing():
    rates = [learning_rate_at(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    falls = [a - b for a, b in pairwise(rates[10:])]
    assert falls == pytest.approx([1 / 90] * 89)
    assert max(rates) == 1.0 and rates[99] == pytest.approx(1 / 90) and min(rates) > 0


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert learning_rate_at(0, 10, 3e-4, 0.0) == 3e-4
    assert learning_rate_at(9, 10, 3e-4, 1.0) == 3e-4


def test_biases_and_norm_scales_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    decaying, others = parameter_groups(model, 0.01)
    assert decaying["weight_decay"] == 0.01 and others["weight_decay"] == 0.0
    assert [p.ndim for p in decaying["params"]] == [2, 2] and [p.ndim for p in others["params"]] == [1, 1, 1]


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("ninja") is None, reason="no C++ compiler or ninja")
def test_the_mark_of_a_killed_compilation_hangs_nobody(tmp_path):
    source, folder = tmp_path / "tiny.cpp", tmp_path / "extensions"
    source.write_text(SOURCE)
    (folder / "tiny_operator").mkdir(parents=True)
    (folder / "tiny_operator" / "lock").write_text("")
    variables = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", CODE, str(source)], env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [run.communicate(timeout=200)[0] for run in runs] == ["42\n", "42\n"]
    assert not (folder / "tiny_operator" / "lock").exists()
