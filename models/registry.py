"""The networks by name, and the functions that build one: ours, timm's and torchvision's.

`timm:resnext50_32x4d` and `torchvision:resnet50` are the libraries' own networks, with attention
put in where it is wanted. They carry the attributes by which `models.weights` saves and rebuilds a
network: arch, attention, ksize, num_classes and model_kwargs, of plain values. Both libraries are
imported when they are used, and not needed otherwise.
"""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version as installed
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import eca_mobilenetv2 as mobilenets
from . import eca_resnet as resnets
from .attention import Attention, Kind, find_attention, is_file
from .classifier import (
    DROP_PATH,
    ArgumentError,
    Classifier,
    FeatureMaps,
    Indices,
    Ksize,
    check_num_classes,
)
from .eca_module import ADAPTIVE
from .fused.block_tail import set_fused
from .insertion import Insertion, add_attention

MODELS: dict[str, Callable[..., Classifier]] = {
    "eca_resnet18": resnets.eca_resnet18,
    "eca_resnet34": resnets.eca_resnet34,
    "eca_resnet50": resnets.eca_resnet50,
    "eca_resnet101": resnets.eca_resnet101,
    "eca_resnet152": resnets.eca_resnet152,
    "eca_mobilenetv2": mobilenets.eca_mobilenetv2,
    "eca_mobilenet_v2": mobilenets.eca_mobilenetv2,
    "se_resnet18": resnets.se_resnet18,
    "se_resnet34": resnets.se_resnet34,
    "se_resnet50": resnets.se_resnet50,
    "se_resnet101": resnets.se_resnet101,
    "se_resnet152": resnets.se_resnet152,
    "se_mobilenetv2": mobilenets.se_mobilenetv2,
    "se_mobilenet_v2": mobilenets.se_mobilenetv2,
    "resnet18": resnets.resnet18,
    "resnet34": resnets.resnet34,
    "resnet50": resnets.resnet50,
    "resnet101": resnets.resnet101,
    "resnet152": resnets.resnet152,
    "mobilenetv2": mobilenets.mobilenetv2,
    "mobilenet_v2": mobilenets.mobilenetv2,
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, in the order of `MODELS`.

    Args:
        pattern: what the whole name must match, as in a shell: `eca_*50*`. No match gives an empty
            list.
    """
    return [name for name in MODELS if fnmatch.fnmatchcase(name, pattern)]


def create_model(
    name: str,
    ksize: Ksize = None,
    num_classes: int = 1000,
    *,
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: Indices = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds the network `name`, with fresh weights.

    Args:
        name: a key of `MODELS`, which `list_models` shows; or `timm:NAME` or `torchvision:NAME`,
            whose arguments `library_network` has.
        ksize: ECA's kernel sizes as `--ksize` takes them, or a sequence; None for the released
            ones, or for a network without ECA.
        num_classes: rows of the last layer; 0 for none, so that the network puts out features.
        pretrained: False. Nothing is downloaded here; True is refused with what loads a file.
        features_only: a `FeatureMaps` in the place of the network: its feature maps, as a list.
        out_indices: which of them, finest first; only with `features_only`.
        **kwargs: the constructor's other arguments: `attention`, a name or a class (see
            `find_attention`); MobileNetV2's `width_mult`.

    Raises:
        ValueError: one line, for an unknown name or a value that will not do.
    """
    if is_of_library(str(name)):
        if pretrained or features_only or out_indices is not None:
            raise ValueError(f"{name} is the library's: pretrained and features are its own affair")
        return library_network(name, ksize, num_classes, **kwargs)
    if name not in MODELS:
        raise ValueError(f"unknown network {name!r}; {_hint(str(name))}")
    if pretrained:
        raise ValueError(
            f"create_model gives {name} fresh weights and downloads none: train from a file with"
            f" `python main.py -a {name} --pretrained FILE`, or load it with"
            " models.weights.network_from_checkpoint(torch.load(FILE))"
        )
    constructor = MODELS[name]
    if foreign := kwargs.keys() - inspect.signature(constructor).parameters:
        raise ValueError(f"{name} takes no {', '.join(sorted(foreign))}: leave it out")
    if not features_only and out_indices is not None:
        raise ValueError("out_indices is for features_only=True: leave it out")
    if features_only:
        return FeatureMaps(constructor(ksize=ksize, num_classes=0, **kwargs), out_indices)
    return constructor(ksize=ksize, num_classes=num_classes, **kwargs)


def _hint(name: str) -> str:
    """What to write in the place of an unknown name: close ones, or how to see them all."""
    if matches := list_models(name):  # none of them is the name itself, so it is a pattern
        return f"models.list_models({name!r}) finds {', '.join(matches)}"
    plain = {"".join(filter(str.isalnum, known)): known for known in MODELS}
    bare = "".join(filter(str.isalnum, name.lower()))
    if close := [plain[match] for match in difflib.get_close_matches(bare, plain)]:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(MODELS)}; models.list_models('eca_*50*') finds some by a pattern"


