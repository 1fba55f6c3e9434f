"""Standardizing once per update, however many forward and backward passes the update takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ._allocator import keep_freed_memory
from ._snapshot import Snapshot
from .layers import ScaledBranch
from .layers.keeping import SharedTensor
from .layers.standardized_weight import StandardizedWeight
from .layers.transposed import WSConvTransposeNd
from .standardize import Scale
from .standardize.ordinary import as_rows, row_memory_is_dense
from .standardize.together import Request, may_launch, standardize_together

_SAMPLES = 64


def shared_standardization(model: nn.Module) -> SharedStandardization:
    """A context in which every weight is standardized once, for any number of forward and backward passes.

    ::

        with nf.shared_standardization(model):
            for images, targets in microbatches:
                loss(model(images), targets).backward()
        optimizer.step()

    Inside, the gradients of the standardized weights add up; on leaving, or on :meth:`SharedStandardization.flush`,
    they are taken back to the parameters in one backward pass. ``parameter.grad`` is then what plain accumulation
    gives, to rounding, and clipping, ``GradScaler`` and the optimiser follow as usual. Before that the gradients of
    standardized weights, their gains and the skip gains are not in ``parameter.grad``, and ``torch.autograd.grad``
    with respect to these parameters finds nothing.

    The parameters must not change inside; call ``flush()`` before an optimiser step inside the context. Use one
    context per update under ``torch.compile``: what follows a ``flush()`` there standardizes in every pass.

    With ``DistributedDataParallel`` pass the wrapped model. Microbatches under ``no_sync()`` then cost no
    communication, and a synchronised backward pass takes its gradients back at its end, so that they are averaged.
    On replicas of ``DataParallel``, with other parameters (``functional_call``), and where a layer is called with an
    ``output_scale`` that is computed anew each time, layers standardize by themselves, as outside the context.

    Args:
        model: any module; its layers of this library take part, except those that an outer context shares already.

    Raises:
        ValueError: a ``DistributedDataParallel`` that looks for unused parameters or has a static graph: both count
            the parameters that a backward pass reaches.
        RuntimeError: inside, on use, on ``flush()`` or on leaving: a parameter has changed while it was shared.

    Source: Brock et al. 2021, section 4.2, for the standardization; sharing it is this library's.
    """
    return SharedStandardization(model)


class SharedStandardization:
    """What :func:`shared_standardization` returns: a context manager that can be entered again."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._distributed = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        for wrapper in self._distributed:
            if wrapper.find_unused_parameters or wrapper.static_graph:
                option = "find_unused_parameters" if wrapper.find_unused_parameters else "static_graph"
                raise ValueError(f"model: DistributedDataParallel({option}=True) cannot share standardized weights")
        self._depth = 0
        self._shared: list[_Shared] = []
        self._parameters: Snapshot | None = None
        self._handles: list[Any] = []
        self._synchronised = False
        self._pull_back_queued = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._attach()
            try:
                self.refresh()
            except BaseException:
                self._detach()
                self._depth = 0
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        try:
            self.flush()
        except RuntimeError as failure:
            if error is None:
                raise
            error.add_note(f"On leaving shared_standardization: {failure}")
        finally:
            self._detach()

    def flush(self) -> None:
        """Takes the gradients back to the parameters now; the next forward pass standardizes anew.

        Raises:
            RuntimeError: a parameter has changed since it was standardized.
        """
        try:
            self._pull_back(keep=False)
        finally:
            for shared in self._shared:
                shared.forget()
            self._parameters = None

    def refresh(self) -> None:
        """Standardizes whatever is not standardized yet."""
        with self._lock:
            if self._parameters is not None:
                return
            with torch.inference_mode(False), torch.enable_grad():
                for shared in self._shared:
                    if isinstance(shared, _SharedScale):
                        shared.compute()
                weights = [shared for shared in self._shared if isinstance(shared, _SharedWeight)]
                launched = [shared for shared in weights if shared.may_launch()]
                together = standardize_together([shared.request() for shared in launched])
                computed = dict(zip(map(id, launched), together, strict=True))
                for weight in weights:
                    weight.compute(computed.get(id(weight)))
                if self._distributed:
                    self._watch_gradients()
            self._parameters = Snapshot.of(*(p for p in self._model.parameters() if not p.is_inference()))

    def _attach(self) -> None:
        keep_freed_memory()
        free = [(path, m) for path, m in self._model.named_modules() if getattr(m, "_shared", None) is None]
        scales: dict[int, _SharedScale] = {}
        for path, module in free:
            if isinstance(module, ScaledBranch) and isinstance(module.last_layer(), StandardizedWeight):
                if module.skip_gain is None or getattr(module.last_layer(), "_shared", None) is not None:
                    continue
                scale = _SharedScale(self, path, module)
                scales[id(module.last_layer())] = scale
                self._shared.append(scale)
        for path, module in free:
            if isinstance(module, StandardizedWeight):
                self._shared.append(_SharedWeight(self, path, module, scales.get(id(module))))
        for shared in self._shared:
            shared.module._shared = shared
        for wrapper in self._distributed:
            self._handles.append(wrapper.register_forward_pre_hook(self._before_distributed_forward))

    def _detach(self) -> None:
        for shared in self._shared:
            shared.module._shared = None
        for handle in self._handles:
            handle.remove()
        self._shared, self._handles = [], []

    def _pull_back(self, keep: bool) -> None:
        waiting = [
            (tensor, leaf, leaf.grad)
            for shared in self._shared
            for tensor, leaf in shared.pairs()
            if leaf.grad is not None
        ]
        if not waiting:
            return
        for shared in self._shared:
            shared.check()
        others_changed = self._parameters is not None and not self._parameters.is_current()
        tensors, leaves, gradients = zip(*waiting, strict=True)
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(tensors, gradients, retain_graph=keep)
        if others_changed:
            raise RuntimeError(
                "a parameter of the model changed inside shared_standardization while gradients of standardized "
                "weights were waiting, so the update missed them; leave the context or call flush() first"
            )

    # A synchronised backward pass of DistributedDataParallel must reach every parameter before it ends.

    def _before_distributed_forward(self, wrapper: Any, inputs: Any) -> None:
        self._synchronised = wrapper.require_backward_grad_sync and torch.is_grad_enabled()

    def _watch_gradients(self) -> None:
        for shared in self._shared:
            for _, leaf in shared.pairs():
                if leaf.requires_grad:
                    leaf.register_post_accumulate_grad_hook(self._after_accumulation)

    def _after_accumulation(self, leaf: Tensor) -> None:
        if self._synchronised and not self._pull_back_queued:
            self._pull_back_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._at_the_end_of_backward)

    def _at_the_end_of_backward(self) -> None:
        self._pull_back_queued = False
        self._pull_back(keep=True)


