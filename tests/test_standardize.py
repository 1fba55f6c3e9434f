import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import normfree as nf
from normfree._torchvision import import_timm
from normfree.standardize import standardize_transposed_weight
from normfree.standardize.formula import composed

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5).filter(lambda shape: math.prod(shape[1:]) > 1)


def float64(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_standardize(weight, gain=None, scale=1.0, eps=1e-4):
    """One output unit at a time, in plain Python numbers."""
    result = torch.empty_like(weight)
    for unit, row in enumerate(weight):
        values = row.flatten().tolist()
        count, mean = len(values), math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / count
        factor = scale * (1.0 if gain is None else float(gain[unit])) / math.sqrt(max(count * variance, eps))
        result[unit] = (row - mean) * factor
    return result


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0.1, 10), st.integers(0, 1000))
def test_row_sums_and_squares(shape, scale, seed):
    weight = 3.0 * float64(*shape, seed=seed) + 1.0
    gain = float64(shape[0], seed=seed + 1)
    result = nf.standardize_weight(weight, gain, scale, eps=1e-12)
    assert result.shape == weight.shape
    rows = result.flatten(1)
    torch.testing.assert_close(rows.sum(1), torch.zeros(shape[0], dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(rows.square().sum(1), (gain * scale).square(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("shape", [(4, 7), (3, 2, 5), (5, 3, 3, 3), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("eps", [1e-4, 0.5, 1e3])
def test_against_a_loop(shape, eps):
    weight, gain = 0.3 * float64(*shape), float64(shape[0], seed=1)
    torch.testing.assert_close(
        nf.standardize_weight(weight, gain, 1.7, eps), loop_standardize(weight, gain, 1.7, eps), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(nf.standardize_weight(weight), loop_standardize(weight), rtol=1e-12, atol=1e-14)


def test_scale_may_be_a_tensor_and_gain_may_have_trailing_axes():
    weight, gain = float64(4, 3, 2, 2), float64(4, seed=1)
    expected = nf.standardize_weight(weight, gain, 0.5)
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        torch.testing.assert_close(nf.standardize_weight(weight, gain.reshape(4, 1, 1, 1), scale), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e3])
def test_constant_rows_are_finite_with_finite_gradients(dtype, value):
    weight = torch.full((3, 4), value, dtype=dtype, requires_grad=True)
    result = nf.standardize_weight(weight)
    assert result.abs().max() < 1e-1
    (gradient,) = torch.autograd.grad(result.square().sum() + result.sum(), weight)
    assert gradient.isfinite().all()


def test_gradients_by_finite_differences():
    weight = float64(3, 2, 2, 2).requires_grad_()
    gain, scale = float64(3, seed=1).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(nf.standardize_weight, (weight, gain, scale))
    assert torch.autograd.gradgradcheck(nf.standardize_weight, (weight, gain, scale))


def test_gradient_where_eps_bounds_the_variance():
    weight = (1e-4 * float64(3, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: nf.standardize_weight(w, eps=0.1), (weight,))


def test_transposed_gradients_by_finite_differences():
    weight, gain = float64(4, 2, 3, 2).requires_grad_(), float64(4, seed=1).requires_grad_()

    def function(weight, gain):
        return standardize_transposed_weight(weight, gain, 1.3, groups=2, stride=(2, 1), dilation=(1, 2))

    assert torch.autograd.gradcheck(function, (weight, gain))
    assert torch.autograd.gradgradcheck(function, (weight, gain))


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (4, 1, 5, 5), (8, 16, 1, 1)])
def test_against_timm(shape):
    import_timm()
    from timm.layers import ScaledStdConv2d

    out, per_group, kernel, _ = shape
    groups = 4 if per_group == 1 else 1
    theirs = ScaledStdConv2d(per_group * groups, out, kernel, groups=groups, gamma=1.7, eps=1e-24).double()
    with torch.no_grad():
        theirs.weight.copy_(float64(*shape))
        theirs.gain.copy_(float64(out, seed=1).reshape(out, 1, 1, 1))
    x = float64(2, per_group * groups, 9, 9, seed=2)
    weight = nf.standardize_weight(theirs.weight, theirs.gain.flatten(), 1.7)
    ours = F.conv2d(x, weight, theirs.bias, padding=theirs.padding, groups=groups)
    torch.testing.assert_close(ours, theirs(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_standardized_in_float32(dtype):
    weight, gain = (20.0 + torch.randn(4, 256)).to(dtype), torch.rand(4).to(dtype)
    result = nf.standardize_weight(weight, gain, 1.7)
    assert result.dtype == dtype
    exact = loop_standardize(weight.double(), gain.double(), 1.7)
    assert torch.equal(result, exact.to(dtype)) or (result.double() - exact).abs().max() < 2 * torch.finfo(dtype).eps


def test_meta_device():
    assert nf.standardize_weight(torch.empty(4, 3, 3, 3, device="meta")).shape == (4, 3, 3, 3)
    transposed = standardize_transposed_weight(torch.empty(4, 3, 3, 3, device="meta"), stride=(2, 2))
    assert transposed.device.type == "meta"
    assert transposed.shape == (4, 3, 3, 3)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"weight: expected \(out, \*fan_in\) .* got shape \(3,\)"):
        nf.standardize_weight(torch.randn(3))
    with pytest.raises(ValueError, match=r"gain: expected one element for each of 4 output units, got shape \(3,\)"):
        nf.standardize_weight(torch.randn(4, 2), torch.ones(3))
    with pytest.raises(ValueError, match=r"weight: .* divisible by groups=3, got shape \(4, 2, 3\)"):
        standardize_transposed_weight(torch.randn(4, 2, 3), groups=3)
    with pytest.raises(ValueError, match=r"gain: expected one element for each of 4 output units"):
        standardize_transposed_weight(torch.randn(4, 2, 3), torch.ones(2), groups=2)


def loop_standardize_transposed(weight, gain, scale, eps, groups, stride, dilation):
    """Groups the weights by the output phase that they reach, one weight at a time."""
    units = {}
    per_group, per_group_in = weight.shape[1], weight.shape[0] // groups
    for index in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape)).tolist():
        channel = index[0] // per_group_in * per_group + index[1]
        phase = tuple(tap * d % s for tap, d, s in zip(index[2:], dilation, stride, strict=True))
        units.setdefault((channel, phase), []).append(tuple(index))
    result = torch.empty_like(weight)
    for (channel, _), indices in units.items():
        values = [float(weight[index]) for index in indices]
        mean = math.fsum(values) / len(values)
        factor = scale * float(gain[channel]) / math.sqrt(max(math.fsum((v - mean) ** 2 for v in values), eps))
        for index, value in zip(indices, values, strict=True):
            result[index] = (value - mean) * factor
    return result


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_transposed_against_a_loop(groups, per_group_in, per_group_out, axes, seed):
    kernel, stride, dilation = zip(*axes, strict=True)
    weight = float64(groups * per_group_in, per_group_out, *kernel, seed=seed)
    gain = float64(groups * per_group_out, seed=seed + 1)
    result = standardize_transposed_weight(weight, gain, 1.3, 1e-4, groups, stride, dilation)
    expected = loop_standardize_transposed(weight, gain, 1.3, 1e-4, groups, stride, dilation)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 2, 3)])
def test_transposed_at_stride_one_is_the_simple_formula(kernel):
    weight, gain = float64(6, 4, *kernel), float64(4, seed=1)
    expected = nf.standardize_weight(weight.transpose(0, 1), gain, 1.7).transpose(0, 1)
    torch.testing.assert_close(standardize_transposed_weight(weight, gain, 1.7), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"),
    [(4, 2, 1, 1), (3, 2, 1, 1), (6, 3, 1, 1), (5, 3, 1, 2), (3, 2, 2, 1), (3, 3, 2, 2), (3, 1, 2, 4), (4, 2, 3, 2)],
)
def test_transposed_output_has_mean_zero_and_variance_one_in_every_phase(kernel, stride, dilation, groups):
    torch.manual_seed(0)
    layer = nf.WSConvTranspose2d(64, 8, kernel, stride, dilation=dilation, groups=groups, activation="relu").double()
    x = torch.relu(torch.randn(64, 64, 14, 14, dtype=torch.float64))
    with torch.no_grad():
        output = layer(x)
    margin = dilation * (kernel - 1) // stride * stride  # positions that every tap of their phase reaches
    output = output[..., margin : output.shape[-2] - margin, margin : output.shape[-1] - margin]
    silent = 0
    for row in range(stride):
        for column in range(stride):
            phase = output[..., row::stride, column::stride]
            if phase.abs().max() == 0:
                silent += 1
                continue
            channels = phase.transpose(0, 1).flatten(1)
            assert (channels.mean(1).abs() < 0.12).all()
            assert channels.var(1).mean() == pytest.approx(1.0, abs=0.1)
    reached = {tap * dilation % stride for tap in range(kernel)}
    assert stride**2 - silent == len(reached) ** 2


def test_transposed_is_standardized_in_full_precision_under_autocast():
    layer = nf.WSConvTranspose2d(16, 4, 4, 2)
    with torch.no_grad():
        layer.weight.add_(3.0)
    expected = layer.effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.effective_weight(), expected, rtol=1e-6, atol=1e-6)


