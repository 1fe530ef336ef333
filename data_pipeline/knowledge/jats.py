"""Articles in JATS, the XML of PubMed Central: title, licence, and the paragraphs that describe.

The bytes come from strangers. They are parsed by expat with handlers of our own: nothing outside of the bytes
is ever loaded, a declaration of an entity ends it, depth and number of elements are bounded. Kept is what a
reader would look for signs in: abstract, introduction, clinical features, imaging, discussion. Methods,
treatment, statistics, tables, captions and the marks of citations are left out.
Neighbour: `pmc.py` asks for the articles.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from fundus_jax.records import DataError

DEEPEST = 200  # elements in one another
MOST_ELEMENTS = 400_000
_DROPPED = {
    "table-wrap",
    "fig",
    "fig-group",
    "disp-formula",
    "inline-formula",
    "supplementary-material",
    "fn",
}
_SECTION = re.compile(
    r"method|material|statistic|treatment|management|therap|surg|fund|acknowledg|conflict|competing|interest|"
    r"ethic|consent|author|abbreviation|supplement|availab|reference|limitation|search strategy|prognos",
    re.IGNORECASE,
)
_CREATIVE = re.compile(
    r"creativecommons\.org/(?:licenses/(by(?:-nc)?(?:-sa|-nd)?)/|(publicdomain)/(zero|mark)/)", re.IGNORECASE
)
_WORDS = re.compile(
    r"creative commons attribution[\s-]*([a-z/\s-]*?)\s*(?:4\.0|3\.0|2\.\d|international|licen[cs]e)"
)


@dataclass(frozen=True, slots=True)
class JatsArticle:
    """An article as far as it matters here; `licence` is a short name, or "" when none could be read."""

    title: str
    kind: str
    licence: str
    licence_words: str
    retracted: bool
    whole: bool  # has a body, and is not the metadata alone
    paragraphs: tuple[str, ...]


def read(body: bytes, where: str) -> list[JatsArticle]:
    """The articles of a response of efetch, or the one of a file. Raises DataError naming `where`."""
    root = parse(body, where)
    found = [root] if root.tag == "article" else list(root.iter("article"))
    return [_article(one) for one in found]


def parse(body: bytes, where: str) -> Element:
    """The element tree of XML bytes. Raises DataError for what is not well-formed, declares entities, or is
    too deep or too large."""
    builder, parser = TreeBuilder(), expat.ParserCreate()
    depth = count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > DEEPEST or count > MOST_ELEMENTS:
            raise DataError(f"{where}: more than {DEEPEST} elements deep, or {MOST_ELEMENTS} in all")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def entity(*_: object) -> None:
        raise DataError(f"{where}: declares an entity, which no article needs")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = entity
    parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
    try:
        parser.Parse(body, True)
        return builder.close()
    except (expat.ExpatError, AssertionError) as error:
        raise DataError(f"{where}: not well-formed XML: {error}") from None


def _article(node: Element) -> JatsArticle:
    title = node.find(".//article-meta//article-title")
    licence = node.find(".//article-meta//permissions/license")
    body = node.find("body")
    kind = node.get("article-type", "")
    related = " ".join(one.get("related-article-type", "") for one in node.iter("related-article"))
    abstracts = [one for one in node.iterfind(".//article-meta//abstract") if not one.get("abstract-type")]
    paragraphs = [text for part in (*abstracts, body) if part is not None for text in _paragraphs(part)]
    return JatsArticle(
        title=_text(title) if title is not None else "",
        kind=kind,
        licence=_licence(licence) if licence is not None else "",
        licence_words=_text(licence)[:200] if licence is not None else "",
        retracted="retract" in kind or "retract" in related,
        whole=body is not None and any(True for _ in body.iter("p")),
        paragraphs=tuple(paragraphs),
    )


def _paragraphs(part: Element) -> Iterator[str]:
    """The paragraphs below an element, without those of sections that do not describe."""
    for child in part:
        if child.tag == "sec":
            title = child.find("title")
            if title is None or not _SECTION.search(_text(title)):
                yield from _paragraphs(child)
        elif child.tag == "p":
            if text := _text(child):
                yield text
        elif child.tag not in _DROPPED and child.tag != "title":
            yield from _paragraphs(child)


def _text(node: Element) -> str:
    """The words of an element on one line, without citations, tables and figures."""

    def pieces(one: Element) -> Iterator[str]:
        yield one.text or ""
        for child in one:
            if child.tag not in _DROPPED and not (child.tag == "xref" and child.get("ref-type") == "bibr"):
                yield from pieces(child)
            yield child.tail or ""

    text = " ".join("".join(pieces(node)).split())
    text = re.sub(r"\[[\s,;–-]*\]|\([\s,;–-]*\)", "", text)  # what the marks of citations stood in
    return re.sub(r"\s+([.,;:])", r"\1", text).strip()


def _licence(node: Element) -> str:
    """CC BY, CC BY-NC and so on, CC0 or public domain: by an address of Creative Commons, else by its words.
    Where addresses disagree, or the words name a restriction that the address does not, there is none."""
    told = [text for one in node.iter() for text in (*one.attrib.values(), one.text or "", one.tail or "")]
    names = set()
    for match in _CREATIVE.finditer(" ".join(told)):
        if match[1]:
            names.add(f"CC {match[1].upper()}")
        else:
            names.add("CC0" if match[3].lower() == "zero" else "public domain")
    words = _text(node).lower()[:5000]
    restricted = {
        part for part, word in (("NC", "non-?commercial"), ("ND", "no-?deriv")) if re.search(word, words)
    }
    if not names and (match := _WORDS.search(words)) and not match[1].strip(" -/"):
        names.add("CC BY")
    if len(names) != 1:
        return ""
    name = names.pop()
    missing = [part for part in restricted if part not in name]
    return "" if missing else name
