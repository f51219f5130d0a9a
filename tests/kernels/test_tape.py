"""The instructions of a tape against float64, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dither import kernels
from dither.kernels.tape import FUNCTIONS, Row, Tape
from kernels.conftest import ISAS, use

TYPES = (torch.float32, torch.bfloat16)
F = torch.nn.functional
TRUTH: dict[str, Callable[..., Tensor]] = {
    "copy": lambda a: a, "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "silu": F.silu,
    "sigmoid": torch.sigmoid, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"), "exp": torch.exp,
    "tanh": torch.tanh, "sin": torch.sin, "cos": torch.cos, "sqrt": lambda a: a.abs().sqrt(), "rsqrt": lambda a: a.abs().rsqrt(),
    "reciprocal": torch.reciprocal, "pow": torch.pow, "sum": lambda a: a.sum(-1, keepdim=True), "mean": lambda a: a.mean(-1, keepdim=True),
}  # fmt: skip


@pytest.fixture(params=ISAS, autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, request.param)
    return str(request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def close(found: Tensor, truth: Tensor, ulps: float = 4) -> None:
    """Within a few roundings of the type it is stored in, and of float32's where values cancel."""
    unit = 2.0 ** -(8 if found.dtype == torch.bfloat16 else 23)
    error = (found.double() - truth).abs()
    assert bool((error <= ulps * unit * truth.abs() + 1e-6).all()), float(error.max())


def ran(write: Callable[[Tape], None]) -> None:
    tape = Tape()
    write(tape)
    tape.run([], 0, 16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_elements(function: str, dtype: torch.dtype) -> None:
    for count in (1, 3, 15, 16, 17, 33, 160):
        a = draw(2, count, dtype=dtype, seed=count)
        a = a.abs() if function in ("sqrt", "rsqrt") else a
        b = 2.0 if function == "pow" else draw(2, count, dtype=dtype, seed=count + 1) + 9 if function in ("add", "sub", "mul", "div") else None
        truth = TRUTH[function](a.double(), *([] if b is None else [b.double() if isinstance(b, Tensor) else b]))
        y = torch.full(truth.shape, math.nan, dtype=dtype)
        ran(lambda tape: tape.elementwise(function, y, a, b))  # noqa: B023
        if function == "sum":
            assert (y.double() - truth).abs().max() <= 2.0 ** (-7 if dtype == torch.bfloat16 else -21) * a.double().abs().sum()
        else:
            close(y, truth, 64 if function == "mean" else 4)


def test_far_ends_do_not_overflow() -> None:
    a = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, -math.inf, math.inf, math.nan] + [0.0] * 10)
    y = torch.zeros_like(a)
    ran(lambda tape: tape.elementwise("sigmoid", y, a))
    assert torch.equal(y[:9].isfinite(), torch.ones(9, dtype=torch.bool)) and bool(y[9].isnan())
    close(y[:9], a[:9].double().sigmoid())
    ran(lambda tape: tape.elementwise("silu", y, a))
    close(y[:7], F.silu(a[:7].double()))


def test_views_and_broadcasting() -> None:
    """What rotary embeddings and norms do: halves, repeated rows, one number a row, transposed axes."""
    x, row, column = draw(1, 9, 1, 64), draw(1, 1, 1, 64, seed=1), draw(1, 9, 1, 1, seed=2)
    turned, y, z = torch.empty_like(x), torch.empty_like(x), torch.empty(1, 1, 9, 64).transpose(1, 2)
    cube, out = draw(3, 4, 5, 6, seed=3).permute(2, 0, 3, 1), torch.empty(5, 3, 6, 4)

    def write(tape: Tape) -> None:
        tape.elementwise("neg", turned[..., :32], x[..., 32:])
        tape.elementwise("copy", turned[..., 32:], x[..., :32])
        tape.elementwise("mul", y, turned, row)
        tape.elementwise("mul", z, y, column)
        tape.elementwise("mul", out, cube, cube[:, :1])

    ran(write)
    expected = torch.cat((-x[..., 32:], x[..., :32]), -1) * row
    assert torch.equal(turned, torch.cat((-x[..., 32:], x[..., :32]), -1)) and torch.equal(y, expected) and torch.equal(z, expected * column)
    assert torch.equal(out, cube * cube[:, :1])


