"""GGUF: the right numbers in the right places, and no belief in what a damaged file says."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from dither import models
from dither.errors import CheckpointError, ModelError
from dither.models import gguf_file, gguf_layout, gguf_metadata

Tiny = Callable[..., Any]
Q = gguf.GGMLQuantizationType

LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(name: str, table: dict[str, str]) -> str:
    stem, _, suffix = name.rpartition(".")
    parts = stem.split(".")
    if stem in table:
        return f"{table[stem]}.{suffix}"
    layer = next(i for i, part in enumerate(parts) if part.isdigit())
    return f"blk.{parts[layer]}.{table['.'.join(parts[layer + 1 :])]}.{suffix}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of query and key: the two halves of each head alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    letters = [chr(i) for i in range(0x21, 0x7F)]
    tokens = [*letters[: size - 2], *(f"<{i}>" for i in range(size - 2 - len(letters))), "ab", "cd"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_llama(path: Path, model: Any, kind: Q = Q.F32, *, head: bool = True) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary(writer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and not head:
            continue
        values = tensor.numpy()
        if "q_proj" in name:
            values = interleave(values, config.num_attention_heads)
        if "k_proj" in name:
            values = interleave(values, config.num_key_value_heads)
        chosen = kind if values.ndim == 2 else Q.F32
        writer.add_tensor(gguf_name(name, LLAMA), gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama_file(tmp_path: Path, tiny: Tiny) -> Path:
    path = tmp_path / "tiny.gguf"
    write_llama(path, tiny("llama"))
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_1])
def test_llama_in_many_types(kind: Q, tied: bool, tmp_path: Path, tiny: Tiny) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    path = tmp_path / "tiny.gguf"
    write_llama(path, model, kind, head=not tied)
    source = models.open(path)
    assert source.notes == []
    assert dict(source.tied) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    expected_type = {Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert source.dtype == expected_type
    state = model.state_dict()
    assert set(source.names()) == set(state)
    for name, tensor in state.items():
        decoded = tensor
        if tensor.dim() == 2:
            decoded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
        read = source.tensor(name, torch.float32)
        assert read.shape == tensor.shape and torch.equal(read, decoded), name
    loaded, tokenizer = models.load(path)
    assert loaded.config.num_key_value_heads == 2 and loaded.config.vocab_size == 96
    assert tokenizer("A!").input_ids == [ord("A") - 0x21, 0]
    if kind == Q.F32:
        ids = torch.tensor([[3, 5, 8, 13]])
        with torch.no_grad():
            assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_transposed_and_stacked_tensors(tmp_path: Path, tiny: Tiny) -> None:
    """GPT-2 is stored transposed; mixtures of experts store gate and up apart. transformers' own reader is the judge."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    gpt2 = tiny("gpt2", n_positions=1024)  # transformers does not read this one from the file
    writer = gguf.GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    vocabulary(writer, 96)
    for name, tensor in gpt2.state_dict().items():
        values = tensor.numpy()
        transposed = values.ndim == 2 and (".c_" in name)
        writer.add_tensor(gguf_name(name, GPT2), np.ascontiguousarray(values.T if transposed else values))
    finish(writer)

    moe = tiny("qwen2_moe", moe_intermediate_size=1408, shared_expert_intermediate_size=5632)  # nor these
    table = LLAMA | {
        "mlp.gate": "ffn_gate_inp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
    }
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "qwen2moe")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    vocabulary(writer, 96)
    for name, tensor in moe.state_dict().items():
        values = tensor.numpy()
        block = next((part for part in name.split(".") if part.isdigit()), "")
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            writer.add_tensor(f"blk.{block}.ffn_gate_exps.weight", np.ascontiguousarray(gate))
            writer.add_tensor(f"blk.{block}.ffn_up_exps.weight", np.ascontiguousarray(up))
        elif name.endswith("experts.down_proj"):
            writer.add_tensor(f"blk.{block}.ffn_down_exps.weight", values)
        else:
            squeezed = values[0] if "shared_expert_gate" in name else values
            writer.add_tensor(gguf_name(name, table), np.ascontiguousarray(squeezed))
    finish(writer)

    for path, model in ((tmp_path / "gpt2.gguf", gpt2), (tmp_path / "moe.gguf", moe)):
        source = models.open(path)
        assert not any("loaded whole" in note for note in source.notes)
        theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=source.skeleton())["tensors"]
        state = model.state_dict()
        assert set(source.names()) == set(state)
        for name, tensor in state.items():
            assert torch.equal(source.tensor(name), tensor), name
            assert torch.equal(source.tensor(name), theirs[name]), name


