"""Reads the weights in a file, loads them into a network, and builds the network they belong to.

Three kinds of file are understood, as `torch.load(..., weights_only=True)` returns them:
  ours      a dict with "format", the fields of `describe_network`, and "state_dict";
  released  the authors' {"epoch", "arch", "state_dict", "best_prec1", "optimizer"}, whose names
            begin with `module.` and whose "arch" can be wrong, so shapes alone are believed;
  bare      a state dict by itself, as torchvision gives it, or as other programs wrap and name it,
            see `PLACES` and what follows it.
Each error is a ValueError of one line.

Training scripts wrap weights in dicts of several names, put prefixes before every key, and leave
counters among the tensors; timm and mmclassification have other names for some layers. What is
known of them stands first. Each change is described in one note for the user.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import Kind
from .classifier import ArgumentError, Classifier
from .eca_mobilenetv2 import LAST, STAGE_OF_BLOCK, STAGES, STEM, shorten_ksize
from .eca_resnet import DEPTHS, Bottleneck
from .inspection import attention_parameters
from .registry import create_model, described_network

# Where the weights of a file are, the averaged ones first, as timm's own loader takes them.
PLACES = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "params",
)
PREFIXES = ("model.", "net.", "network.", "backbone.", "encoder.")
STEMS = ("conv1.weight", "features.0.0.weight", "conv_stem.weight")  # of the networks known here
COUNTERS = re.compile(r"(^|\.)(total_ops|total_params)$|^n_averaged$")  # of thop, of torch's SWA
_TIMM_ECA = re.compile(r"(layer\d\.\d+)\.se\.conv\.weight$")
_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)$")
_TIMM_HEAD = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.18.0",
    "bn2": "features.18.1",
    "classifier": "classifier.1",
}
# timm's layers of MobileNetV2's blocks; the first block does not expand.
_TIMM_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
_TIMM_OTHERS = {
    "conv_pw": "0.0",
    "bn1": "0.1",
    "conv_dw": "1.0",
    "bn2": "1.1",
    "conv_pwl": "2",
    "bn3": "3",
}


def find_weights(checkpoint: Any) -> tuple[Any, list[str]]:
    """Finds the weights in a file of another program; returns them, and notes for the user."""
    path: list[str] = []
    weights = checkpoint
    while isinstance(weights, Mapping):
        inside = [k for k in PLACES if isinstance(weights.get(k), Mapping) and weights[k]]
        if not inside:
            break
        weights, others = weights[inside[0]], inside[1:]
        path.append(inside[0] + (f" (not {', '.join(others)})" if others else ""))
    if path in ([], ["state_dict"]):  # bare weights, and the released files'
        return weights, []
    return weights, [f"took what stands under {', '.join(path)}"]


def plain_names(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the same tensors under this project's names, and notes on what was renamed.

    Unknown names are kept: the function that loads the weights reports names that do not fit.

    Raises:
        ValueError: two tensors would get the same name.
    """
    done = []
    plain = {name: t for name, t in weights.items() if not COUNTERS.search(name)}
    if counters := weights.keys() - plain.keys():
        kinds = sorted({name.rpartition(".")[2] for name in counters})
        done.append(f"dropped {len(counters)} {', '.join(kinds)}")
    while prefix := next((p for p in PREFIXES for stem in STEMS if p + stem in plain), None):
        plain = _renamed(plain, lambda name: name.removeprefix(prefix))
        done.append(f"took {prefix} off the names")
    for rename, what in (
        (_of_mmclassification, "head.fc is the last layer"),
        (_of_timms_eca, ".se.conv is .eca.conv"),
        (_of_timms_mobilenet, "timm's names of MobileNetV2's layers are torchvision's"),
    ):
        new = rename(plain)
        if new.keys() != plain.keys():
            done.append(what)
        plain = new
    return plain, done


