"""A recipe: one YAML file that is the whole experiment, checked before anything runs."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class RecipeError(ValueError):
    """A recipe that cannot be followed; one line says where and why."""


class Section(BaseModel):
    """What every part of a recipe has in common: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=False)


def _named(key: str) -> BeforeValidator:
    """Lets ``section: value`` stand for ``section: {key: value}``."""
    return BeforeValidator(lambda value: {key: str(value)} if isinstance(value, (str, Path)) else value)


def _without_nulls(options: dict[str, Any]) -> dict[str, Any]:
    """So that ``model.options.alpha=null`` takes away what a recipe has and another model does not know."""
    return {name: value for name, value in options.items() if value is not None}


class ModelSection(Section):
    """The network: a name as on the command line, its options, and weights to start from."""

    name: str = "nf_resnet26"
    options: Annotated[dict[str, Any], AfterValidator(_without_nulls)] = Field(
        default_factory=dict, description="Of the model, such as width: 0.25; null takes one away."
    )
    weights: str | None = Field(None, description="To start from (fine-tuning): folder of a run, or a file of tensors.")
    recompute: bool = Field(False, description="Compute every block again in the backward pass: less memory.")


class DataSection(Section):
    """Where the examples come from, and how many of them are used."""

    path: str = Field(
        "digits", min_length=1, description="digits, a folder, Parquet file(s), WebDataset shards, or hub:NAME."
    )
    train: str | None = Field(None, description="Split, folder or file pattern of training; found if left out.")
    validation: str | None = Field(None, description="The same for validation.")
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = Field(False, description="Read on the way, for data that does not fit on the disk or in memory.")
    shuffle_buffer: Count = Field(10_000, description="Examples that streaming shuffles among.")
    limit: Count | None = Field(None, description="Use the first so many training examples only.")
    validation_limit: Count | None = None
    holdout: Count | None = Field(
        None, description="Validate on so many training examples, which are not trained on, and leave validation alone."
    )
    size: Count | None = Field(None, description="Side of the training crop in pixels; by default the model's.")
    test_size: Count | None = None
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    keep_decoded: bool | Literal["auto"] = Field("auto", description="Keep decoded images in memory.")


class AugmentationSection(Section):
    """What training images go through."""

    crop: Literal["random_resized", "padded", "none"] = "random_resized"
    crop_scale: tuple[Positive, Positive] = (0.08, 1.0)
    crop_padding: Annotated[int, Field(ge=0)] = Field(4, description="Pixels on each side, for crop: padded.")
    flip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    randaugment_operations: Annotated[int, Field(ge=0)] = Field(0, description="0 leaves RandAugment out.")
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = Field(9, description="Of 30, as in torchvision.")
    mixup: NotNegative = Field(0.0, description="α of MixUp; with cutmix as well, each takes half of every batch.")
    cutmix: NotNegative = 0.0


class OptimizerSection(Section):
    """SGD with Nesterov momentum, and its learning rate over time."""

    learning_rate: Positive = Field(0.1, description="For batch_size = learning_rate_batch.")
    learning_rate_batch: Count | None = Field(256, description="The rate grows in proportion; null: it is fixed.")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 1e-4
    decay_scalars: bool = Field(False, description="Decay gains, biases and other vectors and scalars, too.")
    vector_learning_rate: Positive = Field(1.0, description="Factor on the rate of gains, biases and other vectors.")
    scalar_learning_rate: Positive = Field(1.0, description="Factor on the rate of parameters with one element.")
    classifier_learning_rate: Positive = Field(1.0, description="Factor on the rate of the classifier's weights.")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: NotNegative = 5.0
    final_learning_rate: NotNegative = Field(0.0, description="Where the schedule ends; scaled as the peak is.")
    adaptive_clipping: Positive | None = Field(None, description="λ of adaptive gradient clipping.")
    adaptive_clipping_batch: Count | None = Field(
        None, description="Batch that λ is for: it goes with 1/batch_size, against the rate; null: it is fixed."
    )
    clip_norm: Positive | None = Field(None, description="Largest norm of the whole gradient.")


class LogSection(Section):
    """What is written down while it runs."""

    every: Count = Field(50, description="Updates between lines of the log.")
    signal_every: Count | None = Field(None, description="Updates between Signal Propagation Plots.")
    tensorboard: bool = False


