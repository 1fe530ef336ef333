"""The notes are sound, BM25 finds the right one, and nothing is made up where it does not."""

import itertools

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from data_pipeline import jobs, knowledge_base
from data_pipeline.knowledge.index import QUERY, Bm25Retriever, split_notes
from data_pipeline.knowledge.note import FOLDER, read_note, read_notes, shipped_notes
from fundus_jax import findings
from fundus_jax.records import ConfigError, DataError, Knowledge, text_sha256
from tests.data_pipeline.made import example

FUNDUS = ("Normal", "No DR", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR", "Glaucoma", "AMD")
PAIRS = [
    *itertools.product(FUNDUS, ("CFP", "UWF")),
    *((label, "OCT") for label in ("Normal", "DME", "Drusen", "CNV")),
]
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


def test_there_is_a_note_for_every_pair_in_play() -> None:
    assert sorted((note.label, note.modality) for note in shipped_notes()) == sorted(PAIRS)


@pytest.mark.parametrize("note", shipped_notes(), ids=lambda note: note.address.rsplit("/", 1)[1])
def test_a_notes_text_says_what_its_front_matter_says(note) -> None:
    mentions = findings.parse_mentions(note.text)
    assert set(note.required) <= mentions.present <= {*note.required, *note.supportive}
    assert mentions.absent <= set(note.excluded)
    assert 2 <= note.text.count(".") - note.text.count("e.g.") <= 5
    assert note.address == f"{FOLDER}/{note.modality}-{note.label}.md".lower().replace(" ", "-")


@pytest.mark.parametrize(("label", "modality"), PAIRS)
def test_bm25_puts_the_right_note_first(retriever, label: str, modality: str) -> None:
    documents = retriever.invoke(QUERY.format(modality=modality, label=label))
    first = documents[0].metadata
    assert (first["label"], first["modality"]) == (label, modality)
    assert first["sha256"] == text_sha256(documents[0].page_content)
    assert first["licence"] == "Apache-2.0"
    assert first["references"]
    assert len(documents) <= retriever.k


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


def test_the_extractor_gives_the_record_of_the_note(retriever) -> None:
    extractor = knowledge_base.NotesExtractor(shipped_notes())
    (record,) = knowledge_base.build([("Moderate NPDR", "CFP")], retriever, extractor)
    assert isinstance(record, Knowledge)
    assert record.required == ("microaneurysm", "haemorrhage")
    assert "neovascularisation" in record.excluded
    assert {passage.address for passage in record.passages} == {f"{FOLDER}/cfp-moderate-npdr.md"}


def test_a_label_whose_note_is_not_among_the_first_passages_is_quarantined(retriever) -> None:
    extractor = knowledge_base.NotesExtractor(shipped_notes())
    (result,) = knowledge_base.build([("Macular hole", "OCT")], retriever, extractor)
    assert isinstance(result, jobs.Quarantine)
    assert result.key == "Macular hole/OCT"
    assert "no note on Macular hole in OCT" in result.reason
    others = Bm25Retriever(
        documents=[d for d in split_notes(shipped_notes()) if d.metadata["label"] != "PDR"]
    )
    (result,) = knowledge_base.build([("PDR", "CFP")], others, extractor)
    assert isinstance(result, jobs.Quarantine)  # the extractor has the note, and still must not use it


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
    with pytest.raises(DataError, match="no note on Macular hole"):
        knowledge_base.run(tmp_path / "other", pairs=[*PAIRS, ("Macular hole", "OCT")])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text(NOTE)
    again = knowledge_base.run(tmp_path / "out", pairs=[("Normal", "OCT")], notes=tmp_path / "notes")
    assert (again.answers, again.shards_done) == (1, 1)
    with pytest.raises(ConfigError, match="no label is in play"):
        knowledge_base.run(tmp_path / "out")


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
    for text in ("PDR", "FFA:PDR", "CFP:"):
        with pytest.raises(ConfigError, match="MODALITY:LABEL"):
            knowledge_base.parse_pairs(text)
