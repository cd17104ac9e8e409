"""The networks, by name. A name that ends in `mobilenet_v2` is another spelling of the same."""

from .classifier import Classifier, FeatureMaps, set_drop_path
from .eca_mobilenetv2 import MobileNetV2
from .eca_module import ECALayer, adaptive_kernel_size, parse_ksize
from .eca_resnet import ResNet
from .fused.block_tail import describe_tails, set_fused, why_not_triton
from .inference import optimise_for_inference
from .insertion import Insertion, add_attention, add_eca
from .inspection import freeze, layer_scales
from .pretrained import from_pretrained
from .registry import MODELS, create_model, list_models
from .timm_registry import register_with_timm

__version__ = "1.0.0"  # of this repository: args.json and the checkpoints of each run record it
__all__ = [
    "MODELS",
    "Classifier",
    "ECALayer",
    "FeatureMaps",
    "Insertion",
    "MobileNetV2",
    "ResNet",
    "adaptive_kernel_size",
    "add_attention",
    "add_eca",
    "create_model",
    "describe_tails",
    "freeze",
    "from_pretrained",
    "layer_scales",
    "list_models",
    "optimise_for_inference",
    "parse_ksize",
    "register_with_timm",
    "set_drop_path",
    "set_fused",
    "why_not_triton",
]


def __dir__() -> list[str]:
    """What `dir(models)` and tab completion show: the public names alone."""
    return sorted(__all__)
