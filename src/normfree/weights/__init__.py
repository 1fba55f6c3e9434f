from .haiku import load_haiku
from .hub import from_pretrained, push_to_hub, save_pretrained
from .matching import CheckpointError
from .native import load_weights, save_weights
from .timm import from_timm, load_timm

__all__ = [
    "CheckpointError",
    "from_pretrained",
    "from_timm",
    "load_haiku",
    "load_timm",
    "load_weights",
    "push_to_hub",
    "save_pretrained",
    "save_weights",
]
