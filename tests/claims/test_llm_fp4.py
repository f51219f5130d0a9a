"""The claim of LLM-FP4: its arms differ in one thing at a time, and shares of layers are counted layer by layer."""

from __future__ import annotations

from dataclasses import fields

from dither.claims import CLAIMS
from dither.claims.llm_fp4 import ARMS, PER_TOKEN, orders


def differences(a: str, b: str) -> set[str]:
    return {f.name for f in fields(ARMS[a]) if getattr(ARMS[a], f.name) != getattr(ARMS[b], f.name)}


def test_arms_differ_in_one_thing() -> None:
    assert differences("MinMax INT4", "MinMax E2M1") == {"formats"}
    assert differences("baseline", "FPQ") == {"preshift"}
    assert differences("FPQ", "FPQ E2M1 only") == {"formats"}
    assert differences("MinMax E2M1", "baseline") == {"formats", "rounds"}
    for method in [*ARMS.values(), *PER_TOKEN.values()]:
        method.recipe()
    assert CLAIMS["llm-fp4"].seeds == (0, 1, 2)


def test_shares_are_of_layers() -> None:
    errors = {"MinMax E2M1": {"a": 0.2, "b": 0.1}, "baseline": {"a": 0.1, "b": 0.1}, "FPQ": {"a": 0.05, "b": 0.11}}
    assert orders(errors) == {"layers with baseline <= MinMax E2M1": 1.0, "layers with FPQ <= baseline": 0.5}