def described_network(fields: Mapping[str, Any], attention: Kind = None) -> Classifier:
    """Builds the network that a checkpoint's fields describe, with fresh weights.

    No file is run for it: a user's own attention must be given again.

    Args:
        fields: as `weights.describe_network` returns them.
        attention: a user's own layer, as a class.

    Returns:
        The network, whose `attention_note` says if the layer's file has changed since.

    Raises:
        ValueError: one line; an attention that is lacking or another one, or see `create_model`.
    """
    kwargs, name = dict(fields["model_kwargs"]), fields["attention"]
    sha256 = kwargs.pop("attention_sha256", None)
    kind, note = name, ""
    if is_file(name) or attention is not None:
        if attention is None:
            raise ArgumentError(
                f"its attention {name} is in a user's file, which a checkpoint never runs: give"
                f" `attention={name}` again",
                attention=name,
            )
        kind = find_attention(attention)
        if kind is None or kind.name != name:
            other = "none" if kind is None else kind.name
            raise ArgumentError(
                f"its attention is {name}: leave `attention={other}` out", attention=other
            )
        if kind.sha256 != sha256:
            note = f"! {name} has changed since the checkpoint was written"
    arguments = {k: fields[k] for k in ("ksize", "num_classes")}
    built = create_model(fields["arch"], attention=kind, **arguments, **kwargs)
    network = cast(Classifier, built)
    network.attention_note = note
    return network


LIBRARIES = ("timm", "torchvision")
# Extra outputs are left out, and images are transformed as for the published weights.
_AUXILIARY = {"aux_logits": False, "transform_input": True, "init_weights": True}
ARGUMENTS = {"torchvision:googlenet": _AUXILIARY, "torchvision:inception_v3": _AUXILIARY}
KWARGS = {"width_mult", "arguments", "identity", "places", "version"}  # of a stranger's file
# Arguments by which a library would load a file or fetch one: no stranger's checkpoint may.
LOADING = ("pretrained", "checkpoint", "cache", "weights", "features")
IMAGES = 2  # of a trial: BatchNorm takes no single value


def is_of_library(arch: str) -> bool:
    """Tells whether a name is one of a library's networks: `timm:NAME` or `torchvision:NAME`."""
    return arch.partition(":")[0] in LIBRARIES and ":" in arch


def check_name(arch: str) -> None:
    """Refuses a name that the library does not have.

    Raises:
        ValueError: one line; the library is missing, or the nearest names.
    """
    library, _, name = arch.partition(":")
    plain = name.partition(".")[0] if library == "timm" else name  # without timm's tag of weights
    try:
        if library == "timm":
            import timm

            known = timm.list_models()
        else:
            import torchvision

            known = torchvision.models.list_models(module=torchvision.models)
    except ImportError:
        raise ValueError(f"{library} is not installed: pip install {library}") from None
    if not re.fullmatch(r"[\w.-]+", name) or plain not in known:  # no address of weights
        close = difflib.get_close_matches(plain, known)
        hint = f"; did you mean {' or '.join(f'{library}:{each}' for each in close)}?"
        raise ValueError(f"{library} has no classifier {name!r}{hint if close else ''}")


