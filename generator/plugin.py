"""A generator of another class than Wan: from a user's file, or from an installed package.

`common.types.Generator` says what GRPO asks of it. The commands ask for three methods more:

    sample(prompts, seeds, *, scheduler)    latents (B, C, F, H, W) without noise on the way
    save_trained(folder, state_dict)        writes what was trained, and returns the file
    load_trained(folder)                    reads it

examples/own_generator.py is the shortest, docs/add-a-generator.md the guide.
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from common.plugin_file import file_of, load_target, place_in

if TYPE_CHECKING:
    from generator.config import GeneratorConfig

# Packages offer generators under this group of entry points: name = "package.module:Class".
GROUP = "video_alignment.generators"
# No file that a user's imports is called so.
_MODULE = "_video_alignment_own_generator"
NEEDED = (
    "module",
    "rollout",
    "transition",
    "decode",
    "reference",
    "sample",
    "save_trained",
    "load_trained",
)


def load_own(cfg: GeneratorConfig, *, seed: int) -> Any:
    """Make the generator that ``cfg.target`` names, by calling it with the config and ``seed``.

    The seed decides the initial weights of what is trained, the same on all ranks. Raises
    ValueError for an unknown target, for an object that lacks something of `NEEDED`, and, with
    the place in the user's file, for whatever that file raises.
    """
    is_file = ":" in cfg.target
    try:
        if is_file:
            maker = load_target("generator.target", cfg.target, module=_MODULE)
        else:
            maker = _installed(cfg.target).load()
        generator = maker(cfg, seed=seed)
    except Exception as error:
        # A user's code may raise anything; an error from elsewhere is not about the target.
        place = place_in(file_of(cfg.target), error) if is_file else ""
        if not place:
            raise
        kind = type(error).__name__
        text = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"generator.target: {place}: {kind}: {text}") from error

    # Found now instead of after the first rollout.
    missing = [name for name in NEEDED if not hasattr(generator, name)]
    if missing:
        raise ValueError(
            f"generator.target={cfg.target}: the generator has no {', '.join(missing)}"
        )
    # What the commands read besides.
    generator.cfg = cfg
    generator.sharded = False
    return generator


def _installed(name: str) -> EntryPoint:
    """Return the entry point of this name; raise ValueError with the names that there are."""
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name in points:
        return points[name]
    close = difflib.get_close_matches(name, points, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    known = ", ".join(points) or "none"
    raise ValueError(
        f"generator.target={name} is neither path/to/file.py:Class nor an entry point of "
        f"{GROUP}, of which there are: {known}{hint}"
    )
