"""The table of visual findings: canonical names, synonyms, the modalities that show them.

It is the only place that knows the words; a new finding is a row. Names are lower case and singular; anatomy
(optic disc, vessels) is no finding. Sources: the finding groups of the paper, section 3.2.1; ICDR (Wilkinson
2003); AREDS. Neighbours: `mentions` reads texts with it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fundus_jax.records import MODALITIES, ConfigError, Knowledge

_FUNDUS = ("CFP", "UWF")


@dataclass(frozen=True, slots=True)
class Finding:
    """A row of the table.

    Attributes:
        name: canonical, lower case, singular, British.
        plural: the form for running text ("The image shows ..."); with its article where English wants one.
        modalities: where it can be seen.
        synonyms: other names in lower case; plurals and American spellings are understood unlisted.
        abbreviations: case-sensitive, because "he" is a pronoun and "HE" hard exudates.
        core: whether the phantoms and the notes use it; the others are names of the real data sets.
    """

    name: str
    plural: str
    modalities: tuple[str, ...]
    synonyms: tuple[str, ...] = ()
    abbreviations: tuple[str, ...] = ()
    core: bool = False


def _row(name: str, plural: str, modalities: tuple[str, ...], words="", short="", core=False) -> Finding:
    synonyms = tuple(words.split(" | ")) if words else ()
    return Finding(name, plural, modalities, synonyms, tuple(short.split()), core)


_SIZES = ("large", "enlarged", "increased", "wide", "big", "deep")
_CUP = ("cup", "optic cup", "optic disc cup", "cupping", "cup disc ratio", "cup / disc ratio")
_CUPS = " | ".join(f"{size} {cup}" for size in _SIZES for cup in (*_CUP, "cup to disc ratio"))
_PRERETINAL = "pre retinal haemorrhage | subhyaloid haemorrhage"
_IRMA = "intraretinal microvascular abnormality | intraretinal microvascular abnormalities"
_TABLE = (
    _row("microaneurysm", "microaneurysms", _FUNDUS, "micro aneurysm | red dot", "MA MAs", core=True),
    _row(
        "haemorrhage",
        "haemorrhages",
        _FUNDUS,
        "retinal haemorrhage | intraretinal haemorrhage | intra retinal haemorrhage | dot haemorrhage | "
        "blot haemorrhage | dot blot haemorrhage | dot and blot haemorrhage | flame haemorrhage | "
        "flame shaped haemorrhage | haemorrhagic spot | bleeding",
        "RH RHs",
        core=True,
    ),
    _row("hard exudate", "hard exudates", _FUNDUS, "exudate", "HE HEs EX", core=True),
    _row(
        "cotton-wool spot",
        "cotton-wool spots",
        _FUNDUS,
        "cottonwool spot | cotton wool patch | cotton wool patches | soft exudate",
        "CWS CWSs SE",
        core=True,
    ),
    _row(
        "neovascularisation",
        "neovascularisation",
        _FUNDUS,
        "new vessel | new blood vessel | newly formed vessel | neovascular vessel | neovessel | "
        "retinal neovascularisation | neovascularisation of the disc | neovascularisation elsewhere",
        "NV NVD NVE",
        core=True,
    ),
    _row("vitreous haemorrhage", "vitreous haemorrhage", _FUNDUS, "vitreous bleed", "VH", core=True),
    _row("drusen", "drusen", MODALITIES, "druse | drusenoid deposit", core=True),
    _row("large cup", "a large cup", _FUNDUS, f"{_CUPS} | cup is large | cup is enlarged", core=True),
    _row(
        "intraretinal fluid",
        "intraretinal fluid",
        ("OCT",),
        "intra retinal fluid | intraretinal cyst | cystoid space | intraretinal cystoid space",
        "IRF",
        core=True,
    ),
    _row("subretinal fluid", "subretinal fluid", ("OCT",), "sub retinal fluid", "SRF", core=True),
    _row(
        "pigment epithelial detachment",
        "a pigment epithelial detachment",
        ("OCT",),
        "pigment epithelium detachment | retinal pigment epithelial detachment | "
        "retinal pigment epithelium detachment | drusenoid pigment epithelial detachment",
        "PED PEDs",
        core=True,
    ),
    # from here on: names of the real data sets and of texts about them
    _row("preretinal haemorrhage", "preretinal haemorrhage", _FUNDUS, _PRERETINAL, "PRH"),
    _row("subretinal haemorrhage", "subretinal haemorrhage", _FUNDUS, "sub retinal haemorrhage"),
    _row("disc haemorrhage", "disc haemorrhage", _FUNDUS, "optic disc haemorrhage | splinter haemorrhage"),
    _row("venous beading", "venous beading", _FUNDUS, "beading of the vein | beaded vein"),
    _row("irma", "intraretinal microvascular abnormalities", _FUNDUS, _IRMA, "IRMA IRMAs"),
    _row(
        "fibrous proliferation",
        "fibrous proliferation",
        _FUNDUS,
        "fibrovascular proliferation | fibrous tissue",
    ),
    _row("laser scar", "laser scars", _FUNDUS, "laser spot | laser mark | photocoagulation scar"),
    _row(
        "rim thinning", "rim thinning", _FUNDUS, "neuroretinal rim thinning | thinning of the rim | rim notch"
    ),
    _row("nerve fibre layer defect", "a nerve fibre layer defect", _FUNDUS, "nerve fiber layer defect"),
    _row("peripapillary atrophy", "peripapillary atrophy", _FUNDUS, "", "PPA"),
    _row("geographic atrophy", "geographic atrophy", MODALITIES, "atrophy of the pigment epithelium"),
    _row("pigmentary change", "pigmentary changes", _FUNDUS, "pigment change | hyperpigmentation"),
    _row("macular hole", "a macular hole", MODALITIES, "", "FTMH"),
    _row("epiretinal membrane", "an epiretinal membrane", MODALITIES, "epi retinal membrane", "ERM"),
    _row("retinal detachment", "retinal detachment", MODALITIES, "detached retina"),
    _row("retinal thickening", "retinal thickening", ("OCT",), "thickened retina | macular thickening"),
    _row("hyperreflective focus", "hyperreflective foci", ("OCT",), "hyperreflective foci", "HRF"),
    _row("subretinal hyperreflective material", "subretinal hyperreflective material", ("OCT",), "", "SHRM"),
    _row("ellipsoid zone loss", "ellipsoid zone loss", ("OCT",), "ellipsoid zone disruption"),
    _row("vitreomacular traction", "vitreomacular traction", ("OCT",), "", "VMT"),
)

# Label ("": any) -> required finding -> what meets it in its place, since most labels are known by one of
# several signs. ICDR: haemorrhages in the vitreous or before the retina prove new vessels; moderate is more
# than microaneurysms; severe is many haemorrhages, beading or IRMA. AREDS: late disease may be atrophy or
# bleeding without drusen. CNV on OCT is a detachment, or material beneath the retina.
_BEYOND = ("hard exudate", "cotton-wool spot", "venous beading", "irma")
_PROVEN_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"neovascularisation": ("vitreous haemorrhage", "preretinal haemorrhage")},
    "Diabetic retinopathy": {"microaneurysm": ("haemorrhage", "neovascularisation", "vitreous haemorrhage")},
    "Moderate NPDR": {"microaneurysm": ("haemorrhage", *_BEYOND), "haemorrhage": _BEYOND},
    "Severe NPDR": {
        "microaneurysm": ("haemorrhage", "venous beading", "irma"),
        "haemorrhage": ("venous beading", "irma"),
    },
    "AMD": {"drusen": ("geographic atrophy", "subretinal haemorrhage")},
    "Dry AMD": {"drusen": ("geographic atrophy",)},
    "CNV": {"pigment epithelial detachment": ("subretinal hyperreflective material",)},
}

FINDINGS: dict[str, Finding] = {row.name: row for row in _TABLE}


def vocabulary(modality: str, extended: bool = False) -> tuple[str, ...]:
    """The canonical names of a modality's findings in the fixed order of the table.

    Args:
        modality: CFP, OCT or UWF.
        extended: False gives those that the phantoms and notes use, True all that the parser knows.
    """
    if modality not in MODALITIES:
        raise ConfigError(f"modality is {modality!r}; known modalities are {', '.join(MODALITIES)}")
    return tuple(row.name for row in _TABLE if modality in row.modalities and (row.core or extended))


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Canonical names in the fixed order of the table, once each. Raises ConfigError for unknown ones."""
    wanted = set(names)
    unknown = sorted(wanted - FINDINGS.keys())
    if unknown:
        raise ConfigError(f"{unknown} are no canonical findings; add rows to fundus_jax/findings/table.py")
    return tuple(name for name in FINDINGS if name in wanted)


