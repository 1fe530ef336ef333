"""EyeWiki, only for those who have its publisher's permission.

The notice on its pages forbids to put their content "into any artificial intelligence program, including
large language and generative AI models, without permission from the Academy". The paper used it; whoever has
the permission says so in the configuration, in words that are kept with the job. Nothing of EyeWiki is in
this repository. Its pages come by MediaWiki's interface, one request at a time.
"""

import json
from urllib.parse import urlencode

from data_pipeline.knowledge.cache import Cache
from data_pipeline.knowledge.passages import Article
from fundus_jax.records import ConfigError, DataError

HOST = "eyewiki.org"
PAUSE = 1.0  # seconds between requests
PERMISSION = "I have the publisher's permission"
LICENCE = (
    "all rights reserved by the American Academy of Ophthalmology; used by permission, not to be passed on"
)
_INTERFACE = f"https://{HOST}/w/api.php"


def require_permission(stated: str) -> None:
    """Raises ConfigError unless the permission is stated, with some words on whose it is."""
    if not stated.startswith(PERMISSION) or len(stated) < len(PERMISSION) + 8:
        raise ConfigError(
            f"eyewiki_permission is {stated!r}: EyeWiki's terms forbid its use in AI programs without the "
            "American Academy of Ophthalmology's permission. If you have it, write "
            f'"{PERMISSION}: by whom, when, for what"; otherwise leave eyewiki out of sources'
        )


def read(cache: Cache, label: str, modality: str, most: int) -> list[Article]:
    """The `most` pages that the wiki's own search finds for a label. Raises DataError for another answer."""
    found = _ask(cache, {"action": "query", "list": "search", "srsearch": label, "srlimit": most})
    try:
        titles = [str(one["title"]) for one in found["query"]["search"]][:most]
        return [article for title in titles for article in _page(cache, title)]
    except (KeyError, TypeError) as error:
        raise DataError(f"EyeWiki on {label} in {modality}: another answer ({error!r})") from None


def _page(cache: Cache, title: str) -> list[Article]:
    pages = _ask(cache, {"action": "query", "prop": "extracts", "explaintext": 1, "titles": title})
    address = f"https://{HOST}/{title.replace(' ', '_')}"
    return [
        Article(title, str(page["extract"]).replace("\n", "\n\n"), f"EyeWiki: {title}", address, LICENCE)
        for page in pages["query"]["pages"].values()
        if page.get("extract")
    ]


def _ask(cache: Cache, query: dict) -> dict:
    address = f"{_INTERFACE}?{urlencode({**query, 'format': 'json'})}"

    def read(body: bytes) -> dict:
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise DataError(f"{address}: no JSON ({error})") from None
        if not isinstance(answer, dict) or "query" not in answer:  # an error, such as too many requests
            raise DataError(f"{address}: another answer ({str(answer)[:200]})")
        return answer

    return read(cache.get(address, check=read))
