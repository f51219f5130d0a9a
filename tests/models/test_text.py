"""Text for calibration and evaluation."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dither.errors import CalibrationError, UsageError
from dither.models import calibration_tokens, embedded_text, read_text, wikitext_join

TEXT = "".join(chr(ord("a") + i * i % 26) for i in range(1000))


def draw(source: Any, tokenizer: Any, samples: int = 5, length: int = 20, seed: int = 0) -> torch.Tensor:
    return calibration_tokens(source, tokenizer, samples=samples, length=length, seed=seed)


def test_windows_do_not_overlap_and_come_from_the_text(tokenizer: Any) -> None:
    tokens = draw(TEXT, tokenizer, samples=50)
    assert tokens.shape == (50, 20) and tokens.dtype == torch.int64
    stream = torch.tensor(tokenizer(TEXT).input_ids).reshape(50, 20)
    assert sorted(tokens.tolist()) == sorted(stream.tolist())
    assert not torch.equal(tokens, stream)  # permuted


def test_the_seed_decides(tokenizer: Any) -> None:
    assert torch.equal(draw(TEXT, tokenizer, seed=3), draw(TEXT, tokenizer, seed=3))
    assert not torch.equal(draw(TEXT, tokenizer, seed=3), draw(TEXT, tokenizer, seed=4))
    assert torch.equal(draw(TEXT, tokenizer, samples=5), draw(TEXT, tokenizer, samples=9)[:5])


def test_too_little_text(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"has 1000 tokens, but 51 samples of 20 need 1020; lower samples to 50"):
        draw(TEXT, tokenizer, samples=51)
    with pytest.raises(CalibrationError, match=r"has 1000 tokens, fewer than one sample of 1001"):
        draw(TEXT, tokenizer, samples=1, length=1001)
    with pytest.raises(ValueError, match="must be positive, got 0 and 20"):
        draw(TEXT, tokenizer, samples=0)


def test_every_kind_of_source(tokenizer: Any, tmp_path: Path) -> None:
    expected = draw(TEXT, tokenizer)
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert torch.equal(draw(file, tokenizer), expected)
    assert torch.equal(draw(str(file), tokenizer), expected)
    assert torch.equal(draw([file], tokenizer), expected)
    assert torch.equal(draw([TEXT], tokenizer), expected)
    stream = torch.tensor(tokenizer(TEXT).input_ids)
    assert torch.equal(draw(stream, tokenizer), expected)
    assert torch.equal(draw(stream.to(torch.int32), tokenizer), expected)
    ragged = [stream[:300].tolist(), stream[300:].tolist()]
    assert torch.equal(draw(ragged, tokenizer), expected)

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.md").write_text("second " * 30)
    (folder / "a.txt").write_text("first " * 30)
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": f"row {i} " * 9}) + "\n" for i in range(3)))
    (folder / "d.json").write_text(json.dumps(["one", {"text": "two", "id": 7}]))
    (folder / "weights.bin").write_bytes(b"\xff\xfe")
    whole = read_text(folder)
    assert [whole.index(w) for w in ("first", "second", "row 0", "row 2", "one", "two")] == sorted(
        whole.index(w) for w in ("first", "second", "row 0", "row 2", "one", "two")
    )
    assert torch.equal(draw(folder, tokenizer), draw(whole, tokenizer))


def test_given_windows_are_used_as_they_are(tokenizer: Any) -> None:
    windows = torch.arange(24, dtype=torch.int32).reshape(3, 8)
    assert torch.equal(draw(windows, tokenizer), windows.long())
    assert torch.equal(draw(windows.tolist(), tokenizer), windows.long())


@pytest.mark.parametrize(
    "bad",
    [
        torch.rand(3, 4),
        torch.tensor([[1, -2]]),
        torch.zeros(2, 2, 2, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
    ],
)
def test_tokens_that_cannot_be_tokens(bad: torch.Tensor, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="calibration tokens must"):
        draw(bad, tokenizer)


def test_sources_that_are_none(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source, says in [
        (tmp_path / "none.txt", "there is no such text file"),
        (str(tmp_path / "none.txt"), "there is no such file or folder of text"),
        ("none.txt", "there is no such file or folder of text"),
        ("owner/data-set", "pip install datasets"),
        ([], "the list is empty"),
        (tmp_path, "holds no text files"),
    ]:
        with pytest.raises(CalibrationError, match=says) as caught:
            draw(source, tokenizer)
        assert "\n" not in str(caught.value)


def test_hub_data_sets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, streaming: bool) -> dict[str, Any]:
        asked.append((name, config, streaming))
        if name == "owner/broken":
            raise RuntimeError("no\nnetwork")
        if name == "owner/images":
            return {"train": [{"image": 0}]}
        return {"test": [], "train": ({"text": f"row {i}\n"} for i in range(10**9))}

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    tokens = draw("owner/data:part", tokenizer)
    assert asked[-1] == ("owner/data", "part", True)
    assert re.match(r"[row \d\n]+$", tokenizer.decode(tokens[0]))
    assert torch.equal(tokens, draw("owner/data:part", tokenizer))
    with pytest.raises(CalibrationError, match="cannot be read \\(no network\\)"):
        draw("owner/broken", tokenizer)
    with pytest.raises(CalibrationError, match='row 0 is neither a string nor an object with a "text" field'):
        draw("owner/images", tokenizer)


def test_encodings(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\n")
    assert read_text(file) == "naïve\r\n"
    file.write_bytes(b"abc\xe9def")
    with pytest.raises(CalibrationError, match=r"byte 0xe9 at offset 3"):
        read_text(file)
    file.write_bytes(b"\xef\xbb\xbfabc\xe9def")
    with pytest.raises(CalibrationError, match=r"byte 0xe9 at offset 6"):
        read_text(file)
    file.write_bytes(b" \n")
    with pytest.raises(CalibrationError, match="is empty"):
        read_text(file)
    bad = tmp_path / "t.jsonl"
    for content in ('{"text": 3}', "{", '{"title": "x"}', "[" * 100_000):
        bad.write_text(content)
        with pytest.raises(CalibrationError) as caught:
            read_text(bad)
        assert "\n" not in str(caught.value)


def test_wikitext_join_follows_the_published_protocol() -> None:
    raw = " \n = Title = \n \n First paragraph . \n"
    assert wikitext_join(raw) == "\n\n = Title = \n\n\n\n\n First paragraph . \n"
    rows = ["" if line == " " else line + "\n" for line in raw.split("\n")[:-1]]
    assert wikitext_join(raw) == "\n\n".join(rows)
    assert wikitext_join("no line end") == "no line end\n"


def paragraphs(text: str) -> set[str]:
    return {" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip()}


def test_embedded_parts_share_no_paragraph() -> None:
    calibration, evaluation = embedded_text("calibration"), embedded_text("evaluation")
    assert not paragraphs(calibration) & paragraphs(evaluation)
    assert len(calibration) > 150_000 and len(evaluation) > 100_000
    assert embedded_text("calibration") == calibration
    with pytest.raises(UsageError, match="'training'"):
        embedded_text("training")  # type: ignore[arg-type]


def test_the_default_is_the_embedded_calibration_text(tokenizer: Any) -> None:
    assert torch.equal(draw(None, tokenizer), draw(embedded_text("calibration"), tokenizer))
