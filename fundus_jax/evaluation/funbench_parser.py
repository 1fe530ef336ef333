"""FunBench's own reading of an answer (SentenceSimilarity.process of its evaluate.py), step by step.

    1. line breaks, and the letters "and" wherever they stand, become ", "; brackets at both ends go;
    2. where several answers are right the text is split at commas, and each piece is read for itself;
    3. a letter; else a letter and a full stop at the beginning; else exactly an option; else the only option
       that is contained, case ignored;
    4. one answer that is none of these, or several of which no piece is any: the nearest option by
       all-MiniLM-L6-v2. Yes and No are compared as what they mean: the lesion's name, or "Abnormality", and
       "No ...".

So every answer is taken for some option. Its quirks are kept: "and" is cut out of "random"; pieces that
name nothing are dropped; in one answer a long text with exactly one option in it counts as that option,
also where it denies it. Two things differ on purpose: only the inside of the last <answer> block is read,
and where the script ends with an error (an empty answer, a letter beyond the options) the answer is None,
and is counted as unparsed. Neighbours: extract.py (the other modes), minilm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fundus_jax import dialog

Nearest = Callable[[str, Sequence[str]], int]


def read(
    answer: str, options: Sequence[str], *, multiple: bool, about: str, nearest: Nearest
) -> tuple[str, ...] | None:
    """The options that an answer chooses, in option order; None where the script ends with an error.

    Args:
        answer: the inside of the answer block.
        about: what Yes means where the options are Yes and No (`asked_about`).
        nearest: which of some texts is nearest to a text, as `minilm.model().nearest`.
    """
    whole = answer.replace("\n", ", ").replace("and", ", ").strip("()")
    if not multiple:
        piece = whole.strip()
        if not piece:
            return None
        letter = _letter(piece, options)
        if letter is None:
            meant = [_meaning(option, about) for option in options] if is_binary(options) else list(options)
            letter = dialog.LETTERS[nearest(piece, meant)]
        letters = {letter}
    else:
        pieces = [piece.strip() for piece in whole.split(",")]
        letters = {_letter(piece, options) for piece in pieces if piece} - {None}
        if not letters:
            letters = {dialog.LETTERS[nearest(answer, list(options))]}
    table = dialog.lettered(options)
    if any(letter not in table for letter in letters):
        return None
    return tuple(text for letter, text in table.items() if letter in letters)


def _letter(piece: str, options: Sequence[str]) -> str | None:
    if len(piece) == 1 and piece in dialog.LETTERS:
        return piece
    if piece[0] in dialog.LETTERS and piece[1:2] == ".":
        return piece[0]
    if piece in options:
        return dialog.LETTERS[options.index(piece)]
    inside = [k for k, option in enumerate(options) if option.lower() in piece.lower()]
    return dialog.LETTERS[inside[0]] if len(inside) == 1 else None


def is_binary(options: Sequence[str]) -> bool:
    """Whether a question is one of Yes and No."""
    return set(options) == {"Yes", "No"}


def _meaning(option: str, about: str) -> str:
    return about.capitalize() if option == "Yes" else f"No {about}"


def asked_about(part: str) -> str:
    """What Yes means in a question file: the lesion at the end of its name, underscores and all; or
    "abnormality", where the file asks for any disease."""
    return part.rsplit("-", 1)[-1] if "lesion" in part else "abnormality"
