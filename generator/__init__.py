"""Wan as a policy: rollouts, transitions with a density, adapters.

`from generator import WanGenerator` loads the module behind the name when it is first used.
"""

from common.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {"GeneratorConfig": "generator.config", "WanGenerator": "generator.wan"},
)
