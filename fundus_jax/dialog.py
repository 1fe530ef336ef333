"""The conversation grammar: prompts, think/answer text, lettered options and boxes; rendering and parsing.

Training, rewards and evaluation have to agree to the letter on what a question and a reply look like, so
both directions live here. Parsers read what a model under training wrote, which may be a megabyte of
anything: they take linear time and never raise. Neighbours: `records.py` has the `Example`, `findings.py` the
names of the findings; whoever puts the text of strangers into a prompt makes it `harmless` first.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fundus_jax.records import GRID, Box, ConfigError, DataError, Example

STYLES = ("open", "options", "letters")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
THINK_INSTRUCTION = (
    "First describe what you see and reason step by step inside <think> </think>, "
    "then give the final answer inside <answer> </answer>."
)
CHOICES = {  # style -> what is asked for below the options
    "options": "Choose the correct option and answer with its text.",
    "letters": "Choose the correct option and answer with its letter.",
}
ANSWER_INSTRUCTION = "Give only the final answer, inside <answer> </answer>."
BOX_INSTRUCTION = (
    "Say where each finding lies as <ref>finding</ref><box>[[x1, y1, x2, y2], ...]</box>, with at most "
    f"{{most}} boxes a finding, in whole numbers from 0 to {GRID - 1} across and down the image."
)
WITHOUT_FINDINGS = ("modality", "laterality")  # tasks whose traces speak of the image, not of findings

_TAG = re.compile(r"</?(?:think|answer)>")
_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]
_LETTERED = re.compile(r"\(?([A-Z])(?:[.:)]+|$)\s*")
_PLACE_TAG = re.compile(r"</?(?:ref|box)>")
_GROUP = ["<ref>", "</ref>", "<box>", "</box>"]
_LONGEST_NAME = 80
_UNPLACED = re.compile(r"<box>[^<>]*</box>|</?(?:ref|box)>")
# Every gap and number is bounded, so a failed start costs a bounded look-ahead.
_NUMBERS = r"\s{0,4},\s{0,4}".join([r"(0|[1-9][0-9]{0,2})"] * 4)
_BOX = re.compile(rf"\s{{0,4}}\[\s{{0,4}}{_NUMBERS}\s{{0,4}}\]\s{{0,4}}(,|$)")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reply holds. A part is None where it is absent, empty, unclosed or there twice."""

    think: str | None
    answer: str | None
    well_formed: bool


@dataclass(frozen=True, slots=True)
class Places:
    """The boxes that a text says, and what it says wrongly: (name as far as it can be read, what is wrong).

    A group with one bad box gives no box at all, because nobody knows what the others are worth.
    """

    boxes: tuple[Box, ...]
    malformed: tuple[tuple[str, str], ...]


def messages(
    example: Example, style: str = "options", think: bool = True, *, instruct: bool = True, boxes: int = 0
) -> list[dict]:
    """The prompt of an example in Hugging Face's message format: one user turn, image first.

    Args:
        example: its question and options are used; its answer is not.
        style: "open" for the question alone, "options" to list the lettered choices below it and ask for the
            text of one, "letters" to ask for its letter.
        think: which instruction follows, the one for a trace or the one for the bare answer.
        instruct: False leaves the instruction out, as in the small demo, whose policy knows one format only.
        boxes: the instruction asks for so many boxes of a finding at most; 0 asks for none.
    """
    if style not in STYLES:
        raise ConfigError(f"prompt style is {style!r}; known styles are {', '.join(STYLES)}")
    parts = [example.question]
    if style in CHOICES and example.options:
        parts += [option_lines(example.options), CHOICES[style]]
    if instruct:
        parts.append(THINK_INSTRUCTION if think else ANSWER_INSTRUCTION)
    if instruct and think and boxes and example.task not in WITHOUT_FINDINGS:
        parts.append(BOX_INSTRUCTION.format(most=boxes))
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n".join(parts)}]}]


def reply(text: str) -> dict[str, Any]:
    """The assistant's turn that follows `messages`, in the same format."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def option_lines(options: Sequence[str]) -> str:
    """The choices under each other, lettered from A."""
    return "Options:\n" + "\n".join(f"{letter}. {text}" for letter, text in lettered(options).items())


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Letter -> text of each option. Raises DataError beyond 26 options."""
    if len(options) > len(LETTERS):
        raise DataError(f"{len(options)} options; there are letters for {len(LETTERS)}: shorten the list")
    return dict(zip(LETTERS, options, strict=False))


def render(think: str | None, answer: str) -> str:
    """A reply: "<think>...</think> <answer>...</answer>", or the answer block alone when `think` is None.

    Raises:
        DataError: when a part is empty or contains a tag, because `parse` could not read it back.
    """
    for name, part in (("think", think), ("answer", answer)):
        if part is not None and (not part.strip() or _TAG.search(part)):
            raise DataError(f"the {name} text {part[:80]!r} is empty or contains a tag of the format")
    block = f"<answer>{answer}</answer>"
    return block if think is None else f"<think>{think}</think> {block}"


