"""Reads the chosen option out of a model's answer.

Multiple-choice accuracy depends on how a sentence is turned into a letter, and published numbers were made
with VLMEvalKit's rules, which changed twice. Each period of those rules is a named mode here, so that a
number can be compared with the one it was printed beside:

    anywhere  until 2025-08-04: a single option letter at any place of the answer
    tail      2025-08-04 to 2026-06-17, the default: the first place of the letter must be among the last four
              tokens (its index > their number - 5); an answer over twice as long as all options together is
              not searched for option texts
    phrase    since 2026-06-17: "tail", then the phrase "answer is X" with X from A to D
    funbench  FunBench's own parser, whose last step is the nearest sentence embedding (funbench_parser.py)

Two things differ on purpose: the rules see the inside of the last <answer> block only, and VLMEvalKit's
random guess for an answer that names no option is left out; it stays `None` and is counted. A letter or
none as a language model reads it is no mode, but counted apart (by_server.py). Neighbours: dialog.py (what
an answer looks like), report.py (scores what comes out of here).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from fundus_jax import dialog
from fundus_jax.evaluation import funbench_parser, minilm
from fundus_jax.records import ConfigError

Mode = Literal["anywhere", "tail", "phrase", "funbench"]
MODES: tuple[Mode, ...] = get_args(Mode)
VLMEVALKIT: tuple[Mode, ...] = ("anywhere", "tail", "phrase")

_OPEN, _CLOSE = "<answer>", "</answer>"
_FAILED_CALL = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_TAIL_TOKENS = 4
# Only A to D, and no word boundary behind the letter: "the answer is Drusen" gives D. Both are upstream's.
_PHRASE = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)
_SEPARATOR = re.compile(r"[,;\n]|\band\b|(?<=\b[A-Z])\s*[&/]\s*(?=[A-Z]\b)", re.IGNORECASE)
_MARK = re.compile(r"\(?([A-Z])(?:[.):]|$)")  # a letter in front of its text: "B.", "(B)", "B:"


def answer_text(response: str) -> str:
    """Inside of the last closed <answer> block; else of an unclosed one; else the whole response."""
    end = response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, end) if end >= 0 else -1
    if start >= 0:
        return response[start + len(_OPEN) : end]
    start = response.rfind(_OPEN)
    return response[start + len(_OPEN) :] if start >= 0 else response


def extract_option(response: str, options: Mapping[str, str], mode: Mode = "tail") -> str | None:
    """Letter of the option that `response` chooses, or None when it names none, several, or refuses.

    `options` maps capital letters to option texts and is left as it is. The rules are those of VLMEvalKit's
    matching_util.py with its VERBOSE switch off, the default: an article "A" near the end counts as option A.
    Mode "funbench" takes Yes for "Abnormality" where the options are Yes and No; `chosen` knows the lesion.

    Raises:
        ConfigError: unknown mode, or an option key that is not one capital letter; in mode "funbench", when
        the optional package with the embeddings is not installed.
    """
    if mode not in MODES:
        raise ConfigError(f"extraction mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    wrong = [key for key in options if len(key) != 1 or key not in dialog.LETTERS]
    if wrong:
        raise ConfigError(
            f"option keys {wrong} are not single capital letters: number them with dialog.lettered"
        )
    if mode == "funbench":
        texts = list(options.values())
        found = chosen(response, texts, mode)
        return None if found is None else list(options)[texts.index(found[0])]
    return _extract(answer_text(response), options, mode, whole_words=False)


def chosen(
    response: str, options: Sequence[str], mode: Mode, *, multiple: bool = False, part: str = ""
) -> tuple[str, ...] | None:
    """Option texts that `response` chooses by the rules of a mode alone, as published numbers are made.

    VLMEvalKit has no rule for several right answers: there its modes read as `match_answers` does. `part` is
    the question file, by which FunBench's parser knows what Yes means.
    """
    if mode == "funbench":
        about, nearest = funbench_parser.asked_about(part), minilm.model().nearest
        answer = answer_text(response)
        return funbench_parser.read(answer, options, multiple=multiple, about=about, nearest=nearest)
    if multiple:
        return match_answers(response, options)
    table = dialog.lettered(options)
    letter = extract_option(response, table, mode)
    return None if letter is None else (table[letter],)


def _extract(answer: str, options: Mapping[str, str], mode: Mode, *, whole_words: bool) -> str | None:
    """`extract_option` on the inside of an answer block."""
    if _FAILED_CALL not in answer:
        if any(refusal in answer for refusal in _REFUSALS):
            return None
        tokens = answer.translate(_PUNCTUATION).split()
        named = [letter for letter in options if letter in tokens]
        if len(named) == 1 and (mode == "anywhere" or tokens.index(named[0]) >= len(tokens) - _TAIL_TOKENS):
            return named[0]
        if not named and "Z" in tokens:  # upstream's letter for "none of them"
            return None
        found = _PHRASE.search(answer) if mode == "phrase" else None
        if found and found.group(1).upper() in options:
            return found.group(1).upper()
    lower = answer.lower()
    if mode != "anywhere" and len(lower) > 2 * sum(len(text) for text in options.values()):
        return None
    inside = [letter for letter, text in options.items() if _stands_in(lower, text, whole_words)]
    return inside[0] if len(inside) == 1 else None


def _stands_in(lower: str, option: str, whole_words: bool) -> bool:
    """Whether an option's text stands in a lower-cased answer."""
    if not whole_words:
        return option.lower() in lower
    return re.search(rf"(?<!\w){re.escape(option.strip().lower())}(?!\w)", lower) is not None


