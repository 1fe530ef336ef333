"""Which findings a text claims and which it denies: a parser of mentions that knows negation.

The trace writer, its quality check, the rule judge and the report all ask this of a text. The parser reads
words, not sentences: one regular expression cuts the text into words and stops, a trie of words finds the
longest known phrase at each place, and a small machine follows the scope of a negation. Each step is linear
in the text, which may be a megabyte of anything that a policy under training wrote. Neighbours: `table` has
the words of the findings.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from fundus_jax.findings.table import FINDINGS


@dataclass(frozen=True, slots=True)
class Mention:
    """A finding that text[start:end] names, and whether it is denied there."""

    name: str
    start: int
    end: int
    denied: bool


@dataclass(frozen=True, slots=True)
class Mentions:
    """The findings that a text claims and those it denies; a self-contradicting text has one in both."""

    present: frozenset[str]
    absent: frozenset[str]

    def without(self, names: Collection[str]) -> "Mentions":
        """The mentions of other findings than these."""
        return Mentions(self.present - frozenset(names), self.absent - frozenset(names))


def canonical(text: str) -> str | None:
    """The canonical name of a finding's name, synonym, plural or abbreviation; None for any other text."""
    words = [_plain(token) for token in _TOKEN.findall(text.strip().removesuffix("."))]
    kind, value, length = _longest(words, 0) if words else _WORD
    return value if kind == "finding" and length == len(words) else None


def parse_mentions(text: str) -> Mentions:
    """The findings that a text says are there and those it says are not (`find_mentions`)."""
    found = find_mentions(text)
    return Mentions(
        frozenset(one.name for one in found if not one.denied),
        frozenset(one.name for one in found if one.denied),
    )


def find_mentions(text: str) -> list[Mention]:
    """Each place at which a text names a finding, in its order, in linear time.

    A negation ("no", "cannot", "absence of", "rules out") reaches over a list ("no X, Y or Z") to the end of
    the clause, to "but" or "however", or to the verb that ends the list ("no X is seen, Y is"). "X and Y are
    absent", "X could not be seen" and "X: no" deny what stands before them. A line break ends a clause. What
    hedges ("possible X", "X cannot be excluded") or tells a degree ("X is not extensive") counts as a claim.
    """
    tokens = _TOKEN.findall(text)
    plain = {token: _plain(token) for token in set(tokens)}
    words, scope, position = [plain[token] for token in tokens], _Scope(), 0
    places = list(_TOKEN.finditer(text)) if not _TRIE.keys().isdisjoint(words) else []
    while position < len(words):
        if words[position] in _TRIE:
            kind, value, length = _longest(words, position)
            scope.read(kind, value, places[position].start(), places[position + length - 1].end())
            position += length
        else:
            scope.touching = False
            position += 1
    scope.end()
    return sorted(scope.found, key=lambda one: one.start)


# The label that follows here is no observation: "the answer is Drusen" must not count as having seen any. It
# ends where labels end, at a stop, before a word that ties something to it, and after six words. What comes
# then counts, or a finding could be said, and evidence be lost, behind a conclusion. No label of the data
# sets has the name of a finding beyond.
_TIES = "and|or|but|with|without|because|since|as|given|due|while|which|that|so|for|from|after|by|in|on"
_WORD_OF_LABEL = rf"(?!(?:{_TIES})\b|-+\s)[^\s,;:.!?()/&–—]+"
_CONCLUSION = re.compile(
    r"\b(?:answer|diagnosis|label) (?:is|must be|should be)\b[^\S\n]*+"
    r"(?:(?:most |best )?(?:consistent|compatible) with |(?:most |best )?(?:described|classified) as )?"
    r"""[:("'“‘*]*+[^\S\n]*+(?:[A-Z][):][^\S\n]*+)?"""  # the letter of an option
    rf"(?:{_WORD_OF_LABEL}(?:[^\S\n]++{_WORD_OF_LABEL}){{,5}})?",
    re.IGNORECASE,
)


