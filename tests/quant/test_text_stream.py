"""Text from tokens as they come, against decoding all of them at once; penalties and biases."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

import tiny_folder
from dither.quant.sampling import Chooser, Sampling
from dither.quant.text_stream import TextStream


class Bytes:
    """Tokens are UTF-8 bytes; a space at the start of what is decoded is dropped, as SentencePiece ones do."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace").removeprefix(" ")


TEXT = " the né 🙂🙂 quick — brown 漢字 fox jumps; over  the   lazy dog\n" * 4


@pytest.mark.parametrize("prompt", [b"", b"is", b"n\xc3\xa9"])
@pytest.mark.parametrize("stop", [(), ("never",), ("dog\n the lazy",)])
def test_pieces_add_up(prompt: bytes, stop: tuple[str, ...]) -> None:
    stream, pieces = TextStream(Bytes(), list(prompt), stop), []
    for byte in TEXT.encode():
        pieces.append(stream.push(byte))
        assert not stream.stopped and "�" not in pieces[-1]
    pieces.append(stream.rest())
    assert "".join(pieces) == stream.text == (TEXT if prompt else TEXT.removeprefix(" ")) and stream.rest() == ""


@pytest.mark.parametrize("seed", range(20))
def test_the_first_stop_string_ends_it_and_is_never_shown(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("ab🙂", k=60))
    stops = (*("".join(draw.choices("ab🙂", k=draw.randrange(1, 6))) for _ in range(2)), "zzz")
    stream, shown = TextStream(Bytes(), [65], stops), ""
    for byte in text.encode():
        shown += stream.push(byte)
        if stream.stopped:
            break
    shown += stream.rest()
    places = [text.index(s) for s in stops if s in text]
    # the stop string that is complete first ends the text, at the first place where one of those complete by then begins
    complete = min((text.index(s) + len(s) for s in stops if s in text), default=None)
    expected = text if complete is None else text[: min(text.index(s) for s in stops if s in text[:complete])]
    assert shown == stream.text == expected and stream.stopped == bool(places)


def test_a_token_costs_the_same_however_long_the_text_is() -> None:
    class Counting(Bytes):
        most = 0

        def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
            Counting.most = max(Counting.most, len(ids))
            return super().decode(ids, skip_special_tokens)

    stream = TextStream(Counting(), list(b"prompt" * 100))
    for byte in TEXT.encode() * 3:
        stream.push(byte)
    assert Counting.most < 40 and stream.text == TEXT * 3


def test_with_a_tokenizer_of_transformers() -> None:
    tokenizer = tiny_folder.tokenizer()
    ids = tokenizer("few bits, more noise; " * 5)["input_ids"]
    stream = TextStream(tokenizer, ids[:7])
    assert "".join(map(stream.push, ids[7:])) + stream.rest() == tokenizer.decode(ids)[7:]


# -- what changes the scores before a token is chosen


def test_penalties_and_biases_by_hand() -> None:
    logits = torch.tensor([3.0, 2.6, 2.4, 0.0])
    chooser = Chooser(Sampling(frequency_penalty=0.3, presence_penalty=0.2))
    # 3.0 | 2.5 2.6 | 2.5 2.1 2.4 | 2.2 2.1 2.4 | 2.2 2.1 1.9 | 1.9 2.1 1.9
    assert [chooser.choose(logits) for _ in range(6)] == [0, 1, 0, 2, 0, 1]
    assert logits.tolist() == pytest.approx([3.0, 2.6, 2.4, 0.0])  # left as they were
    assert Chooser(Sampling(bias={3: 100.0})).choose(logits) == 3 and Chooser(Sampling(bias={0: -1.0})).choose(logits) == 1


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [2.1, -2.1, float("nan")])
def test_penalties_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})
    with pytest.raises(ValueError, match="bias"):
        Sampling(bias={3: value * float("inf")})
