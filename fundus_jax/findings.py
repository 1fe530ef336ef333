"""Visual findings: canonical names, synonyms, modalities, and a parser of mentions that knows negation.

The trace writer, its quality check and the rule judge all ask the same question of a text: which findings
does it claim, and which does it deny? The table below is the only place that knows the words; a new finding
is a row. Names are lower case and singular; anatomy (optic disc, vessels) is no finding.
Sources: the finding groups of the paper, section 3.2.1; ICDR (Wilkinson 2003); AREDS. Neighbours:
`records.py` below; `data_pipeline/traces.py` and `fundus_jax/grpo/` ask.

The parser reads words, not sentences: one regular expression cuts the text into words and stops, a trie of
words finds the longest known phrase at each place, and a small machine follows the scope of a negation. Each
step is linear in the text, which may be a megabyte of anything that a policy under training wrote.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fundus_jax.records import MODALITIES, ConfigError

_FUNDUS = ("CFP", "UWF")


@dataclass(frozen=True, slots=True)
class Finding:
    """A row of the table.

    Attributes:
        name: canonical, lower case, singular, British.
        plural: the form for running text ("The image shows ..."); with its article where English wants one.
        modalities: where it can be seen.
        synonyms: other names in lower case; plurals and American spellings are understood unlisted.
        abbreviations: case-sensitive, because "he" is a pronoun and "HE" hard exudates.
        core: whether the phantoms and the notes use it; the others are names of the real data sets.
    """

    name: str
    plural: str
    modalities: tuple[str, ...]
    synonyms: tuple[str, ...] = ()
    abbreviations: tuple[str, ...] = ()
    core: bool = False


def _row(name: str, plural: str, modalities: tuple[str, ...], words="", short="", core=False) -> Finding:
    synonyms = tuple(words.split(" | ")) if words else ()
    return Finding(name, plural, modalities, synonyms, tuple(short.split()), core)


_SIZES = ("large", "enlarged", "increased", "wide", "big", "deep")
_CUP = ("cup", "optic cup", "optic disc cup", "cupping", "cup disc ratio", "cup / disc ratio")
_CUPS = " | ".join(f"{size} {cup}" for size in _SIZES for cup in (*_CUP, "cup to disc ratio"))
_PRERETINAL = "pre retinal haemorrhage | subhyaloid haemorrhage"
_IRMA = "intraretinal microvascular abnormality | intraretinal microvascular abnormalities"
_TABLE = (
    _row("microaneurysm", "microaneurysms", _FUNDUS, "micro aneurysm | red dot", "MA MAs", core=True),
    _row(
        "haemorrhage",
        "haemorrhages",
        _FUNDUS,
        "retinal haemorrhage | intraretinal haemorrhage | intra retinal haemorrhage | dot haemorrhage | "
        "blot haemorrhage | dot blot haemorrhage | dot and blot haemorrhage | flame haemorrhage | "
        "flame shaped haemorrhage | haemorrhagic spot | bleeding",
        "RH RHs",
        core=True,
    ),
    _row("hard exudate", "hard exudates", _FUNDUS, "exudate", "HE HEs EX", core=True),
    _row(
        "cotton-wool spot",
        "cotton-wool spots",
        _FUNDUS,
        "cottonwool spot | cotton wool patch | cotton wool patches | soft exudate",
        "CWS CWSs SE",
        core=True,
    ),
    _row(
        "neovascularisation",
        "neovascularisation",
        _FUNDUS,
        "new vessel | new blood vessel | newly formed vessel | neovascular vessel | neovessel | "
        "retinal neovascularisation | neovascularisation of the disc | neovascularisation elsewhere",
        "NV NVD NVE",
        core=True,
    ),
    _row("vitreous haemorrhage", "vitreous haemorrhage", _FUNDUS, "vitreous bleed", "VH", core=True),
    _row("drusen", "drusen", MODALITIES, "druse | drusenoid deposit", core=True),
    _row("large cup", "a large cup", _FUNDUS, f"{_CUPS} | cup is large | cup is enlarged", core=True),
    _row(
        "intraretinal fluid",
        "intraretinal fluid",
        ("OCT",),
        "intra retinal fluid | intraretinal cyst | cystoid space | intraretinal cystoid space",
        "IRF",
        core=True,
    ),
    _row("subretinal fluid", "subretinal fluid", ("OCT",), "sub retinal fluid", "SRF", core=True),
    _row(
        "pigment epithelial detachment",
        "a pigment epithelial detachment",
        ("OCT",),
        "pigment epithelium detachment | retinal pigment epithelial detachment | "
        "retinal pigment epithelium detachment | drusenoid pigment epithelial detachment",
        "PED PEDs",
        core=True,
    ),
    # from here on: names of the real data sets and of texts about them
    _row("preretinal haemorrhage", "preretinal haemorrhage", _FUNDUS, _PRERETINAL, "PRH"),
    _row("subretinal haemorrhage", "subretinal haemorrhage", _FUNDUS, "sub retinal haemorrhage"),
    _row("disc haemorrhage", "disc haemorrhage", _FUNDUS, "optic disc haemorrhage | splinter haemorrhage"),
    _row("venous beading", "venous beading", _FUNDUS, "beading of the vein | beaded vein"),
    _row("irma", "intraretinal microvascular abnormalities", _FUNDUS, _IRMA, "IRMA IRMAs"),
    _row(
        "fibrous proliferation",
        "fibrous proliferation",
        _FUNDUS,
        "fibrovascular proliferation | fibrous tissue",
    ),
    _row("laser scar", "laser scars", _FUNDUS, "laser spot | laser mark | photocoagulation scar"),
    _row(
        "rim thinning", "rim thinning", _FUNDUS, "neuroretinal rim thinning | thinning of the rim | rim notch"
    ),
    _row("nerve fibre layer defect", "a nerve fibre layer defect", _FUNDUS, "nerve fiber layer defect"),
    _row("peripapillary atrophy", "peripapillary atrophy", _FUNDUS, "", "PPA"),
    _row("geographic atrophy", "geographic atrophy", MODALITIES, "atrophy of the pigment epithelium"),
    _row("pigmentary change", "pigmentary changes", _FUNDUS, "pigment change | hyperpigmentation"),
    _row("macular hole", "a macular hole", MODALITIES, "", "FTMH"),
    _row("epiretinal membrane", "an epiretinal membrane", MODALITIES, "epi retinal membrane", "ERM"),
    _row("retinal detachment", "retinal detachment", MODALITIES, "detached retina"),
    _row("retinal thickening", "retinal thickening", ("OCT",), "thickened retina | macular thickening"),
    _row("hyperreflective focus", "hyperreflective foci", ("OCT",), "hyperreflective foci", "HRF"),
    _row("subretinal hyperreflective material", "subretinal hyperreflective material", ("OCT",), "", "SHRM"),
    _row("ellipsoid zone loss", "ellipsoid zone loss", ("OCT",), "ellipsoid zone disruption"),
    _row("vitreomacular traction", "vitreomacular traction", ("OCT",), "", "VMT"),
)
# Words that contain a finding's name and mean a disease or normal anatomy.
_NO_FINDING = ("choroidal neovascularisation", "macular neovascularisation")

# What also meets a required finding: ICDR takes a vitreous or preretinal haemorrhage as proof of new vessels.
_PROVEN_BY = {"neovascularisation": ("vitreous haemorrhage", "preretinal haemorrhage")}

FINDINGS: dict[str, Finding] = {row.name: row for row in _TABLE}


@dataclass(frozen=True, slots=True)
class Mentions:
    """The findings that a text claims and those it denies; a self-contradicting text has one in both."""

    present: frozenset[str]
    absent: frozenset[str]


def vocabulary(modality: str, extended: bool = False) -> tuple[str, ...]:
    """The canonical names of a modality's findings in the fixed order of the table.

    Args:
        modality: CFP, OCT or UWF.
        extended: False gives those that the phantoms and notes use, True all that the parser knows.
    """
    if modality not in MODALITIES:
        raise ConfigError(f"modality is {modality!r}; known modalities are {', '.join(MODALITIES)}")
    return tuple(row.name for row in _TABLE if modality in row.modalities and (row.core or extended))


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Canonical names in the fixed order of the table, once each. Raises ConfigError for unknown ones."""
    wanted = set(names)
    unknown = sorted(wanted - FINDINGS.keys())
    if unknown:
        raise ConfigError(f"{unknown} are no canonical findings; add rows to fundus_jax/findings.py")
    return tuple(name for name in FINDINGS if name in wanted)


