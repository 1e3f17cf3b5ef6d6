"""The package makes no tensor of the dtype or on the device that a caller has set as default."""

from __future__ import annotations

import ast
from pathlib import Path

import steppo_kernels

_PACKAGE = Path(steppo_kernels.__file__).parent
_FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
_FACTORIES |= {"randperm", "scalar_tensor", "tensor", "zeros"}
# They make integers if nothing else is said.
_OF_INTEGERS = {"arange", "randint", "randperm"}
# What runs in a process of its own, whose defaults are those of torch.
_PROGRAMS = {"cli", "demo"}
# The dtype that torch finds is looked at.
_FINDS_DTYPE = {"layout/integers.py"}


def test_factories_of_torch_are_told_dtype_and_device():
    lacking, seen = [], 0
    for path in _PACKAGE.rglob("*.py"):
        where = path.relative_to(_PACKAGE).as_posix()
        if where.split("/")[0] in _PROGRAMS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, owner = node.func.attr, node.func.value
            if name not in _FACTORIES or not isinstance(owner, ast.Name) or owner.id != "torch":
                continue
            seen += 1
            wanted = {"device"}
            if name not in _OF_INTEGERS and where not in _FINDS_DTYPE:
                wanted.add("dtype")
            if missing := wanted - {keyword.arg for keyword in node.keywords}:
                lacking.append(f"{where}:{node.lineno}: {ast.unparse(node)} without {missing}")
    assert not lacking, "\n".join(lacking)
    assert seen > 50
