"""GGUF: ggml's own decoder gives our weights to the last bit, transformers our logits, llama.cpp our text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dither
import tiny_bytes
import tiny_models
from dither.errors import CheckpointError, ExportError, UsageError
from dither.formats import MXFP4, NVFP4, Float, Format, Int, QTensor, Scheme, channel, group
from dither.quant.export.gguf_blocks import block_type, blocks
from dither.quant.export.gguf_names import Place, architecture, places
from dither.quant.export.gguf_tokenizer import pre_tokenizer

TOKENS = torch.arange(3, 131).view(4, 32)

# -- blocks --------------------------------------------------------------------------------------------------------------------

EXACT: list[tuple[str, Format]] = [
    *[("Q4_0", Int(bits, sym=sym)) for bits in (2, 3, 4) for sym in ("restricted", "full", "extremum")],
    *[("Q5_0", Int(5, sym=sym)) for sym in ("restricted", "full", "extremum")],
    *[("Q8_0", Int(bits, sym=sym)) for bits in (6, 7, 8) for sym in ("restricted", "full", "extremum")],
    *[("Q4_0", Int(bits)) for bits in (1, 2, 3)],
    ("Q5_0", Int(4)),
    *[("Q8_0", Int(bits)) for bits in (5, 6, 7)],
    *[("Q4_1", Int(bits, zero="float")) for bits in (1, 2, 3, 4)],
    ("Q5_1", Int(5, zero="float")),
    ("MXFP4", MXFP4.format),
]


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to the order of sums: few-bit layers multiply codes, float ones the numbers that the codes stand for."""
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def few_bit(scheme: Scheme, rows: int, columns: int) -> QTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * torch.logspace(-3, 1, rows)[:, None]
    params = scheme.fit(w)
    return QTensor.from_codes(scheme.encode(w, params), params, scheme)


@pytest.mark.parametrize(("kind", "fmt"), EXACT, ids=lambda v: str(v))
@pytest.mark.parametrize(("columns", "size"), [(64, 32), (96, 64), (160, 96), (32, 128), (128, -1)])  # also shorter last groups
def test_blocks_decode_to_our_values_to_the_last_bit(kind: str, fmt: Format, columns: int, size: int) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = few_bit(fmt @ group(size), 5, columns)
    found, data = blocks(tensor)
    assert found == kind
    assert np.array_equal(dequantize(data, GGMLQuantizationType[kind]), tensor.dequantize().numpy())


@pytest.mark.parametrize(
    ("scheme", "columns", "why"),
    [
        (Int(4) @ group(16), 64, "groups of 16 are not whole blocks"),
        (Int(4) @ group(48), 96, "groups of 48 are not whole blocks"),
        (Int(4) @ channel(), 48, "rows of 48 are not whole blocks"),
        (Int(8) @ group(32), 64, "do not fit 8 bits"),
        (Int(6, zero="float") @ group(32), 64, "float offsets come with 4 or 5 bits"),
        (Int(4, scale="bfloat16") @ group(32), 64, "scales are bfloat16"),
        (Float(4, 3) @ channel(), 64, "neither integers nor mxfp4"),
        (NVFP4, 64, "not whole blocks"),
        (Int(4) @ dither.formats.tile(4, 32), 64, "span rows"),
        (dither.formats.Codebook(4, 256), 64, "no grid"),
    ],
    ids=str,
)
def test_what_no_type_holds(scheme: Any, columns: int, why: str) -> None:
    kind, found = block_type(scheme, columns)
    assert kind == "" and why in found


# -- names ---------------------------------------------------------------------------------------------------------------------


def of_architecture(name: str) -> tuple[dict[str, Place], nn.Module, str]:
    model = tiny_models.build(name)[0]
    arch = architecture(model.config.model_type).name
    return places(arch, model.config.to_dict(), model), model, arch


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "phi3", "bloom", "falcon"])
def test_what_transformers_reads_of_every_place_is_the_parameter(name: str) -> None:
    from transformers import modeling_gguf_pytorch_utils as theirs

    found, model, arch = of_architecture(name)
    parameters = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    processor = theirs.TENSOR_PROCESSORS.get(arch, theirs.TensorProcessor)(config=model.config.to_dict())
    for parameter, place in found.items():
        written = place.values(parameters[parameter].detach()).contiguous().numpy()
        read = processor.process(weights=written, name=place.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}).weights
        assert np.allclose(read, parameters[parameter].detach().numpy(), rtol=0, atol=2**-22 if place.less else 0), parameter
    assert any(p.rows is not None for p in found.values()) == (name in ("llama", "bloom"))
    assert any(p.transposed for p in found.values()) == (name == "gpt2")
    assert any(p.less for p in found.values()) == (name == "gemma2")


