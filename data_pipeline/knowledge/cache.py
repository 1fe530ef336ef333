"""Pages that were fetched, on disk: a second run asks nobody, and reads what the first one read.

    pages/SHA256.json    address, where redirects led, kind, sha256 of the body; named for the address
    bodies/SHA256        the body

A search is kept like a page. So a knowledge base stays as it was until the folder is deleted, or another one
is named; it can be copied to machines without network. Neighbour: `net.py` fetches.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from data_pipeline import files
from data_pipeline.net import Fetcher
from fundus_jax.records import ConfigError, DataError, text_sha256


class MissingError(ConfigError):
    """A page that is not in the cache, and may not be fetched."""


class Cache:
    """The pages in a folder; `fetcher` gets what is missing, None means that nothing may be missing."""

    def __init__(self, folder: Path, fetcher: Fetcher | None) -> None:
        self.folder, self.fetcher = folder, fetcher

    def get(
        self,
        address: str,
        private: Mapping[str, str] | None = None,
        check: Callable[[bytes], object] = bytes,
    ) -> bytes:
        """The body at an address.

        Args:
          address: of the page.
          private: parameters that go out with the request and are kept nowhere.
          check: is given a body that was fetched, and raises where it should not be kept.

        Raises FetchError, MissingError offline, DataError for a page that was changed on disk, and what
        `check` raises.
        """
        entry = self.folder / "pages" / f"{text_sha256(address)}.json"
        if not entry.exists():
            self._fetch(address, private, check, entry)
        try:
            noted = json.loads(entry.read_text(encoding="utf-8"))
            body = self.folder / "bodies" / noted["sha256"]
            if noted["address"] == address and files.sha256(body) == noted["sha256"]:
                return body.read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{entry}: can not be read ({error}); delete it, it is fetched again") from None
        raise DataError(f"{entry}: its body is not the one that was fetched; delete both")

    def _fetch(
        self, address: str, private: Mapping[str, str] | None, check: Callable[[bytes], object], entry: Path
    ) -> None:
        if self.fetcher is None:
            raise MissingError(
                f"{address} is not in {self.folder}; run once without offline, or copy the folder"
            )
        page = self.fetcher.get(address, private)
        check(page.body)
        for name in ("pages", "bodies"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        digest = files.bytes_sha256(page.body)
        files.write_atomic(self.folder / "bodies" / digest, page.body)
        noted = {"address": address, "led_to": page.address, "kind": page.kind, "sha256": digest}
        files.write_atomic(entry, json.dumps(noted, indent=1) + "\n")
