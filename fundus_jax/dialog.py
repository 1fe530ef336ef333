"""The conversation grammar: prompts, think/answer text, lettered options and boxes; rendering and parsing.

Training, rewards and evaluation have to agree to the letter on what a question and a reply look like, so
both directions live here. Parsers read what a model under training wrote, which may be a megabyte of
anything: they take linear time and never raise. Neighbours: `records.py` has the `Example`, `findings.py` the
names of the findings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fundus_jax.records import Box, ConfigError, DataError, Example

STYLES = ("open", "options")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
THINK_INSTRUCTION = (
    "First describe what you see and reason step by step inside <think> </think>, "
    "then give the final answer inside <answer> </answer>."
)
ANSWER_INSTRUCTION = "Give only the final answer, inside <answer> </answer>."

_TAG = re.compile(r"</?(?:think|answer)>")
_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]
_LETTERED = re.compile(r"\(?([A-Z])(?:[.:)]+|$)\s*")
# Every gap and number is bounded and no class contains "<", so a failed start costs a bounded look-ahead.
_BOXES = re.compile(r"<ref>([^<>]{1,80})</ref>\s{0,4}<box>([^<>]{0,8000})</box>")
_NUMBERS = r"\s{0,4},\s{0,4}".join([r"(\d{1,3})"] * 4)
_BOX = re.compile(rf"\s{{0,4}}\[\s{{0,4}}{_NUMBERS}\s{{0,4}}\]\s{{0,4}}(,|$)")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reply holds. A part is None where it is absent, empty, unclosed or there twice."""

    think: str | None
    answer: str | None
    well_formed: bool


def messages(
    example: Example, style: str = "options", think: bool = True, *, instruct: bool = True
) -> list[dict]:
    """The prompt of an example in Hugging Face's message format: one user turn, image first.

    Args:
        example: its question and options are used; its answer is not.
        style: "open" for the question alone, "options" to list the lettered choices below it.
        think: which instruction follows, the one for a trace or the one for the bare answer.
        instruct: False leaves the instruction out, as in the small demo, whose policy knows one format only.
    """
    if style not in STYLES:
        raise ConfigError(f"prompt style is {style!r}; known styles are {', '.join(STYLES)}")
    parts = [example.question]
    if style == "options" and example.options:
        parts += [option_lines(example.options), "Choose the correct option and answer with its text."]
    if instruct:
        parts.append(THINK_INSTRUCTION if think else ANSWER_INSTRUCTION)
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


def parse(text: str) -> Parsed:
    """Reads a reply in linear time.

    `well_formed` is the format reward's question: the whole text is one think block and then one answer
    block, both filled, with nothing but white space around and between. A part is also given where the text
    is not well formed, as long as it is unambiguous: one opening and one closing tag, in this order.
    """
    tags = list(_TAG.finditer(text))
    think, answer = _only_block(text, tags, "think"), _only_block(text, tags, "answer")
    well_formed = (
        [tag.group() for tag in tags] == _ORDER
        and think is not None
        and answer is not None
        and not text[: tags[0].start()].strip()
        and not text[tags[1].end() : tags[2].start()].strip()
        and not text[tags[3].end() :].strip()
    )
    return Parsed(think, answer, well_formed)


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


def render_boxes(boxes: Sequence[Box]) -> str:
    """Boxes as "<ref>name</ref><box>[[x1, y1, x2, y2], ...]</box>", one group a finding."""
    groups: dict[str, list[list[int]]] = {}
    for box in boxes:
        groups.setdefault(box.finding, []).append([box.x1, box.y1, box.x2, box.y2])
    return "".join(f"<ref>{name}</ref><box>{corners}</box>" for name, corners in groups.items())


def parse_boxes(text: str) -> tuple[Box, ...] | None:
    """The boxes in a text, in linear time; None when it has no group of boxes or one of them is malformed.

    A text may stand around the groups. The name is given as written, without surrounding white space.
    """
    groups = list(_BOXES.finditer(text))
    if not groups or len(groups) != text.count("<box>") or len(groups) != text.count("<ref>"):
        return None
    boxes: list[Box] = []
    for group in groups:
        corners = _corners(group.group(2).strip())
        if not corners:
            return None
        try:
            boxes += [
                Box(finding=group.group(1).strip(), x1=x1, y1=y1, x2=x2, y2=y2) for x1, y1, x2, y2 in corners
            ]
        except DataError:  # an empty name, or a box without area: malformed is an answer here, not a failure
            return None
    return tuple(boxes)


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
