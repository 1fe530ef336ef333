"""The finding table and the mention parser: words, modalities, negation, speed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundus_jax import findings
from fundus_jax.findings import FINDINGS, canonical, find_mentions, parse_mentions
from fundus_jax.records import MODALITIES, ConfigError
from tests.growth import LINEAR, growth

MA, RH, HE, CWS = "microaneurysm", "haemorrhage", "hard exudate", "cotton-wool spot"
NV, VH, DR, CUP = "neovascularisation", "vitreous haemorrhage", "drusen", "large cup"
IRF, SRF, PED = "intraretinal fluid", "subretinal fluid", "pigment epithelial detachment"


def test_vocabulary_is_the_contract() -> None:
    assert findings.vocabulary("CFP") == (MA, RH, HE, CWS, NV, VH, DR, CUP)
    assert findings.vocabulary("UWF") == findings.vocabulary("CFP")
    assert set(findings.vocabulary("OCT")) == {IRF, SRF, PED, DR}
    assert {"preretinal haemorrhage", "venous beading", "irma", "macular hole"} <= set(
        findings.vocabulary("CFP", extended=True)
    )
    with pytest.raises(ConfigError, match="FFA"):
        findings.vocabulary("FFA")


def test_the_table_is_well_formed() -> None:
    for name, row in FINDINGS.items():
        assert name == row.name == name.lower()
        assert row.modalities
        assert set(row.modalities) <= set(MODALITIES)
        for word in (name, row.plural, *row.synonyms, *row.abbreviations):
            words = word.removeprefix("a ").removeprefix("an ")
            assert canonical(words) == name, word
            assert parse_mentions(f"The image shows {word} here.").present == {name}, word
            assert parse_mentions(f"There is no {words}.").absent == {name}, word


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Microaneurysms", MA),
        ("MAs", MA),
        ("hemorrhage", RH),
        ("Dot-blot hemorrhages", RH),
        ("exudates.", HE),
        ("soft exudates", CWS),
        ("cotton wool spots", CWS),
        ("new vessels", NV),
        ("neovascularization", NV),
        ("Vitreous Hemorrhage", VH),
        ("enlarged cup-to-disc ratio", CUP),
        ("increased cup/disc ratio", CUP),
        ("pigment epithelium detachments", PED),
        ("he", None),
        ("ma", None),
        ("optic disc", None),
        ("microaneurysms and drusen", None),
        ("", None),
        (".", None),
    ],
)
def test_canonical(text: str, name: str | None) -> None:
    assert canonical(text) == name


@pytest.mark.parametrize(
    ("text", "present", "absent"),
    [
        ("The image shows microaneurysms and haemorrhages.", {MA, RH}, set()),
        ("No microaneurysms, haemorrhages or exudates.", set(), {MA, RH, HE}),
        ("It shows microaneurysms and haemorrhages, and neovascularisation is not seen.", {MA, RH}, {NV}),
        ("The image shows drusen, and haemorrhages are absent.", {"drusen"}, {RH}),
        ("Microaneurysms, haemorrhages, and hard exudates are absent.", set(), {MA, RH, HE}),
        (
            "Microaneurysms without haemorrhages, hard exudates, and cotton-wool spots fit.",
            {MA},
            {RH, HE, CWS},
        ),
        (
            "Microaneurysms without haemorrhages, hard exudates and cotton-wool spots fit.",
            {MA},
            {RH, HE, CWS},
        ),
        ("In the absence of microaneurysms, haemorrhages, and exudates it fits.", set(), {MA, RH, HE}),
        ("Without haemorrhages, microaneurysms and exudates fit mild disease.", {MA, HE}, {RH}),
        ("A haemorrhagic pigment epithelial detachment fits.", set(), set()),
        ("No microaneurysms, haemorrhages, or exudates are seen.", set(), {MA, RH, HE}),
        ("Microaneurysms without haemorrhages or exudates.", {MA}, {RH, HE}),
        ("There is an absence of drusen.", set(), {DR}),
        ("Neither IRF nor SRF is seen, but a PED is.", {PED}, {IRF, SRF}),
        ("Haemorrhage is not seen.", set(), {RH}),
        ("Haemorrhages and exudates are absent.", set(), {RH, HE}),
        ("Microaneurysms are present, haemorrhages are absent.", {MA}, {RH}),
        ("Microaneurysms, haemorrhages are absent.", {MA}, {RH}),
        ("Microaneurysms: present, haemorrhages: absent", {MA}, {RH}),
        ("No new vessels; haemorrhages.", {RH}, {NV}),
        ("No new vessels. Haemorrhages.", {RH}, {NV}),
        ("No new vessels\nHaemorrhages", {RH}, {NV}),
        ("No new vessels but haemorrhages.", {RH}, {NV}),
        ("No new vessels, however haemorrhages.", {RH}, {NV}),
        ("No new vessels, and with haemorrhages.", {RH}, {NV}),
        ("No haemorrhage is seen, microaneurysms are.", {MA}, {RH}),
        ("No haemorrhage is seen and microaneurysms are present.", {MA}, {RH}),
        ("No haemorrhage, microaneurysms are present.", {MA}, {RH}),
        ("Without new vessels, haemorrhages and exudates fit moderate disease.", {RH, HE}, {NV}),
        ("In the absence of new vessels, haemorrhages fit moderate disease.", {RH}, {NV}),
        ("Haemorrhages beyond microaneurysms without new vessels fit it.", {RH, MA}, {NV}),
        ("Without haemorrhages, exudates in the macula the eye is normal.", set(), {RH, HE}),
        ("Haemorrhages rather than exudates.", {RH}, {HE}),
        ("Microaneurysms, not haemorrhages.", {MA}, {RH}),
        ("These are not haemorrhages.", set(), {RH}),
        ("Not only microaneurysms but also haemorrhages.", {MA, RH}, set()),
        ("The image does not show drusen.", set(), {DR}),
        ("Drusen can't be seen.", set(), {DR}),
        ("No other lesion is seen, the drusen are large.", {DR}, set()),
        ("Drusen are not seen, nor is a large cup.", set(), {DR, CUP}),
        ("There aren't any drusen.", set(), {DR}),
        ("The cup/disc ratio is 0.7 with no drusen. The cup is large.", {CUP}, {DR}),
        ("No enlarged cup.", set(), {CUP}),
        ("Absent: IRF, SRF. Present: PED", {PED}, {IRF, SRF}),
        ("Vitreous haemorrhage.", {VH}, set()),
        ("No vitreous haemorrhage.", set(), {VH}),
        ("Vitreous haemorrhage and a retinal hemorrhage.", {VH, RH}, set()),
        ("Pre-retinal haemorrhage.", {"preretinal haemorrhage"}, set()),
        ("Choroidal neovascularization is likely.", set(), set()),
        ("He sees MA and ma.", {MA}, set()),
        ("No lesion is seen.", set(), set()),
        ("A lamellar macular hole, optic disc drusen, iris neovascularisation.", set(), set()),
        ("Type 1 neovascularisation beneath a subconjunctival haemorrhage.", set(), set()),
        ("Confluent drusen with a drusenoid PED.", {DR}, set()),
        ("Boat-shaped haemorrhage and vitreous bleeding.", {"preretinal haemorrhage", VH}, set()),
        ("Submacular haemorrhage, cotton-wool exudates.", {"subretinal haemorrhage", CWS}, set()),
        ("Splinter haemorrhages; a disc margin haemorrhage.", {RH, "disc haemorrhage"}, set()),
        (
            "Bone-spicule pigmentation and a macular pucker.",
            {"pigmentary change", "epiretinal membrane"},
            set(),
        ),
        ("The cup-to-disc ratio is increased, with notching of the rim.", {CUP, "rim thinning"}, set()),
        (
            "A serous retinal detachment, cystic spaces, RPE elevation.",
            {"retinal detachment", IRF, PED},
            set(),
        ),
        ("No drusen. The drusen are large.", {DR}, {DR}),
        ("I cannot see any microaneurysms. I can't see haemorrhages or drusen.", set(), {MA, RH, DR}),
        ("Neovascularisation cannot be identified, and drusen could not be detected.", set(), {NV, DR}),
        ("Haemorrhages could not be detected.", set(), {RH}),
        ("Haemorrhages cannot be excluded.", {RH}, set()),
        ("Haemorrhages can't be ruled out, drusen are ruled out.", {RH}, {DR}),
        ("Microaneurysms: no, haemorrhages: yes", {RH}, {MA}),
        ("- **Microaneurysms**: no\n- Haemorrhages: none seen\n- Drusen: absent", set(), {MA, RH, DR}),
        (
            "Microaneurysms: yes. Haemorrhages: yes. Hard exudates: no. Neovascularisation: no.",
            {MA, RH},
            {HE, NV},
        ),
        ("Microaneurysms (no), haemorrhages (yes), drusen – none; PED = no", {RH}, {MA, DR, PED}),
        ("| Microaneurysms | no |\n| Haemorrhages | yes |", {RH}, {MA}),
        ("Haemorrhages? No. Drusen? Yes.", {DR}, {RH}),
        ("Vitreous: none, haemorrhages: yes", {RH}, set()),
        ("Findings: no haemorrhages, no drusen", set(), {RH, DR}),
        ("Haemorrhages and drusen: none.", set(), {RH, DR}),
        ("There are microaneurysms, which rules out drusen.", {MA}, {DR}),
        ("Drusen without haemorrhages exclude neovascularisation.", {DR}, {RH, NV}),
        ("The photograph didn't show haemorrhages.", set(), {RH}),
        ("There are no exudates, only microaneurysms and haemorrhages.", {MA, RH}, {HE}),
        ("The absence of exudates and the presence of microaneurysms.", {MA}, {HE}),
        ("Without the presence of exudates or drusen.", set(), {HE, DR}),
        ("Microaneurysms are few and haemorrhages are not extensive.", {MA, RH}, set()),
        ("Microaneurysms are few and haemorrhages are absent.", {MA}, {RH}),
        ("", set(), set()),
    ],
)
def test_parse_mentions(text: str, present: set, absent: set) -> None:
    mentions = parse_mentions(text)
    assert (mentions.present, mentions.absent) == (present, absent)


def test_each_mention_has_its_place() -> None:
    text = "A hemorrhage and Cotton-wool spots, no IRF.\nSo the answer is drusen. Haemorrhage is absent."
    said = [(text[one.start : one.end], one.name, one.denied) for one in find_mentions(text)]
    assert said == [
        ("hemorrhage", RH, False), ("Cotton-wool spots", CWS, False), ("IRF", IRF, True),
        ("drusen", DR, False), ("Haemorrhage", RH, True),
    ]  # fmt: skip
    observed = findings.observations(text)
    assert len(observed) == len(text)
    assert [one.name for one in find_mentions(observed)] == [RH, CWS, IRF, RH]


SUBSETS = st.sets(st.sampled_from(findings.vocabulary("CFP")), min_size=1)


@given(SUBSETS, SUBSETS)
def test_what_phrase_says_is_what_the_parser_reads(present: set, absent: set) -> None:
    absent = absent - present
    text = f"The image shows {findings.phrase(present)}"
    text += f" but no {findings.phrase(absent, 'or')}." if absent else "."
    mentions = parse_mentions(text)
    assert (mentions.present, mentions.absent) == (present, absent)


@given(SUBSETS)
def test_a_denied_list_reads_the_same_before_and_after_its_verb(names: set) -> None:
    words = findings.phrase(names)
    assert parse_mentions(f"{words} are not seen").absent == names
    assert parse_mentions(f"no {findings.phrase(names, 'or')} are seen").absent == names


def test_phrase_and_order() -> None:
    assert findings.phrase([CWS, MA, RH]) == "microaneurysms, haemorrhages and cotton-wool spots"
    assert findings.phrase([CUP]) == "a large cup"
    assert findings.ordered([VH, MA, MA]) == (MA, VH)
    with pytest.raises(ConfigError, match="no canonical"):
        findings.ordered(["lesion"])
    with pytest.raises(ConfigError, match="no finding"):
        findings.phrase([])


def test_contradictions() -> None:
    assert findings.contradictions({MA, RH}, {RH, HE}) == (RH,)
    assert findings.modality_contradictions("OCT", {MA, IRF, DR}) == (MA,)
    assert findings.modality_contradictions("CFP", {MA, IRF, "venous beading"}) == (IRF,)


@given(st.text())
def test_no_text_makes_the_parser_raise(text: str) -> None:
    parse_mentions(text)
    canonical(text)


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "a ",
            "no ",
            "not ",
            "retinal ",
            "dot and blot ",
            "hemorrhage ",
            "hemorrhage,",
            "not MA ",
            "can not be ",
        ),
        *("neither nor ", ", ", ",.", ".", "\n", "&", "1.", "a'", "pigment epithelium ", "no MA, HE or "),
    ],
)
def test_anything_long_takes_linear_time(piece: str) -> None:
    assert growth(lambda size: parse_mentions(piece * (size // len(piece))), 200_000) < LINEAR


@pytest.mark.parametrize(
    "piece", ["the answer is ", "label is (", "answer is" + " " * 1000, "diagnosis is a "]
)
def test_conclusions_are_found_in_linear_time(piece: str) -> None:
    assert growth(lambda size: findings.observations(piece * (size // len(piece))), 1_000_000) < LINEAR