@pytest.mark.parametrize(
    ("name", "why"),
    [("mixtral", "no common name"), ("qwen2-moe", "cannot be turned round|take apart"), ("olmo2", "no common name"), ("gpt-neox", "no common name")],
)
def test_what_has_no_place_is_refused(name: str, why: str) -> None:
    with pytest.raises(ExportError, match=why):
        of_architecture(name)


# -- whole models --------------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "sym4": {"bits": 4, "group": 32, "sym": True},
    "asym4": {"bits": 4, "group": 64},
    "offset4": {"weights": Int(4, zero="float") @ group(32)},
    "mixed": {
        "bits": 3,
        "group": 32,
        "overrides": {"*down_proj": Int(8, sym=True) @ channel(), "*k_proj": MXFP4, "model.embed_tokens": Int(4, sym=True) @ group(32)},
    },
    "some-float": {"bits": 4, "group": 32, "sym": "extremum", "skip": ("*layers.1.*",)},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("gguf")
    tiny_bytes.save(root / "float")
    found: dict[str, Any] = {"root": root}
    for name, knobs in CASES.items():
        result = dither.quantize(root / "float", dither.recipes.RTN(**knobs), TOKENS, root / name)
        found[name] = (root / name, root / f"{name}-gguf", dither.export(result, root / f"{name}-gguf", to="gguf"))
    return found


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_our_logits(exported: dict[str, Any], name: str) -> None:
    from transformers import AutoModelForCausalLM

    pytest.importorskip("accelerate")
    out, folder, _ = exported[name]
    model, info = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and model.config.tie_word_embeddings
    assert near(logits(model), logits(dither.load(out)[0]))


def test_notes_say_which_types(exported: dict[str, Any]) -> None:
    assert exported["sym4"][2] == ["weights as Q4_0 (14)"]
    assert exported["offset4"][2] == ["weights as Q4_1 (14)"]
    assert exported["mixed"][2] == ["weights as Q4_0 (11), Q8_0 (2), MXFP4 (2)"]
    assert exported["asym4"][2][0] == "weights as Q5_0 (14)" and "--nearest --bits 4 writes Q4_1" in exported["asym4"][2][1]


def test_float_parameters_take_the_smallest_type_that_holds_them(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = tiny_bytes.save(tmp_path / "float", tied=False)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").copy_(model.get_parameter("model.embed_tokens.weight").half())
        model.get_parameter("lm_head.weight").mul_(1e-6).copy_(model.get_parameter("lm_head.weight").bfloat16())
    model.save_pretrained(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=32, sym=True), TOKENS, tmp_path / "out")
    dither.export(tmp_path / "out", tmp_path / "gguf", to="gguf")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"], kinds["output_norm.weight"]) == ("F16", "BF16", "F32")
    again, _ = dither.load_float(tmp_path / "gguf" / "model.gguf")
    assert near(logits(again), logits(dither.load(tmp_path / "out")[0]))


def test_heads_that_are_stored_apart_are_no_longer_tied(tmp_path: Path) -> None:
    tiny_bytes.save(tmp_path / "float")
    recipe = dither.recipes.RTN(bits=4, group=32, sym=True, overrides={"lm_head": Int(8, sym=True) @ group(32)})
    dither.quantize(tmp_path / "float", recipe, TOKENS, tmp_path / "out")
    dither.export(tmp_path / "out", tmp_path / "gguf", to="gguf")
    again, _ = dither.load_float(tmp_path / "gguf" / "model.gguf")
    assert near(logits(again), logits(dither.load(tmp_path / "out")[0]))


