"""Makes the network that a classification run begins with, with the weights of a file if given."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from .attention import Kind
from .classifier import ArgumentError, Ksize
from .eca_module import ECALayer
from .inspection import attention_parameters
from .registry import MODELS, create_model, is_of_library
from .weights import (
    Network,
    describe_network,
    describe_weights,
    find_state_dict,
    load_weights,
    read_ksize,
    read_state_dict,
)


def first_network(
    arch: str,
    num_classes: int | None = None,
    ksize: Ksize = None,
    attention: Kind = None,
    pretrained: Mapping[str, Any] | None = None,
    file: str = "",
    names: Sequence[str] | None = None,
    identity_start: bool | None = None,
    drop_path: float = 0.0,
) -> tuple[Network, list[str]]:
    """Builds the network of a new run. On the device `meta` it only makes the checks, at no cost.

    Args:
        arch, ksize: as `create_model` takes them. Without `ksize` the kernel sizes are those of the
            weights, if the weights have some that fit the network.
        num_classes: None for the number of names, or for 1000 without names.
        attention: None for the attention that `arch` names.
        pretrained: a file of one of the three kinds in `models.weights`. The last layer is new
            where the file has other classes, and attention is new where the file has none.
        file: the name of that file, for messages.
        names: the names of the classes; None if they are not known yet.
        identity_start: the new ECA layers begin with a gate of 1, see `start_as_identity`; None
            for yes in a library's network, and for no in ours.
        drop_path: rate of stochastic depth of a library's network; for ours see `set_drop_path`.

    Returns:
        The network and what was done with the weights, one line each.

    Raises:
        ValueError: one line; see `create_model` and `load_weights`. Also for too few classes.
    """
    num_classes = _count_classes(num_classes, names)
    foreign, more = is_of_library(arch), dict[str, Any]()
    if foreign:  # its layers are put in as identities
        more, identity_start = {"identity": identity_start, "drop_path": drop_path}, None
    if pretrained is None:
        network = _create(arch, ksize, attention, num_classes, **more)
        return network, [start_as_identity(network)] if identity_start else []
    try:
        tensors, renamed = read_state_dict(pretrained, rename=not foreign)
        if ksize is None and not foreign:
            with torch.device("meta"):
                network = _create(arch, None, attention, num_classes)
            # The families name their last layers differently.
            if network.ksize and f"{network.head}.weight" in tensors:
                ksize = read_ksize(tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    network = _create(arch, ksize, attention, num_classes, **more)
    known = pretrained.get("classes") if "format" in pretrained else None
    others = known is not None and names is not None and list(known) != list(names)
    try:
        notes = load_weights(network, tensors, True, others, add_attention=True) + renamed
    except ValueError as error:
        raise ArgumentError(f"{file}: {error}", **getattr(error, "arguments", {})) from None
    if identity_start:
        _refuse_trained(network, tensors, file)
        notes.append(start_as_identity(network))
    return network, [f"pretrained: {file}", *(f"  {note}" for note in notes)]


def _count_classes(num_classes: int | None, names: Sequence[str] | None) -> int:
    if num_classes == 0:
        raise ArgumentError(
            "`num_classes=0`: a run trains a last layer; leave it out for the data's", num_classes=0
        )
    if names and num_classes and num_classes < len(names):
        raise ArgumentError(
            f"`num_classes={num_classes}`: the data has {len(names)} classes; give at least as "
            "many, or leave it out",
            num_classes=num_classes,
        )
    return num_classes or len(names or range(1000))


def _refuse_trained(network: Network, tensors: Mapping[str, Any], file: str) -> None:
    if attention_parameters(network).keys() & tensors.keys():
        raise ArgumentError(
            f"{file}: holds trained attention kernels, which `identity_start=True` would "
            "delete: leave it out",
            identity_start=True,
        )


def start_as_identity(network: Network) -> str:
    """Makes a network with ECA compute exactly what it computes without ECA, until it is trained.

    A sigmoid never gives 1, but with a kernel of zeros it gives 1/2 everywhere. So the kernel
    becomes 0, and weight and bias of the BatchNorm before it are doubled: x · 2 · 1/2 is exactly
    x in floating point. The formula, the names and the checkpoint's fields stay the same, and the
    kernel has its usual gradient.

    Returns:
        What was done, one sentence.

    Raises:
        ValueError: the network's attention is not ECA.
    """
    if network.attention != "eca":
        raise ArgumentError(
            f"`identity_start=True` is for eca, and {network.arch}'s attention is "
            f"{network.attention}: leave it out",
            identity_start=True,
        )
    count = 0
    with torch.no_grad():
        for module in network.modules():
            norm: nn.BatchNorm2d | None = None
            for child in module.children():
                if isinstance(child, nn.BatchNorm2d):
                    norm = child
                elif isinstance(child, ECALayer):
                    assert norm is not None  # ECA comes after BatchNorm in every block
                    # Not in place: the tensors may be those of the file that was read.
                    child.conv.weight.data = torch.zeros_like(child.conv.weight.data)
                    norm.weight.data = 2 * norm.weight.data
                    norm.bias.data = 2 * norm.bias.data
                    count += 1
    return f"{count} ECA layers begin without effect: kernel 0, the BatchNorm before it doubled."


def refuse_another(
    checkpoint: Mapping[str, Any],
    file: str,
    arch: str | None = None,
    ksize: Ksize = None,
    attention: Kind = None,
    num_classes: int | None = None,
) -> None:
    """Raises a ValueError if a file holds another network than arch, ksize, attention and
    num_classes say; None fits every network.

    Args:
        checkpoint: a file of one of the three kinds in `models.weights`.
        file: its name, for messages.

    Raises:
        ValueError: one line that names the arguments to leave out.
    """
    own = checkpoint
    if "format" not in checkpoint:
        try:
            own = describe_weights(find_state_dict(checkpoint))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    foreign = is_of_library(str(own.get("arch")))
    if own.get("arch") not in MODELS and not foreign:
        raise ValueError(f"{file} holds {own.get('arch')}, which is not for this script")
    typed = {"arch": arch, "attention": attention, "ksize": ksize, "num_classes": num_classes}
    if all(v is None for v in typed.values()) and not own.get("state_dict"):  # a file of an engine
        return
    of_file = (own.get("ksize"), own.get("attention"))
    if arch and not (foreign and arch == own["arch"]):
        of_file = (None, None)
    with torch.device("meta"):
        network = _create(
            arch or own["arch"],
            ksize or of_file[0],
            attention or of_file[1],
            own.get("num_classes") if num_classes is None else num_classes,
        )
    described = describe_network(network)
    differing = {k: v for k, v in typed.items() if v is not None and described[k] != own[k]}
    if differing:
        if "attention" in differing:  # it may have been a class
            differing["attention"] = described["attention"]
        others = ", ".join(f"`{k}={v}`" for k, v in differing.items())
        raise ArgumentError(
            f"{file} holds {own['arch']}, ksize {own['ksize']}, {own['num_classes']} classes: "
            f"leave {others} out, or start a new run from these weights",
            **differing,
        )


def _create(arch: str, ksize: Ksize, attention: Kind, num_classes: Any, **more: Any) -> Network:
    chosen: dict[str, Any] = {} if attention is None else {"attention": attention}
    return cast(Network, create_model(arch, ksize, num_classes, **chosen, **more))