def _of_mmclassification(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "conv1.weight" not in weights:
        return dict(weights)
    return _renamed(weights, lambda name: re.sub(r"^head\.fc\.", "fc.", name))


def _of_timms_eca(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # One kernel for all channels: SE's layers there are called fc1 and fc2, or conv of other shape.
    kernels = {n for n, t in weights.items() if _TIMM_ECA.match(n) and t.shape[:2] == (1, 1)}
    return _renamed(
        weights, lambda name: name.replace(".se.", ".eca.") if name in kernels else name
    )


def _of_timms_mobilenet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "conv_stem.weight" not in weights or "blocks.0.0.conv_dw.weight" not in weights:
        return dict(weights)
    if any(".se." in name for name in weights):  # MobileNetV3, EfficientNet
        return dict(weights)
    blocks = sorted({(int(m[1]), int(m[2])) for m in map(_TIMM_BLOCK.match, weights) if m})

    def rename(name: str) -> str:
        layer, _, parameter = name.rpartition(".")
        if layer in _TIMM_HEAD:
            return f"{_TIMM_HEAD[layer]}.{parameter}"
        if match := _TIMM_BLOCK.match(name):
            number = blocks.index((int(match[1]), int(match[2])))
            table = _TIMM_OTHERS if number else _TIMM_FIRST
            if match[3] in table:
                return f"features.{number + 1}.conv.{table[match[3]]}.{match[4]}"
        return name

    return _renamed(weights, rename)


def _renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    new: dict[str, Tensor] = {}
    for old, tensor in weights.items():
        name = rename(old)
        if name in new:
            raise ValueError(f"the weights hold {name} twice, under two names")
        new[name] = tensor
    return new


FORMAT = 1  # of our checkpoints; a file with a higher number is from a newer version

FIELDS = ("arch", "attention", "ksize", "num_classes", "model_kwargs")  # that rebuild a network

StateDict = Mapping[str, Tensor]
Network = Classifier  # or a library's network with the same attributes

_WRAPPERS = {"module", "_orig_mod"}  # (Distributed)DataParallel, torch.compile
_RESNET_ECA = re.compile(r"layer(\d)\.\d+\.eca\.conv\.weight$")
_MOBILENET_ECA = re.compile(r"features\.(\d+)\.conv\.\d\.conv\.weight$")
_FIRST_ATTENTION = ("layer1.0.eca.", "layer1.0.se.", "features.1.conv.3.")
# MobileNetV3 and EfficientNet by channels of the stem, blocks and inputs of the last layer; timm's
# MobileNetV3 counts a block more.
_LIBRARY_MOBILE = {
    (16, 15, 1280): "mobilenet_v3_large",
    (16, 11, 1024): "mobilenet_v3_small",
    (16, 16, 1280): "mobilenetv3_large_100",
    (16, 12, 1024): "mobilenetv3_small_100",
    (32, 16, 1280): "efficientnet_b0",
    (32, 23, 1280): "efficientnet_b1",
    (32, 23, 1408): "efficientnet_b2",
    (40, 26, 1536): "efficientnet_b3",
    (48, 32, 1792): "efficientnet_b4",
    (48, 39, 2048): "efficientnet_b5",
    (56, 45, 2304): "efficientnet_b6",
    (64, 55, 2560): "efficientnet_b7",
    (24, 40, 1280): "efficientnet_v2_s",
    (24, 57, 1280): "efficientnet_v2_m",
    (32, 79, 1280): "efficientnet_v2_l",
}
# Depths of ResNets by bottleneck or not and blocks a stage: ours, and timm's own.
_LIBRARY_DEPTHS: dict[tuple[bool, tuple[int, ...]], int | str] = {
    **{(block is Bottleneck, layers): depth for depth, (block, layers, _) in DEPTHS.items()},
    (True, (1, 1, 1, 1)): 14,
    (True, (2, 2, 2, 2)): 26,
    (True, (3, 24, 36, 3)): 200,
    (True, (3, 30, 48, 8)): 269,
    (True, (1, 1, 11, 3)): "light",
}
_SE_PARAMETERS = {"fc.0.weight": "se", "weight": "se_var2", "fc.weight": "se_var3"}


def strip_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same tensors under names from which all parts of wrappers are removed."""
    plain = {}
    for key, value in state_dict.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in plain:
            raise ValueError(f"the weights hold {name} twice, with and without a wrapper's prefix")
        plain[name] = value
    return plain


def find_state_dict(checkpoint: Any) -> dict[str, Tensor]:
    """Returns the weights in a file of any of the three kinds, under this project's names."""
    return read_state_dict(checkpoint)[0]


def read_state_dict(checkpoint: Any, rename: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Finds the weights in a file of any of the three kinds.

    Args:
        rename: give another program's weights this project's names; not for its own network.

    Returns:
        The weights under this project's names, and a list with one sentence about what was done to
        find and rename them; an empty list if nothing was.

    Raises:
        ValueError: one line; the file holds no weights.
    """
    done: list[str] = []
    ours = isinstance(checkpoint, Mapping) and "format" in checkpoint
    state_dict = checkpoint.get("state_dict") if ours else None
    if not ours:
        state_dict, done = find_weights(checkpoint)
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError(f"no weights here: a state dict is wanted, not {_kind(checkpoint)}")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state_dict.items()):
        raise ValueError(
            f"no weights here: a dict of tensors, or one under 'state_dict', is wanted,"
            f" not {_kind(checkpoint)}"
        )
    weights = strip_prefixes(state_dict)
    if not ours and rename:
        weights, renamed = plain_names(weights)
        done += renamed
    return weights, ["Of another program's names: " + "; ".join(done) + "."] if done else []


def read_ksize(state_dict: StateDict) -> tuple[int, ...] | None:
    """Reads ECA's kernel sizes from the weights' shapes; None without ECA.

    The form is that of `network.ksize`: a number per stage; for MobileNetV2 two if they suffice.
    """
    stages: dict[int, set[int]] = {}
    short = False
    for key, tensor in state_dict.items():
        if match := _RESNET_ECA.search(key):
            stage = int(match[1])
        elif match := _MOBILENET_ECA.search(key):
            short = True
            block = int(match[1])
            if not 1 <= block <= len(STAGE_OF_BLOCK):
                raise ValueError(f"{key}: MobileNetV2 has {len(STAGE_OF_BLOCK)} blocks")
            stage = STAGE_OF_BLOCK[block - 1]
        else:
            continue
        stages.setdefault(stage, set()).add(tensor.shape[-1])
    for stage, sizes in stages.items():
        if len(sizes) > 1:
            raise ValueError(f"kernel sizes {sorted(sizes)} in one stage ({stage}): one is wanted")
    ksize = tuple(min(stages[stage]) for stage in sorted(stages))
    return (shorten_ksize(ksize) if short else ksize) or None


def describe_network(network: Network) -> dict[str, Any]:
    """Returns the fields of a checkpoint from which `network_from_checkpoint` builds it again."""
    return {
        "arch": network.arch,
        "attention": network.attention,
        "ksize": list(network.ksize) if network.ksize else None,
        "num_classes": network.num_classes,
        "model_kwargs": dict(network.model_kwargs),
    }


def describe_weights(state_dict: StateDict) -> dict[str, Any]:
    """Reads the fields of `describe_network` from the names and shapes of unwrapped weights.

    `se_var1` has no parameters, so its weights are taken for those of a network without attention.
    """
    attention = _read_attention(state_dict)
    ksize = read_ksize(state_dict)
    prefix = f"{attention}_" if attention in ("eca", "se") else ""
    if {"layer1.0.conv1.weight", "fc.weight"} <= state_dict.keys():
        arch = f"{prefix}resnet{_read_depth(state_dict)}"
        head, model_kwargs = "fc", {}
    elif {"features.1.conv.0.0.weight", "classifier.1.weight"} <= state_dict.keys():
        arch = f"{prefix}mobilenetv2"
        head, model_kwargs = "classifier.1", {"width_mult": _read_width_mult(state_dict)}
    else:
        what = _library_name(state_dict) or _first(state_dict)
        raise ValueError(f"weights of no network known here: {what}")
    return {
        "arch": arch,
        "attention": attention,
        "ksize": list(ksize) if ksize else None,
        "num_classes": state_dict[f"{head}.weight"].shape[0],
        "model_kwargs": model_kwargs,
    }


def load_weights(
    network: Network,
    state_dict: StateDict,
    replace_head: bool = False,
    other_classes: bool = False,
    add_attention: bool = False,
) -> list[str]:
    """Copies weights into `network`, all or nothing.

    Args:
        network: a network of this package, unwrapped. On `meta` it takes the tensors themselves.
        state_dict: its weights, with wrappers' prefixes or without.
        replace_head: leave the last layer as it is where the weights have other classes, or none.
        other_classes: with `replace_head`, leave it even where only the classes' names differ.
        add_attention: leave the attention layers as they are where the weights have none.

    Returns:
        What was done, one sentence each.

    Raises:
        ValueError: one line that counts and names what is missing, unexpected or of another shape.
    """
    weights = strip_prefixes(state_dict)
    own, head = network.state_dict(), network.head_names
    layer = head[0].rpartition(".")[0]
    unused = [] if network.num_classes else [weights.pop(name) for name in head if name in weights]
    classes = weights[head[0]].shape[0] if head[0] in weights else network.num_classes
    headless = not weights.keys() & set(head)
    fresh = {}
    others = headless or other_classes or classes != network.num_classes
    if replace_head and others and network.num_classes:
        fresh = {name: own[name] for name in head}
    attention = {}
    if add_attention and _read_attention(weights) == "none":
        attention = attention_parameters(network)
        if attention.keys() & weights.keys():  # it is timm's, or a user's
            attention = {}
        fresh |= {name: own[name] for name in attention}
    _refuse_misfits(network, own, weights, weights | fresh)
    weights |= fresh
    network.load_state_dict(weights, assign=next(iter(own.values())).is_meta)

    notes = [f"Loaded {len(weights) - len(fresh)} tensors into {network.arch}."]
    if weights.keys() - state_dict.keys() - fresh.keys():
        notes.append("Took the wrappers' prefixes off their names.")
    if attention:
        what = "kernels" if network.ksize else "parameters"
        notes.append(f"The weights have no attention: {len(attention)} attention {what} are new.")
    notes += [f"Left {layer} out: the network has no last layer."] if unused else []
    if headless and fresh:
        notes.append(f"Left {layer} as initialised: the weights have no last layer.")
    elif head[0] in fresh:
        why = f"the weights have {classes} classes, the network {network.num_classes}"
        if classes == network.num_classes:
            why = f"the weights' {classes} classes have other names"
        notes.append(f"Left {layer} as initialised: {why}.")
    return notes


def network_from_checkpoint(checkpoint: Mapping[str, Any], attention: Kind = None) -> Network:
    """Builds the network in a file of any of the three kinds, with its weights.

    Args:
        attention: a user's own layer, where the network has one; no file is run for it.

    Raises:
        ValueError: one line; the file is of no such kind, or its weights do not fit.
    """
    weights = find_state_dict(checkpoint)
    if "format" in checkpoint:
        if checkpoint["format"] != FORMAT:
            raise ValueError(
                f"checkpoint format {checkpoint['format']!r} is not {FORMAT}: update this program"
            )
        if lacking := [name for name in FIELDS if name not in checkpoint]:
            raise ValueError(f"the checkpoint lacks {_first(lacking)}, so it cannot be rebuilt")
        fields = {name: checkpoint[name] for name in FIELDS}
    else:
        fields = describe_weights(weights)
    network = described_network(fields, attention)
    try:
        load_weights(network, weights)
    except ValueError as error:
        saved, now = (of.get("version") for of in (fields["model_kwargs"], network.model_kwargs))
        if saved == now:
            raise
        raise ValueError(f"{error} (saved by version {saved}; {now} is installed)") from None
    return network


def _refuse_misfits(network: Network, own: StateDict, read: StateDict, weights: StateDict) -> None:
    """Raises a ValueError for whatever keeps `weights` from loading where `own` stands now.

    Args:
        read: what the file holds of them; the rest stays as initialised.
    """
    faults = {
        # Files older than BatchNorm's step counter lack it; torch then keeps the network's own.
        "missing": [k for k in own if k not in weights and not k.endswith(".num_batches_tracked")],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [
            f"{k} {list(v.shape)}, not {list(own[k].shape)}"
            for k, v in weights.items()
            if k in own and v.shape != own[k].shape
        ],
        "of whole numbers": [  # quantised by another program: copied, they would be wrong silently
            f"{k} ({str(v.dtype).removeprefix('torch.')})"
            for k, v in weights.items()
            if k in own and own[k].is_floating_point() and not v.is_floating_point()
        ],
    }
    if not any(faults.values()):
        return
    ksize, built = read_ksize(weights), network.ksize
    if ksize and built and ksize != built and not (faults["missing"] or faults["unexpected"]):
        raise ArgumentError(
            f"the weights have kernel sizes {_join(ksize)} and {network.arch} was built with"
            f" {_join(built)}: give `ksize={_join(ksize)}`",
            ksize=_join(ksize),
        )
    report = "; ".join(f"{len(v)} {fault}: {_first(v)}" for fault, v in faults.items() if v)
    if (arch := _own_arch(read, network.arch)) is not None:
        raise ArgumentError(
            f"the weights do not fit {network.arch}: they are {arch}'s: give `arch={arch}`",
            arch=arch,
        )
    if (name := _library_name(read)) is not None:
        raise ValueError(f"the weights do not fit {network.arch}: they are {name}")
    raise ValueError(f"the weights do not fit {network.arch}: {report}")


def _own_arch(weights: StateDict, other: str) -> str | None:
    """Returns the network of ours whose weights these are, if it is another than `other`; with the
    attention of `other` where they have none, which is added to them then.
    """
    try:
        fields = describe_weights(weights)
    except ValueError:
        return None
    arch, kwargs = fields.pop("arch"), fields.pop("model_kwargs")
    with torch.device("meta"):
        own = create_model(arch, **fields, **kwargs).state_dict()
    named = {name for name in own if not name.endswith(".num_batches_tracked")}
    fits = named <= weights.keys() <= own.keys()
    if not fits or any(own[name].shape != weights[name].shape for name in named):
        return None
    prefix = other.partition("_")[0]
    if fields["attention"] == "none" and prefix in ("eca", "se"):
        arch = f"{prefix}_{arch}"
    return None if arch == other else arch


def _library_name(weights: StateDict) -> str | None:
    """Says of which well-known network of timm's or torchvision's the weights are, and by what name
    it is built; None where that is not known. Names and a few shapes tell.
    """
    name = None
    if {"layer1.0.conv2.weight", "fc.weight"} <= weights.keys():
        name = _library_resnet(weights)
    elif {"conv_stem.weight", "classifier.weight"} <= weights.keys():
        shape = _mobile_shape(weights, "conv_stem", r"blocks\.\d+\.\d+\.", "classifier")
        name = f"timm:{_LIBRARY_MOBILE[shape]}" if shape in _LIBRARY_MOBILE else None
        name = name and name.replace("_v2", "v2")
    elif "features.0.0.weight" in weights:
        last = "classifier.3" if "classifier.3.weight" in weights else "classifier.1"
        shape = _mobile_shape(weights, "features.0.0", r"features\.\d+(\.\d+)?\.block\.", last)
        name = f"torchvision:{_LIBRARY_MOBILE[shape]}" if shape in _LIBRARY_MOBILE else None
    if not name:
        return None
    library, _, plain = name.partition(":")
    return f"those of {library}'s {plain}, which create_model and main.py -a build as {name}"


def _mobile_shape(weights: StateDict, stem: str, block: str, last: str) -> tuple[int, ...]:
    """Returns channels of the stem, blocks and inputs of the last layer; empty if it has none."""
    if f"{last}.weight" not in weights:
        return ()
    channels, inputs = weights[f"{stem}.weight"].shape[0], weights[f"{last}.weight"].shape[-1]
    return channels, _count(weights, block), inputs


def _library_resnet(weights: StateDict) -> str | None:
    """Returns the name of a ResNet with another stem, wider or in groups, or with timm's layers."""
    layers = tuple(_count(weights, rf"layer{n}\.\d+\.conv1\.") for n in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in weights
    depth = _LIBRARY_DEPTHS.get((bottleneck, layers))
    width, inputs = weights["layer1.0.conv2.weight"].shape[:2]
    groups = width // inputs
    attention = "se" if "layer1.0.se.fc1.weight" in weights else ""
    if {"layer1.0.se.conv.weight", "layer1.0.eca.conv.weight"} & weights.keys():
        attention = "eca"
    stem = weights.get("conv1.0.weight")
    plain = f"{depth}" if stem is None else f"{depth}{'t' if stem.shape[0] == 24 else 'd'}"
    if groups > 1:
        plain = f"resnext{plain}_{groups}x{inputs}d"
    elif width == 64:
        plain = f"resnet{plain}"
    else:
        plain = f"wide_resnet{plain}_2"
    odd = width != groups * inputs or (groups == 1 and width not in (64, 128))  # a pruned one
    if depth is None or odd:
        return None
    if stem is None and plain == f"resnet{depth}" and attention != "se" and depth in DEPTHS:
        return None  # ours
    return f"{'torchvision' if stem is None and not attention else 'timm'}:{attention}{plain}"


def _count(weights: StateDict, pattern: str) -> int:
    """Counts the blocks whose names begin so."""
    return len({match[0] for match in map(re.compile(pattern).match, weights) if match})


def _read_attention(weights: StateDict) -> str:
    """Reads the attention's name from the parameters of the first block."""
    first = {
        key.removeprefix(prefix): tensor
        for key, tensor in weights.items()
        for prefix in _FIRST_ATTENTION
        if key.startswith(prefix)
    }
    if "conv.weight" in first:  # shared by all channels, or one row a channel
        return "eca" if first["conv.weight"].shape[0] == 1 else "eca_ns"
    return next((name for key, name in _SE_PARAMETERS.items() if key in first), "none")


def _read_depth(weights: StateDict) -> int:
    layers = tuple(
        sum(bool(re.fullmatch(rf"layer{stage}\.\d+\.conv1\.weight", key)) for key in weights)
        for stage in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.conv3.weight" in weights
    for depth, (block, known, _) in DEPTHS.items():
        if layers == known and bottleneck == (block is Bottleneck):
            return depth
    raise ValueError(f"weights of a ResNet of no known depth: {_join(layers)} blocks a stage")


def _read_width_mult(weights: StateDict) -> float:
    """Computes the smallest `width_mult` that gives these widths."""
    widths = {"features.0.0.weight": STEM, f"features.{len(STAGE_OF_BLOCK) + 1}.0.weight": LAST}
    for stage, (_, channels, _, _) in enumerate(STAGES):
        projection = 1 if stage == 0 else 2  # the first stage does not expand
        block = STAGE_OF_BLOCK.index(stage) + 1
        widths[f"features.{block}.conv.{projection}.weight"] = channels
    if lacking := [name for name in widths if name not in weights]:
        raise ValueError(f"weights of a MobileNetV2 that lack {_first(lacking)}")
    pairs = [(weights[name].shape[0], channels) for name, channels in widths.items()]
    return max(wide / channels for wide, channels in pairs if (wide, channels) != (LAST, LAST))


def _join(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {_first(map(str, value))}" if value else "an empty dict"
    return f"a {type(value).__name__}"
