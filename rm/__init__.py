"""DeScore ("Think, then Score", arXiv 2605.05922): a reward model that thinks first.

`from rm import DeScore, DeScoreScorer` loads the modules behind these names when they are
first used, so importing the package costs nothing.
"""

from common.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {"DeScore": "rm.model", "DeScoreScorer": "rm.scorer", "VideoSettings": "rm.config"},
)
