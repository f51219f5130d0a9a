"""The class by which transformers loads dither's checkpoints: ``AutoModelForCausalLM.from_pretrained(path)`` after ``import dither``.

`dither/__init__.py` registers it when ``transformers.modeling_utils`` is first imported, so that ``import dither`` itself stays light.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dither.quant.assemble import install
from dither.quant.attention_inputs import put_operands
from dither.quant.checkpoint import METHOD, VERSION, align, check_modules, replaced_of
from dither.quant.inputs import InputRounding
from dither.quant.linear import QuantWeight, share
from dither.quant.surroundings import Surroundings, put_turns, surround


class Config(QuantizationConfigMixin):
    """``quantization_config`` of a dither checkpoint; see `quant.checkpoint`."""

    def __init__(
        self,
        version: int = VERSION,
        recipe: str = "",
        schemes: list[Any] | None = None,
        layers: dict[str, Any] | None = None,
        around: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.around = around or {}
        self.version, self.recipe, self.schemes, self.layers = version, recipe, schemes or [], layers or {}


class Quantizer(HfQuantizer):
    """Puts the few-bit modules in place of the float ones before the weights are read."""

    requires_calibration = True
    quantization_config: Config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = vars(self.quantization_config)
        put_turns(model, Surroundings.from_json(config).turns)
        install(model, replaced_of(config))
        put_operands(model, Surroundings.from_json(config).attention)
        share(model)
        surround(model, config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Undo casts that transformers makes by name (its "keep in float32" lists know no buffers), then check what came."""
        for module in model.modules():
            if isinstance(module, QuantWeight | InputRounding):
                module.restore_types()
        align(model)
        check_modules(model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Buffers of few-bit modules keep the type they are stored in; ``dtype`` is that of the module made above."""
        new = super().get_new_dtype(converter, param, dtype)
        return new if isinstance(new, torch.dtype) else None

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def adopt(model: nn.Module, config: dict[str, Any]) -> None:
    """Tell a transformers model whose few-bit modules are already in place that it is quantized, as ``config``
    (`checkpoint.quantization_config`) says: then ``save_pretrained`` writes a folder that loads again."""
    if not hasattr(model, "save_pretrained"):
        return
    own = Config(**{k: v for k, v in config.items() if k != "quant_method"})
    quantizer = Quantizer(own, pre_quantized=True)
    model.is_quantized, model.hf_quantizer, model.quantization_method = True, quantizer, METHOD  # type: ignore[assignment]
    model.config.quantization_config = own  # type: ignore[union-attr]


def register() -> None:
    """Make transformers know `Quantizer`. Safe to call more than once."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(Quantizer)
        auto.register_quantization_config(METHOD)(Config)