class CheckpointSection(Section):
    """When the state of the run is saved."""

    every_epochs: Positive | None = 1.0
    every_minutes: Positive | None = 10.0


class EvaluationSection(Section):
    """When and on what accuracy is measured while training."""

    every_epochs: Positive = 1.0
    batch_size: Count | None = Field(None, description="By default as in training, and at least 64.")
    weights: Literal["auto", "ema", "raw"] = Field("auto", description="auto: the average if there is one.")


class Recipe(Section):
    """A whole experiment.

    ``batch_size`` is the number of examples in an update, over all processes; ``microbatch_size`` is how many of them
    go through the network at a time. All randomness belongs to an example or a microbatch, so that a run with equal
    microbatches is the same on one process and on several.
    """

    model: Annotated[ModelSection, _named("name")] = ModelSection()
    data: Annotated[DataSection, _named("path")] = DataSection()
    augmentation: AugmentationSection = AugmentationSection()
    epochs: Positive = 90.0
    batch_size: Count = 256
    microbatch_size: Count | None = Field(None, description="By default the share of one process.")
    label_smoothing: Fraction = 0.0
    optimizer: OptimizerSection = OptimizerSection()
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(None, description="Of averaged weights.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast.")
    channels_last: bool = True
    compile: bool = False
    share_standardization: bool | Literal["auto"] = Field(
        "auto", description="Standardize weights once per update; auto: where an update has several microbatches."
    )
    calibrate: Literal["none", "theory", "data", "center"] = Field(
        "none", description="Before the first update: gains by theory or on data, or biases that center on data."
    )
    device: str = Field("auto", description="auto: cuda where there is one, else cpu.")
    seed: Annotated[int, Field(ge=0)] = 0
    log: LogSection = LogSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        micro = self.microbatch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"batch_size: {self.batch_size} is not a multiple of microbatch_size {micro}")
        if (self.augmentation.mixup or self.augmentation.cutmix) and (micro or self.batch_size) < 2:
            raise ValueError("augmentation: MixUp and CutMix mix examples and need microbatches of at least 2")
        if self.calibrate != "none" and self.model.weights is not None:
            raise ValueError("calibrate: it is for fresh weights and would undo what model.weights has learned")
        if self.augmentation.crop_scale[0] > self.augmentation.crop_scale[1]:
            raise ValueError("augmentation.crop_scale: expected the smaller scale first")
        if self.optimizer.nesterov and not self.optimizer.momentum:
            raise ValueError("optimizer: nesterov needs a momentum above 0")
        if self.evaluation.weights == "ema" and self.ema_decay is None:
            raise ValueError("evaluation.weights: ema needs an ema_decay")
        if self.optimizer.final_learning_rate > self.optimizer.learning_rate:
            raise ValueError("optimizer.final_learning_rate: it is above learning_rate")
        if self.optimizer.warmup_epochs > self.epochs:
            warmup = self.optimizer.warmup_epochs
            raise ValueError(f"optimizer.warmup_epochs: {warmup} is more than epochs {self.epochs}")
        return self

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up: scaled with the batch size."""
        return self.optimizer.learning_rate * self.learning_rate_factor

    @property
    def learning_rate_factor(self) -> float:
        reference = self.optimizer.learning_rate_batch
        return 1.0 if reference is None else self.batch_size / reference

    @property
    def clipping(self) -> float | None:
        """λ of adaptive gradient clipping at this batch size.

        Rate × λ is the largest part of itself that a weight may move by in an update, momentum aside. The rate goes
        with the batch size, so with λ against it that bound is the same at every batch size.
        """
        section = self.optimizer
        if section.adaptive_clipping is None or section.adaptive_clipping_batch is None:
            return section.adaptive_clipping
        return section.adaptive_clipping * section.adaptive_clipping_batch / self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON know them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the library."""
    return sorted(
        file.name.removesuffix(".yaml") for file in _shipped_folder().iterdir() if file.name.endswith(".yaml")
    )


