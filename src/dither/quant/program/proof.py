"""Which models get a program.

A model gets one if its step can be recorded, the record is the same at two places, every instruction gives what torch gave on the same numbers
(`_proved`), and the scores of a few tokens are near the model's own; else `program_for` says why not, at debug level, and the model runs as
it is. A program is remembered for the model until one of its tensors changes.
"""

from __future__ import annotations

import logging
import statistics
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from dither.errors import ModelError
from dither.kernels.extension import extension
from dither.kernels.tape import ELEMENTS, PANEL, Tape
from dither.quant.kv import KNOWN, attention_modules
from dither.quant.program.instructions import Attend, Record, Unrecordable, same, storage
from dither.quant.program.memory import element
from dither.quant.program.program import KeysValues, Program, write_on
from dither.quant.program.recording import record
from dither.quant.stepping import Stepper

logger = logging.getLogger("dither")

_PLACES = (3, 11)  # of the two recordings
_PROBE = (7, 5, 3, 2, 5, 7, 3, 2)  # tokens on which a program must agree with its model: three to read, five to step
_EACH = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}  # of an instruction's largest result: sums in another order, and a rounding or two
_ALL = {torch.float32: 1e-2, torch.bfloat16: 0.5}  # of the scores' spread, in the median: through all layers roundings grow, as they
# do between the model in bfloat16 and in float32; scores of something else are 1.4 away

_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Program | None]] = weakref.WeakKeyDictionary()


def program_for(model: nn.Module) -> Program | None:
    """The program of a model's step, or None where it has none: on other devices than the CPU, without the C++ extension, where a module has hooks,
    and where its step is more than a program can say."""
    if extension() is None or _hooked(model):
        return None
    state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in (*model.parameters(), *model.buffers())]
    state.append((int(model.training), 0))
    held = _known.get(model)
    if held is None or held[0] != state:
        held = _known[model] = state, _made(model)
    return held[1]


def _hooked(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _made(model: nn.Module) -> Program | None:
    try:
        return _checked(model)
    except (Unrecordable, ModelError) as why:
        logger.debug("%s: is stepped op by op (%s)", type(model).__name__, why)
    return None


def _checked(model: nn.Module) -> Program:
    if any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
        raise Unrecordable("not on the CPU")
    for module, _, _ in attention_modules(model).values():
        name = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
        if name not in KNOWN:
            raise Unrecordable(f"its attention is {name!r}")
    ids = torch.tensor([_PROBE[:3]])
    with torch.inference_mode():
        stepper = Stepper(model, ids)
        stepper.logits()
        cache = stepper.cache
        if not is_plain(cache):
            raise Unrecordable("its cache is not one of keys and values alone")
        one, other = (record(model, len(cache.layers), place) for place in _PLACES)
        if not same(one, other):
            raise Unrecordable("what is done depends on the place")
        _proved(one, len(cache.layers))
        program, held = Program(one), KeysValues.of(cache)
        apart = []
        for token in _PROBE[3:]:
            stepper.append(token)
            apart.append(_distance(program.step(token, held), stepper.logits()))
        if not statistics.median(apart) <= _ALL[one.logits.dtype]:
            raise Unrecordable(f"its scores come out differently, by {apart} of their spread")
    return program


def is_plain(cache: Any) -> bool:
    """Whether it holds keys and values of one sequence, all of them, and nothing else."""
    if type(cache) is not DynamicCache or not cache.layers or not all(type(x) is DynamicLayer and x.is_initialized for x in cache.layers):
        return False
    layers: list[Any] = list(cache.layers)
    length = cache.get_seq_length()
    return all((t.shape[0], t.shape[2]) == (1, length) and t.dtype in ELEMENTS for x in layers for t in (x.keys, x.values))


def _proved(found: Record, layers: int) -> None:
    """Do every instruction by itself, on what torch made before it. Raises Unrecordable where one comes out otherwise."""
    fresh: dict[int, Tensor] = {}

    def again(y: Tensor) -> Tensor:
        like = fresh.setdefault(storage(y), torch.zeros(y.untyped_storage().nbytes() // y.element_size(), dtype=element(y)))
        return like.as_strided(y.shape, y.stride(), y.storage_offset())

    def given(x: Tensor) -> Tensor:
        return x if x.dtype in ELEMENTS else x.float()

    tape = Tape()
    for instruction in found.instructions:
        write_on(tape, [instruction], given, again)
    attended = {i.layer: i for i in found.instructions if isinstance(i, Attend)}
    if attended.keys() != set(range(layers)):
        raise Unrecordable("layers of its cache that no attention reads")
    held = [x.new_zeros(PANEL * x.numel()) for i in range(layers) for x in (attended[i].k, attended[i].v)]
    tape.run([t.data_ptr() for t in held], 0, PANEL)
    for instruction in found.instructions:
        y, torchs = again(instruction.y).float(), instruction.y.float()
        if y.numel() and not bool((y - torchs).abs().max() <= _EACH[element(instruction.y)] * torchs.abs().max()):
            raise Unrecordable(f"{getattr(instruction, 'function', type(instruction).__name__)} comes out differently")


def _distance(scores: Tensor, theirs: Tensor) -> float:
    return float((scores - theirs).norm() / (theirs - theirs.mean()).norm())
