from .registry import batchnorm_twin, create_model, list_models, model_entry

__all__ = ["batchnorm_twin", "create_model", "list_models", "model_entry"]