def load_recipe(source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, with single values replaced.

    Args:
        source: a YAML file; the name of a shipped recipe (``cifar10``, or ``recipes/cifar10.yaml``); a mapping; or
            None for the default, a short run on scikit-learn's digits.
        overrides: ``key=value`` or ``section.key=value``, the value in YAML. ``data=PATH`` and ``model=NAME`` stand
            for ``data.path`` and ``model.name``.

    Raises:
        RecipeError: no such file; not YAML; an unknown key, with the one that was perhaps meant; a value of the
            wrong type or out of range; or settings that contradict each other.
    """
    label, values = _read(source)
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(_explained(label, error.errors()))) from None


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What differs, a line for each key: ``optimizer.learning_rate: 0.1 → 0.4``."""
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {_shown(before, key)} → {_shown(after, key)}"
        for key in keys
        if before.get(key, _MISSING) != after.get(key, _MISSING)
    ]


_MISSING = object()


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(not set)"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shipped_folder() -> Any:
    return resources.files(__package__) / "recipes"


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """What to call it in messages, and its values."""
    if isinstance(source, Mapping):
        return "recipe", copy.deepcopy(dict(source))
    name = "digits" if source is None else str(source)
    path = Path(name)
    if path.is_file():
        text, label = path.read_text(encoding="utf-8"), name
    else:
        shipped = path.name.removesuffix(".yaml")
        if path.parent not in (Path(), Path("recipes")) or shipped not in shipped_recipes():
            near = difflib.get_close_matches(shipped, shipped_recipes(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped_recipes())}"
            raise RecipeError(f"recipe: there is no file {name}, and no shipped recipe of this name; {hint}")
        label = f"{shipped}.yaml"
        text = (_shipped_folder() / label).read_text(encoding="utf-8")
    try:
        values = _parsed(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{label}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{label}: expected keys and values, got a {type(values).__name__}")
    return label, values


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in version 1.2, and not a word."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parsed(text: str) -> Any:
    return yaml.load(text, _Yaml)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"expected key=value, got {override!r}")
    try:
        value = _parsed(text)
    except yaml.YAMLError:
        value = text
    path = key.split(".")
    if path in (["data"], ["model"]) and not isinstance(value, dict):
        path.append("path" if key == "data" else "name")
        value = text
    section = values
    for position, part in enumerate(path[:-1]):
        inner = section.get(part)
        if isinstance(inner, str) and position == 0 and part in ("data", "model"):
            inner = {"path" if part == "data" else "name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{override}: {'.'.join(path[: position + 1])} is a value, not a section")
        section[part] = inner
        section = inner
    section[path[-1]] = value


def _explained(label: str, problems: Sequence[Any]) -> list[str]:
    """A sentence for each key; what a key might have been instead comes as one problem for each possibility."""
    sentences: dict[str, list[str]] = {}
    for problem in problems:
        place = _place([str(part) for part in problem["loc"]])
        where = f"{label}: {'.'.join(place)}" if place else label
        if problem["type"] == "extra_forbidden":
            known = _keys_at(place[:-1])
            near = difflib.get_close_matches(place[-1], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            sentences[where] = [f"unknown key; {hint}"]
        elif problem["type"] == "value_error":
            sentences.setdefault(label, []).append(str(problem["ctx"]["error"]))
        else:
            sentences.setdefault(f"{where}: got {problem['input']!r}, expected", []).append(_expected(problem))
    return [f"{where}: {' or '.join(found)}".replace("expected:", "expected") for where, found in sentences.items()]


def _expected(problem: Any) -> str:
    if problem["type"] == "missing":
        return "one more value"
    message: str = problem["msg"].removeprefix("Input should be ").removeprefix("String should have ")
    if problem["type"].endswith(("_parsing", "_from_float")):
        message = message.split(",")[0]  # "a valid integer, unable to parse string as an integer"
    return re.sub(r" or instance of \w+Section$", "", message)


def _place(parts: Sequence[str]) -> list[str]:
    """The keys of a place, without the names that pydantic gives to the possibilities of a value."""
    place: list[str] = []
    for number, part in enumerate(parts):
        is_last_and_unknown = number == len(parts) - 1 and bool(_keys_at(place))
        if part in _keys_at(place) or part.isdecimal() or is_last_and_unknown:
            place.append(part)
    return place


def _keys_at(place: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in place:
        field = section.model_fields.get(part)
        annotation = None if field is None else field.annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