def packed(outputs: int, inputs: int, bits: int, group: int, seed: int) -> tuple[kernels.PackedMatrix, Tensor]:
    """A matrix, and its values in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=generator)
    groups = -(-inputs // group)
    scale = (torch.rand(outputs, groups, generator=generator) + 0.5).half()
    zero = torch.randint(0, 1 << bits, (outputs, groups), dtype=torch.uint8, generator=generator)
    of = torch.arange(inputs) // group
    return kernels.PackedMatrix(kernels.pack_rows(codes, bits), bits, scale, zero, group, inputs), scale.double()[:, of] * (
        codes.double() - zero.double()[:, of]
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_tables(dtype: torch.dtype, bits: int) -> None:
    """By the token's number and by its place, packed rows as `PackedMatrix.rows` decodes them, to the last bit."""
    few, _ = packed(9, 70, bits, 32, 0)
    dense = draw(5, 33, dtype=dtype)
    tape = Tape()
    by_token, by_length, own = torch.empty(70, dtype=dtype), torch.empty(70, dtype=dtype), torch.empty(33, dtype=dtype)
    tape.lookup(few, by_token)
    tape.lookup(few, by_length, by_length=True)
    tape.lookup(dense, own, by_length=True)
    for token, length in ((0, 4), (8, 0), (3, 2)):
        tape.run([], length, 16, token)
        assert torch.equal(by_token, few.rows(torch.tensor([token]), dtype)[0])
        assert torch.equal(by_length, few.rows(torch.tensor([length]), dtype)[0])
        assert torch.equal(own, dense[length])
    for token, length in ((9, 0), (-1, 0), (0, 5)):
        with pytest.raises(IndexError, match="of a table of"):
            tape.run([], length, 16, token)


def test_the_length_of_each_row() -> None:
    memory = torch.full((3, 128), 255, dtype=torch.uint8)
    tape, length = Tape(memory), memory[0, :4].view(torch.float32)
    tape.length(length)
    tape.elementwise("mul", memory[0, 64:68].view(torch.float32), length, 2.0)
    tape.run_rows([Row([], n, 48) for n in (0, 7, 41)])
    assert memory.view(torch.float32)[:, [0, 16]].tolist() == [[0, 0], [7, 14], [41, 82]]
    with pytest.raises(ValueError, match="y"):
        tape.length(memory[0, :4].view(torch.bfloat16))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_with_matrices_of_all_kinds(dtype: torch.dtype, threads: int) -> None:
    """Of several widths and groups at once, dense ones between them; each gives what the packed product alone gives, to the last bit."""
    inputs = 96
    x = draw(inputs, dtype=dtype)
    kinds = [(5, 4, 32), (16, 8, 32), (7, 4, 32), (3, 3, 48), (1, 4, inputs), (33, 4, 32)]
    few = [packed(o, inputs, bits, group, seed) for seed, (o, bits, group) in enumerate(kinds)]
    dense = [draw(o, inputs, dtype=t, seed=o) for o, t in ((4, torch.bfloat16), (6, torch.float32))]
    matrices: list[tuple[kernels.PackedMatrix | Tensor, Tensor]] = [
        *((m, torch.empty(o, dtype=dtype)) for (m, _), (o, _, _) in zip(few[:3], kinds[:3], strict=True)),
        *((w, torch.empty(w.shape[0], dtype=t)) for w, t in zip(dense, (dtype, torch.float32), strict=True)),
        *((m, torch.empty(o, dtype=torch.float32)) for (m, _), (o, _, _) in zip(few[3:], kinds[3:], strict=True)),
    ]
    torch.set_num_threads(threads)
    ran(lambda tape: tape.multiply(x, matrices))
    truths = [v for _, v in few[:3]] + [w.double() for w in dense] + [v for _, v in few[3:]]
    for (weight, y), truth in zip(matrices, truths, strict=True):
        scale = (truth.abs() @ x.double().abs())[:]
        assert bool(((y.double() - truth @ x.double()).abs() <= 2.0 ** (-8 if y.dtype == torch.bfloat16 else -15) * scale).all())
        if isinstance(weight, kernels.PackedMatrix) and y.dtype == dtype:
            assert torch.equal(y, weight(x[None])[0])


