"""The list of docs/ECA_ANYWHERE.md: classifiers of timm and torchvision with ECA put in, and those
that are refused. On `meta`, forward, at the size that the library names.
"""

import re

import pytest
import torch
from helpers.trees import ROOT

import models
from models.registry import check_forward, image_settings

pytest.importorskip("timm")
PAGE = (ROOT / "docs" / "ECA_ANYWHERE.md").read_text(encoding="utf-8")


def listed(library: str) -> list[str]:
    """The names of the page's line on a library."""
    (line,) = re.findall(rf"^- {library}: (.*?)\.$", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(r"`([\w.]+)`", line)


WITH_ECA = [f"{library}:{n}" for library in ("timm", "torchvision") for n in listed(library)]


def test_the_list_is_long_enough():
    counts = [sum(arch.startswith(each) for arch in WITH_ECA) for each in ("timm:", "torchvision:")]
    assert len(set(WITH_ECA)) == len(WITH_ECA)
    assert counts[0] >= 40
    assert counts[1] >= 24


@pytest.mark.slow
@pytest.mark.parametrize("arch", WITH_ECA)
def test_eca_is_put_in_and_makes_logits(arch):
    with torch.device("meta"):
        network = models.create_model(arch, num_classes=7, attention="eca")
        assert len(network.insertions) > 3
        network.train()
        check_forward(network, [image_settings(arch)["img_size"]])


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_what_is_listed_as_refused_is(library):
    for name in listed(f"{library}, refused"):
        with pytest.raises(ValueError, match=f"{library}:{name}.*ECA"), torch.device("meta"):
            models.create_model(f"{library}:{name}", num_classes=7, attention="eca")
        with torch.device("meta"):
            plain = models.create_model(f"{library}:{name}", num_classes=7)
            check_forward(plain, [image_settings(f"{library}:{name}")["img_size"]])
