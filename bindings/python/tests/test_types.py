"""The interface as type checkers see it: stubs that are what the native module is, a program that
passes, and wrong uses that are reported."""

import ast
import collections
import pathlib
import re
import subprocess
import sys

import pytest
import unisum
import unisum._unisum

pytest.importorskip("mypy")
TYPED = pathlib.Path(__file__).parent / "typed"
PACKAGE = pathlib.Path(unisum.__file__).parent


def mypy(folder, module, *arguments):
    """The exit status of a tool of mypy's, in a folder of its own, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, text=True, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def test_a_typed_program_passes(tmp_path):
    status, told = mypy(tmp_path, "mypy", "--strict", str(TYPED / "program.py"))
    assert status == 0, told


def test_wrong_uses_are_reported(tmp_path):
    _, told = mypy(tmp_path, "mypy", "--strict", "--no-error-summary", str(TYPED / "wrong.py"))
    reported = collections.defaultdict(set)
    for line, code in re.findall(r"wrong\.py:(\d+): error: .*\[([a-z-]+)\]$", told, re.MULTILINE):
        reported[int(line)].add(code)
    lines = (TYPED / "wrong.py").read_text().splitlines()
    expected = {
        number: set(line.split("# wrong: ")[1].split())
        for number, line in enumerate(lines, 1)
        if "# wrong: " in line
    }
    assert len(expected) > 20 and reported == expected, told


def test_the_stub_is_what_the_native_module_is(tmp_path):
    status, told = mypy(tmp_path, "mypy.stubtest", "--ignore-disjoint-bases", "unisum._unisum")
    assert status == 0, told


def test_the_stub_has_private_names_too():
    """Of which stubtest does not notice that they are missing."""
    stub = ast.parse((PACKAGE / "_unisum.pyi").read_text())
    for described in [it for it in stub.body if isinstance(it, ast.ClassDef)]:
        named = {it.name for it in described.body if isinstance(it, ast.FunctionDef)}
        runtime = vars(getattr(unisum._unisum, described.name))
        assert {it for it in named if not it.startswith("__")} == {
            it for it in runtime if not it.startswith("__")
        }, described.name


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_the_package_has_no_wrong_types(tmp_path, version):
    """But for unisum.torch: the types of PyTorch take long."""
    modules = [f"unisum.{it.stem}" for it in PACKAGE.glob("*.py") if it.stem != "__init__"]
    assert len(modules) > 5
    named = [argument for module in ["unisum", *modules] for argument in ("-m", module)]
    status, told = mypy(
        tmp_path, "mypy", "--python-version", version, "--follow-imports=silent",
        "--check-untyped-defs", *named,
    )
    assert status == 0, told
