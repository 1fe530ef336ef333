"""The rules of the house that no linter knows: sizes, docstrings, banned calls, swallowed errors, addresses.

Import directions are import-linter's (pyproject.toml), style is ruff's, documents are test_documents.py's.
Each test walks the tree, so a new file is held to the rules from its first day.
"""

from __future__ import annotations

import ast
import re
import statistics
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fundus_jax", "data_pipeline", "launch", "configs", "benchmarks")
MAX_LINES, MEDIAN_LINES, MAX_FUNCTION = 400, 150, 60


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    """The Python files under `folders` of the repository."""
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


@cache
def text_files() -> tuple[Path, ...]:
    """Every text file of the repository: its top level, the packages, tests, docs, constraints and .ci."""
    folders = (*PACKAGES, "tests", "docs", "constraints", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    found += [path for path in ROOT.iterdir() if path.is_file()]
    return tuple(sorted(path for path in found if "__pycache__" not in path.parts and _is_text(path)))


def _is_text(path: Path) -> bool:
    return b"\0" not in path.read_bytes()[:4096]


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """A file, and the line of a node in it, as an editor understands them."""
    line = f":{node.lineno}" if isinstance(node, ast.expr | ast.stmt | ast.excepthandler) else ""
    return f"{path.relative_to(ROOT)}{line}"


def named(node: ast.expr) -> str:
    """The dotted name of an expression such as `yaml.load`, or ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = named(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def test_files_are_short() -> None:
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*PACKAGES, "tests")
    }
    assert lines, "no Python files found: the walk is broken"
    long = [f"{place(path)}: {count}" for path, count in lines.items() if count > MAX_LINES]
    assert not long, f"files over {MAX_LINES} lines; split them where they do two things: {long}"
    median = statistics.median(lines.values())
    assert median < MEDIAN_LINES, (
        f"the median file has {median} lines; below {MEDIAN_LINES} is the house's measure"
    )


def test_functions_are_short() -> None:
    long = [
        f"{place(path, node)} {node.name}: {_lines(node)}"
        for path in python_files(*PACKAGES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _lines(node) > MAX_FUNCTION
    ]
    assert not long, f"functions over {MAX_FUNCTION} lines: {long}"


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its `def` to its end, less those of its docstring."""
    first = node.body[0]
    text = isinstance(first, ast.Expr) and ast.get_docstring(node) is not None
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if text else 0
    return (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


def _public(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in tree(path).body:
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        if isinstance(node, kinds) and not node.name.startswith("_") and node.name != "main":
            yield node


def test_modules_and_public_names_say_what_they_are() -> None:
    silent = [place(path) for path in python_files(*PACKAGES, "tests") if not _has_docstring(path)]
    assert not silent, f"modules without a docstring: {silent}"
    nodes = [(path, node) for path in python_files(*PACKAGES) for node in _public(path)]
    silent = [f"{place(path, node)} {node.name}" for path, node in nodes if not ast.get_docstring(node)]
    assert not silent, f"public functions and classes without a docstring: {silent}"


def _has_docstring(path: Path) -> bool:
    return bool(ast.get_docstring(tree(path))) or not tree(path).body


def test_nothing_is_left_unfinished() -> None:
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")))
    left = [
        f"{place(path)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if words.search(line)
    ]
    assert not left, f"unfinished places: {left}"


def test_no_machine_and_no_registry_is_named() -> None:
    registries = (
        "pypi" + r"\.org",
        "python" + "hosted",
        r"npmjs\.",
        r"download\.py" + "torch",
        r"debian\.org",
    )
    machine = r"(?<![\w.~}])/(?:wor" + "k|roo" + r"t|hom" + r"e)/\w"
    pattern = re.compile("|".join((*registries, machine)))
    found = [
        f"{place(path)}:{number}: {match.group()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert not found, f"host names of registries, or paths of one machine: {found}"


BANNED_MODULES = {
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "langchain_community",
    "imp",
}
BANNED_CALLS = {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "os.system", "torch.load"}


def test_nothing_runs_code_from_data() -> None:
    found: list[str] = []
    for path in python_files(*PACKAGES):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                )
                found += [
                    f"{place(path, node)}: {name}" for name in names if name.split(".")[0] in BANNED_MODULES
                ]
            elif isinstance(node, ast.Call):
                found += [
                    f"{place(path, node)}: {named(node.func)}"
                    for _ in [0]
                    if named(node.func) in BANNED_CALLS
                ]
                found += [f"{place(path, node)}: {word.arg}" for word in node.keywords if _opens_a_door(word)]
    assert not found, f"pickle, eval and their like: {found}"


def _opens_a_door(word: ast.keyword) -> bool:
    """Whether a keyword lets a file run code: allow_pickle=True, trust_remote_code=..., shell=True."""
    says_no = isinstance(word.value, ast.Constant) and word.value.value is False
    return word.arg in {"allow_pickle", "trust_remote_code", "shell"} and not says_no


def test_no_error_is_swallowed() -> None:
    """A handler of any error must raise, or hand on what it caught (to a quarantine, a future)."""
    found = [
        place(path, node)
        for path in python_files(*PACKAGES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and _catches_all(node) and not _passes_on(node)
    ]
    assert not found, f"handlers that swallow any error: {found}"


def _catches_all(handler: ast.ExceptHandler) -> bool:
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or named(kind) in {"Exception", "BaseException"} for kind in types)


def _passes_on(handler: ast.ExceptHandler) -> bool:
    nodes = [node for statement in handler.body for node in ast.walk(statement)]
    uses_it = any(isinstance(node, ast.Name) and node.id == handler.name for node in nodes)
    return uses_it or any(isinstance(node, ast.Raise) for node in nodes)


@pytest.mark.parametrize("name", ["loss", "advantages", "uncertainty"])
def test_grpo_arithmetic_imports_only_arithmetic(name: str) -> None:
    path = ROOT / "fundus_jax" / "grpo" / f"{name}.py"
    ours = {"fundus_jax.grpo.config", "fundus_jax.records"}  # records for its errors
    allowed = {"__future__", "collections", "dataclasses", "functools", "math", "typing", "jax", "numpy"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        wrong = [m for m in modules if m.split(".")[0] not in allowed and m not in ours]
        assert not wrong, f"{place(path, node)} imports {wrong}"


@pytest.mark.parametrize("name", ["py3.11.txt", "py3.12.txt"])
def test_constraints_name_every_dependency_and_no_address(name: str) -> None:
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert not wrong, f"{name}: not NAME==VERSION: {wrong}"
    pinned = {_normal(line.split("==")[0]) for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    missing = {_normal(re.split(r"[\[<>=;! ]", line)[0]) for line in wanted} - pinned
    assert not missing, f"{name} does not pin {sorted(missing)}: CONTRIBUTING.md says how to renew it"


def test_the_pins_of_vllm_are_sorted_and_name_no_address() -> None:
    lines = (ROOT / "constraints" / "vllm.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*(\+cpu)?", line)]
    assert not wrong, f"vllm.txt: not NAME==VERSION: {wrong}"
    assert pins == sorted(pins, key=str.lower)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
