"""Evidence, not adjectives: each paper's claim, re-measured by one command, with its record."""

from dither.claims import (
    awq,
    flexround,
    gptq,
    llm_fp4,
    log_bessel,
    ostquant,
    pb_llm,
    repq_vit,
    spright,
    two_pass_softmax,
    vptq,
)
from dither.claims.claim import Claim, Test, find, home, run, save, stored

CLAIMS: dict[str, Claim] = {
    module.CLAIM.name: module.CLAIM
    for module in (awq, gptq, repq_vit, llm_fp4, flexround, vptq, pb_llm, ostquant, log_bessel, two_pass_softmax, spright)
}
__all__ = ["CLAIMS", "Claim", "Test", "find", "home", "run", "save", "stored"]
