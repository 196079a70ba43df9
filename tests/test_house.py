"""How the house is built: imports run downward, files and functions are short, public names are those documented."""

from __future__ import annotations

import ast
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import slora_diffusers as sl
from docs.house import figures, looking_into_headers
from slora_diffusers.loader import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "slora_diffusers"
FOLDERS = ("slora_diffusers", "train_scripts", "pipelines", "benchmarks", "docs", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Each floor may import from those below it, and a folder from itself. The longest name that fits counts: `core.pair`
# lies below `core`, for the config checks its start against the table of starts.
FLOORS = (
    ("errors",),
    ("core.pair", "core.patterns", "core.tensors", "core.calls", "records"),
    ("peft_names",),
    ("config",),
    ("core",),
    ("adapters",),
    ("files",),
    ("convert", "heads"),
    ("loader",),
    ("verbs",),
    ("__init__",),
    ("training",),
    ("serving",),
    ("demo",),
    ("recipes",),
    ("app",),
    ("cli",),
    ("serving.serve_app",),
)
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}


def floor_of(name):
    """(place in FLOORS, its number) of a module."""
    parts = name.split(".")
    place = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in FLOOR), None)
    assert place, f"{name} has no place in FLOORS of {__file__} yet: put it above what it imports"
    return place, FLOOR[place]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def nodes_of(tree, lazy):
    """The import statements of a module: all but those for type checkers, `lazy` ones inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from nodes_of(node, lazy)


def imports_of(path, lazy=True):
    """(modules of our own, top-level packages of others) that a file of the package imports."""
    own, others = set(), set()
    for node in nodes_of(ast.parse(path.read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif not node.level and not node.module.startswith("slora_diffusers"):
            others.add(node.module.partition(".")[0])
        else:
            base = path.relative_to(PACKAGE).parts[:-1]
            base = base[: len(base) - node.level + 1] if node.level else ()
            inner = (node.module or "") if node.level else node.module.partition(".")[2]
            stem = ".".join((*base, *filter(None, [inner])))
            for alias in node.names:
                whole = f"{stem}.{alias.name}".lstrip(".")
                own.add(whole if whole in MODULES else stem or "__init__")
    return own, others


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downward(name):
    here, floor = floor_of(name)
    for other in imports_of(MODULES[name])[0]:
        there, below = floor_of(other)
        assert there == here or below < floor, f"{name} imports {other}, which is not below it"


def test_imports_make_no_circle():
    graph = {name: imports_of(path, lazy=False)[0] - {name, "__init__"} for name, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES) - 1


def needs(name, seen=frozenset()):
    """Packages of others that importing a module needs, through all that it imports."""
    own, others = imports_of(MODULES[name], lazy=False)
    for other in own - seen - {name}:
        others |= needs(other, seen | own | {name})
    return others - set(__import__("sys").stdlib_module_names)


def test_the_maths_needs_torch_and_the_errors_alone():
    assert needs("core.pair") == {"torch"}
    assert imports_of(MODULES["core.pair"])[0] == {"errors"}


def test_the_layer_needs_torch_alone():
    assert needs("core.layer") == {"torch"}


def test_the_vision_heads_need_neither_diffusers_nor_transformers_to_be_imported():
    assert needs("heads.segmentation") == {"torch", "safetensors", "regex"}


def test_only_the_loader_and_the_package_import_diffusers():
    """Records match by class name; what a pair does, it does to plain modules."""
    core = [name for name in MODULES if floor_of(name)[1] <= FLOOR["loader"] and name != "loader"]
    assert len(core) > 20
    assert {name for name in core if "diffusers" in imports_of(MODULES[name], lazy=False)[1]} == set()


def test_one_module_knows_an_adapters_header_and_two_the_note_in_an_export():
    assert looking_into_headers(PACKAGE) == ["convert/describe.py", "convert/layouts/write.py", "files/format.py"]


def test_every_change_of_a_model_stands_in_the_verbs_own_lock():
    """A generator that an interrupt leaves suspended gives nothing back; the `with` of a function does."""
    first = [
        [ast.unparse(item.context_expr) for item in node.items]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.With) and "changing(" in ast.unparse(node.items[-1])
    ]
    assert len(first) >= 10
    assert [names for names in first if names[0] != "ONE_VERB"] == []


def test_the_root_keeps_a_handful_of_modules():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {
        "__init__", "config", "errors", "loader", "peft_names", "verbs",
    }  # fmt: skip


def test_the_figures_count_what_lies_there(tmp_path):
    package = tmp_path / "slora_diffusers"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text('def f():\n    """Says."""\n    return header.get("components")\n')
    (package / "training" / "__init__.py").write_text("class O:\n    rank: int = option(4, 'Rank.')\n")
    (package / "training" / "bounds.py").write_text("LEAST = {'rank': 1}\n")
    counted = figures(tmp_path)
    assert list(counted.values()) == ["1", "1", "2, 3", "2, 2", "1", "2.00, 2"]


def lines_of(node):
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    script = path.parent.name in ("train_scripts", "recipes", "pipelines", "benchmarks")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = lines_of(first) if documented else 0
            length = lines_of(node) - docstring
            assert length <= (120 if script and node.name == "main" else 60), node.name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_and_public_names_are_documented(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        assert not public or ast.get_docstring(node), node.name


DOCUMENTED = """
SerialLoraConfig(rank=16, alpha=None, dropout=0.0, inputs=None, targets=None, exclude=None, layers=None, rank_pattern={}, alpha_pattern={}, rslora=False, init="kaiming")
add_serial_lora(model, config, adapter_name="default")
load_serial_lora(model, source, adapter_name=None, weight=1.0, strict=True, **hub)
save_serial_lora(model, save_directory, adapter_name=None, weight_name="serial_lora_weights.safetensors", dtype=None, is_main_process=True)
set_serial_lora(model, adapter_names, weights=None)
serial_lora_scale(model, scale)
disable_serial_lora(model)
serial_lora_batch(model, names)
delete_serial_lora(model, adapter_names)
unload_serial_lora(model)
fuse_serial_lora(model, adapter_names=None, scale=1.0)
unfuse_serial_lora(model)
serial_lora_status(model)
serial_lora_parameters(model, adapter_name=None)
serial_lora_state_dict(model, adapter_name=None)
initialize_serial_lora(model, backward, adapter_name="default", passes=2)
export_lora(model_or_pipe, save_directory, adapter_names=None, format="diffusers")
compress_lora(model, lora_source, rank)
merge_serial_lora(model, names, weights, new_name, rank=None)
register_architecture(record)
"""  # noqa: E501 (the design's own lines)
SIGNATURES = {line.partition("(")[0]: line for line in DOCUMENTED.split("\n") if line}
CLASSES = (
    "SerialLoraAttnProcessor",
    "SerialLoraLoaderMixin",
    "SerialLoraError",
    "SerialLoraForImageClassification",
    "SerialLoraForSemanticSegmentation",
)
PIPELINE_VERBS = (
    "load_serial_lora", "save_serial_lora", "set_serial_lora", "serial_lora_scale", "disable_serial_lora",
    "serial_lora_batch", "delete_serial_lora", "unload_serial_lora", "fuse_serial_lora", "unfuse_serial_lora",
    "serial_lora_status", "export_lora",
)  # fmt: skip


def parameters_in(line):
    """[(name, default or what stands for none)] of a documented signature."""
    arguments = ast.parse(f"def {line}: ...").body[0].args
    required = len(arguments.args) - len(arguments.defaults)
    defaults = [inspect.Parameter.empty] * required + [ast.literal_eval(d) for d in arguments.defaults]
    listed = [(a.arg, d) for a, d in zip(arguments.args, defaults, strict=True)]
    return listed + ([(arguments.kwarg.arg, inspect.Parameter.empty)] if arguments.kwarg else [])


def default_of(parameter, value):
    if value == {} and parameter.default is not inspect.Parameter.empty:
        return {} if "factory" in repr(parameter.default) else parameter.default  # a dataclass field's
    return parameter.default


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_public_names_have_their_documented_signature(name):
    given = dict(inspect.signature(getattr(sl, name)).parameters)
    for parameter, default in parameters_in(SIGNATURES[name]):
        assert parameter in given, f"{parameter} is missing from {name}{inspect.signature(getattr(sl, name))}"
        assert default_of(given.pop(parameter), default) == default
    optional = (p.default is not inspect.Parameter.empty or p.kind is p.VAR_KEYWORD for p in given.values())
    assert all(optional), f"{name} asks for more than is documented: {list(given)}"


@pytest.mark.parametrize("name", CLASSES)
def test_public_classes_are_there(name):
    assert inspect.isclass(getattr(sl, name))
    if name.startswith("SerialLoraFor"):
        assert all(
            callable(getattr(getattr(sl, name), m)) for m in ("from_backbone", "save_pretrained", "from_pretrained")
        )


def test_everything_that_is_exported_is_there():
    assert all(hasattr(sl, name) for name in sl.__all__)
    assert set(SIGNATURES) <= set(sl.__all__)


@pytest.mark.parametrize("verb", PIPELINE_VERBS)
def test_a_pipelines_verb_takes_what_the_function_takes(verb):
    """The function's own parameters, in its order, with the pipeline in the place of the model."""
    assert verb in VERBS
    method = list(inspect.signature(getattr(sl.SerialLoraLoaderMixin, verb)).parameters)[1:]
    function = list(inspect.signature(getattr(sl, verb)).parameters)[1:]
    documented = [name for name, _ in parameters_in(SIGNATURES[verb])][1:]
    assert [name for name in method if name in documented] == documented == [n for n in function if n in documented]


def test_every_error_is_one_that_a_user_can_catch():
    for name in ("AdapterFileError", "AdapterStateError", "ArchitectureError"):
        assert issubclass(getattr(sl, name), sl.SerialLoraError)
    assert issubclass(sl.SerialLoraError, ValueError)


def test_every_public_name_is_imported_from_its_place_when_it_is_used():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [n for n in tree.body if isinstance(n, ast.If)]
    typed = {
        alias.name: node.module
        for node in ast.walk(checked)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == sl._PLACE_OF
    assert set(sl.__all__) == set(typed)
    assert all(getattr(sl, name).__name__ == name for name in sl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_lora'"):
        sl.load_lora  # noqa: B018
