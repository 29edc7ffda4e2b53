"""What a config.json says about weights that are int8 already, in the format of the compressed-tensors library.

Read: symmetric 8-bit integers with one scale an output feature ("channel"), as the formats `int-quantized` and
`naive-quantized` (X.weight int8 [N, K]) and `pack-quantized` (X.weight_packed int32 [N, K / 4], each number four bytes,
each byte a value + 128) store them, beside X.weight_scale [N, 1] or [N]. Activations as they are (w8a16), or int8 with
one dynamic scale a token (w8a8). Written: w8a8 as `int-quantized`, w8a16 as `pack-quantized`, since other readers take
them in no other form. Everything else is refused by name. No torch here.

Source: https://github.com/vllm-project/compressed-tensors (QuantizationConfig, QuantizationArgs, match_named_modules).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from models.errors import ModelError

Int8Mode = Literal["w8a16", "w8a8"]

FIELD = "quantization_config"
_METHOD = "compressed-tensors"
_PACKED = "pack-quantized"
_FORMATS = ("int-quantized", "naive-quantized", _PACKED)
# The version of the library whose files these are like.
_VERSION = "0.12.2"


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """Which weights of a checkpoint are int8, and how they are meant to be multiplied.

    mode     what the checkpoint was made for; the weights serve both modes
    packed   four values to an int32
    targets  modules that are int8: names, classes ("Linear", "Embedding"), or "re:" and an expression that the start of
             a name must match;  ignore: modules that are not, in the same words, which wins
    """

    mode: Int8Mode
    packed: bool
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def covers(self, module: str) -> bool:
        """Whether the weight of `module`, such as "model.layers.0.mlp.down_proj", is stored as int8."""
        return _matches(module, self.targets) and not _matches(module, self.ignore)


def _matches(module: str, words: tuple[str, ...]) -> bool:
    classes = ("Embedding" if _is_embedding(module) else "Linear", "Module")
    for word in words:
        if word.startswith("re:"):
            if re.match(word[3:], module):
                return True
        elif word == module or word in classes:
            return True
    return False


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in ("embed_tokens", "embed_in")


def read_quantization(value: Any) -> StoredQuantization:
    """The content of config.json's `quantization_config`. Raises ModelError that names what is not supported."""
    if not isinstance(value, Mapping):
        raise ModelError(f"{FIELD} is {value!r}; it must be an object")
    method = value.get("quant_method", "unnamed")
    if method != _METHOD:
        raise ModelError(
            f"{FIELD}.quant_method is {method!r}; only {_METHOD!r} is supported: use the checkpoint that this one was "
            "quantized from"
        )
    # What computes something else than a linear layer on int8 weights does.
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if value.get(name):
            _refuse(name, value[name], "a checkpoint without it")
    groups = value.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse("config_groups", groups, "at least one group")
    formats, modes, targets = set[str](), dict[str, Int8Mode](), list[str]()
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, Mapping):
            _refuse(where, group, "an object with weights and targets")
        words = _words(group.get("targets"), f"{where}.targets")
        stored_as = group.get("format") or value.get("format")
        if stored_as not in _FORMATS:
            _refuse(f"{where}.format" if group.get("format") else "format", stored_as, _any_of(_FORMATS))
        formats.add(_PACKED if stored_as == _PACKED else "plain")
        mode = _mode(group, where)
        # A table of token vectors is read, not multiplied: its group says nothing of activations.
        if not all(word == "Embedding" or _is_embedding(word) for word in words):
            modes[where] = mode
        targets += words
    if len(formats) > 1:
        _refuse("config_groups", "a mixture of packed and unpacked weights", "one format")
    if len(set(modes.values())) > 1:
        mixture = ", ".join(f"{mode} in {where}" for where, mode in modes.items())
        _refuse("config_groups", f"a mixture of modes ({mixture})", "one mode for all linear layers")
    return StoredQuantization(
        mode=next(iter(modes.values()), "w8a16"),
        packed=_PACKED in formats,
        targets=tuple(targets),
        ignore=tuple(_words(value.get("ignore") or [], "ignore")),
    )


def write_quantization(mode: Int8Mode, kept: Collection[str], embedding: bool) -> dict[str, Any]:
    """The content of `quantization_config` for a checkpoint whose linear layers are int8, but for the modules `kept`.

    embedding: whether the table of token vectors is int8 too.
    """
    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations = weights | {"strategy": "token", "dynamic": True, "observer": None}
    groups = [("Linear", activations if mode == "w8a8" else None)]
    if embedding:
        groups.append(("Embedding", None))
    return {
        "quant_method": _METHOD,
        "format": _PACKED if mode == "w8a16" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": [target],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
            for index, (target, inputs) in enumerate(groups)
        },
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
        "version": _VERSION,
    }


def _mode(group: Mapping[str, Any], where: str) -> Int8Mode:
    """The mode of a group. `actorder` is not looked at: without groups of columns it only says how values were found,
    and an order that matters comes as a tensor (weight_g_idx), which no model takes."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        _refuse(f"{where}.weights", weights, "an object")
    if group.get("output_activations") is not None:
        _refuse(f"{where}.output_activations", "set", "a checkpoint without it")
    _check_integers(weights, f"{where}.weights")
    _expect(weights, f"{where}.weights", "dynamic", False, missing=False)
    _expect(weights, f"{where}.weights", "strategy", "channel", missing=_unsaid_strategy(weights))
    if inputs is None:
        return "w8a16"
    if not isinstance(inputs, Mapping):
        _refuse(f"{where}.input_activations", inputs, "an object or null")
    _check_integers(inputs, f"{where}.input_activations")
    _expect(inputs, f"{where}.input_activations", "dynamic", True, missing=False)
    _expect(inputs, f"{where}.input_activations", "strategy", "token", missing=_unsaid_strategy(inputs))
    return "w8a8"


def _check_integers(arguments: Mapping[str, Any], where: str) -> None:
    _expect(arguments, where, "type", "int", missing="int")
    _expect(arguments, where, "num_bits", 8, missing=8)
    _expect(arguments, where, "symmetric", True, missing=True)


def _unsaid_strategy(arguments: Mapping[str, Any]) -> str:
    size = arguments.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _expect(arguments: Mapping[str, Any], where: str, name: str, wanted: Any, missing: Any) -> None:
    value = arguments.get(name)
    value = missing if value is None else value
    # True is 1 for Python, but not in a file.
    if type(value) is not type(wanted) or value != wanted:
        _refuse(f"{where}.{name}", value, repr(wanted))


def _words(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        _refuse(where, value, "a list of module names, class names or re: expressions")
    for word in value:
        if word.startswith("re:"):
            try:
                re.compile(word[3:])
            except re.error:
                _refuse(where, word, "valid regular expressions")
    words: list[str] = value
    return words


def _any_of(names: Collection[str]) -> str:
    return ", ".join(map(repr, names))


def _refuse(where: str, value: Any, allowed: str) -> NoReturn:
    shown = value if isinstance(value, str) and " " in value else repr(value)
    shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
    raise ModelError(
        f"{FIELD}.{where} is {shown}, which is not supported ({allowed} is): use the checkpoint that this one was "
        "quantized from"
    )
