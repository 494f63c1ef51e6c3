"""Rules of imports: supporting code knows no script, a model file only models; no cycle."""

import ast
import functools
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDERS = ("nanorecall", "analysis", "myriadlama")
MODELS = ("model", "delta", "delta_variants", "linear", "ttt", "hybrid", "memory")
SUPPORT = ("attention", "ops", "second_order", "settings")


@functools.cache
def modules():
    """{dotted name: path} of every file of the project but tests and configs."""
    found = {}
    for folder in ("", *FOLDERS):
        for file in os.listdir(os.path.join(ROOT, folder)):
            stem, dot_py = os.path.splitext(file)
            if dot_py == ".py" and stem != "__init__":
                name = f"{folder}.{stem}" if folder else stem
                found[name] = os.path.join(ROOT, folder, file)
    return found


def imports(name, at_import_only=True):
    """Our modules that a module imports: when it is imported itself, or anywhere in its text."""
    with open(modules()[name], encoding="utf-8") as f:
        tree = ast.parse(f.read())
    found = set()
    for node in tree.body if at_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & modules().keys()


@pytest.mark.parametrize("name", sorted(n for n in modules() if n.startswith("nanorecall.")))
def test_supporting_code_imports_supporting_code(name):
    for other in imports(name, at_import_only=False):
        assert other.startswith("nanorecall.")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_imports_models_and_what_they_are_made_of(name):
    """A command of a model file may import more inside its main."""
    allowed = {*MODELS, *(f"nanorecall.{file}" for file in SUPPORT)}
    assert imports(name) <= allowed


def test_no_import_leads_back():
    """Each module can be put after all that it imports."""
    left = {name: imports(name) for name in modules()}
    while left:
        free = [name for name, needed in left.items() if not needed & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for name in free:
            del left[name]


def test_no_test_file_imports_another():
    folder = os.path.dirname(os.path.abspath(__file__))
    for file in os.listdir(folder):
        if file.endswith(".py"):
            with open(os.path.join(folder, file), encoding="utf-8") as f:
                assert not re.search(r"^ *(from|import) test_", f.read(), re.M), file


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_readme_has_a_line_for_each_file(folder):
    with open(os.path.join(ROOT, folder, "README.md"), encoding="utf-8") as f:
        named = re.findall(r"^\| `(.*?)`", f.read(), re.M)
    files = [name for name in os.listdir(os.path.join(ROOT, folder)) if name.endswith(".py")]
    files.remove("__init__.py")
    assert sorted(named) == sorted(files)
