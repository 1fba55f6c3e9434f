import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.padding import MaxPool2dSame, as_pad_argument, same_padding


def tensorflow_same(length, taps, step, spread):
    """The formula in TensorFlow's documentation, on the dilated extent of the kernel."""
    extent = (taps - 1) * spread + 1
    total = max(extent - step, 0) if length % step == 0 else max(extent - length % step, 0)
    return total // 2, total - total // 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_same_padding_is_tensorflows(length, taps, step, spread):
    assert same_padding([length], [taps], [step], [spread]) == [tensorflow_same(length, taps, step, spread)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_same_padding_gives_the_promised_size(length, taps, step, spread):
    [(before, after)] = same_padding([length], [taps], [step], [spread])
    assert after - before in (0, 1)
    padded = F.pad(torch.zeros(1, 1, length), (before, after))
    output = F.conv1d(padded, torch.zeros(1, 1, taps), stride=step, dilation=spread)
    assert output.shape[-1] == math.ceil(length / step)


def test_pad_argument_is_in_torchs_order():
    padded = F.pad(torch.zeros(1, 1, 5, 6), as_pad_argument([(1, 2), (3, 4)]))
    assert padded.shape == (1, 1, 5 + 3, 6 + 7)


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (7, 10), (1, 1), (2, 3)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (3, 1), (2, 3)])
def test_max_pool_against_a_loop(size, kernel, stride):
    x = torch.randn(2, 3, *size) - 5.0
    output = MaxPool2dSame(kernel, stride)(x)
    rows, columns = (math.ceil(length / stride) for length in size)
    assert output.shape == (2, 3, rows, columns)
    starts = [tensorflow_same(length, kernel, stride, 1)[0] for length in size]
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride - starts[0], column * stride - starts[1]
            window = x[:, :, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
            torch.testing.assert_close(output[:, :, row, column], window.amax(dim=(2, 3)))
