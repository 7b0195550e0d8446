"""Size and depth of the code, counted with blank lines and docstrings.

The budgets may only fall. No name of a public class stands twice.
"""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import pdvit

PACKAGE = Path(pdvit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGE_LINES, LAYOUT_LINES, PACKAGE_FILES, TEST_LINES = 15_456, 812, 122, 17_664
TRAIN_FUNCTIONS, TRAIN_FILES, TRAIN_FRAMES = 218, 48, 6
ANALYZE_FRAMES = 8

# Trains for a few steps, analyzes the run, and prints as JSON: our functions that each command called ("file:name",
# without lambdas and comprehensions), and the number of our frames from `pdvit.cli.run` to the first call of a target.
TRACE = """
import json, os, sys, threading

import timm  # before the trace, which slows every call

import pdvit
from pdvit.cli import run

root = os.path.dirname(pdvit.__file__)
ANONYMOUS = ("<lambda>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
OPTIMIZED = 1  # of code flags: a function, not the body of a class or module


def traced(place, target, *arguments):
    seen, called, depths = set(), set(), []

    def trace(frame, event, argument):  # returns None: lines are not traced
        code = frame.f_code
        if code in seen:
            return
        seen.add(code)
        if not code.co_flags & OPTIMIZED:
            return
        if code.co_filename.startswith(root) and code.co_name not in ANONYMOUS:
            called.add(f"{os.path.relpath(code.co_filename, root)}:{code.co_qualname}")
        if not depths and code.co_name == target and place in code.co_filename:
            depth = 0
            while frame := frame.f_back:
                depth += frame.f_code.co_filename.startswith(root) and frame.f_code.co_name not in ANONYMOUS
            depths.append(depth)

    threading.settrace(trace)
    sys.settrace(trace)
    assert run(arguments) == 0
    sys.settrace(None)
    return {"called": sorted(called), "frames": depths[0]}


out = sys.argv[1]
train = traced("torch/optim/", "step", "train", "--epochs", "4st", "--out", out)
# P is `patch_similarity`'s mean over the blocks of pairs that the groups of metrics share.
analyze = traced("pdvit/analysis/metrics/patches.py", "similarity", "analyze", out)
print("\\n" + json.dumps({"train": train, "analyze": analyze}))
"""


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> dict:
    command = [sys.executable, "-c", TRACE, str(tmp_path_factory.mktemp("traced") / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent, env=dict(os.environ))
    return json.loads(done.stdout.splitlines()[-1])


def lines(files: list[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_package_and_tests_keep_their_budgets_of_lines_and_files():
    layouts = [file for file in FILES if "layouts" in file.parts]  # other libraries' names: tables, more than code
    assert lines(layouts) <= LAYOUT_LINES
    assert lines(FILES) - lines(layouts) <= PACKAGE_LINES
    assert len(FILES) <= PACKAGE_FILES
    assert lines(sorted((Path(__file__).parents[1]).rglob("*.py"))) <= TEST_LINES


def test_no_public_class_name_is_used_twice():
    names = Counter(
        node.name
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not {name for name, count in names.items() if count > 1}


def test_the_default_training_run_takes_few_functions_and_frames(traces):
    called = traces["train"]["called"]
    assert len(called) <= TRAIN_FUNCTIONS, called
    assert len({name.partition(":")[0] for name in called}) <= TRAIN_FILES
    assert traces["train"]["frames"] <= TRAIN_FRAMES


def test_an_analysis_takes_few_frames_to_p(traces):
    assert traces["analyze"]["frames"] <= ANALYZE_FRAMES
