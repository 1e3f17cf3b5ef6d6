"""What Python hands to compiled code: launchers write the fields of the records, in their order."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import steppo_kernels
from steppo_kernels import StepLayout, config, outputs
from steppo_kernels.backends import choice, records
from steppo_kernels.backends.compiled import kept_head, launch
from steppo_kernels.backends.modules import module_of
from steppo_kernels.layout.step_layout import require_layout
from steppo_kernels.log_probs.kept_sets import PART, KeptSets

_CSRC = Path(__file__).parents[2] / "csrc/include/steppo"
_PACKAGE = Path(steppo_kernels.__file__).parent
_LAUNCHERS = [
    path.stem
    for path in sorted((_PACKAGE / "backends/compiled").glob("[!_]*.py"))
    if path.stem not in ("launch", "place")
]

_WHY_NOT = choice.why_not_cpu() or choice.why_not_cuda()
pytestmark = pytest.mark.skipif(_WHY_NOT is not None, reason=f"not all modules: {_WHY_NOT}")
# One launcher serves both modules, and what both have is of one source.
_MODULES = [] if _WHY_NOT else [module_of("cuda"), module_of("cpu")]


kernels = SimpleNamespace(
    **{name: getattr(module, name) for module in _MODULES for name in module.operators},
    operators={name: value for module in _MODULES for name, value in module.operators.items()},
    records={name: value for module in _MODULES for name, value in module.records.items()},
)

_OF_ROWS = "logits, places, rows, temperatures, temperature, softcap"
# Records that a launcher hands on as they are. Tests below hold each to what it is made of.
_WHOLE = {
    ("kept_directions", f"kept_rows({_OF_ROWS})"): "KeptRows",
    ("kept_directions", "held.fields"): "Sets",
    ("kept_hidden_gradient", "held.fields"): "Sets",
    ("kept_log_probs", "held.fields"): "Sets",
    ("kept_log_probs_backward", "held.fields"): "Sets",
    ("kept_logits", "held.fields"): "Sets",
    ("kept_logits", "index"): "IdIndex",
    ("kept_weight_gradient", "held.fields"): "IdIndex",
    ("policy_loss", "held.fields"): "Steps",
    ("policy_loss", "config"): "PolicyConfig",
    ("policy_loss_masked", "config"): "PolicyConfig",
    ("step_gae", "held.fields"): "Timeline",
    ("value_loss", "record(States, states).fields"): "States",
    ("value_loss", "config"): "ValueConfig",
}

# The fields that are numbers which may not be given.
_NUMBERS = ("ratio_center", "normalizer")

Fields = tuple[str, ...]


def tree_of(launcher: str) -> ast.Module:
    return ast.parse((_PACKAGE / f"backends/compiled/{launcher}.py").read_text())


def written(tree: ast.Module) -> dict[str, list[Fields | str]]:
    """Return what a module hands to each operator: the names in its records.

    Of a record that is handed on as it is, that is its source.
    """
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found: dict[str, list[Fields | str]] = {}
    for function in functions.values():
        for call in calls(function):
            name = call.func.attr
            if ast.unparse(call.func) == f"native.kernels.{name}" and name in kernels.operators:
                assert name not in found, f"{name} is called twice"
                assert not call.keywords
                found[name] = [record(value, function, functions) for value in call.args]
    return found


def calls(inside: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls of methods and of functions of modules."""
    for node in ast.walk(inside):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


def record(
    value: ast.expr, inside: ast.FunctionDef, functions: dict[str, ast.FunctionDef]
) -> Fields | str:
    """Return the names in a tuple, wherever in the module it is made."""
    if isinstance(value, ast.Tuple):
        return tuple(name for entry in value.elts for name in names(entry, inside))
    if isinstance(value, ast.Name) and (made := assigned(value.id, inside)):
        return record(made, inside, functions)
    if isinstance(value, ast.Call) and ast.unparse(value.func) in functions:
        maker = functions[ast.unparse(value.func)]
        (last,) = [node.value for node in ast.walk(maker) if isinstance(node, ast.Return)]
        return record(last, maker, functions)
    return ast.unparse(value)


def assigned(name: str, inside: ast.FunctionDef) -> ast.expr | None:
    """Return what a function assigns to a name, None if that is nothing."""
    made = [
        node.value
        for node in ast.walk(inside)
        if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == [name]
    ]
    assert len(made) <= 1, f"{name} is made more than once"
    return made[0] if made else None