def test_vmap_over_many_weights():
    weights, gains = float64(5, 4, 3, 3), float64(5, 4, seed=1)
    many = torch.func.vmap(nf.standardize_weight)(weights, gains)
    each = torch.stack([nf.standardize_weight(w, g) for w, g in zip(weights, gains, strict=True)])
    torch.testing.assert_close(many, each)

    def transposed(weight, gain):
        return standardize_transposed_weight(weight, gain, groups=2, stride=(2,))

    weights, gains = float64(5, 4, 2, 3), float64(5, 4, seed=1)
    many = torch.func.vmap(transposed)(weights, gains)
    each = torch.stack([transposed(w, g) for w, g in zip(weights, gains, strict=True)])
    torch.testing.assert_close(many, each)


@pytest.mark.parametrize("eps_mode", ["floor", "added"])
@pytest.mark.parametrize("eps", [1e-12, 1e-4, 1.0, 30.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "channels_last_3d"])
def test_the_fused_version_is_the_formula(layout, eps, eps_mode):
    shape = (6, 4, 2, 3, 2) if layout == "channels_last_3d" else (6, 4, 3, 2)
    weight = float64(*shape) * torch.linspace(0.02, 1, 6, dtype=torch.float64).reshape(6, *(1,) * (len(shape) - 1))
    if layout.startswith("channels_last"):
        weight = weight.to(memory_format=getattr(torch, layout))
    elif layout == "transposed":
        weight = weight.transpose(2, 3).contiguous().transpose(2, 3)
    weight.requires_grad_()
    gain, scale = float64(6, seed=1).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    wanted = (weight, gain, scale)
    found = nf.standardize_weight(weight, gain, scale, eps, eps_mode)
    expected = composed(weight, gain, scale, eps, eps_mode)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    if layout.startswith("channels_last"):
        assert found.stride() == weight.stride()
    upstream = float64(*shape, seed=2)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
        rtol=1e-10,
        atol=1e-11,
    )
    for part in wanted:  # each alone
        others = [p.detach() for p in wanted]
        others[next(i for i, p in enumerate(wanted) if p is part)] = part
        results = [rule(*others, eps, eps_mode) for rule in (nf.standardize_weight, composed)]
        gradients = [torch.autograd.grad(result, part, upstream)[0] for result in results]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


