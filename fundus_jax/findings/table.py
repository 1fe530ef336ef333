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
        core: the modalities in which every image is looked through for it; elsewhere, and of the findings
            without any, a text may speak of it and a data set may have it.
    """

    name: str
    plural: str
    modalities: tuple[str, ...]
    synonyms: tuple[str, ...] = ()
    abbreviations: tuple[str, ...] = ()
    core: tuple[str, ...] = ()


def _row(name: str, plural: str, modalities: tuple[str, ...], words="", short="", core=()) -> Finding:
    synonyms = tuple(words.split(" | ")) if words else ()
    return Finding(name, plural, modalities, synonyms, tuple(short.split()), core)


_SIZES = ("large", "enlarged", "increased", "wide", "big", "high", "elevated", "raised")
_RATIO = ("cup disc ratio", "cup / disc ratio", "cup to disc ratio")
_CUP = ("cup", "optic cup", "optic disc cup", "optic nerve cup", "optic nerve head cup", "cupping", *_RATIO)
_CUPS = " | ".join(
    (
        *(f"{size} {cup}" for size in _SIZES for cup in (*_CUP, "c / d ratio")),
        *(f"{ratio} is {size}" for size in _SIZES for ratio in (*_RATIO, "c / d ratio")),
    )
)
_PRERETINAL = (
    "pre retinal haemorrhage | subhyaloid haemorrhage | preretinal bleeding | subhyaloid bleeding | "
    "boat shaped haemorrhage"
)
_SUBRETINAL = (
    "sub retinal haemorrhage | submacular haemorrhage | subretinal bleeding | subretinal blood | "
    "sub rpe haemorrhage"
)
_DISC = (
    "optic disc haemorrhage | optic nerve haemorrhage | optic nerve head haemorrhage | "
    "disc margin haemorrhage | drance haemorrhage | splinter haemorrhage at the disc"
)
_IRMA = "intraretinal microvascular abnormality | intraretinal microvascular abnormalities"
_TABLE = (
    _row("microaneurysm", "microaneurysms", _FUNDUS, "micro aneurysm | red dot", "MA MAs", core=_FUNDUS),
    _row(
        "haemorrhage",
        "haemorrhages",
        _FUNDUS,
        "retinal haemorrhage | intraretinal haemorrhage | intra retinal haemorrhage | dot haemorrhage | "
        "blot haemorrhage | dot blot haemorrhage | dot and blot haemorrhage | flame haemorrhage | "
        "flame shaped haemorrhage | splinter haemorrhage | haemorrhagic spot | bleeding",
        "RH RHs",
        core=_FUNDUS,
    ),
    _row("hard exudate", "hard exudates", MODALITIES, "exudate", "HE HEs EX", core=_FUNDUS),
    _row(
        "cotton-wool spot",
        "cotton-wool spots",
        _FUNDUS,
        "cottonwool spot | cotton wool patch | cotton wool patches | cotton wool exudate | soft exudate",
        "CWS CWSs SE",
        core=_FUNDUS,
    ),
    _row(
        "neovascularisation",
        "neovascularisation",
        _FUNDUS,
        "new vessel | new blood vessel | newly formed vessel | neovascular vessel | neovessel | "
        "retinal neovascularisation | neovascularisation of the disc | neovascularisation elsewhere",
        "NV NVD NVE",
        core=_FUNDUS,
    ),
    _row(
        "vitreous haemorrhage",
        "vitreous haemorrhage",
        _FUNDUS,
        "vitreous bleed | vitreous bleeding | intravitreal haemorrhage | vitreal haemorrhage",
        "VH",
        core=_FUNDUS,
    ),
    _row(
        "drusen",
        "drusen",
        MODALITIES,
        "druse | drusenoid deposit | drusenoid pigment epithelial detachment | drusenoid PED | "
        "pseudodrusen | reticular pseudodrusen",
        core=MODALITIES,
    ),
    _row("large cup", "a large cup", _FUNDUS, f"{_CUPS} | cup is large | cup is enlarged", core=_FUNDUS),
    _row(
        "intraretinal fluid",
        "intraretinal fluid",
        ("OCT",),
        "intra retinal fluid | intraretinal cyst | cystoid space | intraretinal cystoid space | "
        "cystic space | intraretinal cystic space | cystic change | cystoid change | "
        "intraretinal hyporeflective space",
        "IRF",
        core=("OCT",),
    ),
    _row("subretinal fluid", "subretinal fluid", ("OCT",), "sub retinal fluid", "SRF", core=("OCT",)),
    _row(
        "pigment epithelial detachment",
        "a pigment epithelial detachment",
        MODALITIES,
        "pigment epithelium detachment | retinal pigment epithelial detachment | "
        "retinal pigment epithelium detachment | rpe detachment | rpe elevation | double layer sign",
        "PED PEDs",
        core=("OCT",),
    ),
    # from here on: names of the real data sets and of texts about them
    _row("preretinal haemorrhage", "preretinal haemorrhage", _FUNDUS, _PRERETINAL, "PRH"),
    _row("subretinal haemorrhage", "subretinal haemorrhage", _FUNDUS, _SUBRETINAL),
    _row("disc haemorrhage", "disc haemorrhage", _FUNDUS, _DISC),
    _row("venous beading", "venous beading", _FUNDUS, "beading of the vein | beaded vein"),
    _row("irma", "intraretinal microvascular abnormalities", _FUNDUS, _IRMA, "IRMA IRMAs"),
    _row(
        "fibrous proliferation",
        "fibrous proliferation",
        _FUNDUS,
        "fibrovascular proliferation | fibrous tissue | fibrovascular tissue | fibrovascular membrane | "
        "preretinal fibrosis",
    ),
    _row(
        "laser scar",
        "laser scars",
        _FUNDUS,
        "laser spot | laser mark | laser burn | photocoagulation scar | photocoagulation mark | prp scar",
    ),
    _row(
        "rim thinning",
        "rim thinning",
        _FUNDUS,
        "neuroretinal rim thinning | thinning of the rim | thinning of the neuroretinal rim | rim notch | "
        "notching of the rim | notching of the neuroretinal rim | thin neuroretinal rim | rim loss | "
        "neuroretinal rim loss",
    ),
    _row(
        "nerve fibre layer defect",
        "a nerve fibre layer defect",
        _FUNDUS,
        "nerve fiber layer defect | rnfl defect | nfl defect | rnfl thinning | "
        "retinal nerve fibre layer thinning | retinal nerve fiber layer thinning",
    ),
    _row(
        "peripapillary atrophy",
        "peripapillary atrophy",
        _FUNDUS,
        "parapapillary atrophy | peripapillary chorioretinal atrophy | peripapillary crescent | "
        "myopic crescent | temporal crescent",
        "PPA",
    ),
    _row(
        "geographic atrophy",
        "geographic atrophy",
        MODALITIES,
        "rpe and outer retinal atrophy | complete rpe and outer retinal atrophy | crora",
    ),
    _row(
        "pigmentary change",
        "pigmentary changes",
        _FUNDUS,
        "pigment change | pigmentary abnormality | pigmentary abnormalities | hyperpigmentation | "
        "hypopigmentation | depigmentation | bone spicule | bone spicule pigment | "
        "bone spicule pigmentation | pigment clump | pigment clumping | pigment mottling | rpe mottling | "
        "pigment migration",
    ),
    _row("macular hole", "a macular hole", MODALITIES, "", "FTMH"),
    _row(
        "epiretinal membrane",
        "an epiretinal membrane",
        MODALITIES,
        "epi retinal membrane | preretinal membrane | epimacular membrane | cellophane membrane | "
        "macular pucker",
        "ERM",
    ),
    _row(
        "retinal detachment",
        "retinal detachment",
        MODALITIES,
        "detached retina | serous detachment | serous retinal detachment | neurosensory detachment | "
        "serous neurosensory detachment | neurosensory retinal detachment | macular detachment",
    ),
    _row(
        "retinal thickening",
        "retinal thickening",
        ("OCT",),
        "thickened retina | macular thickening | thickening of the retina | increased retinal thickness | "
        "increased macular thickness | retinal swelling",
    ),
    _row(
        "hyperreflective focus",
        "hyperreflective foci",
        ("OCT",),
        "hyperreflective foci | hyper reflective focus | hyper reflective foci | hyperreflective dot",
        "HRF",
    ),
    _row(
        "subretinal hyperreflective material",
        "subretinal hyperreflective material",
        ("OCT",),
        "subretinal hyper reflective material | sub retinal hyperreflective material | "
        "sub retinal hyper reflective material",
        "SHRM",
    ),
    _row(
        "ellipsoid zone loss",
        "ellipsoid zone loss",
        ("OCT",),
        "ellipsoid zone disruption | ez loss | ez disruption",
    ),
    _row("vitreomacular traction", "vitreomacular traction", ("OCT",), "", "VMT"),
)

# Label ("": any) -> required finding -> what meets it in its place, since most labels are known by one of
# several signs. ICDR and ETDRS: blood in the vitreous or before the retina and fibrous proliferation prove
# new vessels; moderate is more than microaneurysms; severe is many haemorrhages, beading or IRMA. English
# grades R1 and R2, which JSIEC's stages resemble, name several signs each. AREDS: AMD may be pigment alone,
# and late disease atrophy, bleeding or a scar without drusen. CNV on OCT is a detachment, material beneath
# the retina or fluid there (types 2 and 3); DME may be thickening without cysts (Otani 1999). A vein's old
# occlusion has lost its haemorrhages, and a rim or nerve fibre layer may be thin beside a small cup. A
# serous detachment of the retina is its fluid.
_BEYOND = ("hard exudate", "cotton-wool spot", "venous beading", "irma")
_PROLIFERATIVE = (
    "neovascularisation",
    "vitreous haemorrhage",
    "preretinal haemorrhage",
    "fibrous proliferation",
)
_OLD_OCCLUSION = (
    "laser scar",
    "neovascularisation",
    "hard exudate",
    "cotton-wool spot",
    "vitreous haemorrhage",
)
_PROVEN_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "": {
        "neovascularisation": ("vitreous haemorrhage", "preretinal haemorrhage", "fibrous proliferation"),
        "subretinal fluid": ("retinal detachment",),
    },
    "Diabetic retinopathy": {"microaneurysm": ("haemorrhage", *_BEYOND, *_PROLIFERATIVE, "laser scar")},
    "Diabetic retinopathy, stage 1 of 3": {"microaneurysm": ("haemorrhage",)},
    "Diabetic retinopathy, stage 2 of 3": {"haemorrhage": _BEYOND},
    "Moderate NPDR": {"microaneurysm": ("haemorrhage", *_BEYOND), "haemorrhage": _BEYOND},
    "Severe NPDR": {
        "microaneurysm": ("haemorrhage", "venous beading", "irma"),
        "haemorrhage": ("venous beading", "irma"),
    },
    "AMD": {
        "drusen": (
            "geographic atrophy",
            "subretinal haemorrhage",
            "pigmentary change",
            "fibrous proliferation",
        )
    },
    "Dry AMD": {"drusen": ("geographic atrophy", "pigmentary change")},
    "CNV": {"pigment epithelial detachment": ("subretinal hyperreflective material", "subretinal fluid")},
    "DME": {"intraretinal fluid": ("retinal thickening",)},
    "Glaucoma": {"large cup": ("rim thinning", "nerve fibre layer defect")},
    "Possible glaucoma": {"large cup": ("rim thinning", "nerve fibre layer defect", "disc haemorrhage")},
    "Branch retinal vein occlusion": {"haemorrhage": _OLD_OCCLUSION},
    "Central retinal vein occlusion": {"haemorrhage": _OLD_OCCLUSION},
    "Retinal vein occlusion": {
        "haemorrhage": _OLD_OCCLUSION,
        "intraretinal fluid": ("retinal thickening", "subretinal fluid"),
    },
    "Severe hypertensive retinopathy": {
        "haemorrhage": ("cotton-wool spot", "hard exudate"),
        "cotton-wool spot": ("haemorrhage", "hard exudate"),
    },
}

FINDINGS: dict[str, Finding] = {row.name: row for row in _TABLE}


def vocabulary(modality: str, extended: bool = False) -> tuple[str, ...]:
    """The canonical names of a modality's findings in the fixed order of the table.

    Args:
        modality: CFP, OCT or UWF.
        extended: False gives the core ones, True all that the modality can show.
    """
    if modality not in MODALITIES:
        raise ConfigError(f"modality is {modality!r}; known modalities are {', '.join(MODALITIES)}")
    return tuple(row.name for row in _TABLE if modality in (row.modalities if extended else row.core))


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