def names(entry: ast.expr, inside: ast.FunctionDef) -> list[str]:
    """Return the names of an entry of a record."""
    if isinstance(entry, ast.Name):
        return [entry.id]
    if isinstance(entry, ast.Starred) and isinstance(entry.value, ast.Name):
        made = assigned(entry.value.id, inside)
        assert isinstance(made, ast.Tuple), ast.unparse(entry)
        return [name for tensor in made.elts for name in names(tensor, inside)]
    if isinstance(entry, ast.Starred):
        assert ast.unparse(entry.value.func) == "addresses", ast.unparse(entry)
        return [name for tensor in entry.value.args for name in names(tensor, inside)]
    if isinstance(entry, ast.Subscript) and ast.unparse(entry.value) == "DTYPES":
        return ["dtype"]
    if isinstance(entry, ast.Call) and ast.unparse(entry.func) in ("start", "bool", "number"):
        # The address of a tensor that may be strided, a number as a switch, and one in a tensor.
        return names(entry.args[0], inside)
    raise AssertionError(f"a record has the entry {ast.unparse(entry)}, expected a name")


def differences(tree: ast.Module) -> list[str]:
    """Return where a module does not write the records of its operators."""
    found = []
    for operator, given in written(tree).items():
        expected = kernels.operators[operator]
        if len(given) != len(expected):
            found.append(f"{operator}: got {len(given)} records, expected {expected}")
        for name, fields in zip(expected, given, strict=False):
            wanted = kernels.records[name]
            if isinstance(fields, str) and fields.startswith("native.place("):
                fields = kernels.records["Place"]
            elif isinstance(fields, str):
                fields = kernels.records[_WHOLE[operator, fields]]
            if fields != wanted:
                found.append(f"{operator}: {name} is {fields}, expected {wanted}")
    return found


@pytest.mark.parametrize("launcher", _LAUNCHERS)
def test_launchers_write_the_fields_of_the_records(launcher):
    assert differences(tree_of(launcher)) == []


def test_every_operator_is_launched():
    launched = [name for launcher in _LAUNCHERS for name in written(tree_of(launcher))]
    assert sorted(launched) == sorted(kernels.operators)


