"""PubMed Central: articles on a label in a modality, by NCBI's E-utilities.

NCBI allows 3 requests a second, 10 with a key, asks for a tool's name and an address of mail, and wants large
jobs at night (21:00 to 5:00 US Eastern) or on weekends. All may read what is here, not all may reuse it: the
licence is each article's own, and one that the configuration does not list is passed over. Of an article that
a publisher does not give away, efetch sends the metadata with status 200; that is told from a body.
Neighbours: `jats.py` reads the articles, `cache.py` keeps them.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlencode

from data_pipeline.knowledge import jats
from data_pipeline.knowledge.cache import Cache
from data_pipeline.knowledge.passages import Article
from fundus_jax.records import DataError

HOST = "eutils.ncbi.nlm.nih.gov"
_UTILITIES = f"https://{HOST}/entrez/eutils"
PAUSE, PAUSE_WITH_KEY = 0.35, 0.11  # seconds between requests
TOOL = "fundus-jax"
KINDS = (  # of articles; corrections, letters and the like are none
    "research-article",
    "review-article",
    "systematic-review",
    "case-report",
    "brief-report",
    "rapid-communication",
    "other",
    "",
)

SKIPPED = ("metadata only", "licence", "retracted", "not an article of its own", "another answer")

# Words for the search; the retrieval after it uses the paper's question.
MODALITIES = {
    "CFP": '("fundus photograph*" OR "fundus photography" OR "colour fundus" OR "color fundus")',
    "OCT": '"optical coherence tomography"',
    "UWF": '("ultra-widefield" OR "ultrawide field" OR "ultra-wide field")',
}
LABELS = {
    "AMD": "age-related macular degeneration",
    "CNV": "choroidal neovascularization",
    "DME": "diabetic macular edema",
    "No DR": "diabetic retinopathy grading",
    "Mild NPDR": "mild nonproliferative diabetic retinopathy",
    "Moderate NPDR": "moderate nonproliferative diabetic retinopathy",
    "Severe NPDR": "severe nonproliferative diabetic retinopathy",
    "PDR": "proliferative diabetic retinopathy",
    "Normal": "normal retina",
    "Dry AMD": "dry age-related macular degeneration",
    "Wet AMD": "neovascular age-related macular degeneration",
}


class SkippedError(Exception):
    """An article that may not, or can not, be used; `kind` is one of SKIPPED."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def term(label: str, modality: str) -> str:
    """The query for a label in a modality, as PMC's search reads it."""
    words = LABELS.get(label, label).replace('"', " ")
    return f'({words}) AND {MODALITIES[modality]} AND "open access"[filter]'


def search(cache: Cache, label: str, modality: str, most: int, private: Mapping[str, str]) -> list[str]:
    """The numbers of at most `most` articles, by relevance. Raises DataError for another answer."""
    query = {"db": "pmc", "term": term(label, modality), "retmax": most, "sort": "relevance"}
    where = f"PMC's search for {label} in {modality}"
    address = f"{_UTILITIES}/esearch.fcgi?{urlencode({**query, 'retmode': 'json', 'tool': TOOL})}"

    def read(body: bytes) -> list[str]:
        try:
            result = json.loads(body)["esearchresult"]
            numbers = result["idlist"] if "ERROR" not in result else []
            fine = all(isinstance(one, str) and one.isascii() and one.isdigit() for one in numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: another answer ({error!r})") from None
        if "ERROR" in result or not fine:
            raise DataError(f"{where}: {str(result.get('ERROR', numbers))[:200]}")
        return numbers

    return read(cache.get(address, private, read))[:most]


def article(cache: Cache, number: str, licences: Collection[str], private: Mapping[str, str]) -> Article:
    """An article. Raises SkippedError for one that may not be used; FetchError where it could not be had."""
    query = {"db": "pmc", "id": number, "retmode": "xml", "tool": TOOL}
    address = f"{_UTILITIES}/efetch.fcgi?{urlencode(query)}"
    name = f"PMC{number}"

    def read(body: bytes) -> Any:
        try:
            return jats.read(body, name)
        except DataError as error:
            raise SkippedError("another answer", str(error)) from None

    found = read(cache.get(address, private, read))  # what is no answer of PMC is not kept
    if len(found) != 1:
        raise SkippedError("another answer", f"{name}: {len(found)} articles where one was asked for")
    [one] = found
    if one.retracted:
        raise SkippedError("retracted", f"{name}: retracted, or the notice of it")
    if one.kind not in KINDS:
        raise SkippedError("not an article of its own", f"{name}: is a {one.kind}")
    if not one.whole:
        raise SkippedError("metadata only", f"{name}: the publisher does not give the text")
    if one.licence not in licences:
        told = one.licence or f"not recognised: {one.licence_words!r}"
        raise SkippedError("licence", f"{name}: licence {told}")
    return Article(
        title=one.title or name,
        text="\n\n".join(one.paragraphs),
        source=f"PMC: {one.title or name}"[:300],
        address=f"https://pmc.ncbi.nlm.nih.gov/articles/{name}/",
        licence=one.licence,
    )
