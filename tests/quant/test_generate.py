"""Text token by token, against transformers' own loop and by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dither
import tiny_folder
import tiny_models
from dither.errors import ModelError, UsageError
from dither.formats import Int, group
from dither.kernels.extension import extension
from dither.quant.generate import Sampling, generate, pick
from dither.quant.linear import QuantLinear

TOKENIZER = tiny_folder.tokenizer()
PROMPT = "few bits lose"


def tiny(name: str = "llama") -> Any:
    model, _ = tiny_models.build(name)
    for parameter in model.parameters():
        parameter.data *= 2
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # random models would stop at random
    return model


class Endless:
    """The tokenizer without an end token."""

    eos_token_id = None

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return TOKENIZER(*args, **kwargs)


ENDLESS = Endless()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba", "bloom"])
def test_greedy_is_what_transformers_generates(name: str) -> None:
    model = tiny(name)
    ids = torch.tensor([TOKENIZER(PROMPT)["input_ids"]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ]
    found = generate(model, ENDLESS, PROMPT, Sampling(max_tokens=12))
    assert found.text == TOKENIZER.decode(expected, skip_special_tokens=True)
    assert (found.tokens, found.prompt_tokens, found.stopped_by) == (12, len(PROMPT), "length")
    assert found.tokens_per_second == pytest.approx(12 / found.seconds)


def test_few_bits_are_decoded_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that multiply codes are never decoded for a step; where there is no kernel, or none for the format, all keep decoded weights."""
    whole, offsets = dither.recipes.RTN(bits=4, group=16), dither.recipes.RTN(weights=Int(4, zero="float") @ group(16))
    for method, path in ((whole, ""), (whole, "reference"), (offsets, "")):
        monkeypatch.setenv("DITHER_KERNELS", path)
        model = dither.quantize(tiny(), method).model
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        multiplied = layers[0].multiplies_codes
        assert multiplied == (not path and method is whole and extension() is not None)
        kept: list[int] = []
        model.register_forward_hook(lambda *a, kept=kept, layers=layers: kept.append(sum(m._kept is not None for m in layers)))
        few = generate(model, ENDLESS, PROMPT, Sampling(max_tokens=5))
        assert kept == [0 if multiplied else len(layers)] * 5 and all(m._kept is None for m in layers)
        assert generate(model, ENDLESS, PROMPT, Sampling(max_tokens=5)).text == few.text


def test_pieces_add_up_to_the_text() -> None:
    pieces: list[str] = []
    found = generate(tiny(), ENDLESS, PROMPT, Sampling(max_tokens=20), on_text=pieces.append)
    assert "".join(pieces) == found.text and len(pieces) > 10


def test_stop_strings_are_never_shown() -> None:
    model = tiny()
    whole = generate(model, ENDLESS, PROMPT, Sampling(max_tokens=20)).text
    stop = whole[6:9]
    pieces: list[str] = []
    found = generate(model, ENDLESS, PROMPT, Sampling(max_tokens=20, stop=("never so", stop)), on_text=pieces.append)
    assert found.text == whole[: whole.find(stop)] == "".join(pieces) and found.stopped_by == "stop"
    late = generate(
        model, ENDLESS, PROMPT, Sampling(max_tokens=20, stop=(whole[-1] + "never so",)), on_text=pieces.append
    )
    assert late.text == whole and late.stopped_by == "length"


