"""Visual findings: `table` names them, `mentions` reads them in texts."""

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
    vocabulary,
)

__all__ = [
    "FINDINGS",
    "Finding",
    "Mention",
    "Mentions",
    "canonical",
    "contradictions",
    "find_mentions",
    "missing",
    "modality_contradictions",
    "observations",
    "ordered",
    "parse_mentions",
    "phrase",
    "vocabulary",
]