def match_answer(
    response: str, options: Sequence[str], *, lettered: bool = False, mode: Mode = "tail"
) -> str | None:
    """Option text that `response` chooses, or None.

    The answer block has to be one of the options (`dialog.same_answer`). Where the prompt was lettered, "B",
    "B. text" (`dialog.choose`) and then the rules of `extract_option` count too, but a text only as whole
    words: upstream's substrings take "NPDR" for the option "PDR", and find two options in "Mild
    nonproliferative diabetic retinopathy", because "Proliferative diabetic retinopathy" is inside it.
    """
    answer = answer_text(response)
    if not lettered:
        return next((option for option in options if dialog.same_answer(answer, option)), None)
    exact = dialog.choose(answer, options)
    if exact is not None:
        return exact
    table = dialog.lettered(options)
    rules = "tail" if mode == "funbench" else mode
    letter = _extract(answer, table, rules, whole_words=True)
    return table[letter] if letter is not None else None


def match_answers(response: str, options: Sequence[str]) -> tuple[str, ...] | None:
    """Option texts that a choose-all-that-apply response names, in option order, or None when it names none.

    FunBench's reading of such answers (commas, semicolons, new lines and "and" separate; a piece is a letter,
    a letter with its text, an option text, or holds exactly one option text) without its last resort, the
    nearest sentence embedding, and without its quirks. A piece may lead in to a letter, its last word: "The
    answers are A". Pieces that name no option are ignored.
    """
    answer = answer_text(response)
    whole = dialog.choose(answer, options)
    if whole is not None:  # an option's text may itself hold a comma or "and"
        return (whole,)
    chosen = {_piece(piece.strip(), options) for piece in _SEPARATOR.split(answer)}
    return tuple(option for option in options if option in chosen) or None


def _piece(piece: str, options: Sequence[str]) -> str | None:
    """Option of one piece of a list of answers."""
    named = dialog.choose(piece, options)
    if named is not None or not piece:
        return named
    mark = _MARK.match(piece)
    letter = mark.group(1) if mark else piece.strip("().*[]{}")
    if letter in (table := dialog.lettered(options)):
        return table[letter]
    inside = [option for option in options if _stands_in(piece.lower(), option, whole_words=True)]
    if inside:
        return inside[0] if len(inside) == 1 else None
    words = piece.translate(_PUNCTUATION).split()
    return table.get(words[-1]) if words else None
