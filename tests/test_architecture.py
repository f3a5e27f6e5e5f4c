"""The house rules that a machine can check. CONTRIBUTING.md says why each one stands."""

from __future__ import annotations

import ast
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import undertow

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("undertow", "sae", "features", "interventions", "dashboards")
MAX_FILE, MAX_FUNCTION, MAX_METHODS, MAX_PARAMETERS, MAX_FIELDS = 500, 60, 14, 7, 12
HELP_SECONDS = 0.3
BUSY_HELP_SECONDS = 0.6  # other work on the same cores may double a start-up time; a torch import costs seconds


class Source(NamedTuple):
    """One file of the project, parsed."""

    name: str
    text: str
    tree: ast.Module

    @property
    def in_packages(self) -> bool:
        return self.name.split("/")[0] in PACKAGES


def sources() -> list[Source]:
    paths = [p for folder in (*PACKAGES, "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
    texts = [(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in paths]
    return [Source(name, text, ast.parse(text)) for name, text in texts]


SOURCES = sources()
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: Source) -> Iterator[Function]:
    return (node for node in ast.walk(source.tree) if isinstance(node, Function))


def n_parameters(function: Function) -> int:
    """Parameters without `self` and `cls`."""
    args = function.args
    named = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")]) + bool(args.vararg) + bool(args.kwarg)


def is_command(function: Function) -> bool:
    """True for a command of the command line, whose parameters are its options."""
    return any("app.command" in ast.unparse(decorator) for decorator in function.decorator_list)


def calls(source: Source) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(node.func), node) for node in ast.walk(source.tree) if isinstance(node, ast.Call))


def test_there_is_something_to_check() -> None:
    assert {source.name.split("/")[0] for source in SOURCES if source.in_packages} == set(PACKAGES)
    assert any(is_command(f) for source in SOURCES for f in functions(source))


def test_files_are_short() -> None:
    assert [(s.name, n) for s in SOURCES if (n := len(s.text.splitlines())) >= MAX_FILE] == []


def test_functions_are_short() -> None:
    lengths = [(s.name, f.name, (f.end_lineno or 0) - f.lineno + 1) for s in SOURCES for f in functions(s)]
    assert [entry for entry in lengths if entry[2] >= MAX_FUNCTION] == []


def test_classes_are_small() -> None:
    classes = [(s.name, c.name, sum(isinstance(part, Function) for part in c.body))
               for s in SOURCES for c in ast.walk(s.tree) if isinstance(c, ast.ClassDef)]
    assert [entry for entry in classes if entry[2] > MAX_METHODS] == []


def test_signatures_are_short() -> None:
    counts = [(s.name, f.name, n_parameters(f)) for s in SOURCES if s.in_packages
              for f in functions(s) if not is_command(f)]
    assert [entry for entry in counts if entry[2] > MAX_PARAMETERS] == []


def _spec_sizes() -> dict[str, int]:
    """Fields of every subclass of Spec, those of its own bases included."""
    classes = {c.name: c for s in SOURCES if s.in_packages for c in ast.walk(s.tree) if isinstance(c, ast.ClassDef)}
    bases = {name: [base.id for base in c.bases if isinstance(base, ast.Name)] for name, c in classes.items()}

    def ancestors(name: str) -> set[str]:
        return {name}.union(*(ancestors(base) for base in bases.get(name, ())))

    return {name: sum(isinstance(part, ast.AnnAssign) for base in ancestors(name) & set(classes)
                      for part in classes[base].body)
            for name in classes if name != "Spec" and "Spec" in ancestors(name)}


def test_specs_have_few_fields() -> None:
    sizes = _spec_sizes()
    assert sizes["Sampling"] == 5  # undertow/subjects/sampling.py
    assert {name: n for name, n in sizes.items() if n > MAX_FIELDS} == {}


# sae-lens' classes have no common attribute set, so its adapter may ask what an object has.
FORBIDDEN_CALLS: dict[str, tuple[str, ...]] = {
    "print": (), "hasattr": ("sae/formats.py",), "torch.load": (), "torch.save": (), "eval": (), "exec": (),
    "torch.manual_seed": (), "random.seed": (), "np.random.seed": (),
}


@pytest.mark.parametrize("name", FORBIDDEN_CALLS)
def test_forbidden_calls(name: str) -> None:
    found = [(s.name, node.lineno) for s in SOURCES if s.in_packages for called, node in calls(s) if called == name]
    assert [place for place in found if place[0] not in FORBIDDEN_CALLS[name]] == []


def test_no_pickle() -> None:
    for source in SOURCES:
        modules = [alias.name for node in ast.walk(source.tree) if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module or "" for node in ast.walk(source.tree) if isinstance(node, ast.ImportFrom)]
        roots = {module.split(".")[0] for module in modules}
        assert not {"pickle", "dill", "cloudpickle", "shelve", "joblib"} & roots, source.name


@pytest.mark.parametrize("keyword", ["trust_remote_code", "allow_pickle"])
def test_no_code_from_outside(keyword: str) -> None:
    given = [(s.name, node.lineno) for s in SOURCES for _, node in calls(s) for k in node.keywords
             if k.arg == keyword and not (isinstance(k.value, ast.Constant) and k.value.value is False)]
    assert given == []


def test_imports_go_one_way() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.split(".")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("statement", [
    "import undertow", "import sae, features, interventions, dashboards", "from undertow import sae, features",
    "import undertow.subjects, undertow.lexicon, undertow.studies, undertow.core",
    "from undertow.cli.main import main; main(['--help'])", "from undertow.cli.main import main; main(['no-such'])",
])
def test_light_imports(statement: str) -> None:
    heavy = {"torch", "transformers", "transformer_lens", "sae_lens", "datasets", "wandb", "numpy", "typer"}
    assert _loaded_by(statement) & heavy == set()


def test_the_heavy_modules_would_be_seen() -> None:
    assert "numpy" in _loaded_by("import undertow, numpy")


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    command = [Path(sys.executable).with_name("undertow"), "--help"]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    busy = os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    with capsys.disabled():
        print(f"[undertow --help: {median:.3f} s, median of 5]", end="")
    assert median < (BUSY_HELP_SECONDS if busy else HELP_SECONDS)


def test_public_names_exist() -> None:
    for name in undertow.__all__:
        getattr(undertow, name)
    for package in PACKAGES[1:]:
        module = importlib.import_module(package)
        assert getattr(undertow, package) is module
        for name in getattr(module, "__all__", ()):
            getattr(module, name)
        with pytest.raises(AttributeError):
            module.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match="no_such_name"):
        undertow.no_such_name  # noqa: B018


def test_version_agrees_with_the_project() -> None:
    assert f'version = "{undertow.__version__}"' in (ROOT / "pyproject.toml").read_text()
