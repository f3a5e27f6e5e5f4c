"""What is installed: exactly five packages; and the everyday names among them are never mistaken for another folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"undertow", "sae", "features", "interventions", "dashboards"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, so that no build folder is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "tests", "docs", "benchmarks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [built] = out.glob("*.whl")
    return built


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_exactly_five_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in members(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


def test_every_module_and_data_file_is_in(wheel: Path) -> None:
    kinds = (".py", ".yaml", ".json", ".safetensors", ".html", ".css", ".js", ".svg", "py.typed")
    wanted = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*")
              if p.is_file() and p.name.endswith(kinds)}
    assert wanted <= members(wheel)
    assert {f"{package}/py.typed" for package in PACKAGES} <= members(wheel)


def test_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [info] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        assert "MIT License" in archive.read(f"{info}/licenses/LICENSE").decode()
        assert "License-Expression: MIT" in archive.read(f"{info}/METADATA").decode()
        assert "undertow = undertow.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


def run(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code in `cwd`, which Python puts first on its path, as a notebook does; `paths` come next."""
    sets_path = f"import sys; sys.path[1:1] = {[str(p) for p in paths]!r}\n"
    return subprocess.run([sys.executable, "-c", sets_path + textwrap.dedent(code)], cwd=cwd, capture_output=True,
                          text=True, check=False)


@pytest.fixture(params=["editable", "wheel", "checkout"])
def install(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ...]:
    """Three ways to import our packages: as installed for the tests, unpacked from the wheel, from a folder."""
    if request.param == "editable":
        return ()
    if request.param == "checkout":
        return (ROOT,)
    with zipfile.ZipFile(request.getfixturevalue("wheel")) as archive:
        archive.extractall(tmp_path / "site")
    return (tmp_path / "site",)


def test_the_names_are_the_same_modules(install: tuple[Path, ...], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    done = run("""
        import undertow, sae, features, interventions, dashboards
        from undertow import features as ours
        assert ours is features and undertow.sae is sae
        assert undertow.interventions is interventions and undertow.dashboards is dashboards
        print(features.__file__)
        print(undertow.__file__)
        """, tmp_path / "work", *install)
    assert done.returncode == 0, done.stderr
    folders = [Path(line).parents[1] for line in done.stdout.splitlines()]
    assert folders[0] == folders[1] == (install[0] if install else ROOT)


@pytest.mark.parametrize("name", ["features", "sae"])
def test_a_foreign_package_is_named(install: tuple[Path, ...], tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "work" / name
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    done = run("import undertow", foreign.parent, *install)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-2:]
    assert "ShadowedError" in last[0] and str(foreign) in last[0]
    assert "rename it" in last[1]


def test_a_foreign_module_that_is_already_loaded_is_named(install: tuple[Path, ...], tmp_path: Path) -> None:
    """A plain file; loaded before Undertow, and off the path by the time that Undertow looks."""
    foreign = tmp_path / "work" / "features.py"
    foreign.parent.mkdir()
    foreign.write_text("")
    done = run("""
        import sys
        sys.path.insert(0, "")
        import features
        del sys.path[0:2]
        import undertow
        """, foreign.parent, *install)
    assert done.returncode == 1
    assert str(foreign) in done.stderr.strip().splitlines()[-2]


def test_the_command_names_it_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "__init__.py").write_text("")
    done = subprocess.run([sys.executable, "-m", "undertow", "--help"], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'features'} has the name")
    assert "Traceback" not in done.stderr
    beside = subprocess.run([Path(sys.executable).with_name("undertow"), "--help"], cwd=tmp_path, capture_output=True,
                            text=True, check=False)
    assert beside.returncode == 0, "the installed command does not look into the working folder"