UPSTREAM = {
    "expanded": lambda gradient: gradient[:1, :1].expand_as(gradient),
    "one number": lambda gradient: gradient.flatten()[0].expand_as(gradient),
    "transposed": lambda gradient: gradient.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda gradient: gradient.contiguous(memory_format=torch.channels_last),
    "part of another": lambda gradient: torch.cat([gradient, gradient], dim=3)[..., : gradient.shape[3]],
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_gradients_may_come_in_any_layout(upstream, layout):
    weight, gain = float64(6, 4, 3, 2).to(memory_format=layout).requires_grad_(), float64(6, seed=1).requires_grad_()
    gradient = UPSTREAM[upstream](float64(6, 4, 3, 2, seed=2))
    before = gradient.clone()
    found, expected = (
        torch.autograd.grad(rule(weight, gain, 1.7, 1e-4, "floor"), (weight, gain), gradient)
        for rule in (nf.standardize_weight, composed)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("shape", [(8, 1000), (64, 64, 3, 3)])
@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0])
def test_the_fused_version_is_as_exact_as_the_formula_in_single_precision(offset, shape):
    torch.manual_seed(1)
    weight, upstream = torch.randn(*shape) + offset, torch.randn(*shape)

    def both(rule, dtype):
        leaf = weight.to(dtype).requires_grad_()
        result = rule(leaf, None, 1.7, 1e-4, "floor")
        return result, torch.autograd.grad(result, leaf, upstream.to(dtype))[0]

    exact = both(composed, torch.float64)
    for found, formula, truth in zip(
        both(nf.standardize_weight, torch.float32), both(composed, torch.float32), exact, strict=True
    ):
        allowed = 3.0 * (formula - truth).abs().max() + 4e-7 * (1.0 + offset) * truth.abs().max()
        assert (found - truth).abs().max() < allowed


