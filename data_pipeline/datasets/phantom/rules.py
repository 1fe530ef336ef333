"""What each label shows: the class-conditional rules of the phantoms, and the draw of one case.

Diabetic retinopathy follows the ICDR scale (Wilkinson et al. 2003): microaneurysms only = mild; haemorrhages
besides = moderate; many haemorrhages in all four quadrants = severe; neovascularisation or vitreous
haemorrhage = proliferative. Glaucoma is a large cup, AMD is drusen around the macula. On OCT, DME is
intraretinal fluid, CNV is a pigment epithelial detachment, with or without fluid. Frequencies are chosen so
that a small network can learn the task; they say nothing about how common a sign is in patients.
"""

from dataclasses import dataclass

import numpy as np

from fundus_jax.records import ConfigError

MIX = {"CFP": 0.50, "UWF": 0.15, "OCT": 0.35}
FUNDUS_LABELS = ("Normal", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR", "Glaucoma", "AMD")
OCT_LABELS = ("Normal", "DME", "Drusen", "CNV")
LABELS = {"CFP": FUNDUS_LABELS, "UWF": FUNDUS_LABELS, "OCT": OCT_LABELS}

QUADRANTS = 4
CUP_USUAL = (0.22, 0.45)  # vertical cup-to-disc ratio
CUP_LARGE = (0.68, 0.88)


@dataclass(frozen=True, slots=True)
class Dose:
    """A finding appears with `chance`, and then `low` to `high` (inclusive) times.

    What is counted: single lesions; for hard exudates clusters; for neovascularisation tufts; for
    intraretinal fluid cysts; in `Rule.everywhere` lesions per quadrant.
    """

    chance: float
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Rule:
    """The findings of one label; what is not listed never appears."""

    doses: dict[str, Dose]
    any_of: tuple[str, ...] = ()  # at least one of these is always there
    everywhere: tuple[str, ...] = ()  # these lie in all four quadrants of the image

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, dose in self.doses.items() if dose.chance >= 1))

    @property
    def allowed(self) -> tuple[str, ...]:
        return tuple(sorted(self.doses))


_FUNDUS = {
    "Normal": Rule({}),
    "Mild NPDR": Rule({"microaneurysm": Dose(1, 5, 10)}),
    "Moderate NPDR": Rule(
        {
            "microaneurysm": Dose(1, 3, 7),
            "haemorrhage": Dose(1, 3, 6),
            "hard exudate": Dose(0.55, 1, 2),
            "cotton-wool spot": Dose(0.4, 1, 3),
        }
    ),
    "Severe NPDR": Rule(
        {
            "microaneurysm": Dose(1, 4, 8),
            "haemorrhage": Dose(1, 6, 10),
            "hard exudate": Dose(0.5, 1, 2),
            "cotton-wool spot": Dose(0.6, 1, 4),
        },
        everywhere=("haemorrhage",),
    ),
    "PDR": Rule(
        {
            "microaneurysm": Dose(1, 3, 6),
            "haemorrhage": Dose(1, 3, 9),
            "hard exudate": Dose(0.35, 1, 1),
            "cotton-wool spot": Dose(0.35, 1, 3),
            "neovascularisation": Dose(0.85, 1, 3),
            "vitreous haemorrhage": Dose(0.3, 1, 1),
        },
        any_of=("neovascularisation", "vitreous haemorrhage"),
    ),
    "Glaucoma": Rule({"large cup": Dose(1, 1, 1)}),
    "AMD": Rule({"drusen": Dose(1, 12, 24)}),
}
_OCT = {
    "Normal": Rule({}),
    "DME": Rule({"intraretinal fluid": Dose(1, 4, 9), "subretinal fluid": Dose(0.35, 1, 1)}),
    "Drusen": Rule({"drusen": Dose(1, 3, 7)}),
    "CNV": Rule(
        {
            "pigment epithelial detachment": Dose(1, 1, 1),
            "subretinal fluid": Dose(0.6, 1, 1),
            "intraretinal fluid": Dose(0.4, 2, 5),
        }
    ),
}
RULES: dict[str, dict[str, Rule]] = {"CFP": _FUNDUS, "UWF": _FUNDUS, "OCT": _OCT}


def draw_case(rng: np.random.Generator, modality: str | None, label: str | None) -> tuple[str, str]:
    """Fill in what is None: the modality by `MIX`, then the label uniformly among those of the modality.

    Raises ConfigError for an unknown modality or a label that the modality (or no modality) has.
    """
    u, v = rng.random(2)  # both drawn always, so that fixing one argument does not change the other's draw
    if modality is not None and modality not in MIX:
        raise ConfigError(f"phantom modality {modality!r} is unknown: choose one of {', '.join(MIX)}")
    choices = [m for m in MIX if modality in (None, m) and (label is None or label in LABELS[m])]
    if not choices:
        raise ConfigError(f"no phantom with modality {modality!r} and label {label!r}: labels are {LABELS}")
    shares = np.cumsum([MIX[m] for m in choices])
    chosen = choices[min(int(np.searchsorted(shares, u * shares[-1], side="right")), len(choices) - 1)]
    labels = LABELS[chosen]
    return chosen, labels[int(v * len(labels))] if label is None else label


def draw_counts(rng: np.random.Generator, modality: str, label: str) -> dict[str, int]:
    """How many of each finding this case shows in all; a finding that it does not show has no entry."""
    rule = RULES[modality][label]
    counts = {}
    for name, dose in rule.doses.items():
        shown, many = rng.random(2)
        if shown < dose.chance:
            quadrants = QUADRANTS if name in rule.everywhere else 1
            counts[name] = quadrants * (dose.low + int(many * (dose.high - dose.low + 1)))
    if rule.any_of and not any(name in counts for name in rule.any_of):
        dose = rule.doses[rule.any_of[0]]
        counts[rule.any_of[0]] = int(rng.integers(dose.low, dose.high + 1))
    return counts