def library_network(
    arch: str,
    ksize: Ksize | int = None,
    num_classes: int = 1000,
    attention: Kind = "none",
    *,
    arguments: Mapping[str, Any] | None = None,
    identity: bool | None = None,
    places: Sequence[str] | None = None,
    version: str | None = None,
    drop_path: float = 0.0,
) -> Classifier:
    """Builds a library's network with fresh weights, and puts attention into it.

    Args:
        arch: timm:NAME or torchvision:NAME.
        ksize: the attention's kernel size: a number, "adaptive" (the default), or one for each
            layer.
        num_classes: rows of the last layer.
        attention: as `find_attention` takes it.
        arguments: for the library's constructor, plain values, such as {"drop_path_rate": 0.1}.
        identity: see `add_attention`.
        places: names of the modules behind which the layers go; None for those that are known.
        version: of the library that a checkpoint names; without effect on what is built.
        drop_path: rate of stochastic depth, by the library's own argument; 0 for its default.

    Returns:
        The library's module, with the attributes of `Classifier` that describe a network, and
        `insertions` (what was put in) and `head_names` (the last layer's parameters).

    Raises:
        ValueError: one line; no such library or network, or no place for the attention.
    """
    check_name(arch)
    if check_num_classes(num_classes) == 0:
        raise ValueError(f"{arch} is built with 1 class or more: 0 is for our networks")
    arguments = _with_drop_path(arch, arguments, drop_path)
    network = cast(Any, _built(arch, num_classes, arguments))
    with torch.device("meta"):  # what has another shape for other classes is the last layer
        other = _built(arch, num_classes + 1, arguments).state_dict()
    head = [name for name, t in network.state_dict().items() if t.shape != other[name].shape]
    kind = find_attention(attention)
    if identity is not None and (kind is None or kind.name != "eca"):
        raise ArgumentError(
            f"{arch}: `identity_start={identity}` is for eca: leave it out", identity_start=identity
        )
    network.model_kwargs = {"version": installed(arch.partition(":")[0])}
    network.model_kwargs |= {"arguments": dict(arguments)} if arguments else {}
    insertions: tuple[Insertion, ...] = ()
    if ksize is not None and (kind is None or not kind.takes_ksize):
        what = f"{arch} {f'with {kind.name}' if kind else 'without attention'} has no ECA layer"
        raise ArgumentError(f"{what}: leave `ksize={ksize}` out", ksize=ksize)
    if kind is not None:
        insertions = _with_attention(network, arch, kind, ksize, places, identity)
    network.arch, network.num_classes, network.frozen = arch, num_classes, ()
    network.attention, network.attention_note = kind.name if kind else "none", ""
    network.ksize = tuple(each.kernel_size for each in insertions if each.kernel_size) or None
    network.insertions, network.head_names = insertions, tuple(head)
    return cast(Classifier, network)


def _with_attention(
    network: Any,
    arch: str,
    kind: Attention,
    ksize: Ksize | int,
    places: Sequence[str] | None,
    identity: bool | None,
) -> tuple[Insertion, ...]:
    """Puts an attention into a library's network, and what rebuilds it into `model_kwargs`."""
    sizes = _sizes(arch, ksize)
    try:
        done = tuple(add_attention(network, kind, places, sizes, identity, quiet=True))
    except ValueError as error:
        raise ValueError(f"{arch}: {error}") from None
    if not done:
        raise ArgumentError(
            f"{arch} has {kind.name} already: leave `attention={kind.name}` out",
            attention=kind.name,
        )
    network.model_kwargs["places"] = [each.place.rpartition(" ")[2] for each in done]
    if kind.name == "eca":
        network.model_kwargs["identity"] = identity is not False
    if kind.sha256 is not None:
        network.model_kwargs["attention_sha256"] = kind.sha256
    return done


