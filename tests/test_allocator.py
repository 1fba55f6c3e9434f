"""Memory that is freed and taken again in every pass, seen by the pages that the system has to give anew."""

import os
import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, torch, normfree as nf

def work():
    pieces = [torch.ones(1 << 20) for _ in range(12)]

{first}
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
LAYER = "layer = nf.WSConv2d(2, 2, 3); images = torch.ones(1, 2, 4, 4)"


def new_pages(first):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC", "GLIBC"))}
    command = [sys.executable, "-c", PAGES.format(first=first)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has such a threshold")
@pytest.mark.parametrize("first", ["layer(images)", "with nf.shared_standardization(layer): layer(images)"])
def test_memory_that_training_frees_is_kept(first):
    # 48 MiB are freed at a time and are 61 280 pages in all where they are given back, which they mostly are without
    # the layer: something small may happen to lie at the end and hold them, so there are three tries
    assert max(new_pages(f"{LAYER}\n{first}") for _ in range(3)) < 100
