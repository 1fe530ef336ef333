"""Recognises texts that speak to a machine: orders, forged roles and delimiters, hidden or encoded text.

An article on the eye has no reason to address a language model, so one that does is left out as a whole, and
counted; what an honest article loses by this is one source of many. It is the coarse sieve. That a text which
passes it can change neither label nor schema is the work of `claims.py`; that its sentences are true is
nobody's but the clinician's who reads the entry.
"""

import re

from fundus_jax.dialog import harmless

_HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")  # reorders or hides text
_MIXED = re.compile(r"[a-zA-Z][\u0400-\u04ff]|[\u0400-\u04ff][a-zA-Z]")  # Cyrillic letters that pose as Latin
_RUN = re.compile(r"[A-Za-z0-9+/=_-]{100}")  # base64, or another code; no word is as long
_TOLD = {
    "an order to a model": (
        r"\b(ignor|disregard|forget|overrid|bypass)\w*\b[^.]{0,40}\b(all|any|the|these|your|previous|prior|above|"
        r"system|les|las|alle)\s+(\w+\s+)?(instruc\w*|prompts?|rules?|anweisung\w*)\b",
        r"\b(ignor|disregard|forget)\w*\b[^.]{0,30}\b(everything|anything|all)\b[^.]{0,20}\b(above|before|prior)\b",
        "忽略|无视|忽視",  # "ignore", for articles that hide it from English readers
        r"\b(previous|prior|above|system|new|updated|hidden|secret|following) (instruction|prompt)s?\b",
        r"\byou (are|act as) (now )?(an? |the )?(\w+ )?(ai|assistant|language model|chatbot|llm)\b",
        r"\b(ai|language) (model|assistant)s?\b[^.]{0,40}\b(must|should|shall|please|have to)\b",
        r"\b(output|respond|reply|answer|return|print)\b[^.]{0,40}\b(json|schema|yaml|only|exactly)\b",
        r"\b(set|change|replace|rename|relabel|overwrite)\b[^.]{0,30}\b(label|modality|diagnosis|schema)\b",
        r"\b(move|add|put|mark|list|classify)\b[^.]{0,60}\b(as|to|under|into) (the )?"
        r"(required|supportive|excluded)\b",
    ),
    "a forged role or delimiter": (
        r"im_start|im_end|endoftext|begin_of_text|start_header_id|eot_id|start_of_turn|\(/?(inst|sys)\)|‹/?s›",
        r"(?:^|[#*|›])\W{0,5}(system|assistant|developer|user|human)( message| prompt)?\s*:",
        r"\bpassages?\b[^.\n]{0,30}\b(begins?|ends?)\b",
        r"‹/?\s*(script|style|iframe|system|user|assistant|tool|passages?|claims?)\b",
    ),
    "a piece of code": (
        r"[\"'](claims?|required|supportive|excluded|quote|finding|label|modality|role|passage)[\"']\s*:",
        r"```|!\[[^\]\n]{0,200}\]\(|\]\(\s*(https?|data|javascript):|\bdata:[a-z]+/|javascript:",
    ),
}
_PATTERNS = [(why, re.compile("|".join(patterns), re.MULTILINE)) for why, patterns in _TOLD.items()]


def suspicion(text: str) -> str:
    """Why a text from outside should not be shown to a model; "" where nothing speaks against it."""
    if _HIDDEN.search(text):
        return "hidden characters"
    plain = harmless(text)
    if _MIXED.search(plain):
        return "letters of two scripts in one word"
    if _RUN.search(plain):
        return "an unbroken run of letters, as of an encoded text"
    spoken = re.sub(r"[^\S\n]+", " ", plain).casefold()
    return next((why for why, pattern in _PATTERNS if pattern.search(spoken)), "")
