"""Visual findings: `table` names them, `mentions` reads them in texts, `claims` marks them there."""

from fundus_jax.findings.claims import Piece, clean, mark, missed
from fundus_jax.findings.mentions import (
    Mention,
    Mentions,
    canonical,
    find_mentions,
    observations,
    parse_mentions,
)
from fundus_jax.findings.table import (
    FINDINGS,
    Finding,
    contradictions,
    missing,
    modality_contradictions,
    ordered,
    phrase,
    proofs,
    required,
    surveyed,
    unknown,
    vocabulary,
)

__all__ = [
    "FINDINGS",
    "Finding",
    "Mention",
    "Mentions",
    "Piece",
    "canonical",
    "clean",
    "contradictions",
    "find_mentions",
    "mark",
    "missed",
    "missing",
    "modality_contradictions",
    "observations",
    "ordered",
    "parse_mentions",
    "phrase",
    "proofs",
    "required",
    "surveyed",
    "unknown",
    "vocabulary",
]
