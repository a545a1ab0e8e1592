"""The planner chooses the plan that a layer follows, prices every plan, and explains the choice.

``choice`` is the door. ``linear``, ``conv`` and ``embedding`` list the plans of one kind of layer
and the steps of each plan; ``multilinear`` lists the steps that they share, and ``steps`` says what
a step is. ``machine`` turns steps into seconds, at rates that are built in or that ``calibrated``
reads. ``explanation`` and ``report`` answer ``polyadic.explain``. No module here imports a layer.
"""
