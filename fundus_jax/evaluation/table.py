"""A report as a plain text table: a line a number, in per cent, with its interval and its n.

Of a partial benchmark every line says so, because lines are copied out of tables. Neighbour: report.py.
"""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> str:
    """The table of a report of `evaluate`."""
    lines = [*_published(report["published"]), line("accuracy", report["accuracy"])]
    for group in ("by_modality", "by_level", "by_task"):
        for name, entry in report[group].items():
            lines.append(line(f"{group.removeprefix('by_')} {name}", entry["accuracy"]))
            lines.append(line("    best constant answer", entry["majority"]))
            lines.append(line("    difference", entry["difference"]))
            if "funbench" in entry:
                lines.append(line("    FunBench score", entry["funbench"]))
    if report["funbench"] is not None:
        lines.append(line("FunBench score, mean of levels", report["funbench"]["overall"]))
    for task, figures in (report["sets"] or {}).items():
        lines += [line(f"answers as sets, {task} {name}", one) for name, one in figures.items()]
    if report["findings"] is not None:
        for name in ("precision", "recall", "f1"):
            lines.append(line(f"findings {name}", report["findings"][name]))
        for name, figures in report["findings"]["by_finding"].items():
            lines.append(line(f"    {name} f1", figures["f1"]))
    if report["localisation"] is not None:
        shown_as = {"iou": "boxes, matched IoU", "f1": "boxes, F1 at IoU 0.5", "hit_rate": "boxes that hit"}
        for name, shown in shown_as.items():
            lines.append(line(shown, report["localisation"][name]))
            for group in ("by_modality", "by_finding"):
                for member, figures in report["localisation"][group].items():
                    lines.append(line(f"    {member} {name}", figures[name]))
        lines.append(line("boxes malformed", report["localisation"]["malformed"]))
    lines += _more(report["more"])
    lines += [line(name.replace("_", "-"), report[name]) for name in ("well_formed", "finished")]
    for rules, figure in (report["vlmevalkit"] or {}).items():
        lines.append(line(f"accuracy by VLMEvalKit, {rules}", figure))
    lines.append(line("unparsed", report["unparsed"]["share"]))
    if "server" in report:
        for name in ("accuracy", "agreement"):
            lines.append(line(f"read by a language model, {name}", report["server"][name]))
    return _framed(report, lines)


def _more(more: dict[str, Any]) -> list[str]:
    """Faithfulness, agreement among samples, and both by data set and disease where there are several."""
    lines = _faithful_and_repeated(more, "")
    for group in ("by_dataset", "by_modality", "by_disease"):
        if len(more[group]) > 1:
            for name, entry in more[group].items():
                label = f"{group.removeprefix('by_').replace('dataset', 'data set')} {name}"
                inner = _faithful_and_repeated(entry, "    ")
                lines += [line(label, entry["accuracy"]), *inner]
    return lines


def _faithful_and_repeated(entry: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for origin, found in entry["faithfulness"].items():
        named = [name for name in found or () if name != "traces" and found[name] is not None]
        for name in named:
            lines.append(line(f"{indent}traces, {name.replace('_', ' ')} ({origin})", found[name]))
    repeats = entry["repeats"]
    if repeats is not None:
        for kind in ("pass_at", "majority_at"):
            shown = f"{indent}{kind.removesuffix('_at')}@"
            lines += [line(f"{shown}{k}", one) for k, one in repeats[kind].items()]
        calibration = repeats["calibration"]
        lines.append(line(f"{indent}calibration error (ECE)", calibration["ece"]))
        lines.append(line(f"{indent}Brier score", calibration["brier"]))
    return lines


def _published(published: dict[str, Any] | None) -> list[str]:
    if published is None:
        return []
    name, rules = published["benchmark"], published["extraction"]
    head = line(f"{name} as published, rules: {rules}", published["score"])
    return [head, *(line(f"    {group}", figure) for group, figure in published["groups"].items())]


def _framed(report: dict[str, Any], lines: list[str]) -> str:
    """Lines with what they are of above them and what is missing below."""
    mark = "  PARTIAL" if report["partial"] else ""
    head = f"{'':<44}{'%':>7}  {'95% interval':>15}{'n':>9}"
    scope = f"{report['n']} answers to {report['items']} items of {report['units']} patients or images"
    undefined = (report["funbench"] or {}).get("undefined", [])
    notes = [f"PARTIAL: {reason}" for reason in report["partial"]]
    notes += [f"without a FunBench score: {', '.join(undefined)}"] if undefined else []
    published = report["published"]
    if published is not None:
        notes += [
            f"no question of {name}: no {published['benchmark']} score" for name in published["lacking"]
        ]
        notes += [
            f"unparsed by the rules {published['extraction']}: {published['unparsed']} of {report['n']}"
        ]
    top = f"{scope}; extraction: {report['extraction']}"
    return "\n".join([top, head, *(one + mark for one in lines), *notes]) + "\n"


def line(name: str, figure: dict[str, Any]) -> str:
    """One line: name, value, interval, n; "-" for what is undefined."""
    value, n = figure["value"], figure["n"]
    if value is None:
        return f"{name:<44}{'-':>7}  {'-':>15}{n:>9}"
    interval = f"[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
    return f"{name:<44}{100 * value:>7.1f}  {interval:>15}{n:>9}"