def test_models_under_the_newer_rules(tmp_path: Path) -> None:
    """LFM2 is covered by transformers' conversion rules instead of its tensor processors."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"], conv_L_cache=3, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Lfm2ForCausalLM(config).eval()
    table = {
        "model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "conv.conv": "shortconv.conv",
        "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm", "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up", "operator_norm": "attn_norm", "ffn_norm": "ffn_norm",
    }  # fmt: skip
    path = tmp_path / "lfm2.gguf"
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([0, 2])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_shortconv_l_cache(3)
    vocabulary(writer, 96)
    state = model.state_dict()
    for name, tensor in state.items():
        if name != "lm_head.weight":
            values = tensor.numpy()
            writer.add_tensor(
                gguf_name(name, table), np.ascontiguousarray(values[:, 0] if "conv.conv" in name else values)
            )
    finish(writer)
    source = models.open(path)
    assert not any("loaded whole" in note for note in source.notes)
    assert set(source.names()) == set(state)
    for name, tensor in state.items():
        assert torch.equal(source.tensor(name), tensor), name


def test_loaded_whole_where_no_plan_can_be_made(llama_file: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr("dither.models.checkpoint.plan", refuse)
    source = models.open(llama_file)
    assert isinstance(source, models.MemorySource) and "loaded whole" in source.notes[0]
    for name, tensor in tiny("llama").state_dict().items():
        assert torch.equal(source.tensor(name), tensor), name
    assert source.tokenizer()("A").input_ids == [ord("A") - 0x21]


@pytest.mark.parametrize("size", [96, 1500])
def test_short_arrays_change_nothing_but_time(
    size: int, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    path = tmp_path / "tiny.gguf"
    write_llama(path, tiny("llama", vocab_size=size))
    plain = gguf.GGUFReader(path)
    with gguf_metadata.short_arrays():
        short = gguf.GGUFReader(path)
    assert [t.name for t in short.tensors] == [t.name for t in plain.tensors]
    assert [t.data_offset for t in short.tensors] == [t.data_offset for t in plain.tensors]
    for key, field in plain.fields.items():
        assert len(short.fields[key].data) == len(field.data) and short.fields[key].types == field.types
        assert np.array_equal(short.fields[key].parts[short.fields[key].data[0]], field.parts[field.data[0]])
    skipped = sum(len(f.parts) for f in plain.fields.values()) - sum(len(f.parts) for f in short.fields.values())
    assert (skipped > 2 * size) == (size > 1024)

    source = models.open(path)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    theirs._name_or_path = ""
    assert source.config.to_dict() == theirs.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert source.tokenizer().get_vocab() == tokenizer.get_vocab()
    assert source.tokenizer().special_tokens_map == tokenizer.special_tokens_map

    monkeypatch.setattr(gguf_metadata, "_STRING", "a change in the gguf package")
    assert models.open(path).config.to_dict() == theirs.to_dict()


def test_decoding_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_PIECE", 96)
    values = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "any")
    packed = gguf.quants.quantize(values, Q.Q4_1)
    writer.add_tensor("t", packed, raw_dtype=Q.Q4_1)
    finish(writer)
    layout = gguf_layout.read_layout(tmp_path / "t.gguf")
    assert np.array_equal(gguf_file.decode(layout, "t").numpy(), gguf.quants.dequantize(packed, Q.Q4_1))


def test_folder_with_one_gguf_and_fingerprint(llama_file: Path, tiny: Tiny) -> None:
    assert models.open(llama_file.parent).fingerprint() == models.open(llama_file).fingerprint()
    write_llama(llama_file.parent / "other.gguf", tiny("llama"), Q.Q8_0)
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        models.open(llama_file.parent)
    assert models.open(llama_file).fingerprint() != models.open(llama_file.parent / "other.gguf").fingerprint()


# -- damage -----------------------------------------------------------------------------------------------------------


def refused(path: Path, says: str | None = None) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        models.open(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_truncated_anywhere(llama_file: Path) -> None:
    raw = llama_file.read_bytes()
    draw = random.Random(0)
    for cut in [0, 3, 4, 8, 16, 23, 24, *(draw.randrange(len(raw) - 64) for _ in range(30))]:
        llama_file.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError) as caught:
            gguf_layout.read_layout(llama_file)
        assert "\n" not in str(caught.value) and llama_file.name in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "form", "value", "says"),
    [
        (0, "4s", b"GGML", "is no GGUF file"),
        (4, "<I", 1, "version 1"),
        (4, "<I", 3 << 24, "big-endian"),
        (8, "<Q", 2**60, "tensors in"),
        (8, "<Q", 2**16, "tensors in"),
        (16, "<Q", 2**60, "metadata fields in"),
        (16, "<Q", 2**15, "metadata fields in|ends inside|claims|unknown|not UTF-8|bytes long"),
        (24, "<Q", 2**62, "claims 4611686018427387904 bytes"),
        (24, "<Q", 0, "is 0 bytes long"),
    ],
)
def test_lying_counts_and_lengths(offset: int, form: str, value: Any, says: str, llama_file: Path) -> None:
    raw = bytearray(llama_file.read_bytes())
    struct.pack_into(form, raw, offset, value)
    llama_file.write_bytes(raw)
    refused(llama_file, says)


def info_position(raw: bytes, name: str) -> int:
    """Where the number of dimensions of a tensor's record stands."""
    key = len(name).to_bytes(8, "little") + name.encode()
    return raw.index(key) + len(key)


