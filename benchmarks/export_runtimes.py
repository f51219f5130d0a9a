"""The log-probabilities that other programs give the tokens of a text: what benchmarks/export_perplexity.py runs, in a process of its own.

    python benchmarks/export_runtimes.py llama.cpp FOLDER windows.npy answer.npy

FOLDER is an export; ``windows.npy`` holds token ids ``[windows, length]`` int64, and the answer is ``log p(x_t | x_<t)`` in nats, float64
``[windows, length - 1]``: each window is read on its own, and nothing predicts its first token. dither cannot be imported in this process, so no
figure can come from it. Every program runs on one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EVERY = 10**7  # more tokens than any vocabulary has


class Blocked:
    """Finds dither first, and refuses it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "dither":
            raise ImportError("dither must not run here")


def log_probabilities(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Of the tokens behind the first: ``logits [length, V]`` and ``ids [length]`` to ``[length - 1]``, float64."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(axis=1)
    return wide[np.arange(len(wide)), ids[1:]] - top - np.log(np.exp(wide - top[:, None]).sum(axis=1))


def transformers(folder: Path, windows: np.ndarray, **options: Any) -> np.ndarray:
    """The folder as anyone loads it, whichever package its config asks for; computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"transformers did not find all weights: {info}")
    with torch.inference_mode():
        return np.stack([log_probabilities(model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy(), ids) for ids in windows])


def transformers_gguf(folder: Path, windows: np.ndarray) -> np.ndarray:
    """The same of a GGUF file, which transformers decodes to float32."""
    return transformers(folder, windows, gguf_file="model.gguf")


def onnxruntime(folder: Path, windows: np.ndarray) -> np.ndarray:
    """MatMulNBits on the processor: products in float32."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return np.stack([log_probabilities(session.run(None, {"input_ids": ids[None]})[0][0], ids) for ids in windows])


def llama_cpp(folder: Path, windows: np.ndarray) -> np.ndarray:
    """llama.cpp's server, in this process, with keys and values in float32.

    The server tells log-probabilities of tokens that it samples, never of a prompt. So each token is asked for by itself: the tokens before it are
    the prompt (all but the last are in the server's cache, so this is one step of the model), and a bias makes it the token that is sampled; the
    probability that is told comes from the logits before any bias. llama.cpp therefore reads the text one token at a time, as when it writes, where
    the other programs read a window at once; its own perplexity tool judges the second half of each window only, so its figures are others.
    """
    import xllamacpp as cpp

    settings = cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(folder / "model.gguf"), windows.shape[1] + 8, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.verbosity = 1  # errors only
    server = cpp.Server(settings)
    found = np.empty((windows.shape[0], windows.shape[1] - 1))
    for n, ids in enumerate(windows.tolist()):
        for end in range(1, len(ids)):
            found[n, end - 1] = _next_token(server, ids, end)
    return found


def _next_token(server: Any, ids: list[int], end: int) -> float:
    """``log p(ids[end] | ids[:end])``. The server is silent where the sampled token breaks off inside a character: there another token of the window
    is sampled, and the one that is looked for is found among the probabilities of all (seconds instead of milliseconds)."""
    token = ids[end]
    for other in (token, *ids):
        asked = {"prompt": ids[:end], "max_tokens": 1, "temperature": 0, "cache_prompt": True, "logit_bias": [[other, 1e4]]}
        told = server.handle_completions(asked | {"logprobs": 1 if other == token else EVERY})["choices"][0]["logprobs"]
        if told is None:
            continue
        entry = told["content"][0]
        if entry["id"] != other:
            raise RuntimeError(f"llama.cpp sampled token {entry['id']} where {other} was forced")
        known = {one["id"]: one["logprob"] for one in (entry, *entry["top_logprobs"])}
        return float(known[token])
    raise RuntimeError(f"llama.cpp tells nothing of token {token} behind {end} tokens")


RUNTIMES: dict[str, Callable[[Path, np.ndarray], np.ndarray]] = {
    "llama.cpp": llama_cpp,
    "onnxruntime": onnxruntime,
    "transformers": transformers,
    "transformers (GGUF)": transformers_gguf,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("answer", type=Path)
    asked = parser.parse_args()
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    np.save(asked.answer, RUNTIMES[asked.runtime](asked.folder, np.load(asked.windows)))


if __name__ == "__main__":
    main()
