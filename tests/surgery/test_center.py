"""Centred networks have channel means of zero on the data that they were centred on."""

import pytest
import torch
from torch import nn

import normfree as nf

torch.set_num_threads(1)
OURS = (nf.WSConv1d, nf.WSConv2d, nf.WSConvTranspose2d, nf.WSLinear)


def photographs(count=16, size=32, seed=0):
    """Smooth images, brighter in the middle: neighbouring pixels are alike, and channels are not centred."""
    noise = torch.randn(count, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=size, mode="bilinear") + 1.0


def largest_means(model, x):
    """Of every layer of ours, the largest channel mean of its output, without ``output_scale``, by plain torch."""
    found = {}

    def watch(path, axis):
        def hook(module, args, kwargs, output):
            plain = module.forward(*args)
            found[path] = plain.transpose(0, axis).flatten(1).mean(1).abs().max().item()

        return hook

    handles = [
        module.register_forward_hook(watch(path, -1 if isinstance(module, nn.Linear) else 1), with_kwargs=True)
        for path, module in model.named_modules()
        if isinstance(module, OURS)
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_regnet_b0", "nf_seresnet26"])
def test_means_are_zero(name):
    torch.manual_seed(0)
    options = {} if "regnet" in name else {"width": 0.125}
    model = nf.create_model(name, num_classes=5, **options).double()
    x = photographs(8, 64).double()
    before = largest_means(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    centred = nf.center(model, x)
    after = largest_means(centred, x)
    assert max(after.values()) < 1e-12
    assert sum(before.values()) / len(before) > 0.05
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    changed = {key for key, value in centred.state_dict().items() if not torch.equal(value, state[key])}
    assert changed
    assert all(key.endswith("bias") for key in changed)


class Odd(nn.Module):
    """Layers of every kind, one with a scale of zero behind it and one without a bias."""

    def __init__(self):
        super().__init__()
        self.up = nf.WSConvTranspose2d(3, 4, 4, 2, 1)
        self.off = nf.WSConv2d(4, 4, 3, padding=1)
        self.bare = nf.WSConv2d(4, 4, 1, bias=False)
        self.line = nf.WSConv1d(4, 6, 3)
        self.head = nf.WSLinear(6, 5)

    def forward(self, x):
        x = torch.relu(self.up(x))
        x = self.bare(x + self.off(x, output_scale=torch.zeros(())))
        return self.head(torch.relu(self.line(x.flatten(2))).transpose(1, 2))


def test_layers_of_every_kind():
    torch.manual_seed(0)
    model = nf.center(Odd().double(), photographs(4, 8).double())
    found = largest_means(model, photographs(4, 8).double())
    assert found.pop("bare") > 1e-3
    assert max(found.values()) < 1e-12


def test_batches_come_close_to_one():
    torch.manual_seed(0)
    model = nf.create_model("nf_resnet26", num_classes=3, width=0.125).double()
    batches = [photographs(seed=seed).double() for seed in range(4)]
    together = torch.cat(batches)
    before, streamed = largest_means(model, together), largest_means(nf.center(model, iter(batches)), together)
    assert sum(streamed.values()) < 0.3 * sum(before.values())
    first = nf.center(model, batches, max_batches=1)
    torch.testing.assert_close(first.state_dict(), nf.center(model, batches[0]).state_dict())


def test_bad_input():
    with pytest.raises(ValueError, match="no layer of normfree"):
        nf.center(nn.Conv2d(3, 4, 3), photographs())
    with pytest.raises(ValueError, match=r"inputs|batch"):
        nf.center(nf.create_model("nf_resnet26", width=0.125), [])
