"""Small modules made to mislead: what is between two weights decides, and nothing that only looks like a site is reported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dither.graph import Structure, apply_scale, discover, discover_block, layers_of, verified
from dither.graph.exact import float64_default, randomize, relative_difference, run_exactly

X = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(function(self.a(x)))

    return Between()


def holds(model: nn.Module, structure: Structure, x: Tensor = X) -> bool:
    """All scale sites folded into other random float64 weights leave the output as it was."""
    bench = copy.deepcopy(model).double().eval().requires_grad_(False)
    randomize(bench, torch.Generator().manual_seed(99))
    with float64_default():
        before = run_exactly(bench, [((x.double(),), {})])
        for site in structure.sites:
            if site.kind == "scale":
                apply_scale(bench, site, torch.linspace(0.5, 2, site.channels, dtype=torch.float64))
        return relative_difference(run_exactly(bench, [((x.double(),), {})]), before) < 1e-9


@pytest.mark.parametrize("function", [
    lambda t: t, F.relu, lambda t: F.leaky_relu(t, 0.2), torch.abs, lambda t: t.clamp(min=0), lambda t: 3 * t, lambda t: t[:, None, :].squeeze(1),
    lambda t: t.float().half().bfloat16().to(t.dtype), lambda t: F.max_pool1d(t.T, 4).T,
], ids=["identity", "relu", "leaky", "abs", "clamp", "times", "views", "casts", "pool"])  # fmt: skip
def test_homogeneous_functions_let_scales_through(function: Callable[[Tensor], Tensor]) -> None:
    model = between(function)
    structure = discover(model, X)
    (site,) = [s for s in structure.sites if s.kind == "scale"]
    assert (site.producer.name, site.consumers[0].name) == ("a", "b")
    assert torch.equal(site.channel_map, torch.arange(16)) and site.producer.bias == "a.bias"
    assert holds(model, structure)


@pytest.mark.parametrize("function", [
    F.gelu, F.silu, torch.tanh, F.relu6, F.hardswish, torch.square, torch.exp, lambda t: t + 1, lambda t: F.relu(t) ** 2,
    lambda t: t.clamp(-4, 4), lambda t: t.clamp(max=30),
    lambda t: F.layer_norm(t, (16,)), lambda t: F.normalize(t, dim=-1), lambda t: F.softmax(t, -1),
    lambda t: t.cumsum(-1), lambda t: t.round(), lambda t: t * (t.sum(-1, keepdim=True) > 0), lambda t: t * t.roll(1, -1), torch.sign,
], ids=[
    "gelu", "silu", "tanh", "relu6", "hardswish", "square", "exp", "plus", "relu2", "clamp", "rarely", "norm", "unit", "softmax", "cumsum", "round",
    "switch", "product", "sign",
])  # fmt: skip
def test_other_functions_do_not(function: Callable[[Tensor], Tensor]) -> None:
    structure = discover(between(function), X)
    assert not [s for s in structure.sites if s.kind == "scale"], structure.summary()
    assert ("b", True) in [(name, bool(why)) for name, why in structure.unproved]


@pytest.mark.parametrize(
    ("function", "shifts"), [(lambda t: t, True), (F.relu, False), (F.gelu, False), (lambda t: 3 * t, False)]
)
def test_shifts_pass_only_where_added_as_they_are(function: Callable[[Tensor], Tensor], shifts: bool) -> None:
    assert any(s.kind == "shift" for s in discover(between(function), X).sites) == shifts


@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
def test_shift_into_a_padded_convolution_is_refused_even_where_it_hardly_shows(padding: int | str) -> None:
    quiet = nn.Linear(5, 3)
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 3, padding=padding), nn.Flatten(0, 1), Times(1e-12), nn.LazyLinear(5), quiet)
    x = torch.randn(2, 3, 8)
    model(x)
    structure = discover(model, x)
    assert bool(structure.sites_of("1", "shift")) == (padding in (0, "valid"))
    assert structure.sites_of("1", "scale")


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_permutation_is_the_channel_map() -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    structure = discover(between(lambda t: t[:, order]), X)
    assert torch.equal(structure.sites_of("b")[0].channel_map, order)


def test_channels_with_another_use_are_left_out() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y[:, :1]

    model = Leaky()
    structure = discover(model, X)
    (site,) = structure.sites_of("b")
    assert torch.equal(site.producer.rows, torch.arange(1, 16))
    assert torch.equal(site.channel_map, torch.arange(-1, 15))
    assert holds(model, structure)
    expanded = site.consumers[0].expand(torch.full((15,), 2.0))
    assert expanded[0] == 1 and bool((expanded[1:] == 2).all())
    assert torch.equal(site.consumers[0].reduce(torch.arange(16.0), 15), torch.arange(1.0, 16.0))


class Norm(nn.Module):
    def __init__(self, width: int, offset: float, bias: bool) -> None:
        super().__init__()
        self.offset = offset
        self.gain = nn.Parameter(torch.ones(width) - offset)
        self.added = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.offset + self.gain)
        return y if self.added is None else y + self.added


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0, 0.5])
def test_the_rule_of_a_norm_is_found(offset: float, bias: bool) -> None:
    model = nn.Sequential(Norm(12, offset, bias), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3))
    structure = discover(model, X)
    (site,) = structure.sites_of("1")
    assert site.producer.parameter == "0.gain" and site.producer.bias == ("0.added" if bias else None)
    assert site.producer.offset == pytest.approx(offset, abs=1e-6)
    assert holds(model, structure)


def test_norm_with_a_reader_that_is_no_weight() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.LayerNorm(12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return y + torch.tanh(self.a(y))

    structure = discover(Both(), X)
    assert not structure.sites


def test_gates_without_activation_give_two_sites_on_one_reader() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) * self.b(x))

    model = Bilinear()
    structure = discover(model, X)
    assert {s.producer.name for s in structure.sites_of("c")} == {"a", "b"}
    assert holds(model, structure)
    assert structure.groups() == [["a", "b"], ["c"]]


def test_concatenation_gives_partial_maps() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 6), nn.Linear(12, 4), nn.Linear(10, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.b(x), F.relu(self.a(x))], -1))

    model = Joined()
    structure = discover(model, X)
    maps = {s.producer.name: s.channel_map.tolist() for s in structure.sites_of("c")}
    assert maps == {"a": [-1] * 4 + [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3] + [-1] * 6}
    assert holds(model, structure)


def test_a_weight_used_on_two_tensors_is_no_consumer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.b(x)

    structure = discover(Shared(), X)
    assert not structure.sites
    assert any("several inputs" in why for _, why in structure.unproved)


class Experts(nn.Module):
    """Separate experts, chosen by the sign of one input, or by a router."""

    def __init__(self, number: int, routed: bool) -> None:
        super().__init__()
        self.norm, self.routed = nn.LayerNorm(12), routed
        self.router = nn.Linear(12, number, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12)) for _ in range(number)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        weight, index = self.router(y).softmax(-1).topk(1)
        if not self.routed:
            index = torch.zeros_like(index)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (index[:, 0] == e).nonzero()[:, 0]
            if len(rows):
                out[rows] += weight[rows] * expert(y[rows])
        return out


def test_experts_that_see_tokens_are_all_consumers() -> None:
    model = Experts(3, routed=True)
    structure = discover(model, X)
    (site,) = [s for s in structure.sites if s.producer.name == "norm" and s.kind == "scale"]
    assert {c.name for c in site.consumers} == {"router", "experts.0.0", "experts.1.0", "experts.2.0"}
    assert structure.layer("router").routes and not structure.layer("experts.0.0").routes
    assert not structure.blocks  # experts run side by side
    assert holds(model, structure)


def test_an_expert_that_never_ran_forbids_the_site_of_its_siblings() -> None:
    structure = discover(Experts(3, routed=False), X)
    assert not any(s.producer.name == "norm" for s in structure.sites)
    assert any("was not run" in why for _, why in structure.unproved)


class Stack(nn.Module):
    """Experts as one parameter stored [E, I, O], with biases [E, O]; each token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 16) / 4)
        self.up_bias = nn.Parameter(torch.zeros(3, 16))
        self.down = nn.Parameter(torch.randn(3, 16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        index = torch.arange(len(x)) % 3
        for e in range(3):
            hidden = F.relu(x[index == e] @ self.up[e] + self.up_bias[e])
            out[index == e] = hidden @ self.down[e]
        return out


def test_stack_of_experts_with_biases() -> None:
    model = nn.Sequential(nn.LayerNorm(12), Stack(), nn.Tanh())
    structure = discover(model, X)
    up, down = structure.layer("1.up"), structure.layer("1.down")
    assert up.kind == "experts" and up.swapped and (up.out_features, up.in_features) == (16, 12)
    assert up.matrix(model).shape == (3, 16, 12) and down.matrix(model).shape == (3, 12, 16)
    (site,) = structure.sites_of("1.down")
    assert site.producer.bias == "1.up_bias" and site.channels == 48
    (norm,) = structure.sites_of("1.up")
    assert torch.equal(norm.channel_map, torch.arange(12).repeat(3))
    assert holds(model, structure)
    assert structure.groups() == []


def test_attention_of_torch_is_looked_into() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
    )
    x = torch.randn(2, 7, 16)
    structure = discover(encoder.eval(), x)
    values = [
        s
        for s in structure.sites
        if s.consumers[0].parameter == "layers.0.self_attn.out_proj.weight" and s.kind == "scale"
    ]
    assert len(values) == 1 and torch.equal(values[0].producer.rows, torch.arange(32, 48))
    assert len(structure.blocks) == 2 and holds(encoder, structure, x)


def test_one_token_is_not_evidence_enough_to_be_wrong() -> None:
    """With a single row much looks proportional; what is reported must still hold on other inputs."""
    model = between(lambda t: F.layer_norm(t, (16,)))
    structure = discover(model, X[:1])
    assert holds(model, structure)


def test_block_by_block_with_masks_and_keywords() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(12), nn.Linear(12, 20, bias=False), nn.Linear(20, 12)

        def forward(self, hidden: Tensor, *, mask: Tensor, cache: Any = None) -> tuple[Tensor, None]:
            if cache is not None:
                cache.append(hidden)
                assert len(cache) == 1  # each run gets the cache as it was
            return hidden + self.b(F.relu(self.a(self.norm(hidden)))) * mask, None

    block = Block()
    calls = [((X[None],), {"mask": torch.ones(1, 40, 1), "cache": []})]
    structure = discover_block(block, calls, name_prefix="layers.7")
    assert [layer.name for layer in structure.layers] == ["layers.7.a", "layers.7.b"]
    assert {s.producer.name for s in structure.sites if s.kind == "scale"} == {"layers.7.norm", "layers.7.a"}
    assert structure.layers[0].within("layers.7").name == "a"
    plain = discover_block(block, calls)
    same = verified(plain, copy.deepcopy(block), calls)
    assert len(same.sites) == len(plain.sites)

    class Other(Block):
        def forward(self, hidden: Tensor, *, mask: Tensor, cache: Any = None) -> tuple[Tensor, None]:
            return hidden + self.b(F.gelu(self.a(self.norm(hidden)))) * mask, None

    other = verified(plain, Other(), calls)
    assert {s.producer.name for s in other.sites if s.kind == "scale"} == {"norm"}
    assert any(name == "b" and "changed the output" in why for name, why in other.unproved)


def test_layers_alone_agree_with_layers_that_ran() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 2), nn.Flatten(), nn.Linear(8 * 3, 6), nn.Tanh(), nn.Linear(6, 2, bias=False))
    ran, alone = discover(model, torch.randn(5, 3, 4)).layers, layers_of(model).layers
    assert [(x.name, x.parameter, x.kind, x.in_features, x.out_features, x.bias) for x in ran] == [
        (x.name, x.parameter, x.kind, x.in_features, x.out_features, x.bias) for x in alone
    ]
    assert alone[1].in_features == 24 and alone[2].bias is None


def test_a_module_that_is_not_quite_linear_is_no_layer() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(12, 8), nn.ReLU(), nn.Linear(8, 3))
    assert [layer.name for layer in discover(model, X).layers] == ["2"]
    assert [layer.name for layer in layers_of(model).layers] == ["2"]


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match="at least one call"):
        discover_block(nn.Linear(2, 2), [])
    with pytest.raises(TypeError, match="not str"):
        discover(nn.Linear(2, 2), "text")