@pytest.mark.parametrize(
    ("field", "form", "value", "says"),
    [
        (0, "<I", 200, "claims 200 dimensions"),
        (0, "<I", 0, "claims 0 dimensions"),
        (4, "<Q", 2**50, "claims .* bytes at"),
        (4, "<Q", 2**63, "claims .* bytes at"),
        (4, "<Q", 0, "impossible shape"),
        (4, "<Q", 16, "has the shape"),
        (20, "<I", 77, "unknown type 77"),
        (20, "<I", 3, "overlaps|has the shape|claims|impossible|decoded|lacks"),
        (24, "<Q", 2**40, "claims .* bytes at"),
        (24, "<Q", 7, "claims .* bytes at"),
        (24, "<Q", 0, "overlaps"),
    ],
)
def test_lying_tensor_records(field: int, form: str, value: int, says: str, llama_file: Path) -> None:
    raw = bytearray(llama_file.read_bytes())
    at = info_position(raw, "blk.1.ffn_up.weight")  # u32 dims | u64 x 2 | u32 type | u64 offset
    struct.pack_into(form, raw, at + field, value)
    llama_file.write_bytes(raw)
    if field == 20 and value == 3:  # a smaller type fits; what it decodes to is noise, but of the right shape
        models.open(llama_file)
        return
    refused(llama_file, says)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 2**32 - 1),
        ("llama.block_count", 2**31),
        ("llama.block_count", 3),
        ("llama.embedding_length", 2**31),
        ("llama.feed_forward_length", 2**31),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 2**30),
        ("llama.vocab_size", 2**32 - 1),
    ],
)
def test_lying_metadata(key: str, value: int, llama_file: Path) -> None:
    raw = bytearray(llama_file.read_bytes())
    at = raw.index(key.encode()) + len(key) + 4  # u32 type | value
    struct.pack_into("<I", raw, at, value)
    llama_file.write_bytes(raw)
    refused(llama_file)


@pytest.mark.parametrize("count", [2**62, 2**40, 10**6])
@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type"])
def test_lying_array_lengths(key: str, count: int, llama_file: Path) -> None:
    raw = bytearray(llama_file.read_bytes())
    at = raw.index(key.encode() + b"\x09\0\0\0") + len(key) + 8  # u32 array | u32 type | u64 count
    struct.pack_into("<Q", raw, at, count)
    llama_file.write_bytes(raw)
    refused(llama_file, "claims|ends inside")


def test_arrays_in_arrays_end_somewhere(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    path = tmp_path / "nested.gguf"
    path.write_bytes(head + struct.pack("<IQ", 9, 1) * 50_000)
    refused(path, "unknown type 9")


def test_flipped_bits_in_the_header(llama_file: Path) -> None:
    """Either one line, or a file that still says the same about its tensors. Never another exception, never a flood of memory."""
    raw = llama_file.read_bytes()
    layout = gguf_layout.read_layout(llama_file)
    draw = random.Random(2)
    found = 0
    for _ in range(400):
        damaged = bytearray(raw)
        damaged[draw.randrange(layout.header_bytes)] ^= 1 << draw.randrange(8)
        llama_file.write_bytes(damaged)
        try:
            seen = gguf_layout.read_layout(llama_file)
        except CheckpointError as error:
            assert "\n" not in str(error)
            found += 1
            continue
        for tensor in seen.tensors.values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(raw)
    assert found > 80


def test_flipped_bits_through_the_whole_reader(llama_file: Path) -> None:
    raw = llama_file.read_bytes()
    layout = gguf_layout.read_layout(llama_file)
    draw = random.Random(3)
    for _ in range(60):
        damaged = bytearray(raw)
        damaged[draw.randrange(layout.header_bytes)] ^= 1 << draw.randrange(8)
        llama_file.write_bytes(damaged)
        try:
            models.open(llama_file)
        except ModelError as error:
            assert "\n" not in str(error)


def test_cut_while_in_use(llama_file: Path) -> None:
    source = models.open(llama_file)
    with open(llama_file, "r+b") as file:
        file.truncate(llama_file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        source.fill(source.skeleton())


def test_types_that_cannot_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.zeros((4, 32), dtype=np.int32))
    finish(writer)
    refused(path, "type I32, which cannot be decoded")