@dataclass(eq=False)
class _Shared(SharedTensor):
    """A tensor computed from parameters: with its graph, and as a leaf in which gradients add up."""

    context: SharedStandardization
    path: str
    module: Any
    tensor: Tensor | None = field(default=None, init=False)
    leaf: Tensor | None = field(default=None, init=False)
    snapshot: Snapshot | None = field(default=None, init=False)
    sample: Tensor | None = field(default=None, init=False)

    def sources(self) -> tuple[Tensor, ...]:
        """The parameters that it is computed from, as the module has them now."""
        raise NotImplementedError

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.tensor is not None and self.leaf is not None:
            yield self.tensor, self.leaf

    def forget(self) -> None:
        self.tensor = self.leaf = self.snapshot = self.sample = None

    def check(self) -> None:
        """Raises RuntimeError if what it was computed from has changed."""
        if self.snapshot is None:
            return
        unchanged = self.snapshot.is_current()
        if unchanged and self.sample is not None:  # .data and NumPy write without a trace
            unchanged = torch.equal(_sample(self.snapshot.tensors[0]), self.sample)
        if not unchanged:
            raise RuntimeError(self._changed())

    def _changed(self) -> str:
        return (
            f"{self.path or 'the model'}: a parameter changed inside shared_standardization, so that the standardized "
            "weight is stale; leave the context or call flush() before changing parameters"
        )

    def _keep(self, tensor: Tensor, snapshot: Snapshot) -> None:
        self.snapshot, self.tensor = snapshot, tensor
        self.leaf = tensor.detach().requires_grad_(tensor.requires_grad)

    def _ready(self) -> bool:
        """Whether the tensor may be used, computed anew if need be."""
        if torch.compiler.is_compiling():  # a change is then seen on flush
            return self.leaf is not None
        if torch._C._functorch.peek_interpreter_stack():
            return False
        if self.snapshot is None:
            self.context.refresh()
        snapshot = self.snapshot
        if snapshot is None or not snapshot.is_of(*self.sources()):
            return False
        if not snapshot.is_current():
            raise RuntimeError(self._changed())
        return True


