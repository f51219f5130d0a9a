"""Records made up for the tests: typical ones, and ones at the edges, by name."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime

import pytest

from dither.report import CompareRecord, Corpus, InspectLayer, InspectRecord, LayerRow, Machine, Row

ROLES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
MACHINE = Machine(cpu="Example CPU @ 2.0 GHz", threads=2, versions={"dither": "0.1.0", "torch": "2.13.0"})
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quoted\" 'single' \x1b[31m\u202e\x00|`"
)
FIGURES = {  # method -> bits -> (bits per weight, perplexity)
    "rtn": {4: (4.31, 23.21), 3: (3.31, 61.9), 2: (2.31, 1.4e6)},
    "awq": {4: (4.31, 21.31), 3: (3.31, 41.2), 2: (2.31, 9.2e4)},
    "gptq": {4: (4.31, 20.62), 3: (3.31, 27.4), 2: (2.31, 612.0)},
    "awq+gptq": {4: (4.33, 20.28), 3: (3.33, 25.9), 2: (2.33, 263.0)},
}


def layers(scale: float, blocks: int = 30, seed: int = 0) -> tuple[LayerRow, ...]:
    """The layers of a small transformer, with errors around ``scale``."""
    draw = random.Random(seed)
    found = []
    for block in range(blocks):
        for k, role in enumerate(ROLES):
            error = scale * math.exp(draw.gauss(0, 0.4) + 0.3 * k - block / blocks)
            found.append(
                LayerRow(
                    name=f"model.layers.{block}.{role}",
                    block=block,
                    shape=(576, 576),
                    scheme="int4 g64",
                    bits=4.31,
                    weight_error=error / 2,
                    output_error=error,
                    damp=0.01,
                    tokens=32768,
                    fallback="columns without inputs kept their nearest value" if block == 3 and k == 6 else None,
                )
            )
    return tuple(found)


def compare(rows: tuple[Row, ...], model: str = "smollm2") -> CompareRecord:
    return CompareRecord(
        model=model,
        calibration=Corpus(text="wiki.valid.tokens", windows=64, length=512),
        evaluation=Corpus(text="wiki.test.tokens", windows=16, length=2048),
        float_perplexity=18.30,
        float_bits_per_weight=16,
        machine=MACHINE,
        seed=0,
        date=datetime(2026, 11, 24, 12, 0, tzinfo=UTC),
        rows=rows,
    )


def typical() -> CompareRecord:
    """Four methods at three widths."""
    rows = []
    for m, (method, widths) in enumerate(FIGURES.items()):
        for bits, (stored, perplexity) in widths.items():
            rows.append(
                Row(
                    method=method,
                    bits=bits,
                    group=64,
                    scheme=f"int{bits} asymmetric, group 64",
                    bits_per_weight=stored,
                    perplexity=perplexity,
                    seconds=9.0 + 21 * m,
                    cpu_seconds=14.0 + 30 * m,
                    peak_memory_bytes=700_000_000 + 90_000_000 * m,
                    checkpoint_bytes=int(106e6 * stored / 8 + 57e6),
                    layers=layers(0.02 * 4 ** (4 - bits) / (m + 1), seed=10 * m + bits),
                    notes=("12 sites scaled",) if "awq" in method else (),
                )
            )
    return compare(tuple(rows))


def crowded(count: int = 40) -> CompareRecord:
    """Many rows with long names, many of them at nearly the same place, some failed or diverged."""
    draw = random.Random(1)
    rows = []
    for k in range(count):
        bits = 2 + k % 3
        perplexity = {
            2: draw.choice([math.inf, math.nan, 3e5, 500.0]),
            3: 25 + draw.random() * 20,
            4: 19 + draw.random() * 4,
        }[bits]
        failed = k % 13 == 12
        rows.append(
            Row(
                method=f"rotation+awq+clipping+gptq+variant-{k // 3}",
                bits=bits,
                group=draw.choice([32, 64, 128, None]),
                scheme="int asymmetric with a clipping search over eighty steps",
                bits_per_weight=None if failed else bits + 0.2 + draw.random() / 4,
                perplexity=None if failed else perplexity,
                seconds=10.0 * k,
                cpu_seconds=20.0 * k,
                peak_memory_bytes=10**9 + k * 10**7,
                status="failed" if failed else "ok",
                reason="Cholesky: damping grew to 1 and the factorisation still failed" if failed else None,
                layers=() if failed else layers(0.1, blocks=8, seed=k),
            )
        )
    return compare(tuple(rows), "a-model-with-a-long-name/" + "x" * 60)


def hostile() -> CompareRecord:
    row = Row(
        method=HOSTILE,
        bits=4,
        bits_per_weight=4.3,
        perplexity=20.0,
        scheme=HOSTILE,
        notes=(HOSTILE,),
        seconds=3.0,
        layers=(LayerRow(name=HOSTILE, block=0, output_error=0.1, fallback=HOSTILE),),
    )
    failed = Row(method="b", bits=4, status="failed", reason=HOSTILE)
    return compare((row, failed), HOSTILE)


def inspected(blocks: int = 30) -> InspectRecord:
    draw = random.Random(2)
    found = []
    for block in range(blocks):
        stream = 12 * math.exp(draw.gauss(0, 0.3)) * (1 + 40 * (block == 1))
        for k, role in enumerate(ROLES):
            ratio = stream if k < 3 else stream * (2 if k == 3 else 1.5 if k < 6 else 9)
            error = 0.006 * math.exp(draw.gauss(0, 0.4) + 0.3 * k)
            found.append(
                InspectLayer(
                    name=f"model.layers.{block}.{role}",
                    block=block,
                    shape=(576, 1536),
                    sites=("norm -> q, k, v",) if k < 3 else (),
                    input_max_over_median=ratio,
                    input_kurtosis=3 * ratio,
                    input_absmax=2 * ratio,
                    weight_kurtosis=3.2 + draw.random(),
                    weight_absmax=1.5,
                    rtn_error={4: error, 3: 5 * error, 2: 40 * error},
                )
            )
    found.append(
        InspectLayer(
            name="lm_head", shape=(49152, 576), input_max_over_median=30, input_kurtosis=20, rtn_error={4: 0.01, 2: 0.6}
        )
    )
    return InspectRecord(
        model="smollm2",
        calibration=Corpus(text="wiki.valid.tokens", windows=8, length=512),
        machine=MACHINE,
        seed=0,
        date=datetime(2026, 11, 24, 12, 0, tzinfo=UTC),
        scheme="asymmetric, group 64",
        layers=tuple(found),
    )


@pytest.fixture(scope="session")
def records() -> dict[str, CompareRecord]:
    """Comparisons by name; "hopeless" is all off scale or failed, "level" loses nothing."""
    lost = [
        Row(method=f"m{k}", bits=2, bits_per_weight=2.3, perplexity=p)
        for k, p in enumerate((math.inf, math.nan, 1e30, None))
    ]
    level = [Row(method="rtn", bits=8, bits_per_weight=8.3, perplexity=p) for p in (18.30, 18.29, 18.3001)]
    return {
        "typical": typical(),
        "none": compare(()),
        "one": compare(typical().rows[:1]),
        "crowded": crowded(),
        "hostile": hostile(),
        "hopeless": compare((*lost, Row(method="e", bits=3, status="failed", reason="out of memory"))),
        "level": compare(tuple(level)),
    }


@pytest.fixture(scope="session")
def inspection() -> InspectRecord:
    """A model of 30 blocks with massive outliers in the second."""
    return inspected()


@pytest.fixture(scope="session")
def hostile_text() -> str:
    """Markup, quotes, control characters and direction overrides: the text inside of the record "hostile"."""
    return HOSTILE