def phrase(names: Iterable[str], conjunction: str = "and") -> str:
    """Findings as running text in the fixed order: "microaneurysms, haemorrhages and hard exudates"."""
    words = [FINDINGS[name].plural for name in ordered(names)]
    if not words:
        raise ConfigError("there is no finding to put into words; say that nothing is seen instead")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def canonical(text: str) -> str | None:
    """The canonical name of a finding's name, synonym, plural or abbreviation; None for any other text."""
    words = [_plain(token) for token in _TOKEN.findall(text.strip().removesuffix("."))]
    kind, value, length = _longest(words, 0) if words else _WORD
    return value if kind == "finding" and length == len(words) else None


def contradictions(present: Iterable[str], absent: Iterable[str]) -> tuple[str, ...]:
    """The findings that are claimed and denied at once, in the fixed order."""
    return ordered(set(present) & set(absent))


def modality_contradictions(modality: str, present: Iterable[str]) -> tuple[str, ...]:
    """The findings that this modality can not show, such as a microaneurysm on OCT, in the fixed order."""
    return ordered(set(present) - set(vocabulary(modality, extended=True)))


def missing(required: Iterable[str], present: Iterable[str]) -> tuple[str, ...]:
    """The required findings that are neither present nor proven by one that is, in the fixed order."""
    there = set(present)
    return ordered(
        name for name in required if name not in there and there.isdisjoint(_PROVEN_BY.get(name, ()))
    )


