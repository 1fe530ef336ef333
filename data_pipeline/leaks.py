"""From pairs of pictures to what may not be trained on, and to labels that contradict each other (pure).

Pictures and patients are one graph: a picture hangs on its patient, and on its copies. Whatever hangs
together with a picture that is held out, over however many links, is held out with it. Neighbours: `near`
finds the pairs, `decontaminate` acts on the verdicts.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# What is held out from what: the higher from the lower.
RANKS = {"train": 0, "val": 1, "test": 2, "benchmark": 2}
BYTES, PIXELS, PICTURE, EYE = "exact", "same pixels", "same picture", "same eye"
COPIES = (BYTES, PIXELS, PICTURE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Print:
    """What a picture is known by, besides its keypoints: its name for a reader, its split, and two hashes."""

    name: str
    split: str
    sha256: str
    pixels: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two pictures that are alike, by name; the distance is 1 - correlation, in thousandths."""

    a: str
    b: str
    relation: str
    distance: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What the Examples say of one picture: split, patient, and its answers by task; several diseases in one
    order, with semicolons between."""

    split: str
    patient: str
    answers: Mapping[str, str]


def exact(prints: Iterable[Print]) -> list[Pair]:
    """Pairs of every picture with the first one of the same bytes, or else of the same pixels."""
    pairs: list[Pair] = []
    files: dict[str, str] = {}
    pixels: dict[str, str] = {}
    for one in prints:
        same = files.setdefault(one.sha256, one.name), pixels.setdefault(one.pixels, one.name)
        kind, first = (BYTES, same[0]) if same[0] != one.name else (PIXELS, same[1])
        if first != one.name:
            pairs.append(Pair(a=first, b=one.name, relation=kind, distance=0))
    return pairs


def union(*lists: Iterable[Pair]) -> list[Pair]:
    """All pairs once, in order of their names; where two lists have one, the first list counts."""
    found: dict[tuple[str, str], Pair] = {}
    for pair in (pair for pairs in lists for pair in pairs):
        found.setdefault((pair.a, pair.b), pair)
    return [found[key] for key in sorted(found)]


def removals(said: Mapping[str, Said], pairs: Sequence[Pair]) -> dict[str, tuple[str, str]]:
    """Name of each picture that may not be trained on -> (kind, reason for a reader).

    Args:
      said: every picture by name, those of benchmarks included ("" is no patient).
      pairs: pictures that are alike; names that are not in `said` are an error (KeyError).

    Kinds: "patient" (in a split that is held out from this one), "picture" (a copy is), "eye" (another
    picture of the eye is), "linked" (over several links).
    """
    groups = _groups(said, pairs)
    rank = {name: RANKS[one.split] for name, one in said.items()}
    highest: dict[Hashable, int] = {}
    patients: dict[str, int] = {}
    for name, one in said.items():
        highest[groups[name]] = max(highest.get(groups[name], 0), rank[name])
        patients[one.patient] = max(patients.get(one.patient, 0), rank[name])
    direct: dict[str, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.relation == EYE, pair.distance)):
        for name, other in ((pair.a, pair.b), (pair.b, pair.a)):
            if rank[other] > rank[name]:
                direct.setdefault(name, pair)
    found: dict[str, tuple[str, str]] = {}
    for name, one in said.items():
        if highest[groups[name]] <= rank[name]:
            continue
        if name in direct:
            pair = direct[name]
            other = pair.b if pair.a == name else pair.a
            kind = "eye" if pair.relation == EYE else "picture"
            found[name] = kind, f"{pair.relation} as {other} ({said[other].split}), distance {distance(pair)}"
        elif one.patient and patients[one.patient] > rank[name]:
            found[name] = "patient", f"patient {one.patient} has pictures that are held out"
        else:
            found[name] = "linked", "linked to a picture that is held out, over its copies or patient"
    return found


def conflicts(said: Mapping[str, Said], pairs: Iterable[Pair]) -> list[tuple[str, str, str, str, str]]:
    """Copies with different labels: (task, a, answer of a, b, answer of b)."""
    found = []
    for pair in pairs:
        if pair.relation not in COPIES:
            continue
        a, b = said[pair.a].answers, said[pair.b].answers
        found += [
            (task, pair.a, a[task], pair.b, b[task]) for task in sorted(a.keys() & b) if a[task] != b[task]
        ]
    return found


def distance(pair: Pair) -> str:
    """The distance as a decimal."""
    return f"{pair.distance / 1000:.3f}"


def _groups(said: Mapping[str, Said], pairs: Iterable[Pair]) -> dict[str, Hashable]:
    """For each picture a member of its group: of all that hang together by patients and pairs."""
    above: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while (parent := above.get(node, node)) != node:
            above[node] = above.get(parent, parent)
            node = parent
        return node

    for name, one in said.items():
        if one.patient:
            above[root(name)] = root(("patient", one.patient))
    for pair in pairs:
        above[root(pair.a)] = root(pair.b)
    return {name: root(name) for name in said}
