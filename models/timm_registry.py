"""Makes this package's ECA networks known to timm: `timm.create_model("eca_net_resnet50")`.

timm's own functions build them there, so its feature wrappers, data configurations and training
scripts work as with its own. timm is imported when `register` is called, and not needed otherwise.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .classifier import Classifier
from .weights import find_state_dict

__all__: list[str] = []  # timm adds the names of the functions that it registers

PREFIX = "eca_net_"

default_cfgs: dict[str, Any] = {}  # timm reads it in the module of a registered function


def register(constructors: Mapping[str, Callable[..., Classifier]]) -> list[str]:
    """Registers every ECA network; a second call changes nothing.

    Args:
        constructors: name → constructor, as `models.MODELS`. `eca_resnet50` becomes
            `eca_net_resnet50`; networks without ECA, which timm has under its own names, and second
            spellings are passed over.

    Returns:
        timm's names of them.

    Raises:
        ValueError: timm is not installed.
    """
    try:
        from timm.models import is_model, register_model
    except ImportError:
        raise ValueError("timm is not installed: pip install timm") from None
    names = []
    for name, constructor in constructors.items():
        if not name.startswith("eca_") or constructor.__name__ != name:
            continue
        names.append(PREFIX + name.removeprefix("eca_"))
        if not is_model(names[-1]):
            default_cfgs[names[-1]] = _configuration(name)
            register_model(_entry(names[-1], constructor))
    return names


def _configuration(name: str) -> dict[str, Any]:
    """What timm keeps of a network: its input, and the names of its first and last layer."""
    mobile = "mobilenet" in name
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "first_conv": "features.0.0" if mobile else "conv1",
        "classifier": "classifier.1" if mobile else "fc",
        "paper_ids": "arXiv:1910.03151",
    }


def _entry(name: str, constructor: Callable[..., Classifier]) -> Callable[..., nn.Module]:
    """The function that timm calls for `name`."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        if pretrained and not {"file", "url", "hf_hub_id", "state_dict"} & overlay.keys():
            raise ValueError(
                f"{name} has no weights to download: give a file, as in"
                " pretrained_cfg_overlay={'file': 'best.pth'}"
            )
        return build_model_with_cfg(
            _builder(name, constructor),
            name,
            pretrained,
            pretrained_filter_fn=lambda weights, network: find_state_dict(weights),
            feature_cfg={"flatten_sequential": constructor.__name__ == "eca_mobilenetv2"},
            **kwargs,
        )

    entry.__name__ = entry.__qualname__ = name
    return entry


def _builder(name: str, constructor: Callable[..., Classifier]) -> Callable[..., Classifier]:
    """A constructor that also takes the arguments which timm gives to every network."""

    def build(in_chans: int = 3, global_pool: str = "avg", **kwargs: Any) -> Classifier:
        if in_chans != 3:
            raise ValueError(f"{name} takes images of 3 channels, not in_chans={in_chans}")
        network = constructor(**kwargs)
        if global_pool != "avg":
            network.reset_classifier(network.num_classes, global_pool)
        return network

    return build
