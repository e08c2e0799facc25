"""The rules of the house: who imports whom, how long files are, what is required and documented."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from referee.sources import source_texts
from train_gpt import TRACKS, Hyperparameters

FILES = sorted(
    path.relative_to(ROOT)
    for folder in (".", "referee", "data", "tools", "baselines", "evals")
    for path in (ROOT / folder).glob("*.py")
)
REFEREE = {str(path) for path in FILES if path.parts[0] == "referee"}
CONTESTANTS = {"train_gpt.py", "kernels.py", "data/prefetch.py", "data/__init__.py"}
CONTESTANTS |= {str(path) for path in FILES if path.parts[0] == "baselines"}
LINE_BUDGETS = {"train_gpt.py": 1100, "kernels.py": 520}
PACKAGES = {"huggingface_hub": "huggingface-hub", "tiktoken_ext": "tiktoken"}
OPTIONAL = {"triton"}  # comes with torch's CUDA build


def imported_names(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def project_imports(path: Path) -> set[str]:
    """Files of the project that a file imports, as paths from the root."""
    files = {name.replace(".", "/") + ".py" for name in imported_names(path)}
    return {str(p) for p in FILES} & files


IMPORTS = {str(path): project_imports(path) for path in FILES}


def test_the_referee_imports_no_contestant():
    for path in REFEREE:
        assert IMPORTS[path] <= REFEREE, path
    assert set(source_texts(ROOT, "train_gpt.py")) >= REFEREE  # all of it, as logs embed it


def test_contestants_import_referee_and_contestants_alone():
    for path in CONTESTANTS - {"baselines/export_hf.py"}:
        assert IMPORTS[path] <= CONTESTANTS | REFEREE, path


def test_contestants_never_name_the_validation_shards():
    for path in CONTESTANTS:
        names = {node.attr for node in ast.walk(ast.parse((ROOT / path).read_text()))
                 if isinstance(node, ast.Attribute)}  # fmt: skip
        assert "val_files" not in names, path


def test_imports_have_no_circle():
    done, path = set(), []

    def visit(name: str):
        assert name not in path, f"{' -> '.join(path)} -> {name}"
        if name not in done:
            path.append(name)
            for imported in IMPORTS[name]:
                visit(imported)
            done.add(path.pop())

    for name in IMPORTS:
        visit(name)


def test_each_module_has_one_import_name():
    """No file is imported by its bare name from a folder, as a script's neighbour would be."""
    stems = {path.stem for path in FILES if path.parent != Path(".")}
    for path in FILES:
        assert not stems & imported_names(path), path


def test_each_script_of_a_folder_puts_the_root_on_the_path():
    """By itself: a module that did it could not be imported from there under python -P."""
    for path in FILES:
        text = (ROOT / path).read_text()
        is_script = re.search(r"^    (sys\.exit\(main|finish\(main|main\(\)$)", text, re.M)
        sets_path = re.search(r'if __name__ == "__main__":\n    sys\.path\[0\] = str\(', text)
        if path.name != "probe_inside.py":  # which runs in a folder of the source under test
            assert bool(sets_path) == (bool(is_script) and len(path.parts) > 1), path
        assert not re.search(r'__doc__("\])?[.[]', text), f"{path}: python -OO has no docstrings"


def test_what_is_imported_is_required():
    """What a run imports by requirements.txt alone, for ./run.sh installs no more for it."""
    needed, more = (set(re.findall(r"^([\w-]+)==", (ROOT / path).read_text(), re.M))
                    for path in ("requirements.txt", "tools/requirements.txt"))  # fmt: skip
    of_runs = REFEREE | CONTESTANTS - {"baselines/export_hf.py"} | {"data/embedded.py"}
    own = {path.stem for path in FILES} | {path.parts[0] for path in FILES}
    for path in FILES:
        tops = {name.partition(".")[0] for name in imported_names(path)}
        outside = tops - own - OPTIONAL - sys.stdlib_module_names
        required = needed if str(path) in of_runs else needed | more
        assert {PACKAGES.get(name, name) for name in outside} <= required, path


@pytest.mark.parametrize("path, most", LINE_BUDGETS.items())
def test_files_stay_small_enough_to_read(path, most):
    assert len((ROOT / path).read_text().splitlines()) <= most


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_function_is_long(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_hyperparameters_are_few_and_each_differs_between_tracks():
    names = [f.name for f in dataclasses.fields(Hyperparameters)]
    assert len(names) <= 45
    for track, hp in TRACKS.items():
        overrides = [n for n in names if getattr(hp, n) != getattr(TRACKS["fineweb"], n)]
        assert len(overrides) <= 24, track
    fixed = {name for name in names
             if len({getattr(hp, name) for hp in TRACKS.values()}) == 1}  # fmt: skip
    assert not fixed, "what no track turns is a constant"