def test_a_checkpoint_without_a_tokenizer_gives_a_file_without(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4)).save_pretrained(tmp_path / "float")  # its layers store [inputs, outputs]
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=32), TOKENS, tmp_path / "out")
    notes = dither.export(tmp_path / "out", tmp_path / "gguf", to="gguf")
    assert "no tokenizer" in " ".join(notes)
    again, tokenizer = dither.load_float(tmp_path / "gguf" / "model.gguf")
    assert tokenizer is None
    assert near(logits(again), logits(dither.load(tmp_path / "out")[0]))


def test_transposed_layers() -> None:
    """A model whose layers store [inputs, outputs]: places and weights agree, whatever the config then loses."""
    found, model, _ = of_architecture("gpt2")
    w = torch.randn(32, 96)  # as stored
    scheme = Int(4, sym=True) @ group(32)
    params = scheme.fit(w.T.contiguous())
    tensor = QTensor.from_codes(scheme.encode(w.T.contiguous(), params), params, scheme)
    place = found["transformer.h.0.attn.c_attn.weight"]
    assert place.transposed and torch.equal(place.values(tensor.dequantize().T), place.few_bit(tensor).dequantize())
    assert model.get_parameter("transformer.h.0.attn.c_attn.weight").shape == w.shape


# -- tokenizers ----------------------------------------------------------------------------------------------------------------

TEXT = "few bits lose less, when noise is 1234 added.\n  On purpose: 007 <|x|> \u00fcber"


@pytest.mark.parametrize(("digits", "pre"), [(False, "gpt-2"), (True, "smollm")])
def test_the_tokenizer_comes_back(tmp_path: Path, digits: bool, pre: str) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    tiny_bytes.save(tmp_path / "float", digits=digits)
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=32, sym=True), TOKENS, tmp_path / "out")
    dither.export(tmp_path / "out", tmp_path / "gguf", to="gguf")
    fields = GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    ours = tiny_bytes.tokenizer(digits)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert fields["tokenizer.ggml.pre"].contents() == pre and len(tokens) == tiny_bytes.TOKENS
    assert tokens[: len(ours)] == ours.convert_ids_to_tokens(range(len(ours))) and tokens[-1] == "[PAD319]"
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1] and fields["tokenizer.ggml.token_type"].contents()[-1] == 5
    assert (fields["tokenizer.ggml.bos_token_id"].contents(), fields["tokenizer.ggml.eos_token_id"].contents()) == (0, 1)
    assert fields["tokenizer.chat_template"].contents() == ours.chat_template
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    theirs = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    sample = TEXT if not digits else TEXT.replace("1234", "").replace("007", "")  # transformers does not know "smollm" cuts digits
    assert theirs(sample)["input_ids"] == ours(sample)["input_ids"]

    carried = tmp_path / "carried"
    dither.export(tmp_path / "out", carried, to="gguf", tokenizer=tmp_path / "gguf" / "model.gguf")
    assert (carried / "model.gguf").read_bytes() == (tmp_path / "gguf" / "model.gguf").read_bytes()


