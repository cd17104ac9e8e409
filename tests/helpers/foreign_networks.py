"""Small networks of torchvision and timm, of every kind that `add_eca` knows."""

from functools import partial

import timm
import torchvision

tv = partial(partial, torchvision.models.get_model, weights=None, num_classes=7)
tm = partial(partial, timm.create_model, num_classes=7)

# network → (how to build it, ECA layers, of which in place of squeeze-and-excitation)
NETWORKS = {
    "torchvision resnet18": (tv("resnet18"), 8, 0),
    "torchvision resnext50_32x4d": (tv("resnext50_32x4d"), 16, 0),
    "torchvision regnet_x_400mf": (tv("regnet_x_400mf"), 22, 0),
    "torchvision regnet_y_400mf": (tv("regnet_y_400mf"), 16, 16),
    "torchvision mobilenet_v2": (tv("mobilenet_v2"), 17, 0),
    "torchvision mobilenet_v3_small": (tv("mobilenet_v3_small"), 11, 9),
    "torchvision efficientnet_b0": (tv("efficientnet_b0"), 16, 16),
    "torchvision convnext_tiny": (tv("convnext_tiny"), 18, 0),
    "timm resnet10t": (tm("resnet10t"), 4, 0),
    "timm seresnet18": (tm("seresnet18"), 8, 8),
    "timm resnext26ts": (tm("resnet26", cardinality=32, base_width=4), 8, 0),
    "timm regnetx_002": (tm("regnetx_002"), 13, 0),
    "timm mobilenetv2_050": (tm("mobilenetv2_050"), 17, 0),
    "timm mobilenetv3_small_050": (tm("mobilenetv3_small_050"), 11, 9),
    "timm efficientnet_b0": (tm("efficientnet_b0"), 16, 16),
    "timm tf_efficientnetv2_s": (tm("tf_efficientnetv2_s", channel_multiplier=0.25), 40, 30),
    "timm tf_efficientnetv2_b0": (tm("tf_efficientnetv2_b0"), 20, 16),
    "timm gernet_s": (tm("gernet_s"), 14, 0),
    "timm convnext_atto": (tm("convnext_atto"), 12, 0),
}
