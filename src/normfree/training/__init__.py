"""Training: a recipe in, a trained network out."""

from .evaluation import ClassResult, EvaluationResult, evaluate
from .loop import TrainingResult, train
from .monitor import SignalMonitor, lightning_callback
from .recipe import Recipe, RecipeError, load_recipe, shipped_recipes
from .side_by_side import Trained, train_side_by_side
from .stopping import TrainingInterrupted, TrainingStopped
from .stored_runs import evaluate_run

__all__ = [
    "ClassResult",
    "EvaluationResult",
    "Recipe",
    "RecipeError",
    "SignalMonitor",
    "Trained",
    "TrainingInterrupted",
    "TrainingResult",
    "TrainingStopped",
    "evaluate",
    "evaluate_run",
    "lightning_callback",
    "load_recipe",
    "shipped_recipes",
    "train",
    "train_side_by_side",
]
