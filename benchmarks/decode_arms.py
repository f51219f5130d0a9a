"""The runtimes that `decode.py` compares, each in a process of its own: ``python benchmarks/decode_arms.py``, told by its standard input.

The first line is an `Arm` as JSON; the model is loaded, and ``{"bytes": ...}`` says what a token reads of it. Each further line ``[prompt, tokens]``
is one measurement: a prompt of so many tokens is read, and so many are made behind it, greedily and past any end token. The answer is a `Times`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FIRST_TOKEN = 1000  # of prompts, which are consecutive tokens


@dataclass(frozen=True)
class Arm:
    """``runtime``: a key of `RUNTIMES`. ``model``: a checkpoint, a folder or a file."""

    name: str
    runtime: str
    model: str
    dtype: str = "float32"
    threads: int = 2


@dataclass(frozen=True)
class Times:
    """Seconds. ``prompt``: until the first token's scores are there; ``decode``: from then until the last token is chosen, which is a step for each
    token but the first; ``cpu``: of the processor, for both."""

    prompt: float
    decode: float
    cpu: float


class Runtime(ABC):
    """``nbytes``: of the weights that a token reads."""

    nbytes: int

    @abstractmethod
    def __init__(self, arm: Arm) -> None: ...

    @abstractmethod
    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds of the prompt, and of the ``tokens - 1`` steps behind the first token."""

    def measure(self, prompt: int, tokens: int) -> Times:
        before = time.process_time()
        found = self.run(list(range(FIRST_TOKEN, FIRST_TOKEN + prompt)), tokens)
        return Times(*found, time.process_time() - before)


class Dither(Runtime):
    """What ``dither run`` does (`generate`), text included."""

    def __init__(self, arm: Arm) -> None:
        import torch

        from dither.quant.evaluate import open_model

        torch.set_num_threads(arm.threads)
        self.model, self.tokenizer = open_model(arm.model, arm.dtype)
        self.nbytes = nbytes(self.model)
        for owner in (self.model.generation_config, self.model.config, self.tokenizer):
            owner.eos_token_id = None

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        from dither.quant.generate import Sampling, generate

        text = " the" * len(prompt)  # as many tokens: which ones they are costs nothing
        found = generate(self.model, self.tokenizer, text, Sampling(max_tokens=tokens), on_text=lambda piece: None)
        if (found.tokens, found.prompt_tokens) != (tokens, len(prompt)):
            raise SystemExit(f"made {found.tokens} tokens behind {found.prompt_tokens}, not {tokens} behind {len(prompt)}")
        return found.prompt_seconds, found.seconds - found.prompt_seconds


class Torch(Runtime):
    """The float model as transformers has it, stepped by the plainest loop: its own ``generate`` does more for each token."""

    def __init__(self, arm: Arm) -> None:
        import torch

        from dither.quant.evaluate import open_model

        torch.set_num_threads(arm.threads)
        self.model, _ = open_model(arm.model, arm.dtype)
        self.nbytes = nbytes(self.model)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        import torch

        with torch.inference_mode():
            started = time.perf_counter()
            output = self.model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            read = time.perf_counter()
            for _ in range(tokens - 1):
                token = output.logits[:, -1].argmax(-1, keepdim=True)
                output = self.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            int(output.logits[0, -1].argmax())
            return read - started, time.perf_counter() - read


class LlamaCpp(Runtime):
    """llama.cpp's server without its network, by its own clock; keys and values in float16, its default."""

    def __init__(self, arm: Arm) -> None:
        import xllamacpp as cpp
        from gguf import GGUFReader

        self.nbytes = sum(int(tensor.n_bytes) for tensor in GGUFReader(arm.model).tensors)
        settings = cpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = arm.model, 4096, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = arm.threads
        self.server = cpp.Server(settings)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        times = self.server.handle_completions(asked)["timings"]
        if (times["prompt_n"], times["predicted_n"]) != (len(prompt), tokens):
            raise SystemExit(f"llama.cpp made {times['predicted_n']} tokens behind {times['prompt_n']}")
        return times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3


class OnnxRuntime(Runtime):
    """onnxruntime-genai on a folder that its own builder made: 4 bits in layers and head, keys and values in a cache."""

    def __init__(self, arm: Arm) -> None:
        import onnxruntime_genai as genai

        self.genai = genai
        self.nbytes = (Path(arm.model) / "model.onnx.data").stat().st_size
        config = genai.Config(arm.model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": arm.threads}}}}))
        self.model = genai.Model(config)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        length = len(prompt) + tokens
        options = self.genai.GeneratorParams(self.model)
        options.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self.genai.Generator(self.model, options)
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        if generator.token_count() != length:
            raise SystemExit(f"onnxruntime-genai made {generator.token_count()} tokens, not {length}")
        return read - started, time.perf_counter() - read


class OpenVino(Runtime):
    """OpenVINO GenAI on a GGUF file, by its own clock: the time to the first token, and the mean of the others."""

    def __init__(self, arm: Arm) -> None:
        import openvino_genai as genai
        from gguf import GGUFReader

        self.nbytes = sum(int(tensor.n_bytes) for tensor in GGUFReader(arm.model).tensors)
        self.genai, self.pipeline = genai, genai.LLMPipeline(arm.model, "CPU", INFERENCE_NUM_THREADS=arm.threads)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        options = self.genai.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample, options.apply_chat_template = tokens, True, False, False
        found = self.pipeline.generate([" the" * len(prompt)], options).perf_metrics
        if (found.get_num_input_tokens(), found.get_num_generated_tokens()) != (len(prompt), tokens):
            raise SystemExit(f"OpenVINO made {found.get_num_generated_tokens()} tokens behind {found.get_num_input_tokens()}")
        return found.get_ttft().mean / 1e3, found.get_tpot().mean * (tokens - 1) / 1e3 if tokens > 1 else 0.0


RUNTIMES: dict[str, type[Runtime]] = {
    "dither": Dither, "torch": Torch, "llama.cpp": LlamaCpp, "onnxruntime-genai": OnnxRuntime, "openvino-genai": OpenVino,
}  # fmt: skip


def nbytes(model: Any) -> int:
    """Of parameters and few-bit tensors, each once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what libraries print is no answer
        arm = Arm(**json.loads(sys.stdin.readline()))
        if arm.runtime == "llama.cpp" and not Path(arm.model).is_file():
            raise SystemExit(f"{arm.model}: no such file")
        runtime = RUNTIMES[arm.runtime](arm)
        runtime.measure(8, 32)  # what is made on first use
        print(json.dumps({"bytes": runtime.nbytes}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(asdict(runtime.measure(*json.loads(line)))), file=out, flush=True)


if __name__ == "__main__":
    main()
