# the rules of these modules register themselves
from . import attention, average_pooling, joining, linear, max_pooling, norms, pointwise, resizing
from .rules import Call, NoRule, register_rule
from .state import State

__all__ = [
    "Call",
    "NoRule",
    "State",
    "attention",
    "average_pooling",
    "joining",
    "linear",
    "max_pooling",
    "norms",
    "pointwise",
    "register_rule",
    "resizing",
]
