"""Wheel and sdist: built, installed into a new environment, and tried there."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, links, read

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, target: Path) -> dict[str, Path]:
    run(sys.executable, "-m", "hatchling", "build", "-d", target, cwd=source)
    return {file.suffix: file for file in target.iterdir()}


def read_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def test_the_wheel_works_in_a_new_environment(built, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", built[".whl"], cwd=tmp_path)
    # Dependencies are those of this environment, after the new one's own packages.
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    found = run(python, "-c", "import pdvit; print(pdvit.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(site)
    pdvit = tmp_path / "env" / "bin" / "pdvit"
    run(pdvit, "train", "--epochs", "4st", "--depth", "2", "--out", "run", cwd=tmp_path)
    printed = run(pdvit, "analyze", "run", "--limit", "8", "--explore", "--report", cwd=tmp_path)
    assert "at norm (random weights:" in printed
    assert (tmp_path / "run" / "explorer.html").exists()
    run(pdvit, "plot", "similarity", "run", cwd=tmp_path)


def test_the_sdist_builds_the_same_wheel_and_passes_its_own_tests(built, tmp_path):
    with tarfile.open(built[".gz"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    rebuilt = build(source, tmp_path / "dist")
    with zipfile.ZipFile(built[".whl"]) as first, zipfile.ZipFile(rebuilt[".whl"]) as second:
        assert {name: first.read(name) for name in first.namelist()} == {
            name: second.read(name) for name in second.namelist()
        }
    tests = ["tests/docs", "tests/experiments", "tests/unit/test_public_api.py", "tests/unit/test_recipes.py"]
    run(sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", *tests, cwd=source)


def test_the_metadata_is_that_of_a_package_index(built):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        assert not [name for name in wheel.namelist() if not name.startswith("pdvit")]
    metadata = read_metadata(built[".whl"])
    assert metadata["Author"] == "pdvit contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    versions = {"Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.13"}
    assert versions <= set(metadata.get_all("Classifier"))
    requirements = metadata.get_all("Requires-Dist")
    # Each has a floor, and a limit at the first release that nobody has run.
    assert all(">=" in requirement and "<" in requirement for requirement in requirements), requirements


def test_links_and_images_of_the_readme_are_absolute_once_the_repository_has_an_address(tmp_path):
    for name in ("README.md", "LICENSE", "hatch_build.py", "pdvit"):
        (tmp_path / name).symlink_to(ROOT / name)
    project = re.sub("(# )?Repository = .*", 'Repository = "https://example.org/pdvit"', read("pyproject.toml"))
    (tmp_path / "pyproject.toml").write_text(project)
    page = read_metadata(build(tmp_path, tmp_path / "dist")[".whl"]).get_payload()
    assert [link for link in links(page) if not link.startswith("https://")] == []
    assert not re.search(r"!\[[^]]*\]\(https://example.org/pdvit/blob/", page)
    assert re.sub("https://example.org/pdvit/(raw|blob)/HEAD/", "", page) == read("README.md")