def parse_mentions(text: str) -> Mentions:
    """The findings that a text says are there and those it says are not, in linear time.

    A negation ("no", "without", "absence of", "neither") reaches over a list ("no X, Y or Z") to the end of
    the clause, to "but" or "however", or to the verb that ends the list ("no X is seen, Y is"). "X and Y are
    absent" and "X is not seen" deny what stands before them. A line break ends a clause. What hedges
    ("possible X") counts as a claim.
    """
    tokens = _TOKEN.findall(text)
    plain = {token: _plain(token) for token in set(tokens)}
    words, scope, position = [plain[token] for token in tokens], _Scope(), 0
    while position < len(words):
        if words[position] in _TRIE:
            kind, value, length = _longest(words, position)
            scope.read(kind, value)
            position += length
        else:
            scope.touching = False
            position += 1
    scope.end()
    return Mentions(frozenset(scope.present), frozenset(scope.absent))


# ---- words -------------------------------------------------------------------------------------------------

# A word, a joint, or a run of commas and clause ends; the full stop of "0.7" ends nothing.
_TOKEN = re.compile(r"[^\W\d_]+(?:['’]t)?|[&/]+|(?:[,;!?\n]|\.(?!\d))+")
_WORD = ("word", "", 1)  # what is not in the trie

_ABBREVIATIONS = frozenset(item for row in _TABLE for item in row.abbreviations)

_KINDS = {
    # opens a scope that reaches forward; "before" marks those after whose list a verb has another subject
    "deny": "no | not | neither | never | zero | rather than | instead of | does not | doesn't | don't",
    "deny before": (
        "without | absence of | lack of | lack | lacking | free of | free from | negative for | devoid of"
    ),
    "comma": ",",
    # denies what stands before it, or reaches forward when nothing does
    "flip": (
        "not seen | not present | not visible | not observed | not evident | not identified | not detected | "
        "not noted | not found | not apparent | not appear | not there | never seen | is not | are not | "
        "was not | were not | isn't | aren't | wasn't | weren't | absent | missing | excluded | ruled out | "
        "none | cannot be seen | can not be seen | can't be seen | not be seen"
    ),
    "seen": (
        "seen | present | visible | observed | evident | identified | detected | noted | found | show | "
        "fit | suggest | indicate | support | mean | make | point | confirm | appear | lie | has | have"
    ),
    "be": "is | are | was | were",
    "or": "or | nor",
    "and": "and | as well as | plus | /",
    "with": "with",
    "stop": (
        ". | but | however | although | though | whereas | while | yet | except | other than | apart from | "
        "besides | beyond | so | therefore | thus | hence | because | since"
    ),
    # stand here only to keep "no", "not" and "or" in them from meaning what they mean elsewhere
    "word": (
        "not only | is not only | are not only | not just | not merely | no more than | no doubt | "
        "whether or not"
    ),
}