def test_pre_tokenizers_by_their_pattern() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as theirs

    def data(pattern: str, **model: Any) -> dict[str, Any]:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
        return {"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}

    assert pre_tokenizer(data(theirs["qwen2"])) == "qwen2" and pre_tokenizer(data(theirs["tekken"])) == "tekken"
    assert pre_tokenizer(data(theirs["llama3"], ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer(data(theirs["llama3"])) == "dbrx"
    for unknown in (data("x+"), {"model": {}, "pre_tokenizer": {"type": "Metaspace"}}, {"model": {}, "pre_tokenizer": None}):
        with pytest.raises(ExportError, match="name for this pre-tokenizer is not known here"):
            pre_tokenizer(unknown)


def test_tokenizers_that_have_no_place_are_refused(tmp_path: Path, exported: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import tiny_folder

    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    tiny_folder.tokenizer().save_pretrained(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=32, sym=True), TOKENS % 96, tmp_path / "out")
    with pytest.raises(ExportError, match="not byte-level BPE"):
        dither.export(tmp_path / "out", tmp_path / "x", to="gguf")
    with pytest.raises(ExportError, match="320 tokens, the embedding 96 rows"):
        dither.export(tmp_path / "out", tmp_path / "x", to="gguf", tokenizer=exported["sym4"][1] / "model.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        dither.export(tmp_path / "out", tmp_path / "x", to="gguf", tokenizer=tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="only gguf files carry"):
        dither.export(tmp_path / "out", tmp_path / "x", tokenizer=exported["sym4"][1] / "model.gguf")
    assert not list((tmp_path / "x").glob("*"))


# -- what does not fit ---------------------------------------------------------------------------------------------------------


def test_refusals_say_who_can_and_what_the_nearest_costs(tmp_path: Path, exported: dict[str, Any]) -> None:
    root, out = exported["root"], tmp_path / "out"
    result = dither.quantize(root / "float", dither.recipes.RTN(bits=4, group=16), TOKENS, out)
    message = (
        r"gguf cannot hold 14 of 14 weights exactly: .*groups of 16 are not whole blocks.*compressed-tensors.* can; "
        r"--nearest would write 14 weights as int8"
    )
    with pytest.raises(ExportError, match=message):
        dither.export(result, tmp_path / "x", to="gguf")
    assert not (tmp_path / "x").exists()
    notes = dither.export(result, tmp_path / "x", to="gguf", nearest=True)
    assert notes[0].startswith("re-encoded 14 weights as int8 symmetric (restricted) group(32): relative squared error")
    ours, (theirs, _) = dither.load(out)[0], dither.load_float(tmp_path / "x" / "model.gguf")
    errors = []
    for name, parameter in theirs.named_parameters():
        if "proj" in name:
            weight = ours.get_submodule(name.removesuffix(".weight")).weight.detach()
            errors.append(float((parameter.detach() - weight).square().sum() / weight.square().sum()))
    assert f"{sum(errors) / len(errors):.1e} on average, {max(errors):.1e} at worst" in notes[0]
    assert 0 < max(errors) < 1e-4


def test_nearest_keeps_the_codes_where_only_the_offset_is_rounded(tmp_path: Path, exported: dict[str, Any]) -> None:
    out = exported["asym4"][0]
    notes = dither.export(out, tmp_path / "x", to="gguf", nearest=True, bits=4)
    assert "weights as Q4_1 (14)" in notes and "int4 float offset group(64)" in notes[0]
    ours, (theirs, _) = dither.load(out)[0], dither.load_float(tmp_path / "x" / "model.gguf")
    for name, parameter in theirs.named_parameters():
        if "proj" in name:
            held = ours.get_submodule(name.removesuffix(".weight")).qtensor()
            scale, zero = (held.params[key].repeat_interleave(64, 1)[:, : held.shape[1]] for key in ("scale", "zero_point"))
            assert ((parameter - held.dequantize()).abs() <= 2**-10.9 * scale * zero + 2**-23 * scale * 16).all()


def test_models_without_a_name_in_gguf_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    tiny_models.build("olmo2")[0].save_pretrained(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=16), TOKENS % 96, tmp_path / "out")
    with pytest.raises(ExportError, match=r"gguf: .*no common name for models of type olmo2; compressed-tensors, gptq, awq and onnx can"):
        dither.export(tmp_path / "out", tmp_path / "x", to="gguf")
    assert not (tmp_path / "x").exists()


def test_a_config_that_gguf_would_lose_is_refused(tmp_path: Path) -> None:
    tiny_bytes.save(tmp_path / "float", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=32, sym=True), TOKENS, tmp_path / "out")
    with pytest.raises(ExportError, match=r"would read another model from the file.*rope_parameters"):
        dither.export(tmp_path / "out", tmp_path / "x", to="gguf")
    assert not list((tmp_path / "x").glob("*.gguf"))


# -- llama.cpp -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama_cpp() -> Iterator[Any]:
    """``serve(file)``: llama.cpp with that model on one thread, keys and values in float32."""
    cpp = pytest.importorskip("xllamacpp")
    servers = []

    def serve(file: Path) -> Any:
        settings = cpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 128, 1, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        servers.append(cpp.Server(settings))
        return servers[-1]

    yield serve
    servers.clear()


def next_token(server: Any, ids: list[int], count: int, letter: int) -> torch.Tensor:
    """Log-probabilities of all tokens after ``ids``. What is sampled, which they do not depend on, is ``letter``: the server tells nothing of half a
    character."""
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": count, "logit_bias": {str(letter): 100.0}}
    answer = server.handle_completions(asked)
    found = torch.full((count,), -torch.inf)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    made = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    found: list[int] = made[0, len(ids) :].tolist()
    return found


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_says_the_same(exported: dict[str, Any], llama_cpp: Any, name: str) -> None:
    """llama.cpp rounds activations to 8 bits in front of few-bit weights, so probabilities differ a little: by less than 2e-3 nats of divergence
    where the model itself is about 3 away from a uniform one."""
    out, folder, _ = exported[name]
    model, tokenizer = dither.load(out)
    server = llama_cpp(folder / "model.gguf")
    prompt = "few bits lose less 12 when noise"
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        ours = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    apart = []
    for end in range(1, len(ids) + 1):
        theirs = next_token(server, ids[:end], tiny_bytes.TOKENS, tokenizer("a")["input_ids"][0])
        apart.append(float((ours[end - 1].exp() * (ours[end - 1] - theirs)).sum()))
    assert max(apart) < 2e-3 and float((ours.exp() * ours).sum(-1).mean()) > -4
    text = server.handle_completions({"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True})
    assert text["usage"]["prompt_tokens"] == len(ids)  # it cuts the text as we do
    assert text["choices"][0]["text"] == tokenizer.decode(greedy(model, ids, 1))


OTHERS: dict[str, dict[str, Any]] = {
    "Qwen2": {"num_key_value_heads": 2, "intermediate_size": 96},
    "Qwen3": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 128},
    "Gemma2": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 256, "query_pre_attn_scalar": 256},
    "StableLm": {"num_key_value_heads": 2, "intermediate_size": 96},
    "Starcoder2": {"num_key_value_heads": 2, "intermediate_size": 96},
    "Nemotron": {"num_key_value_heads": 2, "intermediate_size": 96},
    "GPT2": {"vocab_size": 50257},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_say_the_same_in_transformers_and_llama_cpp(tmp_path: Path, llama_cpp: Any, name: str) -> None:
    import transformers as hf

    config = getattr(hf, f"{name}Config")(
        **{"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1,
           "pad_token_id": 2} | OTHERS[name]
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(hf, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "float")
    tiny_bytes.tokenizer().save_pretrained(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=32), TOKENS, tmp_path / "out")
    dither.export(tmp_path / "out", tmp_path / "gguf", to="gguf")
    exact = logits(dither.load(tmp_path / "out")[0])
    assert near(logits(dither.load_float(tmp_path / "gguf" / "model.gguf")[0]), exact)  # by transformers' rules
    ours = exact[0, -1].log_softmax(-1)
    theirs = next_token(llama_cpp(tmp_path / "gguf" / "model.gguf"), TOKENS[0].tolist(), len(ours), 70)
    assert float((ours.exp() * (ours - theirs)).sum()) < 3e-3


@pytest.mark.slow
def test_llama_cpp_runs_the_embedded_model(tmp_path: Path, llama_cpp: Any) -> None:
    """SmolLM2-135M at 4 bits: the same greedy text, and the same perplexity of a text to 1 %."""
    result = dither.quantize("smollm2", dither.recipes.RTN(bits=4, group=32), None, tmp_path / "out")
    dither.export(result, tmp_path / "gguf", to="gguf", tokenizer="smollm2")
    model, tokenizer = dither.load(tmp_path / "out")
    server = llama_cpp(tmp_path / "gguf" / "model.gguf")
    prompt = "The capital of France is"
    ids = tokenizer(prompt)["input_ids"]
    answer = server.handle_completions({"prompt": prompt, "max_tokens": 16, "temperature": 0})
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(model, ids, 16))
    text = tokenizer("Noise that is added on purpose makes a signal better: engineers call it dither, and every stored byte counts.")["input_ids"]
    with torch.no_grad():
        ours = model(torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1)
    theirs = [float(next_token(server, text[:end], 49152, tokenizer("a")["input_ids"][0])[text[end]]) for end in range(1, len(text))]
    own = [float(ours[end - 1, text[end]]) for end in range(1, len(text))]
    assert abs(sum(theirs) - sum(own)) / len(own) < 0.01
