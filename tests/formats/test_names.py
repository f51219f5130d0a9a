"""Formats by name: what each name means, by its table of values, and what is no name."""

from __future__ import annotations

import pytest
import torch

from dither.formats import MXFP4, NVFP4, named_format, named_scheme


def test_names_are_the_published_tables() -> None:
    assert named_format("fp4") == named_format("e2m1")
    assert named_format("fp4").values()[0].tolist()[7:] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        every = torch.arange(256).to(torch.uint8).view(dtype).double()
        finite = every[every.isfinite()].unique()
        assert torch.equal(named_format(name).values()[0], finite)
    assert named_format("e3m2", "bfloat16").scale == "bfloat16" and named_format("e3m2").largest == 28
    assert named_scheme("mxfp4") == MXFP4 and named_scheme("nvfp4") == NVFP4 and named_scheme("fp8") is None
    assert named_format("nvfp4") == NVFP4.format


@pytest.mark.parametrize("name", ["", "half", "e4", "fp16", "e10m1", "E2M1", "int"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be int, fp4, fp8, mxfp4, nvfp4 or like e3m2"):
        named_format(name)


@pytest.mark.parametrize("name", ["e0m3", "e5m3", "e7m0", "e9m9"])
def test_names_of_impossible_widths_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        named_format(name)
