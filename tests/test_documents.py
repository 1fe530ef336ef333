"""The documents tell the truth: their commands can be given, their links lead somewhere, their tree is true.

A command in a fenced block is taken apart, not run: the make target, the module, the flags and the path of
every `--config.` override must exist. So a rename that forgets a document fails here.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/log.md",
    "docs/hosts.md",
    "docs/judge.md",
    "docs/evaluation.md",
    "docs/data_jobs.md",
    "docs/scaling.md",
    "docs/benchmarks.md",
)
COMMANDS_OF = (
    *(
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "docs/hosts.md",
        "docs/judge.md",
        "docs/evaluation.md",
        "docs/data_jobs.md",
    ),
)


def commands() -> list[tuple[str, str]]:
    """(document, command) for each line of the ```bash blocks, continued lines joined, comments left out."""
    found = []
    for name in COMMANDS_OF:
        text = (ROOT / name).read_text(encoding="utf-8")
        for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(name, line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    return found


def words(command: str) -> list[str]:
    """The words of a command without its comment and without leading VARIABLE=value."""
    parts = shlex.split(command, comments=True)
    while parts and re.fullmatch(r"[A-Z_]+=.*", parts[0]):
        parts = parts[1:]
    return parts


def flags(parts: list[str]) -> dict[str, str]:
    """--name=value of a command."""
    return {m[1]: m[2] for part in parts if (m := re.fullmatch(r"--([\w.-]+)=?(.*)", part))}


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 6


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document, command in commands():
        parts = words(command)
        if parts[0] == "make":
            targets = [part for part in parts[1:] if "=" not in part]
            missing = [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.M)]
            assert not missing, f"{document}: `{command}`: the Makefile has no {missing}"


def _module_file(parts: list[str]) -> Path | None:
    """The file that `python FILE` or `python -m MODULE` runs; None for the commands of other programs."""
    if not parts[0].endswith("python") or parts[1:2] == ["-c"]:
        return None
    if parts[1] != "-m":
        return ROOT / parts[1]
    if parts[2].split(".")[0] not in {"fundus_jax", "data_pipeline", "launch"}:
        return None
    spec = importlib.util.find_spec(parts[2])
    assert spec is not None, f"there is no module {parts[2]}"
    return Path(str(spec.origin))


def test_modules_and_their_flags_exist() -> None:
    for document, command in commands():
        parts = words(command)
        file = _module_file(parts)
        if file is None:
            continue
        assert file.is_file(), f"{document}: `{command}`: there is no {file.name}"
        source = file.read_text(encoding="utf-8")
        names = [name.split(".")[0] for name in flags(parts)]
        unknown = [name for name in names if f'"{name}"' not in source and f'"--{name}"' not in source]
        assert not unknown, f"{document}: `{command}`: {file.name} defines no {unknown}"


@cache
def _config(name: str) -> Any:
    """What get_config() of configs/NAME.py[:arg] returns."""
    path, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(f"_documented_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def test_configs_and_overridden_fields_exist() -> None:
    for document, command in commands():
        given = flags(words(command))
        if "config" not in given:
            continue
        path = given["config"].partition(":")[0]
        assert (ROOT / path).is_file(), f"{document}: `{command}`: there is no {path}"
        value = _config(given["config"])
        for name in given:
            if name.startswith("config."):
                _descend(value, name.split(".")[1:], f"{document}: `{command}`")


def _descend(value: Any, names: list[str], where: str) -> None:
    for name in names:
        assert hasattr(value, name), f"{where}: {type(value).__name__} has no field {name}"
        value = getattr(value, name)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    inside = [target for target in targets if "://" not in target]
    missing = [target for target in inside if not ((ROOT / name).parent / target).exists()]
    assert not missing, f"{name} points to what is not there: {missing}"


def test_architecture_names_every_file_and_no_other() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"## The house.*?```text\n(.*?)```", text, flags=re.S)
    assert block, "ARCHITECTURE.md has no tree under `## The house`"
    told = set(re.findall(r"\w+\.py\b", block[1]))
    packages = [ROOT / name for name in ("fundus_jax", "data_pipeline", "launch", "configs", "benchmarks")]
    files = [path for package in packages for path in package.rglob("*.py") if path.name != "__init__.py"]
    untold = sorted(str(path.relative_to(ROOT)) for path in files if path.name not in told)
    assert not untold, f"ARCHITECTURE.md's tree does not name {untold}"
    gone = told - {path.name for path in files}
    assert not gone, f"ARCHITECTURE.md's tree names {sorted(gone)}, which do not exist"
