"""What benchmarks of softmax compute from times, and the harness that takes them; no time is judged here."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

from dither import kernels
from dither.special import softmax_error, softmax_timing, timing


def row(**changes: Any) -> dict[str, Any]:
    seconds = {"two_pass": 2.0, "recompute": 3.0, "reload": 4.0, "online": 1.9, "stream": 1.0, "torch": 5.0}
    return {"seconds": seconds, "auto": "two_pass"} | changes


def test_ratios() -> None:
    assert softmax_timing.ratio(row()) == 1.5 and softmax_timing.ratio(row(), "online") == pytest.approx(3 / 1.9)
    assert softmax_timing.lag(row()) == pytest.approx(2 / 1.9 - 1) and softmax_timing.lag(row(auto="online")) == 0
    assert softmax_timing.alike(row()) == pytest.approx((3 / 1.9) / (5 / 4))
    assert softmax_timing.alike(row(), 1) == pytest.approx((4 / 1.9) / (6 / 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_measured(dtype: torch.dtype) -> None:
    found = softmax_timing.measure(8192, dtype=dtype, rounds=1)
    assert found["numbers"] == 8192 // dtype.itemsize and found["isa"] == kernels.backend() and found["auto"] == "reload"
    assert found["seconds"].keys() == {*kernels.SOFTMAX_ALGORITHMS, "stream", "log_softmax", "logsumexp", "torch"}
    assert all(math.isfinite(s) and s > 0 for s in (*found["seconds"].values(), *found["streams"].values()))
    read, copy, update = (found["streams"][name] for name in ("read", "copy", "update"))
    assert found["predicted"] == pytest.approx(
        {"two_pass": read + copy, "recompute": 2 * read + copy, "reload": read + copy + update, "online": read + copy}
    )
    assert found["bytes_a_second"]["reload"] == pytest.approx(5 * 8192 / found["seconds"]["reload"])
    assert softmax_timing.line(found).split()[0] == "8K"


def test_every_combination_short_rows_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_timing, "measure", lambda size, **how: (size, how["threads"], how["isa"], how["dtype"]))
    found = list(softmax_timing.rows([4, 8], [1, 2], ["float32", "bfloat16"], ["avx2"]))
    assert len(found) == 8 and found[0] == (4, 1, "avx2", torch.float32) and found[-1] == (8, 2, "avx2", torch.bfloat16)


def test_wrong_arguments() -> None:
    for name, call in [
        ("size", lambda: softmax_timing.measure(3)),
        ("threads", lambda: softmax_timing.measure(4096, threads=0)),
        ("rounds", lambda: softmax_timing.measure(4096, rounds=0)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()


def test_calls_take_turns() -> None:
    order: list[str] = []
    found = timing.alternating({name: lambda n=name: order.append(n) for name in "abc"}, rounds=3, least=0.0)
    assert found.keys() == set("abc") and all(seconds > 0 for seconds in found.values())
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # once to warm up


def test_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITHER_ISA", "avx2")
    before = torch.get_num_threads()
    with timing.settings(3, "scalar"):
        assert torch.get_num_threads() == 3 and os.environ["DITHER_ISA"] == "scalar"
    assert torch.get_num_threads() == before and os.environ["DITHER_ISA"] == "avx2"
    monkeypatch.delenv("DITHER_ISA")
    with pytest.raises(KeyError), timing.settings(1, ""):
        raise KeyError
    assert "DITHER_ISA" not in os.environ


def test_memory_is_whole_and_writable() -> None:
    x = timing.buffer(5000, torch.bfloat16)
    assert x.shape == (5000,) and x.dtype == torch.bfloat16 and not bool(x.any())
    assert float(x.fill_(2).float().sum()) == 10000


def test_short_sizes() -> None:
    assert [softmax_timing.short(n) for n in (0, 100, 1024, 1536, 4 << 20, 3 << 30)] == ["0", "100", "1K", "1536", "4M", "3G"]


def test_units_of_the_last_place() -> None:
    exact = torch.tensor([[0.5, 0.25, 1e-40]], dtype=torch.float64)
    y = exact.float()
    y[0, 1] += 2**-24
    y[0, 2] = 0
    assert softmax_error.in_ulp(y, exact) == 2.0  # an ulp of 0.25 is 2^-25; what is not normal does not count


def test_errors_of_every_algorithm() -> None:
    found = softmax_error.errors(4099)
    assert found.keys() == {*kernels.SOFTMAX_ALGORITHMS, "torch", "logsumexp"}
    assert max(found["two_pass"].values()) < 8 and max(found["logsumexp"].values()) < 2
    assert found["recompute"]["falling"] > 20  # the maximum is subtracted first, which rounds
    assert all(by_kind.keys() == softmax_error.rows(1, 0).keys() for by_kind in found.values())
