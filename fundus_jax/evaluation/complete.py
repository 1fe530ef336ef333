"""What of a benchmark is there: images under the user's folder, and what is missing, listed and counted.

A score over a part of a benchmark is another benchmark's score. So what is missing is an error, unless the
user allows a partial benchmark; then every reason stands in `partial`, and report.py prints it at each
score. Neighbours: the readers of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fundus_jax.data import Size
from fundus_jax.evaluation.items import Item, Selection
from fundus_jax.records import ConfigError, DataError

SHOWN = 5
THREADS = 8  # that look at the heads of images


@dataclass(frozen=True, slots=True)
class Chosen:
    """The items that are asked, the image keys that can not be shown, and why the score is partial."""

    items: tuple[Item, ...]
    missing: tuple[str, ...]
    partial: tuple[str, ...]


def choose(
    read: Sequence[Item],
    selection: Selection,
    title: str,
    *,
    there: Callable[[str], bool] | None = None,
    size: Callable[[str], Size] | None = None,
    where: str = "",
    gaps: Sequence[str] = (),
) -> Chosen:
    """The selected items whose images are there, and are images as far as their heads tell.

    Args:
        read: all items of the source.
        title: the benchmark's name, for messages.
        there: whether there is a file, or a cell, of an image key; None asks nothing, as where only questions
            are listed.
        size: `Images.image_size`; raises DataError for what is no image. None asks nothing.
        where: the place where images are looked for, for messages.
        gaps: what tells the source from the published benchmark, one reason each.

    Raises:
        DataError: there are gaps, or an image is missing or none, and `allow_partial` is not set.
        ConfigError: nothing is left.
    """
    asked = selection.choose(read)
    keys = tuple(dict.fromkeys(key for item in asked for key in item.images))
    missing = () if there is None else tuple(key for key in keys if not there(key))
    broken = {} if size is None else _broken(size, sorted({*keys} - {*missing}))
    reasons = list(gaps)
    if missing:
        reasons.append(f"{len(missing)} of {len(keys)} images are not under {where}: {listed(missing)}")
    if broken:
        why = "; ".join([*broken.values()][:SHOWN]) + ("; ..." if len(broken) > SHOWN else "")
        reasons.append(f"{len(broken)} of {len(keys)} images can not be read: {why}")
    if reasons and not selection.allow_partial:
        raise DataError(
            f"{title}: {'; '.join(reasons)}; mend that, or allow a partial benchmark (allow_partial), whose "
            "scores cannot be compared with published ones"
        )
    gone = {*missing, *broken}
    items = tuple(item for item in asked if gone.isdisjoint(item.images))
    if not items:
        raise ConfigError(f"{title}: none of {len(keys)} images can be shown: {'; '.join(reasons)}")
    if selection.tasks:
        reasons.append(f"of its tasks only {', '.join(selection.tasks)}")
    if selection.modalities:
        reasons.append(f"of its modalities {', '.join(selection.modalities)}")
    if selection.emode != 3:
        reasons.append(f"asked in E-mode{selection.emode}, of questions that have it")
    chosen = len([item for item in read if not selection.tasks or item.task in selection.tasks])
    if len(asked) < chosen:
        reasons.append(f"{len(asked)} of {chosen} questions, drawn")
    return Chosen(items, (*missing, *broken), tuple(reasons))


def file_gaps(files: Mapping[str, tuple[int, int] | None]) -> list[str]:
    """What question files lack. files: name -> how many questions are there, and how many were published, or
    None where there is no such file."""
    lacking = [name for name, counts in files.items() if counts is None]
    counted = [(name, *counts) for name, counts in files.items() if counts is not None]
    other = [f"{name} {there} of {published}" for name, there, published in counted if there != published]
    found = []
    if lacking:
        found.append(f"{len(lacking)} of {len(files)} question files are missing: {listed(lacking)}")
    if other:
        found.append(f"{len(other)} of {len(files)} question files are not as published: {listed(other)}")
    return found


def _broken(size: Callable[[str], Size], keys: Sequence[str]) -> dict[str, str]:
    """The keys of what is no image, and why."""

    def fault(key: str) -> str:
        try:
            size(key)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(THREADS) as pool:
        return {key: why for key, why in zip(keys, pool.map(fault, keys), strict=True) if why}


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
