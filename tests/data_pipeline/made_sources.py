"""Articles in JATS as efetch sends them, NCBI's answers to them, and small PDFs, for tests of the sources."""

from __future__ import annotations

import json
import zlib
from urllib.parse import parse_qs, urlsplit

from tests.data_pipeline.tls_server import answer


def licence_words(words: str, more: str = "") -> str:
    """A <license> with some words."""
    return f'<license license-type="open-access"><license-p>{words}{more}</license-p></license>'


CC_BY = (
    '<license><ali:license_ref xmlns:ali="http://www.niso.org/schemas/ali/1.0/" specific-use="textmining" '
    'content-type="ccbylicense">https://creativecommons.org/licenses/by/4.0/</ali:license_ref><license-p>'
    "Open access, under the terms of the Creative Commons Attribution License.</license-p></license>"
)
CC_BY_NC = (
    '<license license-type="open-access" xlink:href="https://creativecommons.org/licenses/by-nc/4.0/">'
    "<license-p>Creative Commons Attribution-NonCommercial License.</license-p></license>"
)
WORDS_ONLY = licence_words("Under the terms of the Creative Commons Attribution License, which permits use.")
BODY = """<sec sec-type="intro"><title>Introduction</title><p>Moderate nonproliferative disease is
characterized by multiple microaneurysms and dot-blot hemorrhages<xref ref-type="bibr" rid="B1">1</xref>,
which reflect a greater burden than mild disease [<xref ref-type="bibr" rid="B2">2</xref>,<xref
ref-type="bibr" rid="B3">3</xref>]. Hard exudates and cotton-wool spots may also be observed.</p></sec>
<sec><title>Clinical features</title><sec><title>Color photographs</title><p>In moderate disease there is no
neovascularization. <fig id="F1"><caption><p>A caption.</p></caption></fig>The posterior pole is involved
first.</p></sec></sec>
<sec sec-type="methods"><title>Materials and Methods</title><p>We used 12 cameras with a drusen
filter.</p></sec>"""


def jats(
    number: int,
    *,
    body: str | None = BODY,
    licence: str = CC_BY,
    kind: str = "review-article",
    title: str = "Grading of <italic>diabetic</italic> retinopathy",
    more: str = "",
) -> bytes:
    """One article of efetch's answer; body None is what a publisher gives who does not give the text."""
    whole = "" if body is None else f"<body>{body}</body>"
    silent = "<!--The publisher of this article does not allow downloading of the full text in XML form.-->"
    return f"""<?xml version="1.0" ?>
<!DOCTYPE pmc-articleset PUBLIC "-//NLM//DTD ARTICLE SET 2.0//EN" "https://dtd.nlm.nih.gov/nlm-articleset-2.0.dtd">
<pmc-articleset><article xmlns:xlink="http://www.w3.org/1999/xlink" xml:lang="en" article-type="{kind}">
{silent if body is None else ""}<front><journal-meta><journal-id journal-id-type="nlm-ta">J Made</journal-id>
</journal-meta><article-meta><article-id pub-id-type="pmcid">PMC{number}</article-id><title-group>
<article-title>{title}</article-title></title-group>{more}<permissions><copyright-statement>Copyright
2020</copyright-statement>{licence}</permissions><abstract><p>The grades of retinopathy rest on the lesions
that a photograph shows.</p></abstract><abstract abstract-type="graphical"><p>A picture.</p></abstract>
</article-meta></front>{whole}
<back><ref-list><ref id="B1"><mixed-citation>Somebody</mixed-citation></ref></ref-list></back></article>
</pmc-articleset>""".encode()


def ncbi(articles: dict[str, bytes]):
    """A handler that answers esearch with all numbers, in their order, and efetch with the article."""

    def handle(connection, request) -> None:
        parts = urlsplit(request.target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path.endswith("/esearch.fcgi"):
            found = {"count": str(len(articles)), "retmax": query["retmax"], "retstart": "0"}
            found |= {"idlist": list(articles)[: int(query["retmax"])], "querytranslation": query["term"]}
            told = {"header": {"type": "esearch", "version": "0.3"}, "esearchresult": found}
            connection.sendall(answer(json.dumps(told).encode(), Content_Type="application/json"))
        elif query["id"] in articles:
            connection.sendall(answer(articles[query["id"]], Content_Type="text/xml; charset=UTF-8"))
        else:
            connection.sendall(answer(b"", "404 Not Found"))

    return handle


def pdf(lines: list[str], *, bomb: bool = False) -> bytes:
    """A PDF of one page with some lines of text; a bomb unpacks to more than anybody should hold."""
    text = "BT /F1 12 Tf 14 TL 50 700 Td " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    stream = zlib.compress(bytes(400 << 20) if bomb else text.encode(), 9)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%b\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    tail = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + tail
