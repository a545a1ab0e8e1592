"""CP layers whose factors are spread over processes, by torch's own DTensor."""

from polyadic.distributed.styles import FeatureParallel, RankParallel

__all__ = ["FeatureParallel", "RankParallel"]