def observations(text: str) -> str:
    """The text as long, without the conclusion: in the place of "the answer is" and the label that follows
    stands the end of a clause. The label is no observation, and some carry the name of a finding."""
    return _CONCLUSION.sub(lambda match: ".".ljust(len(match.group())), text)


# ---- words -------------------------------------------------------------------------------------------------

# A denial that answers for itself ("X: no", "X (none)", "X? No."), a word, a joint, or a run of commas and
# clause ends; the full stop of "0.7" ends nothing.
_TOKEN = re.compile(
    r"[:(?|[=–—-]\s*+(?i:no|none|nil|absent|negative|not (?:seen|present))\b(?=[^\S\n]*+(?:[],;.!?)|\n]|$))"
    r"|[^\W\d_]+(?:['’]t)?|[&/]+|(?:[,;!?\n]|\.(?!\d))+"
)
_ASIDE, _ANSWERED = ":(?|[=–—-", ":no"  # how a denial of that kind begins; what it is in `_plain`
_WORD = ("word", "", 1)  # what is not in the trie

# Words that contain a finding's name and mean a disease or normal anatomy.
_NO_FINDING = (
    "choroidal neovascularisation",
    "macular neovascularisation",
    "haemorrhagic pigment epithelial detachment",
    "lamellar macular hole",
    *(f"{where} drusen" for where in ("optic disc", "optic nerve head", "disc")),
    *(
        f"{kind} neovascularisation" for kind in ("iris", "subretinal", "type")
    ),  # "type 1": digits are no words
    *(f"{where} haemorrhage" for where in ("subconjunctival", "choroidal")),
)

_ABBREVIATIONS = frozenset(item for row in FINDINGS.values() for item in row.abbreviations)

_SEEN = "seen | present | visible | observed | evident | identified | detected | noted | found"
_BE = ("is", "are", "was", "were")
_MODAL = ("cannot", "can't", "can not", "could not", "couldn't")


def _each(starts: Iterable[str], ends: str) -> str:
    return " | ".join(f"{start} {end}" for start in starts for end in ends.split(" | "))


_KINDS = {
    # opens a scope that reaches forward; "before" marks those after whose list a verb has another subject
    "deny": (
        "no | not | neither | never | zero | nothing | rather than | instead of | does not | doesn't | "
        "don't | did not | didn't | unable to | fail to | failed to | rule out | ruling out | exclude | "
        "excluding | " + " | ".join(_MODAL)
    ),
    "deny before": (
        "without | absence of | lack of | lack | lacking | free of | free from | negative for | devoid of"
    ),
    "comma": ",",
    # denies what stands before it, or reaches forward when nothing does
    "flip": (
        "not apparent | not appear | not there | never seen | isn't | aren't | wasn't | weren't | absent | "
        "missing | excluded | ruled out | none | "
        + _each(("not", "not be", *(f"{modal} be" for modal in _MODAL)), f"{_SEEN} | made out | visualised")
        + " | "
        + _each(_BE, "not")
    ),
    "answer": _ANSWERED,
    "seen": (
        f"{_SEEN} | show | fit | suggest | indicate | support | mean | make | point | confirm | appear | "
        "lie | has | have"
    ),
    "be": " | ".join(_BE),
    "or": "or | nor",
    "and": "and | as well as | plus | /",
    "with": "with | only | merely | presence of",  # ends a negation where a joint stands before it
    "stop": (
        ". | but | however | although | though | whereas | while | yet | except | other than | apart from | "
        "besides | beyond | so | therefore | thus | hence | because | since"
    ),
    # stand here only to keep "no", "not" and "or" in them from meaning what they mean elsewhere
    "word": (
        "no more than | no doubt | whether or not | "
        + _each((*_MODAL, "not"), "be excluded | be ruled out")
        + " | "
        + _each(
            ("not", *(f"{be} not" for be in _BE)),
            "only | just | merely | extensive | severe | marked | many | numerous | widespread | large | "
            "excluded",
        )
    ),
}


