"""Load a model of transformers or diffusers with exactly the weights of its folder, or refuse it.

`from_pretrained` fills a weight that a folder lacks with random numbers, leaves out a weight that
it does not know, and says so in a log line at most. Here both are errors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import read_json
from common.log import say
from common.state_dicts import raise_problems
from common.weight_files import require_whole_folder, tensor_places

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The file of the weights, as each library names it.
TRANSFORMERS_FILE = "model.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
# The loggers that report missing weights, which are errors here.
_REPORTERS = ("transformers.modeling_utils", "diffusers.models.modeling_utils")


def load_pretrained(
    model_class: Any,
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    kinds: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Return ``model_class.from_pretrained(folder, **options)`` on a device, fully loaded.

    ``folder`` is on this machine and holds config.json and the weights. Weights are read from
    safetensors only. ``kinds`` are further names by which config.json may call this class.

    Raises ValueError or FileNotFoundError, naming the file and the tensor, for an unfinished
    download, a damaged file, a pickle, a tensor that is missing, unexpected or of another shape,
    and for a number that is NaN or infinite.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it lacks config.json")
    _require_kind(model_class, folder / "config.json", kinds)
    return _read_weights(model_class, folder, device, **options)


def _read_weights(
    model_class: Any, folder: Path, device: torch.device | str, **options: Any
) -> Any:
    """Do what `load_pretrained` says. A rehearsal builds shapes without numbers instead."""
    # 1. The files, by their names and headers.
    require_whole_folder(folder)
    by_diffusers = model_class.__module__.startswith("diffusers.")
    places = tensor_places(
        folder, DIFFUSERS_FILE if by_diffusers else TRANSFORMERS_FILE
    )

    # 2. The weights. What does not fit is reported below, with its file.
    with _reports_off(), errors_of(folder, model_class.__name__):
        model, info = model_class.from_pretrained(
            folder.as_posix(),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    problems = _problems(info, places) + _untied(model)
    raise_problems(problems, f"{_source(places)} does not fit {folder / 'config.json'}")

    # 3. The numbers, on the device: there this costs least.
    model = model.to(device)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    require_finite(state, _source(places), places)
    _say_zeros(model, places)
    return model


def _say_zeros(model: Any, places: Mapping[str, Path]) -> None:
    """Report matrices of zeros: an aborted download may leave them behind a sound header.

    It is no error, because a layer may begin with zeros.
    """
    zeros = []
    for name, weight in model.named_parameters():
        # nearly always the first number tells
        if weight.dim() > 1 and not weight.flatten()[0] and not weight.any():
            zeros.append(name)
    if zeros:
        say(
            f"WARNING: {_source(places)} holds nothing but zeros in {len(zeros)} matrices, first "
            f"{zeros[0]}: is it a whole download?"
        )


@contextmanager
def errors_of(folder: str | Path, name: str) -> Iterator[None]:
    """Inside, what a library raises for unusual contents of a folder is a ValueError.

    ``name`` says what is read: a model, a config, a tokenizer. A .json file of the folder, or of a
    folder in it, that cannot be parsed is refused before anything is read.
    """
    from huggingface_hub.errors import StrictDataclassError

    _require_json(Path(folder), name)
    try:
        yield
    except (RuntimeError, TypeError, KeyError, StrictDataclassError) as error:
        raise ValueError(
            f"{folder} holds no usable {name} ({type(error).__name__}: {error})"
        ) from error


def _require_json(folder: Path, name: str) -> None:
    """Raise ValueError for the first .json file that is none; it names the file."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} holds no usable {name} ({error})") from error


def _require_kind(model_class: Any, config_file: Path, kinds: Sequence[str]) -> None:
    """Raise ValueError if config.json is of another class; the libraries warn at most."""
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a JSON object")
    if config.get("quantization_config"):
        raise ValueError(
            f"{config_file} has a quantization_config; quantised weights are not read"
        )
    # diffusers names the class, transformers the architecture; Auto classes take any.
    key = "_class_name"
    wanted = model_class.__name__
    if not model_class.__module__.startswith("diffusers."):
        key = "model_type"
        wanted = getattr(getattr(model_class, "config_class", None), "model_type", None)
    if wanted is not None and config.get(key) not in (wanted, *kinds):
        raise ValueError(
            f"{config_file} has {key} {config.get(key)!r}, want {wanted!r}"
        )


def _source(places: Mapping[str, Path]) -> Path:
    """The file of all tensors, or the folder of several."""
    files = set(places.values())
    return files.pop() if len(files) == 1 else next(iter(files)).parent


def _problems(info: Mapping[str, Any], places: Mapping[str, Path]) -> list[str]:
    """List what `from_pretrained` reports, with the file of a tensor where there are several."""
    several = len(set(places.values())) > 1

    def shown(name: str) -> str:
        # The library renames tensors of older checkpoints.
        if several and name in places:
            return f"{name} in {places[name].name}"
        return name

    problems = [f"unexpected {shown(name)}" for name in sorted(info["unexpected_keys"])]
    problems += [f"missing {name}" for name in sorted(info["missing_keys"])]
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        problems.append(f"{shown(name)} is {tuple(stored)}, want {tuple(wanted)}")
    return problems + list(info.get("error_msgs", ()))


def _untied(model: Any) -> list[str]:
    """List pairs of weights that config.json ties and that differ in the files."""
    # diffusers has no tied weights.
    tied_keys = getattr(model, "get_expanded_tied_weights_keys", None)
    if tied_keys is None:
        return []
    problems = []
    for target, source in tied_keys(all_submodels=True).items():
        if model.get_parameter(target) is not model.get_parameter(source):
            problems.append(f"{target} differs from {source}, to which it is tied")
    return problems


@contextmanager
def _reports_off() -> Iterator[None]:
    """Inside, the libraries do not log which weights are missing."""
    loggers = [logging.getLogger(name) for name in _REPORTERS]

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # A filter, because transformers does further checks where its logger has a level.
    for logger in loggers:
        logger.addFilter(is_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_error)


def require_finite(
    state: Mapping[str, Tensor],
    source: str | Path,
    places: Mapping[str, Path] | None = None,
) -> None:
    """Raise ValueError, naming file and tensors, if a number is NaN or infinite.

    ``places`` are the files of single tensors, where they are not all in ``source``. Reads every
    number once: about 10 GB a second on a core, and no memory.
    """
    broken = [name for name, tensor in state.items() if not is_finite(tensor)]
    if not broken:
        return
    file = (places or {}).get(broken[0], source)
    names = ", ".join(broken[:10])
    raise ValueError(
        f"{file} holds numbers that are NaN or infinite, in {len(broken)} tensors: {names}"
    )


def require_floats(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError, naming file and tensor, for weights that are stored as integers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(
                f"{source} stores {name} as {tensor.dtype}, want floating-point numbers"
            )


def is_finite(tensor: Tensor) -> bool:
    """True unless a number of the tensor is NaN or infinite."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Types of 8 bits have no comparison.
    if tensor.element_size() < 2:
        tensor = tensor.float()
    # NaN passes into both ends; `isfinite` would take thirty times as long.
    low, high = torch.aminmax(tensor.detach())
    return bool(low.isfinite() & high.isfinite())
