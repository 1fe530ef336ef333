"""The names of diseases and grades that several data sets share, so that one disease has one name everywhere.

The names are those of the notes in `data_pipeline/knowledge/notes`, and of the paper; what only one publisher
knows is named in its builder.
"""

NORMAL = "Normal"
GRADES = ("No DR", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR")  # ICDR 0 to 4
DR_DISEASES = (NORMAL, *GRADES[1:])
ICDR = {str(code): code for code in range(5)}  # as publishers write it; 5 is "ungradable" in some

AMD_GRADES = ("No AMD", "Early AMD", "Intermediate AMD", "Late AMD")  # AREDS 1 to 4
# IDRiD's 0 to 2, which say where hard exudates lie: "near" is within one disc diameter.
DME_RISKS = ("No hard exudates", "Hard exudates away from the fovea", "Hard exudates near the fovea")
PROGRESSION = ("No progression", "Progression")

AMD, AMD_DRY, AMD_WET, PCV = "AMD", "Dry AMD", "Wet AMD", "Polypoidal choroidal vasculopathy"
BRVO, CRVO, RVO = "Branch retinal vein occlusion", "Central retinal vein occlusion", "Retinal vein occlusion"
BRAO, CRAO, RAO = (
    "Branch retinal artery occlusion",
    "Central retinal artery occlusion",
    "Retinal artery occlusion",
)
CNV, DME, DRUSEN = "CNV", "DME", "Drusen"
CSC = "Central serous chorioretinopathy"
DR = "Diabetic retinopathy"
ERM = "Epiretinal membrane"
GLAUCOMA = "Glaucoma"
LASER_SCARS = "Laser scars"
MACULAR_HOLE = "Macular hole"
MYELINATED = "Myelinated nerve fibres"
PATHOLOGICAL_MYOPIA = "Pathological myopia"
RETINAL_DETACHMENT = "Retinal detachment"
RP = "Retinitis pigmentosa"
TESSELLATED = "Tessellated fundus"
TORTUOUS = "Tortuous vessels"


def dr(grade: int) -> dict[str, str]:
    """The labels of a photograph that was graded 0 to 4 for diabetic retinopathy, and for nothing else."""
    return {"disease": DR_DISEASES[grade], "dr_grade": GRADES[grade]}


def one_of_many(diseases: tuple[str, ...]) -> dict[str, str]:
    """`disease` where the publisher states exactly one; where there are several, no answer is right."""
    return {"disease": diseases[0]} if len(diseases) == 1 else {}