def _plain(token: str) -> str:
    """A token without case, plural and spelling variants; not English, only the same on both sides."""
    if token in _ABBREVIATIONS:
        return f"={token}"  # the mark keeps case-sensitive words apart from the others
    if token[0] in _ASIDE and token[-1].isalpha():
        return _ANSWERED
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
    for row in FINDINGS.values():
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

    `items` is the list being read: ((finding, start, end), what joined it to the one before).
    """

    found: list[Mention] = field(default_factory=list)
    items: list[tuple[tuple[str, int, int], str]] = field(default_factory=list)
    cue: str = ""  # "", "deny" or "deny before": what opened the negation that `items` stands under
    joined: str = ""  # "", "comma", "and", "comma and" or "or": what came since the last finding
    subject: bool = False  # whether the clause named something before the negation
    told: bool = False  # whether "X are" was read of a claimed list, which is over where more of it follows
    touching: bool = False  # whether nothing but joints came since the last finding or cue

    def read(self, kind: str, value: str, start: int, end: int) -> None:
        if kind == "finding":
            if self.told and not self.touching:
                self._settle(len(self.items), denied=False)
            self.told = False
            self.items.append(((value, start, end), self.joined))
            self.joined, self.touching = "", True
            return
        if kind == "comma":
            self.joined = self.joined or kind
            return
        if kind in ("and", "or"):
            if value == "nor" and not self.cue:
                self._deny("deny")
            self.joined = "comma and" if (self.joined, kind) == ("comma", "and") else kind
            return
        if kind in ("deny", "deny before"):
            self._deny(kind)
            return
        if kind == "flip":
            self._flip()
        elif kind == "answer":
            self._flip() if self.items and not self.cue else self.end()
        elif kind == "seen":
            self._end_list()
            if self.items:  # else it stands in "does not show X", and X is still to come
                self.end()
        elif kind == "be":  # ends a denied list; a claimed one waits, for "are absent" may still come
            self._end_list()
            if not self.items and not self.touching:  # "no other lesion is ...": the denial was of no finding
                self.end()
            self.told = bool(self.items)
        elif kind == "stop" or (kind == "with" and self.joined not in ("", "or")):
            self.end()
        self.touching = False

    def _deny(self, cue: str) -> None:
        subject = bool(self.items) and not self.cue
        self.end()
        self.cue, self.touching, self.subject = cue, True, subject

    def end(self) -> None:
        """The clause is over: its items count as what they stand under."""
        self._settle(len(self.items), denied=bool(self.cue))
        self.cue, self.joined, self.subject, self.told = "", "", False, False

    def _settle(self, count: int, *, denied: bool) -> None:
        self.found += [Mention(*place, denied) for place, _ in self.items[:count]]
        del self.items[:count]

    def _flip(self) -> None:
        """Denies the list before "are absent"; of a list without "and", only what follows the last comma. In
        "X and Y, and Z is absent" the last comma begins another clause; in "X, Y, and Z" it does not."""
        joints = [joint for _, joint in self.items[1:]]
        *before, last = joints or [""]
        clause = last == "comma and" and "comma" not in before
        if self.items and not self.cue and (clause or all(joint == "comma" for joint in joints)):
            self._settle(len(self.items) - 1, denied=False)
        was_empty = not self.items
        self.cue = "deny"
        if not was_empty:
            self.end()

    def _end_list(self) -> None:
        """A verb ends a denied list. In "without X, Y fits" it ended at the comma, and Y is the subject; not
        so in "without X, Y, and Z", nor where the clause has one already: "W without X, Y and Z fits"."""
        if not self.cue or not self.items:
            return
        joints = [joint for _, joint in self.items[1:]]
        joined = "and" in joints or "comma and" in joints
        one_list = "or" in joints or (joined and (self.cue == "deny" or self.subject))
        one_list = one_list or joints[-1:] == ["comma and"]
        if self.touching and not one_list and "comma" in joints:
            self._settle(joints.index("comma") + 1, denied=True)
            self.cue = ""
        else:
            self.end()
