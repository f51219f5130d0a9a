"""A model without weights: parameters on the meta device, buffers for real.

The module is built by its own constructor. A registration hook turns each parameter into a meta tensor the moment it is
registered, before anything is written to it, so memory is never spent on weights; buffers (rotary frequencies, masks,
running statistics) come out exactly as the constructor computes them.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dither.errors import CheckpointError, ModelError


class _TooLarge(Exception):
    pass


@contextmanager
def _parameters_on_meta(limit: int | None = None) -> Iterator[None]:
    """Within it, modules built by this thread have meta parameters. ``limit``: elements at which building stops with
    `_TooLarge`, so that a lying config cannot build for ever."""
    thread, total = threading.get_ident(), 0

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        nonlocal total
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        total += parameter.numel() + 1
        if limit is not None and total > limit:
            raise _TooLarge
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]  # its stub omits the result
    try:
        yield
    finally:
        handle.remove()


def build(
    config: Any,
    model_class: Any,
    attn_implementation: str,
    dtype: torch.dtype,
    *,
    limit: int | None = None,
    where: Path | str = "",
) -> nn.Module:
    """The module of a transformers config, in eval mode; "eager" attention where the model lacks the one asked for.

    Raises ModelError where the config does not describe a model that can be built; CheckpointError where it has more
    than ``limit`` parameters. ``where`` it comes from is for the message.
    """
    before = torch.get_default_dtype()
    first: Exception | None = None
    for attention in dict.fromkeys((attn_implementation, "eager")):
        try:
            with _parameters_on_meta(limit), torch.random.fork_rng(devices=[]):
                model: nn.Module = model_class._from_config(
                    copy.deepcopy(config), attn_implementation=attention, dtype=dtype
                )
            return model.eval()
        except _TooLarge:
            raise CheckpointError(
                f"{where}: the config describes a larger model than the weights hold; copy or download both again"
            ) from None
        except Exception as error:  # a config can be wrong in as many ways as there are models
            first = first or error
        finally:
            torch.set_default_dtype(before)
    assert first is not None
    raise ModelError(
        f"{where}: no model can be built from its config ({type(first).__name__}: {_line(first)}); "
        "the config is damaged or of a newer transformers: copy or download it again, or update"
    )


def auto_class(where: Path | Any) -> Any:
    """The transformers class of a checkpoint folder or a config: the one that ``architectures`` names, else the one for
    causal language models of this type, else the bare model. Raises ModelError where transformers has none (models that
    bring their own code)."""
    import transformers

    config = where if isinstance(where, transformers.PretrainedConfig) else read_config(Path(where))
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    from transformers.models.auto import modeling_auto

    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelError(
        f"{config.model_type}: transformers has no class for this model (dither runs no code that a checkpoint brings "
        "along)"
    )


def read_config(folder: Path) -> Any:
    """The transformers config of a local folder. Raises ModelError (no config.json, unknown type), CheckpointError
    (damaged)."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: has no config.json, so it is no model folder; "
            "give the folder that holds config.json and the weights"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({_line(error)}); copy or download it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise CheckpointError(f"{path}: has no model_type; copy or download it again")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._name_or_path = ""  # a place on this machine has no business in checkpoints made from this one
        return config
    except Exception as error:  # unknown types, wrong values: each config class has its own
        raise ModelError(f"{path}: transformers cannot use it ({_line(error)})") from None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
