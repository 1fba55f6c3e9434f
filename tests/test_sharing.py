import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normfree as nf
from normfree import sharing
from normfree.layers import standardized_weight

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Everything(nn.Module):
    """One layer of every kind, a scale of its own on one of them, and one layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nf.WSConv2d(3, 6, 3, padding=1, activation=None)
        self.twice = nf.WSConv2d(6, 6, 3, padding="same", groups=2, eps_mode="added")
        self.up = nf.WSConvTranspose2d(6, 4, 4, 2, 1)
        self.linear = nf.WSLinear(4, 5, activation="tanh")
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = torch.relu(self.twice(x, output_scale=self.scale) + self.twice(x, output_scale=self.scale * 0.5))
        x = torch.relu(self.twice(x, output_scale=0.3) + self.twice(x))
        return self.linear(torch.tanh(self.up(x)).mean((2, 3)))


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def network(name="nf_resnet26", **options):
    torch.manual_seed(0)
    if name == "everything":
        return randomised(Everything().double())
    return randomised(nf.create_model(name, num_classes=5, width=0.0625, **options).double())


def batches(count=3, dtype=torch.float64):
    torch.manual_seed(2)
    return [torch.randn(2, 3, 32, 32, dtype=dtype) for _ in range(count)]


def loss_of(model, batch):
    return model(batch).sin().sum()


def accumulate(model, count=3):
    for batch in batches(count):
        loss_of(model, batch).backward()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(found, expected, **tolerance):
    found, expected = gradients(found), gradients(expected)
    assert {n for n, g in found.items() if g is None} == {n for n, g in expected.items() if g is None}
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, **(tolerance or TIGHT), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf_resnet26", {}),
        ("nf_resnet26", {"eps_mode": "added", "gamma_placement": "weight", "padding": "same"}),
        ("nf_seresnet26", {"skip_gain": 0.0}),
        ("nf_regnet_b0", {"drop_rate": 0.0}),
        ("test_nfnet", {"stem_width": 8}),
        ("everything", {}),
    ],
    ids=str,
)
def test_gradients_are_those_of_plain_accumulation(name, options, zero):
    model = network(name, **options)
    plain = copy.deepcopy(model)
    if zero:
        for parameter in [*model.parameters(), *plain.parameters()]:
            parameter.grad = torch.ones_like(parameter)
    accumulate(plain)
    with nf.shared_standardization(model):
        accumulate(model)
    assert_same_gradients(model, plain)


def counted(monkeypatch):
    calls = []
    original = standardized_weight.standardize_weight
    monkeypatch.setattr(standardized_weight, "standardize_weight", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def test_every_weight_is_standardized_once(monkeypatch):
    calls = counted(monkeypatch)
    model = network()
    convs = sum(isinstance(module, nf.WSConv2d) for module in model.modules())
    with nf.shared_standardization(model) as shared:
        accumulate(model)
        assert len(calls) == convs
        shared.flush()
        assert len(calls) == convs
        accumulate(model)
        assert len(calls) == 2 * convs
    assert len(calls) == 2 * convs
    accumulate(model, 1)
    assert len(calls) == 3 * convs


def test_steps_inside_behind_a_flush():
    model = network()
    plain = copy.deepcopy(model)
    with nf.shared_standardization(model) as shared:
        for contender in (model, plain):
            optimizer = torch.optim.SGD(contender.parameters(), 0.01, momentum=0.9)
            for _ in range(3):
                accumulate(contender, 2)
                if contender is model:
                    shared.flush()
                optimizer.step()
                optimizer.zero_grad()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, **TIGHT)


def test_clipping_afterwards():
    model = network()
    plain = copy.deepcopy(model)
    with nf.shared_standardization(model):
        accumulate(model)
    accumulate(plain)
    for contender in (model, plain):
        nf.adaptive_gradient_clip_(contender, 0.01)
        torch.nn.utils.clip_grad_norm_(contender.parameters(), 0.1)
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    model = network()
    plain = copy.deepcopy(model)
    accumulate(plain)

    def through_checkpoints(x):
        x = model.stem(x)
        for block in model.residual_blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return model.forward_head(x)

    with nf.shared_standardization(model):
        for batch in batches():
            loss_of(through_checkpoints, batch).backward()
    assert_same_gradients(model, plain)


def test_autocast_and_gradient_scaling():
    model = network().float()
    plain = copy.deepcopy(model)
    updated = []
    for contender in (model, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(contender.parameters(), 0.01)
        shared = nf.shared_standardization(contender) if contender is model else torch.enable_grad()
        with shared:
            for batch in batches(dtype=torch.float32):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(contender, batch).float()
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.dtype == torch.float32 for p in contender.parameters())
        scaler.step(optimizer)
        scaler.update()
        updated.append(torch.cat([p.grad.flatten() for p in contender.parameters()]))
    assert torch.nn.functional.cosine_similarity(*updated, dim=0) > 0.999


def test_infinite_gradients_reach_the_scaler():
    model = network().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    with nf.shared_standardization(model):
        (scaler.scale(loss_of(model, batches(1, torch.float32)[0])) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_under_compile():
    torch._dynamo.reset()
    full = network()
    model = nn.Sequential(full.stem, full.stages[0])
    plain = copy.deepcopy(model)
    accumulate(plain)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    for _ in range(2):
        model.zero_grad()
        with nf.shared_standardization(model):
            accumulate(compiled)
        assert_same_gradients(model, plain)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1], "the next update compiles nothing anew"
    accumulate(compiled, 1)  # and outside
    accumulate(plain, 1)
    assert_same_gradients(model, plain)


def test_a_change_under_compile_is_an_error():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def change_inside():
        with nf.shared_standardization(model):
            accumulate(compiled, 1)
            with torch.no_grad():
                model.stem.conv.weight.mul_(1.1)

    with pytest.raises(RuntimeError, match=r"stem.conv: a parameter changed"):
        change_inside()


def test_an_exception_leaves_nothing_shared_and_loses_no_gradient():
    model = network()
    plain = copy.deepcopy(model)
    accumulate(plain, 2)

    def fail():
        with nf.shared_standardization(model):
            accumulate(model, 2)
            model(batches(1)[0])
            raise KeyError("of the caller")

    with pytest.raises(KeyError):
        fail()
    assert_same_gradients(model, plain)
    assert all(getattr(module, "_shared", None) is None for module in model.modules())
    with torch.no_grad():
        for part in (model, plain):
            part.stem.conv.weight.mul_(torch.linspace(-1, 1, 3)[:, None, None])
    torch.testing.assert_close(model(batches(1)[0]), plain(batches(1)[0]), **TIGHT)


def test_an_exception_and_a_change_inside():
    model = network()
    with pytest.raises(KeyError) as caught, nf.shared_standardization(model):  # noqa: PT012
        accumulate(model, 1)
        with torch.no_grad():
            model.stem.conv.weight.zero_()
        raise KeyError
    assert "stem.conv: a parameter changed" in caught.value.__notes__[0]


@pytest.mark.parametrize("frozen", ["weight", "gain", "skip_gain", "stem", "all but the classifier"])
def test_frozen_parameters(frozen):
    model = network()
    for name, parameter in model.named_parameters():
        if frozen == "all but the classifier":
            parameter.requires_grad_("classifier" in name)
        else:
            parameter.requires_grad_(frozen not in name)
    plain = copy.deepcopy(model)
    accumulate(plain)
    with nf.shared_standardization(model):
        accumulate(model)
    assert_same_gradients(model, plain)


def test_nested_contexts_take_back_at_the_outer_ones_end():
    model = network()
    plain = copy.deepcopy(model)
    accumulate(plain)
    accumulate(plain)
    with nf.shared_standardization(model) as outer:
        accumulate(model)
        with outer, nf.shared_standardization(model.stages[1]), nf.shared_standardization(model):
            accumulate(model)
        assert model.stem.conv.weight.grad is None
    assert_same_gradients(model, plain)


def test_a_part_first_and_then_the_whole():
    model = network()
    plain = copy.deepcopy(model)
    accumulate(plain)
    with nf.shared_standardization(model.stages[1]):
        with nf.shared_standardization(model):
            accumulate(model)
        assert model.stem.conv.weight.grad is not None
    assert_same_gradients(model, plain)


CHANGES = {
    "in place": lambda model: model.stages[0][0].conv1.weight.mul_(1.5),
    "gain": lambda model: model.stages[0][0].conv1.gain.add_(0.5),
    "skip gain": lambda model: model.stages[0][0].skip_gain.add_(0.5),
    "new memory": lambda model: setattr(model.stages[0][0].conv1.weight, "data", torch.ones(4, 4, 3, 3).double()),
    "state dict": lambda model: model.load_state_dict(network(alpha=0.3).state_dict()),
    "dtype": lambda model: model.float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside_is_an_error_at_the_next_pass_and_on_leaving(change):
    model = network()
    with pytest.raises(RuntimeError, match=r"a parameter changed inside shared_standardization"):  # noqa: PT012, SIM117
        with nf.shared_standardization(model):
            accumulate(model, 1)
            with torch.no_grad():
                CHANGES[change](model)
            loss_of(model, batches(1, next(model.parameters()).dtype)[0])
    model = network()
    with pytest.raises(RuntimeError, match=r"a parameter changed inside shared_standardization"):  # noqa: PT012, SIM117
        with nf.shared_standardization(model):
            accumulate(model, 1)
            with torch.no_grad():
                CHANGES[change](model)


def test_a_change_through_data_is_seen_on_leaving():
    model = network()
    with pytest.raises(RuntimeError, match=r"a parameter changed"), nf.shared_standardization(model):  # noqa: PT012
        accumulate(model, 1)
        for parameter in model.parameters():
            parameter.data.mul_(0.9)


def test_an_optimiser_step_without_flush_is_an_error():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=r"while gradients .* were waiting"), nf.shared_standardization(model):  # noqa: PT012
        accumulate(model, 1)
        optimizer.step()


def test_another_parameter_in_place_of_one_is_used_at_once():
    model = network()
    other = network(alpha=0.3)
    batch = batches(1)[0]
    with nf.shared_standardization(model):
        model(batch)
        model.load_state_dict(other.state_dict(), assign=True)
        model.alpha = 0.3
        expected = copy.deepcopy(model)
        torch.testing.assert_close(model(batch), expected(batch), **TIGHT)


def test_other_parameters_and_per_example_gradients_inside():
    model = network()
    other = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    batch = batches(1)[0]
    expected = torch.func.functional_call(model, other, (batch,))

    def loss(parameters, example):
        return torch.func.functional_call(model, parameters, (example.unsqueeze(0),)).sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))
    expected_gradients = per_example(other, batch)
    with nf.shared_standardization(model):
        torch.testing.assert_close(torch.func.functional_call(model, other, (batch,)), expected, **TIGHT)
        torch.testing.assert_close(per_example(other, batch), expected_gradients, **TIGHT)


def test_copies_made_inside_stand_alone():
    model = network()
    batch = batches(1)[0]
    with nf.shared_standardization(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        expected = model(batch)
        for part in copies:
            torch.testing.assert_close(part(batch), expected, **TIGHT)
            with torch.no_grad():
                part.stem.conv.gain.zero_()
            assert not torch.equal(part(batch), expected)


def test_evaluation_and_no_grad_inside():
    model = network()
    expected = copy.deepcopy(model)
    batch = batches(1)[0]
    with nf.shared_standardization(model), torch.no_grad():
        torch.testing.assert_close(model(batch), expected(batch), **TIGHT)
        with torch.inference_mode():
            torch.testing.assert_close(model.eval()(batch), expected.eval()(batch), **TIGHT)


def test_entered_without_gradients():
    model = network()
    plain = copy.deepcopy(model)
    accumulate(plain, 1)
    with torch.no_grad(), nf.shared_standardization(model), torch.enable_grad():
        accumulate(model, 1)
    assert_same_gradients(model, plain)


def test_a_model_without_standardized_layers():
    model = nn.Linear(3, 2)
    with nf.shared_standardization(model) as shared:
        model(torch.ones(1, 3)).sum().backward()
        shared.flush()
    assert model.weight.grad is not None


def test_channels_last():
    model = network().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    accumulate(plain)
    with nf.shared_standardization(model):
        accumulate(model)
        leaf = model.stages[0][0].conv1._shared.leaf
        assert leaf.is_contiguous(memory_format=torch.channels_last)
    assert_same_gradients(model, plain)


MODES = {"synchronised": (True, True, True), "no_sync": (False, False, True), "mixed": (True, False, True)}


def distributed_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for mode in MODES:
        check_distributed(rank, mode)
    for option in ("find_unused_parameters", "static_graph"):
        with pytest.raises(ValueError, match=option):
            nf.shared_standardization(DistributedDataParallel(network(), **{option: True}))
    dist.barrier()
    dist.destroy_process_group()


def check_distributed(rank, mode):
    model = network("nf_seresnet26" if mode == "mixed" else "nf_resnet26")
    plain = DistributedDataParallel(copy.deepcopy(model))
    wrapped = DistributedDataParallel(model)
    mine = [batch[rank : rank + 1] for batch in batches(3)]

    def passes(contender):
        for batch, is_synchronised in zip(mine, MODES[mode], strict=True):
            if is_synchronised:
                loss_of(contender, batch).backward()
            else:
                with contender.no_sync():
                    loss_of(contender, batch).backward()

    for _ in range(2):
        passes(plain)
        with nf.shared_standardization(wrapped):
            passes(wrapped)
        assert_same_gradients(wrapped, plain)
    if mode == "no_sync":  # the inner module will do where one pass alone is synchronised
        with nf.shared_standardization(model):
            passes(wrapped)
        passes(plain)
        assert_same_gradients(wrapped, plain)
    for parameter in model.parameters():
        both = [torch.empty_like(parameter.grad) for _ in range(2)]
        dist.all_gather(both, parameter.grad)
        torch.testing.assert_close(*both, **TIGHT)


def test_distributed_data_parallel(tmp_path):
    mp.spawn(distributed_worker, (str(tmp_path),), nprocs=2)


def test_the_sample_reaches_all_of_a_tensor():
    tensor = torch.arange(1000.0).reshape(10, 100)
    for layout in (tensor, tensor.t().contiguous().t()):
        sample = sharing._sample(layout)
        assert sample.min() == 0
        assert sample.max() > 980
