"""Lists parameters, FLOPs and accuracies that others printed, as they printed them.

M and G are 2^20 and 2^30 in the ImageNet tables (1000 classes), 10^6 and 10^9 in the COCO table
(80 classes and, but for RetinaNet, background).
"""

from dataclasses import dataclass

PAPER = "ECA-Net, CVPR 2020, arXiv 1910.03151"
AUTHORS = "the README of the authors' released code"
IMAGENET_SIZE = (224, 224)  # height and width of the image that FLOPs are given for
COCO_SIZE = (800, 1280)
# Remarks on figures that differ from ours.
CUT_OFF = "the printed figure is cut off after two decimals, ours is rounded"
ROUNDED_UP = (
    "plain ResNet-152 has 57.404M and ECA adds 234 parameters, so the published figure looks"
    " rounded up"
)
REDUCTION = (
    "the paper does not say which reduction its SE has here: 16, as in the ResNets, is counted;"
    " 8 would give 3.40M"
)
OTHER_BLOCKS = (
    "published is 10^6, of blocks that add, reduce 16 times and stand in the last three stages;"
    " timm's multiplies, reduces 8 times and stands here in every block"
)


@dataclass(frozen=True)
class Published:
    params: str
    flops: str | None  # None: not at hand
    ksize: tuple[int, ...] | None  # of the network that was printed; None without ECA
    source: str
    remark: str = ""  # shown where our count disagrees
    accuracy: str = ""  # top-1 / top-5 in %, of one crop of ImageNet's validation images


IMAGENET = {
    "eca_resnet18": Published("11.15M", "1.70G", (3, 5, 7, 7), AUTHORS, accuracy="70.92 / 89.93"),
    "eca_resnet34": Published("20.79M", "3.43G", (3, 3, 5, 7), AUTHORS, accuracy="74.21 / 91.83"),
    "eca_resnet50": Published("24.37M", "3.86G", (3, 5, 5, 7), AUTHORS, accuracy="77.48 / 93.68"),
    "eca_resnet101": Published("42.49M", "7.35G", (3, 3, 5, 7), AUTHORS, accuracy="78.65 / 94.34"),
    "eca_resnet152": Published(
        "57.41M", "10.83G", (3, 3, 5, 7), AUTHORS, ROUNDED_UP, "78.92 / 94.55"
    ),
    "eca_mobilenetv2": Published("3.34M", "319.9M", (1, 3), AUTHORS, accuracy="72.56 / 90.81"),
    "se_resnet18": Published("11.23M", None, None, PAPER),
    "se_resnet34": Published("20.93M", None, None, PAPER, CUT_OFF),
    "se_resnet50": Published("26.77M", None, None, PAPER),
    "se_resnet101": Published("47.01M", None, None, PAPER),
    "se_resnet152": Published("63.68M", None, None, PAPER),
    "se_mobilenetv2": Published("3.40M", None, None, PAPER, REDUCTION),
    "resnet18": Published("11.15M", None, None, PAPER),
    "resnet34": Published("20.78M", None, None, PAPER, CUT_OFF),
    "resnet50": Published("24.37M", "3.86G", None, PAPER),
    "resnet101": Published("42.49M", None, None, PAPER),
    "resnet152": Published("57.40M", None, None, PAPER),
    "mobilenetv2": Published("3.34M", None, None, PAPER),
}

WITH_ATTENTION = {  # Table 3 of the paper: (plain network, --attention)
    ("resnet50", "se"): IMAGENET["se_resnet50"],
    ("resnet50", "timm:cbam"): Published("26.77M", None, None, PAPER),
    ("resnet50", "timm:gc"): Published("28.08M", None, None, PAPER, OTHER_BLOCKS),
}

COCO = {  # (detector, backbone): parameters are the trainable ones
    ("faster_rcnn", "eca_resnet50"): Published("41.53M", "207.18G", (5, 5, 5, 5), AUTHORS),
    ("faster_rcnn", "eca_resnet101"): Published("60.52M", "283.32G", (3, 3, 5, 7), AUTHORS),
    ("mask_rcnn", "eca_resnet50"): Published("44.18M", "275.69G", (3, 3, 7, 7), AUTHORS),
    ("mask_rcnn", "eca_resnet101"): Published("63.17M", "351.83G", (3, 3, 5, 7), AUTHORS),
    ("retinanet", "eca_resnet50"): Published("37.74M", "239.43G", (3, 3, 7, 7), AUTHORS),
    ("retinanet", "eca_resnet101"): Published("56.74M", "315.57G", (3, 3, 5, 7), AUTHORS),
}