@dataclass(eq=False)
class _SharedScale(_Shared):
    """α times the skip gain of a block."""

    def sources(self) -> tuple[Tensor, ...]:
        return (self.module.skip_gain,)

    def compute(self) -> None:
        skip_gain = self.module.skip_gain
        self._keep(skip_gain * self.module.alpha, Snapshot.of(skip_gain))

    def get(self, module: Any, output_scale: Scale | None) -> Tensor | None:
        return self.leaf if self._ready() else None


@dataclass(eq=False)
class _SharedWeight(_Shared):
    """A standardized weight, for the scale that the layer's block gives it, and for others that come to be used."""

    scale: _SharedScale | None
    others: dict[float | int, _OtherScale] = field(default_factory=dict, init=False)

    def sources(self) -> tuple[Tensor, ...]:
        weight, gain = self.module.weight, self.module.gain
        return (weight,) if gain is None else (weight, gain)

    def total_scale(self) -> Scale:
        scale: Scale = self.module.weight_scale
        return scale if self.scale is None or self.scale.tensor is None else self.scale.tensor * scale

    def request(self) -> Request:
        module = self.module
        return Request(module.weight, module.gain, self.total_scale(), module.eps, module.eps_mode)

    def may_launch(self) -> bool:
        """Whether the weight may be standardized together with others."""
        is_transposed = isinstance(self.module, WSConvTransposeNd)
        return not is_transposed and may_launch(self.module.weight, self.module.gain, self.total_scale())

    def compute(self, launched: Tensor | None) -> None:
        """``launched``: the standardized weight, where it was computed together with others."""
        snapshot = Snapshot.of(*self.sources())
        self._keep(self.module._scaled_weight(self.total_scale()) if launched is None else launched, snapshot)
        self.sample = _sample(self.module.weight)

    def get(self, module: Any, output_scale: Scale | None) -> Tensor | None:
        if not self._ready():
            return None
        prepared = None if self.scale is None else self.scale.leaf
        if output_scale is prepared:
            return self.leaf
        if torch.compiler.is_compiling():
            return None
        return self._with_another_scale(output_scale)

    def _with_another_scale(self, output_scale: Scale | None) -> Tensor | None:
        if isinstance(output_scale, Tensor) and not (output_scale.is_leaf and output_scale.requires_grad):
            return None  # computed anew each time
        key = id(output_scale) if isinstance(output_scale, Tensor) else 1.0 if output_scale is None else output_scale
        other = self.others.get(key)
        if other is None:
            other = self.others[key] = _OtherScale(self, output_scale)
        return other.current()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from super().pairs()
        for other in self.others.values():
            yield other.tensor, other.leaf

    def forget(self) -> None:
        super().forget()
        self.others.clear()


class _OtherScale:
    """A layer's standardized weight times a constant, or times a leaf that may be learned."""

    def __init__(self, weight: _SharedWeight, output_scale: Scale | None):
        self._weight = weight
        leaves = (output_scale,) if isinstance(output_scale, Tensor) else ()
        self._snapshot = Snapshot.of(*leaves)
        with torch.inference_mode(False), torch.enable_grad():
            self.tensor = weight.module._scaled_weight(weight.module._whole_scale(output_scale))
            self.leaf = self.tensor.detach().requires_grad_(self.tensor.requires_grad)

    def current(self) -> Tensor:
        if not self._snapshot.is_current():
            raise RuntimeError(self._weight._changed())
        return self.leaf


def _sample(tensor: Tensor) -> Tensor:
    """A few elements from everywhere in a tensor."""
    tensor = tensor.detach()
    flat = (as_rows(tensor) if tensor.numel() and row_memory_is_dense(tensor) else tensor).flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()