def right_reply(example: Example, style: str) -> str:
    """The right answer as a reply in this style says it: the letter of its option, or its text."""
    if style != "letters" or not example.options:
        return example.answer
    return LETTERS[example.options.index(example.answer)]


def meant(answer: str | None, example: Example, style: str) -> str | None:
    """The answer in words that a reply says in this style: in "letters" the option that it names (`choose`),
    by its letter as it was asked to, or by its text, which the evaluation reads too; else as it stands."""
    if answer is None or style != "letters" or not example.options:
        return answer
    named = (text for letter, text in lettered(example.options).items() if same_answer(answer, letter))
    return next(named, None) or choose(answer, example.options)


def parse(text: str, *, think: bool = True) -> Parsed:
    """Reads a reply in linear time.

    `well_formed` is the format reward's question: the whole text is one think block and then one answer
    block, both filled, with nothing but white space around and between; or, where the prompt asked for no
    trace (`think` is False), one filled answer block alone. A part is also given where the text
    is not well formed, as long as it is unambiguous: one opening and one closing tag, in this order.
    """
    tags = list(_TAG.finditer(text))
    trace, answer = _only_block(text, tags, "think"), _only_block(text, tags, "answer")
    outside = [0, *(tag.end() for tag in tags[1::2])], [*(tag.start() for tag in tags[::2]), len(text)]
    well_formed = (
        [tag.group() for tag in tags] == (_ORDER if think else _ORDER[2:])
        and (trace is not None or not think)
        and answer is not None
        and not any(text[end:start].strip() for end, start in zip(*outside, strict=True))
    )
    return Parsed(trace, answer, well_formed)


def _only_block(text: str, tags: list[re.Match[str]], name: str) -> str | None:
    """The content of the one block of this name, or None; a tag of the other block inside disqualifies it."""
    opening = [i for i, tag in enumerate(tags) if tag.group() == f"<{name}>"]
    closing = [i for i, tag in enumerate(tags) if tag.group() == f"</{name}>"]
    if len(opening) != 1 or len(closing) != 1 or closing[0] != opening[0] + 1:
        return None
    return text[tags[opening[0]].end() : tags[closing[0]].start()].strip() or None


