"""What becomes of a model's claims: quotations only, by names of the table, in the role a sentence gives."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document

from data_pipeline.knowledge import claims
from data_pipeline.knowledge.claims import REASONS, Said, checked, compose, named
from data_pipeline.knowledge.passages import Article, split_articles
from fundus_jax.records import DataError

TEXT = (
    "In moderate NPDR, multiple microaneurysms and dot-blot hemorrhages are characteristic (Fig. 2). "
    "Hard exudates and cotton-wool spots may also be observed. There is no evidence of "
    "neovascularization, and arteriolar narrowing is no feature. On OCT, intraretinal fluid may be found."
)


@pytest.fixture
def documents() -> list[Document]:
    return split_articles([Article("A title", TEXT, "a source", "an address", "CC BY")])


def said(quote: str, finding: str, role: str = "required", passage: int = 1) -> Said:
    return Said(passage, quote, finding, role)


def test_a_quotation_is_widened_to_its_sentence_and_the_finding_gets_its_name(documents) -> None:
    (claim,), dropped = checked(
        [said("dot-blot  hemorrhages ARE characteristic", "dot-blot hemorrhages")], documents, "CFP"
    )
    assert dropped == ()
    assert (claim.finding, claim.role) == ("haemorrhage", "required")
    assert claim.quote == TEXT[: TEXT.index(" Hard")]
    assert claim.passage == documents[0].metadata["sha256"]


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (said("microaneurysms and dot-blot", "microaneurysm", passage=0), "no such passage"),
        (said("microaneurysms and dot-blot", "microaneurysm", passage=2), "no such passage"),
        (said("drusen are characteristic", "drusen"), "not in the passage"),
        (said("microaneurysms", "microaneurysm"), "not in the passage"),  # one word is no quotation
        (said("Hard exudates and cotton-wool spots", "drusen"), "not named in the quotation"),
        (said("evidence of neovascularization", "neovascularization"), "denied in the quotation"),
        (
            said("cotton-wool spots may also be observed", "cotton-wool spots", "excluded"),
            "claimed in the quotation",
        ),
        (said("intraretinal fluid may be found", "intraretinal fluid"), "another modality"),
        (said("Hard exudates and cotton-wool spots", "lacquer cracks"), "not named in the quotation"),
    ],
)
def test_what_no_sentence_says_is_dropped_with_the_reason(documents, one: Said, reason: str) -> None:
    kept, dropped = checked([one], documents, "CFP")
    assert kept == ()
    assert [lost.reason for lost in dropped] == [reason]
    assert reason in REASONS


def test_a_quotation_cut_out_of_a_denial_does_not_turn_it_round(documents) -> None:
    """The words alone claim it; their sentence denies it."""
    quote = "neovascularization, and arteriolar narrowing is"
    assert checked([said(quote, "neovascularisation", "supportive")], documents, "CFP")[0] == ()
    (claim,), _ = checked([said(quote, "new vessels", "excluded")], documents, "CFP")
    assert (claim.finding, claim.role) == ("neovascularisation", "excluded")


def test_a_very_long_sentence_is_no_quotation() -> None:
    text = "Drusen are seen " + "and seen again " * 45 + "here."
    documents = split_articles([Article("t", text, "s", "a", "CC BY")])
    [lost] = checked([said("Drusen are seen", "drusen")], documents, "CFP")[1]
    assert lost.reason == "too long"


def test_roles_are_disjoint(documents) -> None:
    twice = [
        said("multiple microaneurysms", "microaneurysms", "supportive"),
        said("multiple microaneurysms", "red dots", "required"),
        said("multiple microaneurysms and", "MA", "required"),
    ]
    kept, dropped = checked(twice, documents, "CFP")
    assert [(one.finding, one.role) for one in kept] == [("microaneurysm", "required")]
    assert dropped == ()
    more = split_articles(
        [Article("t", f"{text} It is seen in the clinic every day.", "s", "a", "CC BY") for text in (
            "Drusen are a sign of the disease in the elderly.", "There are no drusen in the disease at all.")]
    )  # fmt: skip
    against = [said("Drusen are a sign", "drusen"), said("There are no drusen", "drusen", "excluded", 2)]
    kept, dropped = checked(against, more, "CFP")
    assert kept == ()
    assert [one.reason for one in dropped] == ["contradicted by another claim"] * 2


def test_what_the_table_does_not_know_is_kept_as_text(documents) -> None:
    kept, _ = checked(
        [
            said("arteriolar narrowing is no feature", "arteriolar narrowing"),
            said("multiple microaneurysms", "microaneurysm"),
        ],
        documents,
        "CFP",
    )
    record = compose("Moderate NPDR", "CFP", kept, documents)
    assert record.required == ("microaneurysm",)
    assert [(one.finding, one.role) for one in record.claims] == [
        ("microaneurysm", "required"),
        ("arteriolar narrowing", "other"),
    ]
    assert "arteriolar narrowing" in record.text
    assert record.passages[0].licence == "CC BY"
    with pytest.raises(DataError, match="no claim on X in CFP holds"):
        compose("X", "CFP", [one for one in kept if one.role == "other"], documents)


def test_only_passages_that_are_quoted_stay() -> None:
    more = split_articles(
        [Article("t", f"Drusen are seen, {n} of them. " * 3, "s", f"a{n}", "CC0") for n in range(3)]
    )
    kept, _ = checked([said("Drusen are seen, 1", "drusen", passage=2)], more, "CFP")
    assert [one.address for one in compose("Drusen", "CFP", kept, more).passages] == ["a1"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("multiple dot-blot hemorrhages", "haemorrhage"),
        ("soft drusen", "drusen"),
        ("absence of hard exudates", "hard exudate"),
        ("choroidal neovascularization", None),
        ("microaneurysms and haemorrhages", None),
        ("cherry-red spot", None),
    ],
)
def test_words_become_one_finding_or_none(words: str, name: str | None) -> None:
    assert named(words) == name


def test_findings_of_a_known_role_get_the_sentence_that_says_so(documents) -> None:
    roles = {"required": ("microaneurysm",), "supportive": ("drusen",), "excluded": ("neovascularisation",)}
    found = claims.quoted(documents, roles)
    assert [(one.finding, one.role) for one in found] == [
        ("microaneurysm", "required"),
        ("neovascularisation", "excluded"),
    ]
    assert found[1].quote.startswith("There is no evidence")
