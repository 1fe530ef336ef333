"""What of a benchmark is there: images under the user's folder, and what is missing, listed and counted.

A score over a part of a benchmark is another benchmark's score. So what is missing is an error, unless the
user allows a partial benchmark; then every reason stands in `partial`, and report.py prints it at each
score. Neighbours: the readers of this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fundus_jax.evaluation.items import Item, Selection
from fundus_jax.records import ConfigError, DataError

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Chosen:
    """The items that are asked, the image keys that were not found, and why the score is partial."""

    items: tuple[Item, ...]
    missing: tuple[str, ...]
    partial: tuple[str, ...]


def choose(
    read: Sequence[Item],
    selection: Selection,
    title: str,
    *,
    there: Callable[[str], bool] | None = None,
    where: str = "",
    lacking: Sequence[str] = (),
    of: int = 0,
) -> Chosen:
    """The selected items whose images are there.

    Args:
        read: all items of the source.
        title: the benchmark's name, for messages.
        there: whether an image key can be loaded; None asks nothing, as where only questions are listed.
        where: the place where images are looked for, for messages.
        lacking: question files that the publisher has and the source has not; `of` is how many there are.

    Raises:
        DataError: something is missing, and `allow_partial` is not set.
        ConfigError: nothing is left.
    """
    asked = selection.choose(read)
    keys = tuple(dict.fromkeys(key for item in asked for key in item.images))
    missing = () if there is None else tuple(key for key in keys if not there(key))
    reasons = []
    if lacking:
        reasons.append(f"{len(lacking)} of {of} question files are missing: {listed(lacking)}")
    if missing:
        reasons.append(f"{len(missing)} of {len(keys)} images are not under {where}: {listed(missing)}")
    if reasons and not selection.allow_partial:
        raise DataError(
            f"{title}: {'; '.join(reasons)}; add them, or allow a partial benchmark (allow_partial), whose "
            "scores cannot be compared with published ones"
        )
    gone = set(missing)
    items = tuple(item for item in asked if gone.isdisjoint(item.images))
    if not items:
        raise ConfigError(f"{title}: none of {len(keys)} images is under {where}: check the folder of images")
    if selection.tasks:
        reasons.append(f"of its tasks only {', '.join(selection.tasks)}")
    chosen = len([item for item in read if not selection.tasks or item.task in selection.tasks])
    if len(asked) < chosen:
        reasons.append(f"{len(asked)} of {chosen} questions, drawn")
    return Chosen(items, missing, tuple(reasons))


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def find_file(root: Path, key: str) -> Path | None:
    """The file `key` under `root`, exactly spelt or else with case ignored; None if there is none.

    Raises:
        DataError: a key that leads out of `root`.
    """
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
        raise DataError(f"image key {key!r} leads out of its folder")
    path = root.joinpath(*parts)
    if path.is_file():
        return path
    folder = root
    for part in parts:
        name = _names(folder).get(part.lower())
        if name is None:
            return None
        folder = folder / name
    return folder if folder.is_file() else None


@functools.lru_cache(maxsize=4096)
def _names(folder: Path) -> dict[str, str]:
    """Lower-case name -> name of everything in a folder; of two that differ in case only, the first."""
    if not folder.is_dir():
        return {}
    return {path.name.lower(): path.name for path in sorted(folder.iterdir(), reverse=True)}
