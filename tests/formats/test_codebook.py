"""Codebook storage: layout, bits, decoding, checks, JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dither.errors import CheckpointError
from dither.formats import Codebook, QTensor, scheme_from_json

SCHEMES = [
    Codebook(),
    Codebook(3, 16),
    Codebook(5, 128, 32),
    Codebook(4, 4096, 4096, groups=3),
    Codebook(4, 64, outlier_percent=7.0, outlier=(2, 32)),
    Codebook(2, 8, 4, groups=2, outlier_percent=5.0, outlier=(3, 16), norm=True),
    Codebook(1, 2, norm=True),
]
SHAPES = [(8, 12), (13, 41), (29, 7), (64, 64)]


def filled(scheme: Codebook, shape: tuple[int, int], seed: int = 0) -> tuple[QTensor, Tensor]:
    """Random contents, and what they decode to by the definition."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape
    n = scheme.outliers(columns)
    own = torch.randperm(columns, generator=g)[:n].sort().values
    rest = torch.tensor([j for j in range(columns) if j not in own.tolist()], dtype=torch.int64)
    group = torch.cat([torch.full((s,), i) for i, s in enumerate(scheme.group_sizes(columns))])[torch.randperm(len(rest), generator=g)]
    v, (v0, k0) = scheme.vector, scheme.outlier

    def book(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).half().float()

    main, second = book(scheme.groups, scheme.centroids, v), book(scheme.groups, scheme.residual or 1, v)
    outlier, affine = book(k0, v0), (book(columns), book(columns))
    codes = torch.randint(0, 1 << scheme.index_bits, (-(-rows // v), len(rest)), generator=g, dtype=torch.int32)
    outlier_codes = torch.randint(0, k0, (-(-rows // v0), n), generator=g, dtype=torch.int32)
    wanted = torch.empty(rows, columns)
    for i in range(rows):
        for at, j in enumerate(rest.tolist()):
            code, of = int(codes[i // v, at]), int(group[at])
            wanted[i, j] = main[of, code % scheme.centroids, i % v]
            if scheme.residual is not None:
                wanted[i, j] += second[of, code // scheme.centroids, i % v]
        for at, j in enumerate(own.tolist()):
            wanted[i, j] = outlier[int(outlier_codes[i // v0, at]), i % v0]
    if scheme.norm:
        wanted = wanted * affine[0] + affine[1]
    stored = scheme.pack(
        codes, main, shape, residuals=None if scheme.residual is None else second, groups=group,
        outlier_columns=own, outlier_codes=outlier_codes, outlier_centroids=outlier, affine=affine if scheme.norm else None,
    )
    return QTensor.from_tensors(stored, scheme, shape), wanted


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_decoding(scheme: Codebook, shape: tuple[int, int], tmp_path: Path) -> None:
    tensor, wanted = filled(scheme, shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(tensor.dequantize(dtype), wanted.to(dtype))
    layout = scheme.layout(*shape)
    assert {k: (tuple(v.shape), v.dtype) for k, v in tensor.tensors().items()} == layout
    tensor.save(tmp_path / "t")
    assert torch.equal(QTensor.load(tmp_path / "t").dequantize(), wanted)
    assert scheme_from_json(scheme.to_json()) == scheme


def test_reference_decodes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in SCHEMES:
        tensor, wanted = filled(scheme, (13, 41))
        with monkeypatch.context() as m:
            m.setenv("DITHER_KERNELS", "reference")
            assert torch.equal(tensor.dequantize(), wanted)


def test_bits_are_those_of_the_paper() -> None:
    """log2 k / v + log2 k2 / v + 16 v (k + k2) G / (M N), where streams need no padding; and every further tensor counts."""
    for k, k2, groups in ((256, None, 1), (256, 16, 1), (4096, 256, 2)):
        scheme, (rows, columns) = Codebook(4, k, k2, groups), (576, 1536)
        index = 8 * (k == 256) + 12 * (k == 4096) + (0 if k2 is None else {16: 4, 256: 8}[k2])
        wanted = index / 4 + 16 * 4 * (k + (k2 or 0)) * groups / (rows * columns) + (groups > 1) / rows
        assert QTensor.empty(scheme, (rows, columns)).bits == pytest.approx(wanted, rel=1e-12)
        assert scheme.book_bits(rows, columns) == 64 * (k + (k2 or 0)) * groups
    assert round(QTensor.empty(Codebook(), (576, 576)).bits, 3) == 2.049
    with_norm = QTensor.empty(Codebook(norm=True), (576, 576)).bits
    assert with_norm == pytest.approx(QTensor.empty(Codebook(), (576, 576)).bits + 32 / 576)


def test_outliers_and_groups_share_the_columns() -> None:
    scheme = Codebook(groups=4, outlier_percent=1.0)
    assert scheme.outliers(576) == 8 and scheme.group_sizes(576) == [142] * 4  # 6 rounded up, and what 4 groups leave over
    assert Codebook(groups=5).group_sizes(12) == [3, 3, 2, 2, 2] and Codebook(groups=5).outliers(12) == 0


def test_columns_beyond_int16() -> None:
    scheme, shape = Codebook(1, 2, outlier_percent=0.001, outlier=(1, 2)), (1, 40000)
    layout = scheme.layout(*shape)
    assert layout["outlier_columns"] == ((1,), torch.int16)
    stored = {k: torch.zeros(s, dtype=d) for k, (s, d) in layout.items()}
    stored["outlier_columns"] = torch.tensor([39999 - 65536], dtype=torch.int16)
    stored["outlier_centroids"][0] = 3
    out = QTensor.from_tensors(stored, scheme, shape).dequantize()
    assert float(out[0, 39999]) == 3 and int(out.count_nonzero()) == 1
    assert scheme.layout(1, 70000)["outlier_columns"] == ((1,), torch.int32)


def test_damage_is_told() -> None:
    scheme = Codebook(2, 8, 4, groups=3, outlier_percent=5.0, outlier=(3, 16))
    tensor, _ = filled(scheme, (13, 41))

    def changed(key: str, value: Tensor) -> dict[str, Tensor]:
        return {**tensor.tensors(), key: value}

    columns = tensor.stored["outlier_columns"]
    bad = [
        ("centroids", changed("centroids", torch.full_like(tensor.stored["centroids"], torch.nan))),
        ("outlier_columns", changed("outlier_columns", torch.full_like(columns, 41))),
        ("outlier_columns", changed("outlier_columns", torch.zeros_like(columns))),
        ("groups", changed("groups", torch.full_like(tensor.stored["groups"], 255))),
        ("codes", changed("codes", tensor.stored["codes"][:, :-1])),
        ("residuals", {k: v for k, v in tensor.tensors().items() if k != "residuals"}),
        ("scale", changed("scale", torch.ones(1))),
    ]
    for key, stored in bad:
        with pytest.raises(CheckpointError, match=f"^{key}: "):
            QTensor.from_tensors(stored, scheme, (13, 41))


def test_wrong_values() -> None:
    for name, values in [
        ("centroids", {"centroids": 100}), ("centroids", {"centroids": 1}), ("centroids", {"centroids": 1 << 17}), ("residual", {"residual": 1}),
        ("residual", {"residual": 24}), ("residual", {"centroids": 1 << 16, "residual": 512}), ("vector", {"vector": 0}), ("groups", {"groups": 0}),
        ("outlier_percent", {"outlier_percent": 100.0}), ("outlier_percent", {"outlier_percent": -1}), (r"outlier\[1\]", {"outlier": (4, 100)}),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            Codebook(**values)
    with pytest.raises(ValueError, match=r"^vector: 32 weights of a column, but the matrix has only 16 rows"):
        Codebook(32).layout(16, 64)
    with pytest.raises(ValueError, match=r"^groups: "):
        Codebook(groups=9).layout(16, 8)
    with pytest.raises(ValueError, match="'height'"):
        scheme_from_json({"kind": "codebook", "height": 3})