def _sizes(arch: str, ksize: Ksize | int) -> Any:
    """Reads the kernel size of inserted layers: one for all, one for each, or "adaptive"."""
    if ksize is None or ksize == ADAPTIVE:
        return ADAPTIVE
    if isinstance(ksize, str):
        if not ksize.isdecimal():
            raise ValueError(f"ksize {ksize!r}: {arch} takes one odd number, or {ADAPTIVE}")
        return int(ksize)
    return ksize


def _with_drop_path(
    arch: str, arguments: Mapping[str, Any] | None, rate: float
) -> Mapping[str, Any]:
    """Returns a network's arguments, with a rate of stochastic depth if it then has some."""
    arguments = ARGUMENTS.get(arch, {}) if arguments is None else arguments
    if not rate:
        return arguments
    arguments = {**arguments, DROP_PATH[arch.partition(":")[0]]: rate}
    try:
        with torch.device("meta"):
            modules = [type(m).__name__ for m in _built(arch, 2, arguments).modules()]
    except ValueError:
        modules = []
    if not {"DropPath", "StochasticDepth"} & {*modules}:
        raise ArgumentError(
            f"{arch} takes no `drop_path={rate:g}`: leave it out, or give 0", drop_path=f"{rate:g}"
        )
    return arguments


def _built(arch: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    library, _, name = arch.partition(":")
    if loading := [key for key in arguments if str(key).startswith(LOADING)]:
        raise ValueError(f"{arch} is built with fresh weights: leave {', '.join(loading)} out")
    device = torch.get_default_device()
    try:
        if library == "timm":
            import timm

            return timm.create_model(name, num_classes=num_classes, **arguments)
        import torchvision

        build = torchvision.models.get_model
        if device.type == "meta" and name.startswith("regnet"):  # it computes with tensors
            with torch.device("cpu"):
                return build(name, num_classes=num_classes, **arguments).to("meta")
        return build(name, num_classes=num_classes, **arguments)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a library may raise anything
        raise ValueError(f"{arch} cannot be built: {first_line(error)}") from None


def check_forward(network: Classifier, sizes: Iterable[int]) -> None:
    """Refuses a network that does not make logits of images of these sides; it goes to `meta`.

    Raises:
        ValueError: one line with the size.
    """
    arch, expected = network.arch, (IMAGES, network.num_classes)
    set_fused(network, False)  # the modules say as much
    network.to("meta")  # made there, it may hold a file's tensors by now
    for size in sizes:
        try:
            logits = network(torch.empty(IMAGES, 3, size, size, device="meta"))
        except Exception as error:  # a library may raise anything
            reason = f"fails with images of {size} pixels: {first_line(error)}"
            raise ArgumentError(
                f"{arch} {reason}: leave `img_size={size}` out", img_size=size
            ) from None
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            raise ValueError(f"{arch} puts out {type(logits).__name__}, not logits of each class")


def image_settings(arch: str) -> dict[str, Any]:
    """Returns how images are made for a network's published weights, as the library says it.

    Returns:
        img_size (pixels), crop_pct, interpolation, mean and std.

    Raises:
        ValueError: one line; as `check_name`, or images that are not square.
    """
    check_name(arch)
    library, _, name = arch.partition(":")
    if library == "timm":
        import timm

        settings = timm.get_pretrained_cfg(name)
        if settings is None:
            raise ValueError(f"timm has no weights {name}: leave what follows the point out")
        (_, height, size), crop = settings.input_size, settings.crop_pct
        mean, std, interpolation = settings.mean, settings.std, settings.interpolation
    else:
        import torchvision

        made = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        (height,) = (size,) = made.crop_size
        crop = size / made.resize_size[0]
        mean, std, interpolation = made.mean, made.std, made.interpolation.value
    if height != size:
        raise ValueError(f"{arch} takes images of {height} x {size} pixels, and not square ones")
    named = {"img_size": size, "crop_pct": crop, "interpolation": interpolation}
    return {**named, "mean": tuple(mean), "std": tuple(std)}


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