def swapped(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Yield the module with two neighbours of a record exchanged, for all that there are."""
    nodes = list(ast.walk(tree))
    parts = {ast.unparse(node.value) for node in nodes if isinstance(node, ast.Starred)}
    made = [
        n.value for n in nodes if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in parts
    ]
    for place, node in enumerate(nodes):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "addresses":
            entries = node.args
        elif isinstance(node, ast.Tuple) and (
            node in made or any(isinstance(entry, ast.Starred) for entry in node.elts)
        ):
            entries = node.elts
        else:
            continue
        for at in range(len(entries) - 1):
            other = copy.deepcopy(tree)
            own = list(ast.walk(other))[place]
            own = own.args if isinstance(own, ast.Call) else own.elts
            own[at], own[at + 1] = own[at + 1], own[at]
            yield f"{ast.unparse(own[at])}, {ast.unparse(own[at + 1])}", other


@pytest.mark.parametrize("launcher", _LAUNCHERS)
def test_two_fields_that_are_exchanged_are_found(launcher):
    """The test of the test."""
    places = list(swapped(tree_of(launcher)))
    assert len(places) >= 2
    for pair, tree in places:
        assert len(differences(tree)) >= 1, f"{pair} in {launcher}"


@pytest.mark.parametrize("change", ["less", "more"])
def test_a_field_or_a_record_too_many_or_too_few_is_found(change):
    tree = tree_of("gae")
    (call,) = [call for call in calls(tree) if ast.unparse(call.func) == "native.kernels.step_gae"]
    call.args = call.args[:-1] if change == "less" else [*call.args, call.args[-1]]
    assert "records, expected" in differences(tree)[0]
    tree = tree_of("gae")
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Tuple)]
    (entries,) = [node for node in made if any(isinstance(x, ast.Subscript) for x in node.elts)]
    entries.elts = entries.elts[:-1] if change == "less" else [*entries.elts, entries.elts[1]]
    assert "GaeTensors is" in differences(tree)[0]


def nothing(name: str) -> tuple[object, ...]:
    """Return a record of zeros and numbers that are not given."""
    return tuple(None if field in _NUMBERS else 0 for field in kernels.records[name])


@pytest.mark.parametrize("operator", getattr(kernels, "operators", ()))
def test_a_wrong_number_of_fields_is_refused(operator):
    """Before anything is read."""
    expected = kernels.operators[operator]
    good = [nothing(name) for name in expected]
    for place, name in enumerate(expected):
        size = len(good[place])
        for wrong in (size - 1, size + 1, 0):
            given = [*good[:place], (0,) * wrong, *good[place + 1 :]]
            with pytest.raises(ValueError, match=f"^{name}: got {wrong} fields, expected {size}$"):
                getattr(kernels, operator)(*given)
    with pytest.raises(TypeError):
        getattr(kernels, operator)(*good[:-1])


def test_entries_that_are_no_numbers_are_refused():
    size = len(kernels.records["GaeConfig"])
    good = [nothing(name) for name in kernels.operators["step_gae"]]
    for bad in (("a",) * size, (None,) * size):
        with pytest.raises(TypeError):
            kernels.step_gae(good[0], good[1], bad, good[3])
    with pytest.raises((TypeError, OverflowError)):
        kernels.step_gae((0, -1, *good[0][2:]), *good[1:])


@pytest.mark.parametrize("bad", [0, 1.5, (0,), (0, 1.5, 2), ("a", 1.5), (0, None)])
def test_a_number_is_none_or_an_address_and_a_value(bad):
    """An address alone may be one of the CPU, which a GPU cannot read."""
    record, *others = [nothing(name) for name in kernels.operators["value_loss"]]
    place = kernels.records["ValueTensors"].index("normalizer")
    with pytest.raises(TypeError):
        kernels.value_loss((*record[:place], bad, *record[place + 1 :]), *others)


def test_a_gpu_is_given_a_number_on_the_cpu_by_value():
    on_gpu = SimpleNamespace(is_cpu=False, data_ptr=lambda: 64)
    on_cpu = torch.tensor(2.5, dtype=torch.float64)
    assert launch.number(None, on_gpu) is None
    assert launch.number(on_cpu, on_gpu) == (0, 2.5)
    assert launch.number(on_gpu, on_gpu) == (64, 0.0)
    assert launch.number(on_cpu, on_cpu) == (on_cpu.data_ptr(), 0.0)


# The records that are made elsewhere.


def test_the_config_of_a_policy_loss():
    assert kernels.records["PolicyConfig"] == config.KernelConfig._fields


@pytest.mark.parametrize(("module", "name"), [("value_loss", "ValueConfig"), ("gae", "GaeConfig")])
def test_the_configs_of_other_functions(module, name):
    """The tuple of numbers that a public function hands to its operator."""
    fields = kernels.records[name]
    tree = ast.parse((_PACKAGE / f"losses/{module}.py").read_text())
    found = []
    for made in (node for node in ast.walk(tree) if isinstance(node, ast.Tuple)):
        used = [
            {node.id for node in ast.walk(number) if isinstance(node, ast.Name)} & set(fields)
            for number in made.elts
        ]
        if set().union(*used) == set(fields):
            found += [used] if all(len(own) == 1 for own in used) else []
    assert found == [[{field} for field in fields]]


def test_the_place_of_a_call(threads_restored):
    from steppo_kernels.backends.compiled import launch

    torch.set_num_threads(3)
    place = dict(
        zip(kernels.records["Place"], launch.native_of("cpu").place(torch.empty(0)), strict=True)
    )
    assert place == {"threads": 3, "workspace": 0, "device": 0, "stream": 0}


def test_the_records_of_a_layout():
    """Addresses of the tensors of these names, and sizes; each of another size."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]])
    valid = torch.tensor([True, True, True, False])
    layout = StepLayout.from_rows(mask.repeat(2, 1), [*"aabb"], [0, 1, 0, 1], valid=valid)
    held = require_layout(layout)
    sizes = {
        "num_tokens": 24,
        "num_rows": 4,
        "num_steps": layout.num_steps,
        "num_actions": layout.num_tokens,
        "num_members": layout.trajectory_steps.numel(),
        "num_trajectories": layout.num_trajectories,
    }
    for kept in (held.steps, held.timeline, held.states):
        kind = type(kept)
        fields = dict(zip(kernels.records[kind.__name__], kept.fields, strict=True))
        tensors = [name for name in fields if name not in sizes]
        # An operator's schema has them as a list, in this order.
        assert tuple(tensors) == kind._fields
        for name, value in fields.items():
            wanted = sizes[name] if name in sizes else getattr(held, name).data_ptr()
            assert value == wanted, f"{kind.__name__}.{name}"
        again = records.record(kind, list(kept))
        assert type(again) is kind
        assert again.fields == kept.fields
        assert records.record(kind, kept) is kept


def test_the_records_of_kept_sets():
    """The same of sets and of their index, one of whose ids is long."""
    ids, offsets = torch.arange(3).repeat(PART + 2), 3 * torch.arange(PART + 3)
    ids, offsets = torch.cat((ids, torch.tensor([1]))).int(), torch.cat((offsets, offsets[-1:] + 1))
    held = KeptSets(ids, offsets, 2, has_empty=False)
    index = held.by_id
    sizes = {
        "num_pairs": 3 * PART + 7,
        "num_tokens": PART + 3,
        "num_ids": 3,
        "num_parts": 6,
        "num_long": 3,
    }
    for kept in (held.sets, index):
        fields = dict(zip(kernels.records[type(kept).__name__], kept.fields, strict=True))
        assert tuple(name for name in fields if name not in sizes) == kept._fields
        for name, value in fields.items():
            wanted = sizes[name] if name in sizes else getattr(kept, name).data_ptr()
            assert value == wanted, f"{type(kept).__name__}.{name}"
    assert len(kernels.records["IdIndex"]) == len(kept_head._NO_INDEX)


def test_a_tensor_of_a_record_that_is_not_contiguous_is_refused():
    layout = require_layout(StepLayout.from_mask(torch.ones(2, 3)))
    wide = layout.step_ids.repeat(1, 2)[:, ::2]
    with pytest.raises(RuntimeError, match="not contiguous"):
        _ = layout.steps._replace(step_ids=wide).fields


# The numbers of names.


def enums() -> dict[str, list[str]]:
    """Return the names of each enum of types.h, without their k, in their order."""
    if not _CSRC.is_dir():
        pytest.skip("no csrc/: the package is installed without its sources")
    text = re.sub(r"//[^\n]*", "", (_CSRC / "types.h").read_text())
    found = {}
    for name, body in re.findall(r"enum (\w+) : int \{(.*?)\};", text, re.DOTALL):
        entries = [entry.strip() for entry in body.split(",") if entry.strip()]
        for place, entry in enumerate(entries):
            assert "=" not in entry or entry.split("=")[1].strip() == str(place), entry
        found[name] = [entry.split("=")[0].strip().removeprefix("k").lower() for entry in entries]
    return found


def plain(words: tuple[str, ...]) -> list[str]:
    return [word.replace("_", "") for word in words]


def test_names_are_the_numbers_that_kernels_know_them_by():
    found = enums()
    assert found["Ratio"] == plain(config.RATIOS)
    assert found["Surrogate"] == plain(config.SURROGATES)
    assert found["Reduction"] == plain(config.REDUCTIONS)
    assert found["KLEstimator"] == plain(config.KL_ESTIMATORS)


def test_dtypes_are_the_numbers_that_kernels_know_them_by():
    from steppo_kernels.backends.compiled.launch import DTYPES

    assert [str(dtype).removeprefix("torch.") for dtype in DTYPES] == enums()["DType"]
    assert list(DTYPES.values()) == list(range(len(DTYPES)))


@pytest.mark.parametrize("loss", ["Policy", "Value"])
def test_metrics_stand_where_kernels_write_them(loss):
    """The names that are shown, the hidden ones behind them, and how many there are."""
    shown, count = {
        "Policy": (outputs.POLICY_METRICS, outputs.NUM_POLICY_METRICS),
        "Value": (outputs.VALUE_METRICS, outputs.NUM_VALUE_METRICS),
    }[loss]
    *entries, last = enums()[f"{loss}Metric"]
    assert last == f"num{loss}metrics".lower()
    assert len(entries) == count
    wanted = plain((*shown, *outputs._HIDDEN[shown]))
    # Some have the loss in front.
    short = [
        e if e == w else e.removeprefix(loss.lower()) for e, w in zip(entries, wanted, strict=True)
    ]
    assert short == wanted
