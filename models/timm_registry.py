"""Makes this package's ECA networks known to timm: `timm.create_model("eca_net_resnet50")`.

timm's own functions build them there, so its feature wrappers, data configurations and training
scripts work as with its own. timm is imported when it is used, and not needed otherwise.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .classifier import Classifier, set_drop_path
from .registry import MODELS
from .weights import find_state_dict

__all__: list[str] = []  # timm adds the names of the functions that it registers

PREFIX = "eca_net_"

default_cfgs: dict[str, Any] = {}  # timm reads it in the module of a registered function


def register_with_timm(
    constructors: Mapping[str, Callable[..., Classifier]] = MODELS,
) -> list[str]:
    """Registers every ECA network; a second call changes nothing.

    Args:
        constructors: name → constructor; all networks unless told. `eca_resnet50` becomes
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
    """Wraps a constructor to take the arguments that timm and its scripts give every network."""
    own = inspect.signature(constructor).parameters

    def build(
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> Classifier:
        if in_chans != 3:
            raise ValueError(f"{name} takes images of 3 channels, not in_chans={in_chans}")
        if output_stride != 32:
            raise ValueError(f"{name} has output_stride=32 alone, not {output_stride}")
        if drop_block_rate:
            raise ValueError(
                f"{name} has no DropBlock: leave drop_block_rate={drop_block_rate} out"
            )
        if foreign := kwargs.keys() - own.keys():
            raise ValueError(f"{name} takes no {', '.join(sorted(foreign))}: leave it out")
        network = constructor(**kwargs)
        if drop_rate is not None:
            _set_dropout(name, network, drop_rate)
        set_drop_path(network, drop_path_rate)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = module.momentum if bn_momentum is None else bn_momentum
                module.eps = module.eps if bn_eps is None else bn_eps
        if global_pool != "avg":
            network.reset_classifier(network.num_classes, global_pool)
        return network.to(device=device, dtype=dtype)

    return build


def _set_dropout(name: str, network: Classifier, rate: float) -> None:
    """Gives the last layer's dropout its rate; a ResNet, which has none, takes 0 alone."""
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    if rate and not layers:
        raise ValueError(
            f"{name} has no dropout: leave drop_rate={rate} out, or use drop_path_rate"
        )
    for layer in layers:
        layer.p = nn.Dropout(rate).p  # which refuses what is no probability