def _plain(token: str) -> str:
    """A token without case, plural and spelling variants; not English, only the same on both sides."""
    if token in _ABBREVIATIONS:
        return f"={token}"  # the mark keeps case-sensitive words apart from the others
    if token[0] in ",.;!?\n":
        return "." if token.strip(",") else ","
    if token[0] in "&/":
        return "/"
    word = token.lower().replace("’", "'").replace("hemorrh", "haemorrh").replace("ization", "isation")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _make_trie() -> dict[str, Any]:
    """Word -> next words; the key "" holds (kind, value) where a phrase ends."""
    trie: dict[str, Any] = {}

    def add(words: Iterable[str], kind: str, value: str) -> None:
        node = trie
        for word in words:
            node = node.setdefault(word, {})
        node[""] = (kind, value)

    for kind, phrases in _KINDS.items():
        for item in phrases.split(" | "):
            add([_plain(word) for word in item.split()], kind, item)
    for item in _NO_FINDING:
        add([_plain(word) for word in item.split()], "word", item)
    for row in _TABLE:
        for item in (row.name, *row.synonyms):
            add([_plain(word) for word in item.replace("-", " ").split()], "finding", row.name)
        for item in row.abbreviations:
            add([f"={item}"], "finding", row.name)
    return trie


_TRIE = _make_trie()


def _longest(words: list[str], start: int) -> tuple[str, str, int]:
    """Kind, value and length in words of the longest known phrase at `start`."""
    node, found = _TRIE, _WORD
    for position in range(start, len(words)):
        node = node.get(words[position])
        if node is None:
            break
        if "" in node:
            found = (*node[""], position - start + 1)
    return found


# ---- the scope of a negation -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Scope:
    """Follows a text phrase by phrase.

    `items` is the list being read: (finding, what joined it to the one before).
    """

    present: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    items: list[tuple[str, str]] = field(default_factory=list)
    cue: str = ""  # "", "deny" or "deny before": what opened the negation that `items` stands under
    joined: str = ""  # "", "comma", "and" or "or": what came since the last finding
    touching: bool = False  # whether nothing but joints came since the last finding or cue

    def read(self, kind: str, value: str) -> None:
        if kind == "finding":
            self.items.append((value, self.joined))
            self.joined, self.touching = "", True
            return
        if kind == "comma":
            self.joined = self.joined or kind
            return
        if kind in ("and", "or"):
            if value == "nor" and not self.cue:
                self._deny("deny")
            self.joined = kind
            return
        if kind in ("deny", "deny before"):
            self._deny(kind)
            return
        if kind == "flip":
            self._flip()
        elif kind == "seen":
            self._end_list()
            if self.items:  # else it stands in "does not show X", and X is still to come
                self.end()
        elif kind == "be":  # ends a denied list; a claimed one waits, for "are absent" may still come
            self._end_list()
            if not self.items and not self.touching:  # "no other lesion is ...": the denial was of no finding
                self.end()
        elif kind == "stop" or (kind == "with" and self.joined):
            self.end()
        self.touching = False

    def _deny(self, cue: str) -> None:
        self.end()
        self.cue, self.touching = cue, True

    def end(self) -> None:
        """The clause is over: its items count as what they stand under."""
        (self.absent if self.cue else self.present).update(name for name, _ in self.items)
        self.items, self.cue, self.joined = [], "", ""

    def _flip(self) -> None:
        """Denies the list before "are absent"; of a list without "and", only what follows the last comma."""
        if self.items and not self.cue and all(joint == "comma" for _, joint in self.items[1:]):
            self.present.update(name for name, _ in self.items[:-1])
            del self.items[:-1]
        was_empty = not self.items
        self.cue = "deny"
        if not was_empty:
            self.end()

    def _end_list(self) -> None:
        """A verb ends a denied list. In "without X, Y fits" it ended at the comma, and Y is the subject."""
        if not self.cue or not self.items:
            return
        joints = [joint for _, joint in self.items[1:]]
        one_list = "or" in joints or (self.cue == "deny" and "and" in joints)
        if self.touching and not one_list and "comma" in joints:
            first = joints.index("comma") + 1
            self.absent.update(name for name, _ in self.items[:first])
            self.items, self.cue = self.items[first:], ""
        else:
            self.end()
