"""Runs a benchmark's command in this process, with the sizes of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from absl import flags

from benchmarks import common

MODEL = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 96, "vocab": 512}
MODEL |= {"vision_width": 32, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 48}


def arguments(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **more: Any) -> Any:
    """The parsed flags of a benchmark; nothing is left in absl's own."""
    values = flags.FlagValues()
    for kind in ("string", "enum", "bool", "list", "integer"):
        original = getattr(flags, f"DEFINE_{kind}")
        monkeypatch.setattr(
            flags, f"DEFINE_{kind}", lambda *a, _define=original, **k: _define(*a, flag_values=values, **k)
        )
    module.define_flags()
    monkeypatch.undo()
    values([module.__name__, *(f"--{name}={value}" for name, value in more.items())])
    return values


def report(monkeypatch: pytest.MonkeyPatch, module: ModuleType, out: Path, **more: Any) -> dict[str, Any]:
    """What the benchmark writes for these flags, read from its file."""
    args = arguments(monkeypatch, module, **{"repeats": 1} | more)
    common.finish(module.run(args), str(out))
    return json.loads(out.read_text(encoding="utf-8"))
