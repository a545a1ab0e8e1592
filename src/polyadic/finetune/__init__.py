"""Recovery of a converted model: train its factors towards what the original model puts out.

No labels are needed: the original answers for every batch. ``distill`` trains on the outputs of the
whole model, ``match_layers`` on those of each converted layer.
"""

from polyadic.finetune.distillation import distill
from polyadic.finetune.loop import Recovery
from polyadic.finetune.match import match_layers
from polyadic.finetune.match_job import LayerMatch
from polyadic.finetune.settings import Progress

__all__ = ["LayerMatch", "Progress", "Recovery", "distill", "match_layers"]
