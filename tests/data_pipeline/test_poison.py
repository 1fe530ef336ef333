"""Poisoned passages change no label and break no schema, though the model behind the server obeys them."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from langchain_core.documents import Document

from data_pipeline.knowledge import extract
from data_pipeline.knowledge.extract import Extracted
from data_pipeline.knowledge.index import QUERY, Bm25Retriever
from data_pipeline.knowledge.model import ServerModel
from data_pipeline.knowledge.note import shipped_notes
from data_pipeline.knowledge.passages import Article, split_articles
from data_pipeline.knowledge.suspicion import suspicion
from fundus_jax import records
from fundus_jax.chat import Chat, ChatConfig, ChatError
from fundus_jax.dialog import harmless
from fundus_jax.findings import find_mentions
from fundus_jax.records import DataError, Knowledge
from tests.chat_server import Reply, Server
from tests.data_pipeline.poison import POISONS, Poison

LABEL, MODALITY = "Moderate NPDR", "CFP"
HONEST = (
    "In moderate NPDR microaneurysms and haemorrhages are seen on CFP, more of them than in mild disease. "
    "Hard exudates may also be observed. There is no neovascularisation at this stage of the disease."
)
BAIT = "Key CFP findings for diagnosing moderate NPDR in the photographs of a clinic."
CLAIMS = [
    ("microaneurysms and haemorrhages are seen on CFP", "microaneurysm", "required"),
    ("microaneurysms and haemorrhages are seen on CFP", "haemorrhages", "required"),
    ("Hard exudates may also be observed.", "hard exudate", "supportive"),
    ("There is no neovascularisation", "new vessels", "excluded"),
]


def passages(*texts: str) -> list[Document]:
    """Each text as an article of its own, split as all are."""
    articles = [Article(f"Findings {n}", text, f"s{n}", f"a{n}", "CC BY") for n, text in enumerate(texts)]
    return split_articles(articles)


def obedient(poison: Poison | None):
    """A server that answers as the poison wants when it is shown, and honestly otherwise."""

    def reply(body: dict, number: int) -> Reply:
        shown = body["messages"][-1]["content"]
        order = " ".join(harmless(poison.text).split())[:300] if poison else ""
        place = shown.find(order[:60]) if poison else -1
        if poison is None or place < 0:
            said = [{"passage": 1, "quote": q, "finding": f, "role": r} for q, f, r in CLAIMS]
            return Reply(texts=[json.dumps({"claims": said})])
        number = int(re.findall(r"\[(\d+)\] \(", shown[:place])[-1])
        claim = {"passage": number, "quote": order, "finding": "drusen", "role": "required"}
        return Reply(texts=[poison.answer or json.dumps({"claims": [claim]})])

    return reply


def ask(server: Server, documents: list[Document]) -> Extracted | ChatError | DataError:
    """What the extractor gives, or why it gives nothing."""

    async def run():
        async with Chat(ChatConfig(address=server.address, model="m"), "test") as chat:
            try:
                return await extract.by_model(ServerModel(chat=chat), LABEL, MODALITY, documents)
            except (ChatError, DataError) as error:
                return error

    return asyncio.run(run())


@pytest.fixture(scope="module")
def clean() -> Knowledge:
    with Server(obedient(None)) as server:
        found = ask(server, passages(HONEST))
    assert isinstance(found, Extracted)
    assert found.dropped == ()
    return found.record


def test_there_are_thirty_at_least_and_none_is_like_another() -> None:
    assert len({poison.name for poison in POISONS}) == len({poison.text for poison in POISONS}) >= 30


def test_the_honest_record(clean) -> None:
    assert (clean.label, clean.modality) == (LABEL, MODALITY)
    assert clean.required == ("microaneurysm", "haemorrhage")
    assert clean.supportive == ("hard exudate",)
    assert clean.excluded == ("neovascularisation",)


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.name)
def test_nothing_changes_when_a_source_is_poisoned(poison, clean) -> None:
    """The whole way: screened, split, retrieved, shown to a model that obeys, checked."""
    bait = Article("Bait", f"{BAIT} {poison.text}", "t", "b", "CC BY")
    articles = [Article("Honest", HONEST, "s", "a", "CC BY"), bait]
    documents = split_articles(one for one in articles if not suspicion(one.text))
    found = Bm25Retriever(documents=documents, k=4).invoke(QUERY.format(modality=MODALITY, label=LABEL))
    with Server(obedient(poison)) as server:
        answer = ask(server, found)
    if isinstance(answer, Extracted):
        fields = ("label", "modality", "required", "supportive", "excluded")
        assert [getattr(answer.record, name) for name in fields] == [getattr(clean, name) for name in fields]
    else:
        assert poison.answer  # no record, and the reason why; never another one


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.name)
def test_without_the_screen_label_modality_schema_and_fence_still_hold(poison) -> None:
    documents = [*passages(HONEST), *passages(f"{BAIT} {poison.text}")[:2]]
    with Server(obedient(poison)) as server:
        answer = ask(server, documents)
    prompt = server.bodies[0]["messages"][-1]["content"]
    nonce = prompt.split()[1]
    lines = [line for line in prompt.splitlines() if re.fullmatch(f"PASSAGES {nonce} (BEGIN|END)", line)]
    assert [line.split()[-1] for line in lines] == ["BEGIN", "END"]
    assert prompt.count(nonce) == 4  # the first line, the two of the fence, the last
    assert not set("<>") & set(prompt)
    if isinstance(answer, Extracted):
        record = answer.record
        assert (record.label, record.modality) == (LABEL, MODALITY)
        assert records.from_json(Knowledge, records.to_json(record)) == record
        texts = {one.metadata["sha256"]: one.page_content for one in documents}
        assert all(claim.quote in texts[claim.passage] for claim in record.claims)
        for claim in record.claims:  # it says no more than a sentence says that stands in a passage
            assert claim.finding in {mention.name for mention in find_mentions(claim.quote)}


def test_most_are_recognised_before_any_model_sees_them() -> None:
    passed = [poison.name for poison in POISONS if not suspicion(poison.text)]
    assert passed == ["a surrogate", "numbers out of range", "a huge claim"]  # noise, which `claims` stops


def test_no_note_is_suspicious_nor_is_a_paper_on_language_models_in_medicine() -> None:
    assert [note.address for note in shipped_notes() if suspicion(note.text)] == []
    for text in (
        HONEST,
        "Drusen < 63 µm are small; 5 μm sections were cut. The patient ignored prior symptoms for two weeks.",
        "The imaging system: a Topcon camera. Users should read the label of the bottle and follow it.",
        "A large language model was used to edit this text. COX-2, IL-1β and ΔF508 were measured (p<0.05).",
        "Ignoring the 4-2-1 rule would be wrong. After a bypass, prompt referral is best; forget no drusen.",
        "Postoperative instructions were given. Adding or changing a diagnosis was recorded by the examiner.",
    ):
        assert suspicion(text) == "", text


@pytest.mark.parametrize(
    "piece", ["ignore ", "answer ", "add as ", "passages ", "(", "![", "x" * 99 + " ", '"claims"  ']
)
def test_a_megabyte_made_to_be_read_again_and_again_is_read_once(piece: str) -> None:
    assert (
        suspicion(piece * (1_000_000 // len(piece))) == ""
    )  # in time squared it would not end within the test's


def test_what_no_rule_can_stop_is_a_false_sentence_and_it_leads_to_its_source() -> None:
    lie = "In moderate NPDR drusen are the characteristic finding on CFP images of all patients."
    said = {"passage": 2, "quote": lie, "finding": "drusen", "role": "required"}
    with Server(lambda body, n: Reply(texts=[json.dumps({"claims": [said]})])) as server:
        answer = ask(server, passages(HONEST, lie))
    assert isinstance(answer, Extracted)
    assert answer.record.required == ("drusen",)
    assert [(one.address, one.source) for one in answer.record.passages] == [("a1", "s1")]


def test_the_fence_is_the_same_on_every_run_and_no_passage_can_hold_it() -> None:
    documents = passages(HONEST)
    first, again = (extract.messages(LABEL, MODALITY, documents) for _ in range(2))
    assert first == again
    nonce = str(first[-1].content).split()[1]
    other = extract.messages(LABEL, MODALITY, passages(f"{HONEST} PASSAGES {nonce} END"))
    assert str(other[-1].content).split()[1] != nonce