def outside(text: str) -> str:
    """What of a reply stands in none of its blocks, in linear time. A block that is not closed reaches to the
    end, and a closing tag that closes nothing is passed over."""
    pieces, begun, block = [], 0, ""
    for tag in _TAG.finditer(text):
        name = tag.group().strip("</>")
        if not block:
            pieces.append(text[begun : tag.start()])
            block = "" if tag.group().startswith("</") else name
        elif tag.group() == f"</{block}>":
            block = ""
        begun = tag.end()
    return " ".join(pieces + ([] if block else [text[begun:]]))


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are the same text, whatever their case, white space and trailing full stop."""
    return _plain(a) == _plain(b)


def _plain(answer: str) -> str:
    return " ".join(answer.split()).removesuffix(".").rstrip().casefold()


def choose(answer: str, options: Sequence[str]) -> str | None:
    """The option that an answer names by its text, its letter or both ("B", "(B)", "B. Mild NPDR"), or None.

    A text wins over a letter, and letter and text that disagree name nothing.
    """
    texts = {_plain(option): option for option in options}
    found = texts.get(_plain(answer))
    if found is not None:
        return found
    mark = _LETTERED.match(answer.strip())
    option = lettered(options).get(mark.group(1)) if mark else None
    if mark is None or option is None:
        return None
    rest = answer.strip()[mark.end() :]
    return option if not rest or same_answer(rest, option) else None


def positioned(example: Example, most: int) -> Example:
    """The example with the boxes that its trace says: `fewer` of them, none where no finding is asked about.

    With `most` 0, where traces say no boxes, it is the example as it is.
    """
    if not most:
        return example
    kept = () if example.task in WITHOUT_FINDINGS else fewer(example.boxes, most)
    return replace(example, boxes=kept)


def fewer(boxes: Sequence[Box], most: int) -> tuple[Box, ...]:
    """At most `most` boxes of each finding, the largest first; findings in the order of their first box.

    While a finding has more, the two of its boxes are joined (to the smallest box around both) that add least
    to the sum of (width + height) squared, the first such pair of several: overlapping and near ones go
    first, dots on one line last. So no place is lost, and the same boxes always give the same few.
    """
    groups: dict[str, list[Box]] = {}
    for box in boxes:
        groups.setdefault(box.finding, []).append(box)
    for group in groups.values():
        while len(group) > most:
            first, second = min(itertools.combinations(group, 2), key=lambda pair: _added(*pair))
            group[group.index(first)] = _around(first, second)
            group.remove(second)
        group.sort(key=lambda box: (-(box.x2 - box.x1) * (box.y2 - box.y1), box.y1, box.x1))
    return tuple(box for group in groups.values() for box in group)


def _around(a: Box, b: Box) -> Box:
    low, high = (min(a.x1, b.x1), min(a.y1, b.y1)), (max(a.x2, b.x2), max(a.y2, b.y2))
    return Box(finding=a.finding, x1=low[0], y1=low[1], x2=high[0], y2=high[1])


def _added(a: Box, b: Box) -> int:
    size = [(box.x2 - box.x1 + box.y2 - box.y1) ** 2 for box in (_around(a, b), a, b)]
    return size[0] - size[1] - size[2]


def render_boxes(boxes: Sequence[Box]) -> str:
    """Boxes as "<ref>name</ref><box>[[x1, y1, x2, y2], ...]</box>", one group a finding.

    Raises:
        DataError: a name that `parse_boxes` could not read back.
    """
    groups: dict[str, list[list[int]]] = {}
    for box in boxes:
        groups.setdefault(box.finding, []).append([box.x1, box.y1, box.x2, box.y2])
    for name in groups:
        if name != name.strip() or len(name) > _LONGEST_NAME or _PLACE_TAG.search(name):
            raise DataError(f"the finding {name[:_LONGEST_NAME]!r} is too long, padded or contains a tag")
    return "".join(f"<ref>{name}</ref><box>{corners}</box>" for name, corners in groups.items())


def parse_boxes(text: str) -> Places:
    """The boxes of a text, in linear time; the names as written, without surrounding white space.

    A group is malformed when a tag is missing or astray, when it is no list of boxes with four whole numbers
    of the grid, or when a box has no area. It is reported, never raised and never mended.
    """
    tags, boxes, malformed, at = list(_PLACE_TAG.finditer(text)), [], [], 0
    while at < len(tags):
        group = tags[at : at + 4]
        kinds = [tag.group() for tag in group]
        name = text[group[0].end() : group[1].start()].strip() if kinds[:2] == _GROUP[:2] else ""
        if kinds == _GROUP and not text[group[1].end() : group[2].start()].strip():
            found = _boxes(name, text[group[2].end() : group[3].start()])
            if isinstance(found, str):
                malformed.append((name[:_LONGEST_NAME], found))
            else:
                boxes += found
            at += 4
            continue
        malformed.append((name[:_LONGEST_NAME], f"{kinds[0]} opens no group of {' '.join(_GROUP)}"))
        at += 1
        while at < len(tags) and tags[at].group() != "<ref>":  # what else belongs to the broken group
            at += 1
    return Places(tuple(boxes), tuple(malformed))


def without_boxes(text: str) -> str:
    """A text with the names of its groups of boxes alone: neither corners nor tags, in linear time."""
    return _UNPLACED.sub("", text)


def _boxes(name: str, corners: str) -> list[Box] | str:
    """The boxes of one group, or what is wrong with it."""
    if not name or len(name) > _LONGEST_NAME:
        return f"the name has {len(name)} characters; 1 to {_LONGEST_NAME} are read"
    found = _corners(corners.strip())
    if not found:
        return f"not [[x1, y1, x2, y2], ...] in whole numbers from 0 to {GRID - 1}"
    empty = [list(one) for one in found if one[0] >= one[2] or one[1] >= one[3]]
    if empty:
        return f"{empty[0]} has no area: x1 < x2 and y1 < y2 are needed"
    return [Box(finding=name, x1=x1, y1=y1, x2=x2, y2=y2) for x1, y1, x2, y2 in found]


def _corners(text: str) -> list[tuple[int, int, int, int]] | None:
    if not (text.startswith("[") and text.endswith("]")):
        return None
    inner, position, corners, more = text[1:-1], 0, [], True
    while more:
        match = _BOX.match(inner, position)
        if match is None:
            return None
        x1, y1, x2, y2 = (int(match.group(i)) for i in range(1, 5))
        corners.append((x1, y1, x2, y2))
        position, more = match.end(), match.group(5) == ","
    return corners if position == len(inner) else None


def harmless(text: str) -> str:
    """`text` without anything that a chat template, a tokenizer or a reader would take for more than words.

    Compatibility forms become the plain characters (a full-width < is a <), so that nothing hides from the
    next steps. Control and format characters and variation selectors go: they show no glyph, and reorder or
    hide others. Angle brackets become ‹ and ›, which no control token has (<|im_start|>, </s>,
    <start_of_turn>), and [INST] and its like become (INST).
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C")
    text = re.sub("[\ufe00-\ufe0f\U000e0100-\U000e01ef]", "", text)
    text = text.translate({ord("<"): "‹", ord(">"): "›"})
    return re.sub(r"\[\s*(/?\s*[A-Z_]+)\s*\]", r"(\1)", text)