def phrase(names: Iterable[str], conjunction: str = "and") -> str:
    """Findings as running text in the fixed order: "microaneurysms, haemorrhages and hard exudates"."""
    words = [FINDINGS[name].plural for name in ordered(names)]
    if not words:
        raise ConfigError("there is no finding to put into words; say that nothing is seen instead")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def contradictions(present: Iterable[str], absent: Iterable[str]) -> tuple[str, ...]:
    """The findings that are claimed and denied at once, in the fixed order."""
    return ordered(set(present) & set(absent))


def modality_contradictions(modality: str, present: Iterable[str]) -> tuple[str, ...]:
    """The findings that this modality can not show, such as a microaneurysm on OCT, in the fixed order."""
    return ordered(set(present) - set(vocabulary(modality, extended=True)))


def unknown(modality: str, searched: Iterable[str] | None) -> frozenset[str]:
    """The findings that a modality can show and nobody looked for; none where `searched` is None: then all
    of them were."""
    if searched is None:
        return frozenset()
    return frozenset(vocabulary(modality, extended=True)) - set(searched)


def surveyed(modality: str, searched: Iterable[str] | None) -> bool:
    """Whether enough was looked for to say that there is no lesion: all of the modality's core findings."""
    return unknown(modality, searched).isdisjoint(vocabulary(modality))


def proofs(label: str, required: str) -> tuple[str, ...]:
    """What meets a required finding of a label in its place, in the fixed order."""
    return ordered(name for of in ("", label) for name in _PROVEN_BY.get(of, {}).get(required, ()))


def required(known: Knowledge) -> tuple[str, ...]:
    """The required findings in words, each with what meets it: "drusen (or geographic atrophy)"."""
    rest = ((name, proofs(known.label, name)) for name in known.required)
    return tuple(f"{name} (or {' or '.join(others)})" if others else name for name, others in rest)


def missing(known: Knowledge, present: Iterable[str], unknown: Collection[str] = ()) -> tuple[str, ...]:
    """The required findings of a label that are neither present nor met by one that is, in the fixed order;
    nor may they be so for all that is known, where `unknown` names what nobody looked for."""
    there = {*present, *unknown}
    return ordered(name for name in known.required if there.isdisjoint((name, *proofs(known.label, name))))
