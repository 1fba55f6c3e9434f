from .data import DataConfig
from .registry import batchnorm_twin, create_model, data_config, list_models, model_entry

__all__ = ["DataConfig", "batchnorm_twin", "create_model", "data_config", "list_models", "model_entry"]
