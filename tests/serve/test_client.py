"""What OpenAI's own Python client sees."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI

import live_server
from dither.quant.generate import Sampling, generate
from dither.quant.stepping import Stepper
from live_server import NAME

PROMPT = "few bits lose"
NET, TOKENIZER = live_server.model(), live_server.tokenizer()


def greedy(tokens: int = 20, **options: Any) -> str:
    return generate(NET, TOKENIZER, PROMPT, Sampling(max_tokens=tokens, **options)).text


def complete(client: OpenAI, **options: Any) -> Any:
    return client.completions.create(**({"model": NAME, "prompt": PROMPT, "max_tokens": 20, "temperature": 0} | options))


def chat(client: OpenAI, **options: Any) -> Any:
    messages = [{"role": "user", "content": PROMPT}]
    return client.chat.completions.create(**({"model": NAME, "messages": messages, "max_tokens": 20, "temperature": 0} | options))


def test_models(client: OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, client.models.retrieve(NAME)) == (NAME, "model", card)
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; 'tiny' is"):
        client.models.retrieve("other")


def test_a_completion(client: OpenAI) -> None:
    found = complete(client)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.logprobs, choice.index) == (greedy(), "length", None, 0)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (len(PROMPT), 20, len(PROMPT) + 20)
    assert (found.object, found.model) == ("text_completion", NAME) and found.id.startswith("cmpl-")


def test_a_chat(client: OpenAI) -> None:
    found = chat(client)
    (choice,) = found.choices
    expected = generate(NET, TOKENIZER, PROMPT, Sampling(max_tokens=20), chat=True)
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "length")
    assert found.usage.prompt_tokens == expected.prompt_tokens and found.object == "chat.completion" and found.id.startswith("chatcmpl-")
    parts = [{"role": "developer", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    plain = complete(client, prompt="<system>be<user>ab>>")
    assert chat(client, messages=parts).choices[0].message.content == plain.choices[0].text
    assert chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=3).usage.completion_tokens == 3


def test_streams_add_up(client: OpenAI) -> None:
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == greedy() and len(chunks) > 10
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20 and len({c.id for c in chunks}) == 1
    talk = list(chat(client, stream=True))
    assert talk[0].choices[0].delta.role == "assistant" and talk[-1].choices[0].finish_reason == "length" and all(c.usage is None for c in talk)
    assert "".join(c.choices[0].delta.content or "" for c in talk) == chat(client).choices[0].message.content


def test_stop_strings_and_the_end_token(client: OpenAI, server: live_server.Live) -> None:
    whole = greedy()
    stop = whole[6:9]
    for options in ({"stop": stop}, {"stop": ["never so", stop]}):
        choice = complete(client, **options).choices[0]
        assert (choice.text, choice.finish_reason) == (whole[: whole.find(stop)], "stop")
        assert "".join(c.choices[0].text for c in complete(client, stream=True, **options)) == choice.text
    ids = TOKENIZER(whole)["input_ids"]
    end = next(t for t in ids if ids.index(t) > 0)
    with live_server.live() as other:
        other.service.intake.ends = frozenset({end})
        found = complete(OpenAI(base_url=other.url, api_key="none", max_retries=0))
        assert (found.choices[0].text, found.choices[0].finish_reason) == (whole[: ids.index(end)], "stop")
        assert found.usage.completion_tokens == ids.index(end)


def test_several_choices_and_prompts(client: OpenAI) -> None:
    found = complete(client, prompt=["few", "bits"], n=2, temperature=1, seed=7)
    assert [c.index for c in found.choices] == [0, 1, 2, 3] and len({c.text for c in found.choices}) == 4
    assert found.usage.prompt_tokens == 7 and found.usage.completion_tokens == 80
    texts = Counter[int]()
    parts: dict[int, str] = {}
    for chunk in complete(client, prompt=["few", "bits"], n=2, temperature=1, seed=7, stream=True):
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + choice.text
            texts[choice.index] += choice.finish_reason is not None
    assert parts == {c.index: c.text for c in found.choices} and set(texts.values()) == {1}
    ids = TOKENIZER(PROMPT)["input_ids"]
    assert complete(client, prompt=ids).choices[0].text == complete(client, prompt=[ids]).choices[0].text == greedy()
    assert len(chat(client, n=3, temperature=1).choices) == 3


def test_seeds_and_sampling(client: OpenAI) -> None:
    hot = {"temperature": 1.5, "seed": 3}
    assert complete(client, **hot).choices[0].text == complete(client, **hot).choices[0].text == greedy(**hot)
    assert complete(client, **hot, extra_body={"top_k": 3}, top_p=0.9).choices[0].text == greedy(**hot, top_k=3, top_p=0.9)
    assert len({complete(client, temperature=1.5).choices[0].text for _ in range(3)}) == 3  # no seed: a new one each time
    with_penalties = {"frequency_penalty": 2.0, "presence_penalty": 1.0}
    assert complete(client, **with_penalties).choices[0].text == greedy(**with_penalties) != greedy()
    token = TOKENIZER("Z")["input_ids"][0]
    assert complete(client, logit_bias={str(token): 100}).choices[0].text == "Z" * 20


def test_logprobs_are_the_models(client: OpenAI) -> None:
    found = complete(client, logprobs=3, max_tokens=6, temperature=1.3, seed=1).choices[0]
    logs, ids = found.logprobs, TOKENIZER(PROMPT)["input_ids"]
    assert "".join(logs.tokens) == found.text and logs.text_offset == list(range(6))
    step = Stepper(NET, torch.tensor([ids]))
    with torch.inference_mode():
        for text, value, top in zip(logs.tokens, logs.token_logprobs, logs.top_logprobs, strict=True):
            token, expected = TOKENIZER(text)["input_ids"][0], step.logits().log_softmax(-1)
            assert value == pytest.approx(float(expected[token]), abs=1e-4) == top[text]
            likeliest = expected.topk(3)
            assert sorted(top.values())[-3:] == pytest.approx(sorted(likeliest.values.tolist()), abs=1e-4)
            step.append(token)
    talk = chat(client, logprobs=True, top_logprobs=2, max_tokens=4).choices[0]
    assert "".join(t.token for t in talk.logprobs.content) == talk.message.content
    for t in talk.logprobs.content:
        assert t.bytes == list(t.token.encode()) and len(t.top_logprobs) == 2
        assert t.top_logprobs[0].logprob == t.logprob and math.exp(t.logprob) <= 1
    parts = [c.choices[0].logprobs for c in chat(client, logprobs=True, max_tokens=4, stream=True)]
    streamed = [t for part in parts if part for t in part.content]
    assert [t.logprob for t in streamed] == [t.logprob for t in talk.logprobs.content] and all(not t.top_logprobs for t in streamed)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"top_p": -1}, "top_p", "greater than or equal to 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 99}, "n", "less than or equal to 16"),
    ({"max_tokens": 401}, "max_tokens", "at most 400 on this server"),
    ({"max_tokens": "many"}, "max_tokens", "valid integer"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
    ({"echo": True}, "echo", "False"),
    ({"suffix": "x"}, "suffix", "is not supported"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
    ({"logit_bias": {"96": 1}}, "logit_bias", "token 96 is none of the model's 96"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty|1 to 16"),
    ({"prompt": [96]}, "prompt", "token 96 is none of the model's 96"),
    ({"prompt": [-1]}, "prompt", "greater than or equal to 0|valid"),
    ({"prompt": ["a"] * 17}, "prompt", "1 to 16 prompts, not 17"),
    ({"prompt": "x" * 500}, "prompt", "500 tokens, and with 20 new ones that is more than the 512"),
]


@pytest.mark.parametrize(("wrong", "param", "words"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_requests_name_the_parameter(client: OpenAI, wrong: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        complete(client, **wrong)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


def test_wrong_chats(client: OpenAI) -> None:
    message = {"role": "user", "content": "a"}
    for wrong, param in (
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [message], "max_completion_tokens": 0}, "max_completion_tokens"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **wrong)
        assert caught.value.param == param
    assert chat(client, tools=[], response_format={"type": "text"}, user="me").choices[0].message.content  # neutral values are fine
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, prompt="x" * 600)
    assert long.value.code == "context_length_exceeded"


def test_a_model_without_a_template() -> None:
    tokens = live_server.tokenizer()
    tokens.chat_template = None
    with live_server.live(tokens=tokens) as plain, pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
        chat(OpenAI(base_url=plain.url, api_key="none", max_retries=0))


def test_a_template_that_refuses() -> None:
    tokens = live_server.tokenizer()
    tokens.chat_template = "{{ raise_exception('roles must alternate') }}"
    with live_server.live(tokens=tokens) as picky, pytest.raises(openai.BadRequestError, match="roles must alternate"):
        chat(OpenAI(base_url=picky.url, api_key="none", max_retries=0))


def test_keys() -> None:
    with live_server.live(api_key="sesame") as locked:
        for key in ("wrong", "sesam", "sesamee", "Sesame"):
            with pytest.raises(openai.AuthenticationError) as caught:
                complete(OpenAI(base_url=locked.url, api_key=key, max_retries=0))
            assert caught.value.code == "invalid_api_key"
        assert complete(OpenAI(base_url=locked.url, api_key="sesame", max_retries=0)).choices[0].text == greedy()
        assert httpx.get(f"{locked.url}/models").status_code == 401 and httpx.get(f"{locked.root}/health").status_code == 200
    with live_server.live(api_key="sésame") as locked:
        given = {"sésame": 200, "sesame": 401}
        assert {k: httpx.get(f"{locked.url}/models", headers={"Authorization": f"Bearer {k}".encode()}).status_code for k in given} == given