def rounding(outputs: int, inputs: int, bits: int, group: int, grid: kernels.TokenGrid, seed: int) -> kernels.Int8Matrix:
    matrix, _ = packed(outputs, inputs, bits, group, seed)
    return kernels.Int8Matrix(matrix.packed, bits, matrix.scale, matrix.zero if seed % 2 else 1 << bits - 1, group, inputs, grid)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_that_is_rounded_to_integers(dtype: torch.dtype, threads: int) -> None:
    """With matrices of all widths and on several grids at once, others between them; each gives what it gives alone, to the last bit."""
    grids = [kernels.TokenGrid(8, False, torch.float16), kernels.TokenGrid(), kernels.TokenGrid(6, "extremum", torch.bfloat16)]
    for inputs in (96, 576, 1100):
        x = draw(inputs, dtype=dtype, seed=inputs)
        kinds = [(bits, group) for bits, group in ((4, 64), (4, 32), (3, 48), (8, inputs), (2, 64), (4, inputs), (8, 13), (4, 64)) if group <= inputs]
        weights: list[kernels.PackedMatrix | kernels.Int8Matrix | Tensor] = [
            *(rounding(o, inputs, bits, group, grids[i % 3], i) for i, (bits, group) in enumerate(kinds) for o in (1, 37, 64)),
            packed(19, inputs, 4, 32, 9)[0],
            draw(6, inputs, dtype=dtype),
        ]
        matrices = [(w, torch.empty((w if isinstance(w, Tensor) else w.packed).shape[0], dtype=dtype)) for w in weights[::2] + weights[1::2]]
        torch.set_num_threads(threads)
        ran(lambda tape: tape.multiply(x, matrices))  # noqa: B023
        for weight, y in matrices:
            if not isinstance(weight, Tensor):
                assert torch.equal(y, weight(x[None])[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_to_be_rounded_that_is_not_finite_is_refused(bad: float) -> None:
    """In any of several products, and only while it is so."""
    x, good, y = draw(96), draw(96, seed=1), torch.empty(2, 16)
    weight, tape = rounding(16, 96, 4, 32, kernels.TokenGrid(), 1), Tape()
    tape.multiply(x, [(weight, y[0])])
    tape.multiply(good, [(weight, y[1])])
    tape.run([], 0, 16)
    kept, x[77] = x[77].item(), bad
    with pytest.raises(ValueError, match="holds NaN or inf"):
        tape.run([], 0, 16)
    assert bool(y[0].isnan().all()) and torch.equal(y[1], weight(good[None])[0])
    x[77] = kept
    tape.run([], 0, 16)
    assert torch.equal(y[0], weight(x[None])[0])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matrices_whose_codes_name_values(dtype: torch.dtype) -> None:
    """Several tables at once, one that bfloat16 does not hold, scales of a byte: each gives what the packed product alone gives, to the last bit."""
    g, x = torch.Generator().manual_seed(0), draw(96, dtype=dtype)
    wide, half = torch.randn(16, generator=g), torch.randn(128, generator=g).bfloat16().float()
    small = wide.bfloat16().float()
    floats = torch.cat([half.abs(), -half.abs()])
    kinds = [(4, 32, small, 0.5), (4, 32, None, 1.0), (4, 32, wide, 2.0), (4, 32, small, 0.25), (8, 48, floats, 1.0)]
    matrices: list[tuple[kernels.PackedMatrix | Tensor, Tensor]] = []
    for bits, group, values, factor in kinds:
        codes = torch.randint(0, 1 << bits, (9, 96), dtype=torch.uint8, generator=g)
        scale = (torch.rand(9, 96 // group, generator=g) + 0.5).to(torch.float8_e4m3fn)
        weight = kernels.PackedMatrix(kernels.pack_rows(codes, bits), bits, scale, 0.0, group, 96, values=values, tensor_scale=factor)
        matrices.append((weight, torch.empty(9, dtype=dtype)))
    ran(lambda tape: tape.multiply(x, matrices))
    for weight, y in matrices:
        assert isinstance(weight, kernels.PackedMatrix) and torch.equal(y, weight(x[None])[0])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("heads", "groups", "width", "value_width"), [(4, 2, 8, 8), (9, 3, 64, 64), (3, 3, 20, 33), (1, 1, 1, 1), (7, 1, 5, 16)])
def test_attention(dtype: torch.dtype, heads: int, groups: int, width: int, value_width: int, threads: int) -> None:
    """Token after token, against float64's softmax over all keys so far; strides as a transposed projection has them."""
    tokens, capacity, layers = 70, 80, 2
    q, k, v = (draw(tokens, n, d, dtype=dtype, seed=i) / 4 for i, (n, d) in enumerate(((heads, width), (groups, width), (groups, value_width))))
    held = [torch.full((groups, capacity, d), math.nan, dtype=dtype) for _ in range(layers) for d in (width, value_width)]  # filled anyhow
    at = [torch.empty_like(x[0]) for x in (q, k)]
    v_at = torch.empty(value_width, groups, dtype=dtype).T  # features are not dense
    y = torch.empty(heads, value_width, dtype=dtype)
    torch.set_num_threads(threads)
    tape = Tape()
    tape.attend(1, *at, v_at, y, 0.25)
    for t in range(tokens):
        for there, x in zip((*at, v_at), (q, k, v), strict=True):
            there.copy_(x[t])
        tape.run([h.data_ptr() for h in held], t, capacity)
        if t in (0, 1, 2, 15, 16, 17, 63, 69):
            keys, values = (x[: t + 1].double().repeat_interleave(heads // groups, 1) for x in (k, v))
            p = (torch.einsum("hd,thd->ht", q[t].double(), keys) / 4).softmax(-1)
            truth = torch.einsum("ht,the->he", p, values)
            assert (y.double() - truth).abs().max() <= (2.0**-8 if dtype == torch.bfloat16 else 2.0**-20) * values.abs().max()
    keys = held[2].view(groups, -1, width, 16).transpose(2, 3).reshape(groups, capacity, width)
    assert torch.equal(keys[:, :tokens], k.transpose(0, 1)) and torch.equal(held[3][:, :tokens], v.transpose(0, 1)) and bool(held[0].isnan().all())


HEADS, GROUPS, WIDTH = 6, 2, 16


def small_model(dtype: torch.dtype, rows: int, grid: kernels.TokenGrid | None = None) -> tuple[Tape, Tensor, Tensor]:
    """Every kind of instruction, on keys and values of a second layer; its memory, and the scores in it, ``[rows, 33]``. ``grid``: x of some products
    is rounded."""
    few: list[kernels.PackedMatrix | kernels.Int8Matrix] = [
        packed(o, 96, bits, group, bits)[0] if grid is None else rounding(o, 96, bits, group, grid, bits)
        for o, bits, group in ((64, 4, 32), (32, 3, 48), (33, 4, 96), (96, 8, 32))
    ]
    embedding, places, dense = packed(101, 96, 4, 32, 9)[0], draw(99, 96, dtype=dtype), draw(32, 96, dtype=dtype, seed=2)
    memory = torch.full((rows, 16 << 10), 255, dtype=torch.uint8)  # NaN
    ends = [0]

    def own(*shape: int) -> Tensor:
        start = ends[-1]
        ends.append(start + -(-math.prod(shape) * dtype.itemsize // 64) * 64)
        return memory[0, start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    x, z, mean, q0, q1, k, v, y, last, out = (own(n) for n in (96, 96, 1, 64, 32, 32, 32, 96, 96, 33))
    q = memory[0, ends[3] : ends[3] + HEADS * WIDTH * dtype.itemsize].view(dtype).view(HEADS, WIDTH)
    tape = Tape(memory)
    tape.lookup(embedding, x)
    tape.lookup(places, z, by_length=True)
    tape.elementwise("add", x, x, z)
    tape.elementwise("mean", mean, x)
    tape.elementwise("sub", x, x, mean)
    tape.multiply(x, [(few[3], last)])
    tape.elementwise("mul", last, last, 0.05)
    tape.elementwise("add", x, x, last)
    tape.multiply(x, [(few[0], q0), (few[1], q1), (dense, k), (few[1], v)])
    tape.elementwise("mul", q, q, 0.02)
    tape.attend(1, q, k.view(GROUPS, WIDTH), v.view(GROUPS, WIDTH), y.view(HEADS, WIDTH), 0.05)
    tape.elementwise("silu", y, y)
    tape.multiply(y, [(few[2], out)])
    return tape, memory, memory[:, ends[9] : ends[9] + 33 * dtype.itemsize].view(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("grid", [None, kernels.TokenGrid(8, False, torch.float16)], ids=["floats", "integers"])
def test_rows_at_once_are_what_each_is_alone(dtype: torch.dtype, threads: int, grid: kernels.TokenGrid | None) -> None:
    """A small model of every kind of instruction, over sequences of different lengths and rooms: any number of rows, in any order, gives the bits of
    each row alone, writes only to its own keys and values, and to no other row's memory. (That one row is right, the tests above say.) A row whose
    numbers are not finite is no other row's affair."""
    rows = 8
    tape, memory, scores = small_model(dtype, rows, grid)

    lengths, capacities = (0, 3, 15, 16, 31, 40, 70, 79), (16, 32, 16, 48, 32, 48, 96, 80)
    cached = [[draw(GROUPS, c, WIDTH, dtype=dtype, seed=n + i) for i in range(4)] for n, c in zip(lengths, capacities, strict=True)]

    def run(order: list[int], bad: int | None = None) -> list[tuple[Tensor, list[Tensor]]]:
        memory.fill_(255)
        held = [[t.clone() for t in cached[i]] for i in order]
        for t in held[order.index(bad)][2:] if bad is not None else ():
            t.fill_(math.nan)
        finite = tape.run_rows([Row([t.data_ptr() for t in h], lengths[i], h[0].shape[1], i) for i, h in zip(order, held, strict=True)])
        assert bool((memory[len(order) :] == 255).all()) and finite == [grid is None or i != bad for i in order]
        return [(scores[t].clone(), h) for t, h in enumerate(held)]

    torch.set_num_threads(threads)
    alone = [run([i])[0] for i in range(rows)]
    for i, (_, held) in enumerate(alone):
        assert torch.equal(held[0], cached[i][0]) and torch.equal(held[1], cached[i][1]) and not torch.equal(held[2], cached[i][2])
        assert torch.equal(held[3][:, : lengths[i]], cached[i][3][:, : lengths[i]]) and not torch.equal(held[3], cached[i][3])
    for count in range(1, rows + 1):
        for order in (list(range(count)), list(range(rows))[: -count - 1 : -1], [(3 * i) % rows for i in range(count)]):
            for i, (found, held) in zip(order, run(order), strict=True):
                assert bool(found.isfinite().all()) and torch.equal(found, alone[i][0])
                assert all(map(torch.equal, held, alone[i][1]))
    for bad in (1, 6):
        for i, (found, held) in enumerate(run(list(range(rows)), bad)):
            assert bool(found.isnan().all()) if i == bad else torch.equal(found, alone[i][0]) and all(map(torch.equal, held, alone[i][1]))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("grid", [None, kernels.TokenGrid(8, False, torch.float16)], ids=["floats", "integers"])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens_at_once_are_what_they_are_one_by_one(dtype: torch.dtype, grid: kernels.TokenGrid | None, threads: int) -> None:
    """Scores, keys and values, but for sums in another order; behind none and behind some, in numbers that fill panels of keys and that do not. Keys
    and values of other layers, and rooms beyond the last token, stay as they are."""
    rows, capacity = 80, 96
    tape, memory, scores = small_model(dtype, rows, grid)
    torch.set_num_threads(threads)
    tokens = [(37 * t + 5) % 101 for t in range(rows)]
    start = [draw(GROUPS, capacity, WIDTH, dtype=dtype, seed=i) for i in range(4)]
    tolerance = 0.06 if dtype == torch.bfloat16 else 0.01 if grid else 1e-4  # a rounding is no continuous function
    for before, count in ((0, 1), (0, 3), (0, 16), (7, 9), (0, 47), (16, 33), (13, 80)):
        stepped, read = [t.clone() for t in start], [t.clone() for t in start]
        for t in range(count):
            memory.fill_(255)
            tape.run([h.data_ptr() for h in stepped], before + t, capacity, tokens[t])
        truth = scores[0].float().clone()
        memory.fill_(255)
        tape.read(Row([h.data_ptr() for h in read], before, capacity), tokens[:count])
        assert bool((memory[count:] == 255).all())
        assert (scores[count - 1].float() - truth).norm() <= tolerance * truth.norm()
        for found, own in zip(read, stepped, strict=True):
            assert (found.float() - own.float()).norm() <= tolerance * own.float().norm()
        keys = read[2].view(GROUPS, capacity // 16, WIDTH, 16).transpose(2, 3).reshape(GROUPS, capacity, WIDTH)
        was = start[2].view(GROUPS, capacity // 16, WIDTH, 16).transpose(2, 3).reshape(GROUPS, capacity, WIDTH)
        assert torch.equal(keys[:, :before], was[:, :before]) and torch.equal(keys[:, before + count :], was[:, before + count :])
        assert torch.equal(read[3][:, before + count :], start[3][:, before + count :]) and torch.equal(read[0], start[0])
    for bad in ([], [0] * (rows + 1)):
        with pytest.raises(ValueError, match="tokens"):
            tape.read(Row([h.data_ptr() for h in start], 0, capacity), bad)
    with pytest.raises(ValueError, match="length"):
        tape.read(Row([h.data_ptr() for h in start], 90, capacity), [0] * 8)
    with pytest.raises(IndexError, match="of a table of"):
        tape.read(Row([h.data_ptr() for h in start], 0, capacity), [0, 101])


def test_rows_that_do_not_fit_are_refused() -> None:
    memory = torch.zeros(2, 256, dtype=torch.uint8)
    x, outside, table = memory[0, :64].view(torch.float32), torch.zeros(16), torch.ones(3, 16)
    tape, row = Tape(memory), Row([], 0, 16)
    tape.lookup(table, x)
    for call in (
        lambda: tape.lookup(table, outside),
        lambda: tape.elementwise("neg", memory[1, :64].view(torch.float32), x),
        lambda: tape.multiply(x, [(torch.ones(16, 16), outside)]),
        lambda: tape.attend(0, x[None], x[None], x[None], outside[None], 1.0),
    ):
        with pytest.raises(ValueError, match=r"y: a tensor of shape .* lies outside the memory"):
            call()
    for rows in ([], [row] * 3):
        with pytest.raises(ValueError, match=r"rows: must be 1 \.\. 2"):
            tape.run_rows(rows)
    with pytest.raises(ValueError, match="length"):
        tape.run_rows([row, Row([], 16, 16)])
    with pytest.raises(IndexError, match="row 3 of a table of 3"):
        tape.run_rows([row, Row([], 0, 16, 3)])
    for bad in (torch.zeros(256, dtype=torch.uint8), torch.zeros(2, 64), memory.T):
        with pytest.raises(ValueError, match="memory"):
            Tape(bad)


def test_what_does_not_fit_is_refused() -> None:
    tape, x = Tape(), torch.zeros(4)
    for call, match in (
        (lambda: tape.elementwise("erf", x, x), "function"),
        (lambda: tape.elementwise("add", x, x), "b: add takes one"),
        (lambda: tape.elementwise("neg", x, x, 1.0), "b: neg takes none"),
        (lambda: tape.elementwise("pow", x, x, x), "b: pow takes a number"),
        (lambda: tape.elementwise("neg", x, torch.zeros(3)), "a: shape"),
        (lambda: tape.elementwise("neg", x, x.double()), "a: torch.float64"),
        (lambda: tape.elementwise("sum", x, x), "y: shape"),
        (lambda: tape.multiply(x, [(torch.zeros(2, 3), torch.zeros(2))]), "weight"),
        (lambda: tape.multiply(x, [(torch.zeros(4, 2).T, torch.zeros(2))]), "weight"),
        (lambda: tape.attend(0, x[None], x[None], x[None, :2], x[None], 1.0), "k: shapes"),
        (lambda: tape.attend(0, x[None], x[None], x[None].bfloat16(), x[None], 1.0), "q: types"),
        (lambda: tape.lookup(torch.zeros(2, 4), x[:3].clone()), "weight: rows"),
        (lambda: tape.lookup(torch.zeros(2, 4), x.bfloat16()), "weight: rows"),
        (lambda: tape.lookup(torch.zeros(4, 2).T, x), "weight"),
        (lambda: tape.run([], 16, 16), "length"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_there_is_no_tape_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITHER_KERNELS", "reference")
    with pytest.raises(RuntimeError, match="extension"):
        Tape()