def test_the_end_token_ends_and_is_not_counted() -> None:
    model = tiny()
    ids = torch.tensor([TOKENIZER(PROMPT)["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()
    end = made[-1]
    model.generation_config.eos_token_id = [end]
    found = generate(model, ENDLESS, PROMPT, Sampling(max_tokens=12))
    assert (found.tokens, found.stopped_by) == (made.index(end), "end")
    assert found.text == TOKENIZER.decode(made[: made.index(end)])


def test_seeds_repeat_and_differ() -> None:
    model, hot = tiny(), {"max_tokens": 16, "temperature": 1.5}
    texts = [generate(model, ENDLESS, PROMPT, Sampling(seed=s, **hot)).text for s in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(model, ENDLESS, PROMPT, Sampling(seed=9, **hot))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are left alone


class Bytes:
    """A tokenizer of UTF-8 bytes that, as SentencePiece ones do, drops a space at the start of what it decodes."""

    chat_template = eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace").removeprefix(" ")


class Scripted(nn.Module):
    """Says what it is told to, whatever it reads."""

    def __init__(self, says: bytes) -> None:
        super().__init__()
        self.says, self.start = says, 0
        self.weight, self.config = nn.Parameter(torch.zeros(1)), SimpleNamespace(max_position_embeddings=100)

    def forward(self, input_ids: torch.Tensor) -> Any:
        self.start = self.start or input_ids.shape[1]
        logits = torch.zeros(1, 1, 256)
        logits[0, 0, self.says[input_ids.shape[1] - self.start]] = 9.0
        return SimpleNamespace(logits=logits)


def test_characters_come_whole_and_the_first_space_stays() -> None:
    says, pieces = " né 🙂 ok".encode(), list[str]()
    found = generate(Scripted(says), Bytes(), "is", Sampling(max_tokens=len(says)), on_text=pieces.append)
    assert found.text == " né 🙂 ok" == "".join(pieces) and "🙂" in pieces and not any("�" in p for p in pieces)
    cut = generate(Scripted(says), Bytes(), "is", Sampling(max_tokens=3), on_text=pieces.append)
    assert cut.text == " n�"  # it ends in the middle of a character: nothing to wait for


def test_chat_uses_the_template() -> None:
    tokenizer = tiny_folder.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    plain = generate(tiny(), tokenizer, "<user>hi>>", Sampling(max_tokens=4))
    chat = generate(tiny(), tokenizer, "hi", Sampling(max_tokens=4), chat=True)
    assert chat.text == plain.text and chat.prompt_tokens == len("<user>hi>>")
    with pytest.raises(UsageError, match="no chat template"):
        generate(tiny(), ENDLESS, "hi", Sampling(max_tokens=4), chat=True)


def test_prompts_that_do_not_fit() -> None:
    model = tiny()
    assert generate(model, ENDLESS, "x" * 60, Sampling(max_tokens=4)).tokens == 4
    with pytest.raises(UsageError, match=r"61 tokens, and with 4 new ones .* 64 positions"):
        generate(model, ENDLESS, "x" * 61, Sampling(max_tokens=4))
    with pytest.raises(UsageError, match="empty"):
        generate(model, ENDLESS, "", Sampling())


def test_models_that_cannot() -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        generate(tiny(), None, PROMPT, Sampling())
    with pytest.raises(ModelError, match="no language model"):
        generate(tiny().model, ENDLESS, PROMPT, Sampling(max_tokens=2))
    broken = tiny()
    broken.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(broken, ENDLESS, PROMPT, Sampling(max_tokens=2))


# -- one token --------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def shares(sampling: Sampling, draws: int = 4000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([pick(LOGITS, sampling, generator) for _ in range(draws)]), minlength=4)
    return (counts / draws).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [1, 0, 0, 0]),
        (Sampling(temperature=1), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(temperature=1e-30), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_p=0.4), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=0.0), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=0.9, top_k=3), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    ],
    ids=str,
)
def test_pick_draws_from_the_stated_distribution(sampling: Sampling, expected: list[float]) -> None:
    found = shares(sampling)
    assert found == pytest.approx(expected, abs=0.03)
    assert all(f == 0 for f, e in zip(found, expected, strict=True) if e == 0)


WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"top_p": 1.1},
    {"top_p": -0.1},
    {"top_p": float("nan")},
    {"top_k": -1},
    {"stop": ("",)},
    {"stop": "text"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
