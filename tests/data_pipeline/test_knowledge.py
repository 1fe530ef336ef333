"""The notes are sound, BM25 finds the right one, and nothing is made up where it does not."""

import re

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from data_pipeline import jobs, knowledge_base
from data_pipeline.datasets import registry
from data_pipeline.knowledge import extract
from data_pipeline.knowledge.config import KnowledgeConfig
from data_pipeline.knowledge.index import QUERY, Bm25Retriever
from data_pipeline.knowledge.note import FOLDER, read_note, read_notes, shipped_notes, undescribed
from data_pipeline.knowledge.passages import split_notes
from data_pipeline.questions import DISEASES, GRADES
from fundus_jax import findings
from fundus_jax.records import ConfigError, DataError, Knowledge, text_sha256
from tests.data_pipeline.made import example

PAIRS = sorted((note.label, note.modality) for note in shipped_notes())
NOTE = """+++
label = "Normal"
modality = "OCT"
required = []
supportive = []
excluded = ["drusen"]
references = ["Somebody 2000. A paper. A journal 1:1-2"]
licence = "Apache-2.0"
+++
# Normal on OCT

Flat layers.
No drusen.
"""


@pytest.fixture(scope="module")
def retriever() -> Bm25Retriever:
    return Bm25Retriever(documents=split_notes(shipped_notes()))


def test_there_is_a_note_or_a_reason_for_every_label_that_a_data_set_can_give() -> None:
    asked = {(label, modality) for modality, labels in DISEASES.items() for label in labels}
    asked |= {(grade, modality) for modality in ("CFP", "UWF") for grade in GRADES}
    for name, row in registry.DATASETS.items():
        if "disease" in row.tasks:
            asked |= {(label, modality) for label in registry.diseases(name) for modality in row.modalities}
    assert asked == {*PAIRS, *undescribed()}
    assert not undescribed().keys() & set(PAIRS)


@pytest.mark.parametrize("note", shipped_notes(), ids=lambda note: note.address.rsplit("/", 1)[1])
def test_a_notes_text_says_what_its_front_matter_says(note) -> None:
    mentions = findings.parse_mentions(note.text)
    assert set(note.required) <= mentions.present <= {*note.required, *note.supportive}
    assert mentions.absent <= set(note.excluded)
    assert note.required or note.supportive or note.excluded
    assert 2 <= note.text.count(".") - note.text.count("e.g.") <= 5
    slug = re.sub("[^a-z0-9]+", "-", f"{note.modality}-{note.label}".lower())
    assert note.address == f"{FOLDER}/{slug}.md"


def test_bm25_puts_the_right_note_first_or_near(retriever) -> None:
    """Labels that are a part of another one (Myopia, Pathological myopia) may come after that one."""
    firsts = 0
    for pair in PAIRS:
        documents = retriever.invoke(QUERY.format(modality=pair[1], label=pair[0]))
        assert len(documents) <= retriever.k
        found = [(one.metadata["label"], one.metadata["modality"]) for one in documents]
        assert pair in found
        firsts += found[0] == pair
        assert documents[0].metadata["sha256"] == text_sha256(documents[0].page_content)
        assert documents[0].metadata["licence"] == "Apache-2.0"
        assert documents[0].metadata["references"]
    assert firsts >= 0.9 * len(PAIRS)


def test_the_rank_comes_from_the_words_of_the_query() -> None:
    texts = ["red red apple", "green pear", "red pear"]
    retriever = Bm25Retriever(documents=[Document(page_content=text) for text in texts], k=2)
    assert isinstance(retriever, BaseRetriever)
    assert [found.page_content for found in retriever.invoke("a red apple")] == ["red red apple", "red pear"]
    assert [found.page_content for found in retriever.invoke("green?")] == ["green pear"]
    assert retriever.invoke("unheard of") == []
    assert retriever.invoke("") == []
    with pytest.raises(ValueError, match="at least 1 item"):
        Bm25Retriever(documents=[])


def test_long_notes_are_split_and_each_piece_keeps_its_title() -> None:
    documents = split_notes(shipped_notes())
    assert len(documents) > len(shipped_notes())
    for document in documents:
        assert document.page_content.startswith(document.metadata["title"] + "\n")


def from_notes(retriever, label: str, modality: str) -> Knowledge:
    """The record of what the retriever finds for a label."""
    documents = retriever.invoke(QUERY.format(modality=modality, label=label))
    return extract.from_notes(label, modality, documents, shipped_notes())


def test_the_record_is_the_notes_and_each_finding_is_quoted(retriever) -> None:
    record = from_notes(retriever, "Moderate NPDR", "CFP")
    assert record.required == ("microaneurysm", "haemorrhage")
    assert "neovascularisation" in record.excluded
    assert {passage.address for passage in record.passages} == {f"{FOLDER}/cfp-moderate-npdr.md"}
    quoted = {(claim.finding, claim.role): claim.quote for claim in record.claims}
    assert "dot or blot haemorrhages" in quoted["haemorrhage", "required"]
    assert quoted["neovascularisation", "excluded"].endswith("are absent.")
    hole = from_notes(retriever, "Macular hole", "OCT")
    assert hole.claims[0].quote.startswith("A macular hole is a gap")  # and not the title, which names it too