def test_without_gain_and_under_a_learned_scale():
    weight, scale = float64(4, 9).requires_grad_(), torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    found = nf.standardize_weight(weight, None, scale)
    expected = composed(weight, None, scale, 1e-4, "floor")
    upstream = float64(4, 9, seed=2)
    torch.testing.assert_close(
        torch.autograd.grad(found, (weight, scale), upstream), torch.autograd.grad(expected, (weight, scale), upstream)
    )


@pytest.mark.parametrize(
    "shape", [(6, 4, 1, 1), (6, 1, 3, 3), (1, 4, 3, 3), (6, 1, 1, 2), (6, 4, 1, 3), (6, 4, 1, 1, 1)]
)
def test_channels_last_of_axes_with_one_element(shape):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    weight, upstream = float64(*shape), float64(*shape, seed=2)
    results = []
    for leaf in (weight.clone(), weight.to(memory_format=layout), weight.contiguous().to(memory_format=layout)):
        result = nf.standardize_weight(leaf.requires_grad_(), None, 1.7)
        results.append((result, *torch.autograd.grad(result, leaf, upstream)))
    torch.testing.assert_close(results[0][0], loop_standardize(weight, None, 1.7), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=1e-14)


def test_a_gain_of_zero_still_learns():
    weight, gain = float64(4, 9).requires_grad_(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    nf.standardize_weight(weight, gain).backward(float64(4, 9, seed=2))
    assert gain.grad.abs().min() > 0
    assert not weight.grad.any()


def test_nothing_of_the_size_of_the_weight_is_saved_but_the_weight():
    weight, gain = torch.randn(8, 16, requires_grad=True), torch.ones(8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nf.standardize_weight(weight, gain, 1.7)
    large = [tensor for tensor in saved if tensor.numel() >= weight.numel()]
    assert [tensor.data_ptr() for tensor in large] == [weight.data_ptr()]


def test_forward_mode_derivatives():
    weight, tangent = float64(3, 7), float64(3, 7, seed=1)
    _, found = torch.func.jvp(nf.standardize_weight, (weight,), (tangent,))
    step = 1e-6
    expected = (nf.standardize_weight(weight + step * tangent) - nf.standardize_weight(weight - step * tangent)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        found = torch.autograd.forward_ad.unpack_dual(nf.standardize_weight(dual)).tangent
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
