import os
import shutil
import subprocess
import sys

import pytest

CODE = """
import sys
from torch.utils.cpp_extension import load
from quincunx.engine.compile_once import compile_once

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
