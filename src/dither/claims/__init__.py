"""Evidence, not adjectives: each paper's claim, re-measured by one command, with its record."""

from dither.claims import awq, gptq
from dither.claims.claim import Claim, Test, find, run, save, stored

CLAIMS: dict[str, Claim] = {module.CLAIM.name: module.CLAIM for module in (awq, gptq)}
__all__ = ["CLAIMS", "Claim", "Test", "find", "run", "save", "stored"]
