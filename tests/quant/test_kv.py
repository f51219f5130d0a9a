"""Few-bit keys and values: the numbers against a plain reference, with a cache and without; what the cache holds; who is refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

import dither
import tiny_folder
import tiny_models
from dither.errors import CheckpointError, ModelError, UsageError
from dither.formats import Float, Int, Scheme, group, tensor, token
from dither.quant.generate import Sampling, generate
from dither.quant.inputs import round_rows
from dither.quant.kv import KVRounding, few_bit_attention
from dither.quant.kv_cache import FewBitCache, FewBitLayer, cache_bytes
from dither.quant.surroundings import Surroundings
from dither.special.hadamard import hadamard

IDS = torch.randint(3, tiny_models.VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))
ROTATE = pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])


def dynamic(scheme: Scheme) -> Scheme:
    return replace(scheme, dynamic=True)


KV4 = dynamic(Int(4) @ token())


def sharp(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny model whose attention looks at some tokens much more than at others, so that keys matter."""
    model, _ = tiny_models.build(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in key and "wte" not in key and "wpe" not in key:
                parameter.mul_(4)
    return model.to(dtype)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@torch.no_grad()
def by_steps(model: nn.Module, cuts: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of pieces of the tokens, each piece behind a cache of those before."""
    pieces = []
    for first, last in itertools.pairwise(cuts):
        output = model(input_ids=IDS[:, first:last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, 1), cache


def rounded_by_hand(x: Tensor, bits: int) -> Tensor:
    """Asymmetric min-max rounding of each row, from its definition."""
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = ((hi - lo) / (2**bits - 1)).to(torch.float16).to(x.dtype)
    z = (-lo / s).round()
    return s * (((x / s).round() + z).clamp(0, 2**bits - 1) - z)


# -- the numbers ------------------------------------------------------------------------------------------------------


@ROTATE
def test_attention_is_what_its_definition_says(rotate: bool) -> None:
    model = sharp("llama")
    few = copy.deepcopy(model)
    few_bit_attention(few, KV4, rotate)

    def by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
        turn = hadamard(key.shape[-1]) if rotate else torch.eye(key.shape[-1], dtype=torch.float64)
        key, value = rounded_by_hand(key @ turn, 4), rounded_by_hand(value, 4)
        key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
        future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        weights = (query @ turn @ key.mT * scaling).masked_fill(future, -math.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("by-hand", by_hand)
    AttentionMaskInterface.register("by-hand", AttentionMaskInterface._global_mapping["sdpa"])
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("by-hand")
    want = logits(reference)
    assert (logits(few) - want).abs().max() < 1e-10 * want.abs().max()
    assert (logits(model) - want).abs().max() > 1e-3 * want.abs().max()  # and it does something


@ROTATE
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "gemma3", "gpt-neox"])
def test_a_cache_changes_nothing(name: str, rotate: bool) -> None:
    """In float64 the two orders of sums differ by 1e-15, too little to move a code: what is left is the same rounding."""
    model = sharp(name)
    few_bit_attention(model, KV4, rotate)
    full = logits(model)
    for cuts in ([0, *range(4, 15)], [0, 9, 14]):  # token by token; two pieces (beyond mistral's window of 8)
        got, cache = by_steps(model, cuts)
        assert isinstance(cache, FewBitCache) and all(isinstance(layer, FewBitLayer) for layer in cache.layers)
        assert (got - full).abs().max() < 1e-10 * full.abs().max()


def test_a_cache_changes_nothing_in_a_mixture_of_experts() -> None:
    """In float32, which torch's grouped products need: sums differ by 1e-6, and 8 bits make a code that moves for it cost little."""
    model = sharp("mixtral", torch.float32)
    few_bit_attention(model, dynamic(Int(8) @ token()), True)
    got, _ = by_steps(model, [0, *range(4, 15)])
    full = logits(model)
    assert (got - full).abs().max() < 2e-2 * full.abs().max()


def test_any_cache_of_transformers_gives_the_same_numbers() -> None:
    """One that already holds something, and one of fixed size, stay as they are: attention rounds what they return."""
    model = sharp("llama")
    few_bit_attention(model, KV4, True)
    full = logits(model)
    mine = DynamicCache()
    mine.update(torch.zeros(2, 2, 0, 8, dtype=torch.float64), torch.zeros(2, 2, 0, 8, dtype=torch.float64), 0)
    got, cache = by_steps(model, [0, 9, 14], mine)
    assert type(cache) is DynamicCache and (got - full).abs().max() < 1e-10 * full.abs().max()
    static = model.generate(IDS, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, model.generate(IDS, max_new_tokens=6, do_sample=False))


def test_rotation_spreads_a_large_channel() -> None:
    """Keys with one channel thirty times the others: the grid of a row follows it, and the rotation takes it apart. Exact products stay."""
    query, key = states(50, torch.float64, width=64), states(50, torch.float64, seed=1, width=64)
    key[..., 5] *= 30
    query[..., 5] /= 30

    def error(rotate: bool) -> float:
        q, k, _ = KVRounding(KV4, rotate, lambda *a: a)(query, key, key)
        return float((q @ k.mT - query @ key.mT).square().mean())

    assert error(True) < 0.3 * error(False)


@pytest.mark.parametrize("name", ["bert", "vit", "swin", "t5", "whisper"])
def test_encoders_round_too(name: str) -> None:
    model, sample = tiny_models.build(name)
    with torch.no_grad():
        before = model(**sample)[0]
        few_bit_attention(model, dynamic(Int(2) @ token()), True)
        assert not torch.equal(model(**sample)[0], before)


def test_encoder_and_decoder_caches_are_few_bit() -> None:
    model, sample = tiny_models.build("whisper")
    model = model.double()
    few_bit_attention(model, KV4, True)
    features, ids = sample["input_features"].double(), sample["decoder_input_ids"]
    with torch.no_grad():
        full = model(input_features=features, decoder_input_ids=ids, use_cache=False).logits
        cache, found = None, []
        for i in range(ids.shape[1]):
            output = model(input_features=features, decoder_input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    assert isinstance(cache, EncoderDecoderCache) and isinstance(cache.cross_attention_cache, FewBitCache)
    assert cache.cross_attention_cache.nbytes > 0
    assert (torch.cat(found, 1) - full).abs().max() < 1e-10 * full.abs().max()


# -- generation -------------------------------------------------------------------------------------------------------


@ROTATE
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_uses_the_few_bit_cache_by_default(name: str, rotate: bool) -> None:
    model = sharp(name)
    few_bit_attention(model, KV4, rotate)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(IDS, return_dict_in_generate=True, **options)
    assert isinstance(found.past_key_values, FewBitCache) and found.past_key_values.nbytes > 0
    assert torch.equal(found.sequences, model.generate(IDS, use_cache=False, **options))
    beams = model.generate(IDS, num_beams=3, num_return_sequences=3, **options)
    assert torch.equal(beams, model.generate(IDS, num_beams=3, num_return_sequences=3, use_cache=False, **options))


def test_speculation_takes_tokens_back() -> None:
    """Prompt look-up guesses tokens and crops the wrong ones off the cache."""
    model = sharp("llama")
    few_bit_attention(model, KV4, True)
    ids = IDS[:1].repeat(1, 2)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), model.generate(ids, use_cache=False, **options))


def test_our_generate_uses_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_folder.save(tmp_path).double()
    few_bit_attention(model, KV4, True)
    made = []
    monkeypatch.setattr(FewBitCache, "become_few_bit", lambda *a, of=FewBitCache.become_few_bit: (made.append(1), of(*a))[1])
    text = generate(model, tiny_folder.tokenizer(), "few bits", Sampling(max_tokens=12)).text
    ids = tiny_folder.tokenizer()("few bits", return_tensors="pt")["input_ids"]
    for _ in range(12):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert made == [1]  # one cache for all tokens
    assert text == tiny_folder.tokenizer().decode(ids[0], skip_special_tokens=True)[len("few bits") :]


# -- the cache --------------------------------------------------------------------------------------------------------

SCHEMES = [
    dynamic(scheme)
    for scheme in (
        Int(4) @ token(),
        Int(2) @ group(5),
        Int(8) @ group(4),
        Int(3, sym=True) @ token(),
        Int(4, zero="float") @ token(),
        Int(4, scale="bfloat16") @ token(),
        Float(2, 1) @ token(),
        Float(2, 1, scale="e8m0") @ group(8),
        Float(4, 3) @ token(),
    )
]


def states(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = 3, heads: int = 2, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)  # as models give them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kv", SCHEMES, ids=str)
def test_the_cache_returns_the_rounded_values_to_the_last_bit(kv: Scheme, dtype: torch.dtype) -> None:
    keys, values = states(70, dtype), states(70, dtype, seed=1)
    layer = FewBitLayer(kv, rotate=False)
    for first, last in [(0, 7), *((i, i + 1) for i in range(7, 20)), (20, 70)]:
        found = layer.update(keys[:, :, first:last], values[:, :, first:last])
        for got, given in zip(found, (keys, values), strict=True):
            assert got.dtype == dtype and torch.equal(got, round_rows(given[:, :, :last], kv))


def test_bytes_are_those_of_the_codes_and_the_grids() -> None:
    """1 head of 64 at 4 bits, one scale: 32 + 2 + 1 bytes against 256 in float32."""
    layer = FewBitLayer(KV4, rotate=False)
    layer.update(states(500, batch=1, heads=1, width=64), states(500, batch=1, heads=1, width=64))
    assert layer.nbytes == 2 * 500 * (32 + 2 + 1)
    buffers = set()
    for i in range(1000):
        layer.update(states(1, batch=1, heads=1, width=64, seed=i), states(1, batch=1, heads=1, width=64, seed=i))
        assert layer.rows is not None
        buffers.add(layer.rows[0].buffers["codes"].shape[0])
    assert layer.get_seq_length() == 1500 and layer.nbytes <= 1.125 * 2 * 1500 * 35
    assert len(buffers) < 13  # each an eighth larger than the one before


@pytest.mark.parametrize("window", [None, 6], ids=["full", "sliding"])
@pytest.mark.parametrize("record", [False, True], ids=["", "recording"])
def test_it_behaves_as_the_float_cache_that_is_given_rounded_values(window: int | None, record: bool) -> None:
    ours = FewBitLayer(KV4, rotate=False, window=window)
    theirs: Any = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    if record:
        ours.activate_past_recording()
        getattr(theirs, "activate_past_recording", lambda: None)()

    def update(tokens: int, seed: int, batch: int = 3) -> None:
        assert ours.get_mask_sizes(tokens) == theirs.get_mask_sizes(tokens)
        k, v = states(tokens, seed=seed, batch=batch), states(tokens, seed=seed + 100, batch=batch)
        pairs = zip(ours.update(k, v), theirs.update(round_rows(k, KV4), round_rows(v, KV4)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert ours.get_seq_length() == theirs.get_seq_length() and ours.get_max_length() == theirs.get_max_length()

    for i, tokens in enumerate((3, 1, 1, 1, 2)):
        update(tokens, i)
    if window is None or record:
        for both in (ours, theirs):
            both.crop(-2)
        update(1, 10)
        for both in (ours, theirs):
            both.crop(0)
    else:
        with pytest.raises(RuntimeError):
            theirs.crop(-1)
        with pytest.raises(RuntimeError):
            ours.crop(-1)
    for both in (ours, theirs):
        both.reorder_cache(torch.tensor([2, 0, 0]))
    update(1, 11)
    for both in (ours, theirs):
        both.batch_repeat_interleave(2)
    update(2, 12, batch=6)
    for both in (ours, theirs):
        both.batch_select_indices(torch.tensor([5, 1]))
    update(9, 13, batch=2)
    assert ours.keys is not None and torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    for both in (ours, theirs):
        both.reset()
    update(4, 14)


def test_a_cache_may_leave_inference_mode() -> None:
    layer = FewBitLayer(KV4, rotate=True)
    with torch.inference_mode():
        layer.update(states(3), states(3))
    layer.update(states(200), states(200))
    with torch.no_grad():
        layer.update(states(1), states(1))
    assert layer.get_seq_length() == 204


def test_its_bytes_against_the_float_cache() -> None:
    model = sharp("llama", torch.float32)
    _, plain = by_steps(model, [0, 14])
    few_bit_attention(model, KV4, False)
    _, cache = by_steps(model, [0, 14])
    assert cache_bytes(plain) == 2 * 2 * 2 * 14 * 2 * 8 * 4  # layers, k and v, batch, tokens, heads, width, bytes
    assert cache.nbytes == cache_bytes(cache) == 2 * 2 * 2 * 14 * 2 * (4 + 2 + 1)


# -- who is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "falcon", "falcon-new", "mamba", "mlp"])
def test_other_attention_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    model, _ = tiny_models.build(name)
    with pytest.raises(ModelError, match="does not go through"):
        few_bit_attention(copy.deepcopy(model), KV4, False)
    with pytest.raises(ModelError, match="leave kv_bits out"):
        dither.quantize(model, dither.recipes.RTN(bits=4, group=16, kv_bits=4), out=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_change_of_attention_is_noticed() -> None:
    model = sharp("llama")
    few_bit_attention(model, KV4, False)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="were not rounded"):
        logits(model)


def test_states_that_change_behind_the_cache_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp("llama")
    few_bit_attention(model, KV4, True)
    mark = FewBitLayer._marked
    monkeypatch.setattr(FewBitLayer, "_marked", lambda self, x: mark(self, x).clone())
    with pytest.raises(ModelError, match="use_cache=False"):
        by_steps(model, [0, 5])


def test_heads_without_a_hadamard_matrix_are_refused() -> None:
    model, _ = tiny_models.build("llama")
    with pytest.raises(ModelError, match="heads of 7 channels"):
        FewBitLayer(KV4, rotate=True).update(states(3, width=7), states(3, width=7))
    few_bit_attention(model, KV4, True)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("scheme", [Int(4) @ token(), dynamic(Int(4) @ tensor()), dynamic(Float(2, 1, scale="e4m3") @ group(16))], ids=str)
def test_schemes_that_a_cache_cannot_hold(scheme: Scheme) -> None:
    with pytest.raises(UsageError, match="kv"):
        dither.quant.Recipe((), Int(4) @ group(16), kv=scheme)
    with pytest.raises(CheckpointError, match="damaged"):
        Surroundings.from_json({"around": {"kv": scheme.to_json()}})


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_disk_as_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_folder.save(tmp_path / "model")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    before = logits(original)
    recipe = dither.recipes.RTN(bits=4, group=16, act_bits=8, kv_bits=4)
    result = dither.quantize(original, recipe)
    result.model.save_pretrained(tmp_path / "w4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "w4", dtype=dtype)
    for model in (result.model, loaded, dither.load(tmp_path / "w4", dtype=dtype)[0]):
        assert torch.equal(logits(model), logits(result.model)) and not torch.equal(logits(model), before)
        _, cache = by_steps(model, [0, 5, 6])
        assert isinstance(cache, FewBitCache)
    config = json.loads((tmp_path / "w4" / "config.json").read_text())
    assert "dither-" not in json.dumps(config) and config["quantization_config"]["around"]["kv"]["format"]["bits"] == 4
    assert original.config._attn_implementation == "sdpa" and torch.equal(logits(original), before)  # left as it was


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    """A model of transformers inside of a user's module: its keys and values are rounded all the same."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_models.build("llama")[0]

        def forward(self, input_ids: Tensor) -> Tensor:
            found: Tensor = self.inner(input_ids, use_cache=False).logits
            return found

    recipe = dither.recipes.RTN(bits=8, group=16, kv_bits=2)
    model = dither.quantize(Wrapped(), recipe, [{"input_ids": IDS}], tmp_path / "out").model
    assert sum(type(m).__name__ == "KVRounding" for m in model.modules()) == 2
    assert model(IDS).isfinite().all()
    cache = model.inner(IDS, use_cache=True).past_key_values
    assert isinstance(cache, FewBitCache) and cache.nbytes > 0
