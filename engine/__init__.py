"""What surrounds a training step: optimizer, checkpoints, guards, exports.

`from engine import LocalEngine` loads the module behind the name when it is first used.
"""

from common.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, {"LocalEngine": "engine.local"})