def test_a_label_whose_note_is_not_among_the_first_passages_has_no_record(retriever) -> None:
    with pytest.raises(DataError, match="no note on Bird strike in OCT: the first passages are"):
        from_notes(retriever, "Bird strike", "OCT")
    others = [one for one in split_notes(shipped_notes()) if one.metadata["label"] != "PDR"]
    with pytest.raises(DataError, match="no note on PDR"):  # there is a note, and it still must not be used
        from_notes(Bm25Retriever(documents=others), "PDR", "CFP")


def test_pairs_in_play_are_answers_and_options_of_label_tasks() -> None:
    asked = [
        example(task="disease", options=("Normal", "PDR"), answer="PDR"),
        example(task="dr_grade", options=("No DR", "PDR"), answer="PDR"),
        example(task="lesion_presence", options=("Yes", "No"), answer="No"),
    ]
    assert knowledge_base.pairs_in_play(asked) == (("No DR", "CFP"), ("Normal", "CFP"), ("PDR", "CFP"))


def test_the_job_writes_all_pairs_and_starts_again_for_other_notes(tmp_path) -> None:
    summary = knowledge_base.run(tmp_path / "out", pairs=PAIRS)
    assert (summary.answers, summary.quarantined, summary.shards_done) == (len(PAIRS), 0, 1)
    records = list(jobs.read(tmp_path / "out", Knowledge))
    assert [(record.label, record.modality) for record in records] == sorted(PAIRS)
    assert knowledge_base.run(tmp_path / "out", pairs=PAIRS).shards_skipped == 1
    with pytest.raises(DataError, match="no note on Bird strike"):
        knowledge_base.run(tmp_path / "other", pairs=[("PDR", "CFP"), ("Bird strike", "OCT")])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text(NOTE)
    own = KnowledgeConfig(notes=str(tmp_path / "notes"))
    again = knowledge_base.run(tmp_path / "out", pairs=[("Normal", "OCT")], config=own)
    assert (again.answers, again.shards_done) == (1, 1)
    with pytest.raises(ConfigError, match="no label is in play"):
        knowledge_base.run(tmp_path / "out")


def test_labels_that_no_finding_is_characteristic_of_are_outside_of_the_notes(tmp_path) -> None:
    pairs = [("Cataract", "CFP"), ("PDR", "CFP")]
    summary = knowledge_base.run(tmp_path / "out", pairs=pairs)
    assert (summary.answers, summary.quarantined) == (1, 0)
    with pytest.raises(ConfigError, match=r"any label in play: see docs/knowledge\.md"):
        knowledge_base.run(tmp_path / "none", pairs=pairs[:1])


def test_a_note_is_read() -> None:
    note = read_note(NOTE, "a.md")
    assert (note.title, note.text, note.excluded) == ("Normal on OCT", "Flat layers. No drusen.", ("drusen",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("+++\nlabel", "label", "between two lines"),
        ('modality = "OCT"', 'modality = "FFA"', "needs a modality"),
        ('licence = "Apache-2.0"', 'licence = "mine"', "the licence Apache-2.0"),
        ('label = "Normal"', "label = 3", "label is 3"),
        ('label = "Normal"', "", r"front matter has \["),
        ('label = "Normal"', 'label = "Normal"\nextra = 1', r"front matter has \['excluded', 'extra'"),
        ("required = []", 'required = "drusen"', "expected a list"),
        ("required = []", 'required = ["drusen"]', "'drusen'.*two lists"),
        ("required = []", 'required = ["microaneurysm"]', "'microaneurysm'.*no findings of OCT"),
        ("required = []", 'required = ["lesion"]', "'lesion'.*no findings of OCT"),
        ("required = []", "required = [", "not TOML"),
        ("Flat layers.\nNo drusen.\n", "", "a title line"),
        ("# Normal", "Normal", "a title line"),
    ],
)
def test_a_bad_note_is_refused_by_name(old: str, new: str, message: str) -> None:
    assert old in NOTE
    with pytest.raises(DataError, match=f"a.md: .*{message}"):
        read_note(NOTE.replace(old, new), "a.md")


def test_two_notes_on_one_subject_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="no note"):
        read_notes(tmp_path)
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text(NOTE)
    with pytest.raises(DataError, match="a.md and b.md are both about Normal on OCT"):
        read_notes(tmp_path)


def test_pairs_of_the_command_line() -> None:
    assert knowledge_base.parse_pairs("") == ()
    assert knowledge_base.parse_pairs("CFP:PDR, OCT:DME") == (("PDR", "CFP"), ("DME", "OCT"))
    stage = ("Diabetic retinopathy, stage 1 of 3", "CFP")
    assert knowledge_base.parse_pairs("CFP:Diabetic retinopathy,, stage 1 of 3") == (stage,)
    for text in ("PDR", "FFA:PDR", "CFP:"):
        with pytest.raises(ConfigError, match="MODALITY:LABEL"):
            knowledge_base.parse_pairs(text)
