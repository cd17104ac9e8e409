"""What both families of networks offer as classifiers, under the names that timm's classifiers use.

`ResNet` and `MobileNetV2` inherit it: another last layer or none, the features before it, feature
maps of every resolution, and training that keeps fewer activations (`set_grad_checkpointing`).
Besides, what the families share in building a network, and stochastic depth (Huang et al. 2016): in
training, images skip blocks at random.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .eca_module import parse_ksize

Ksize = str | Sequence[int] | None


class ArgumentError(ValueError):
    """Means arguments that do not fit, and carries their names and values.

    The message has each as `name=value`, between backticks: a script shows its flag instead.
    """

    def __init__(self, message: str, **arguments: object):
        super().__init__(message)
        self.arguments = arguments


def check_num_classes(num_classes: int) -> int:
    """Returns `num_classes`; a ValueError if it is no integer of 0 (no last layer) or more."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(
            f"num_classes must be 1 or more, such as 1000, or 0 for no last layer,"
            f" not {num_classes!r}"
        )
    return num_classes


def check_ksize(
    arch: str, attention: Attention | None, ksize: Ksize, stages: int | tuple[int, ...]
) -> tuple[int, ...] | Literal["adaptive"] | None:
    """Returns what `parse_ksize` reads, or None for an attention without kernel sizes.

    Raises:
        ValueError: one line; a kernel size that will not do, or one where the attention has none.
    """
    if attention is not None and attention.takes_ksize:
        return parse_ksize(ksize, stages)
    if ksize is not None:
        name = attention.name if attention else "none"
        raise ArgumentError(
            f"{arch} (attention {name!r}) has no ECA layer: leave `ksize={ksize}` out",
            ksize=ksize,
        )
    return None


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def initialise_convolutions(network: nn.Module) -> None:
    """Initialises the 2-d convolutions in place: Kaiming normal, by fan-out.

    All else keeps torch's initialisation, as in the authors' code: ECA's 1-d convolution, and
    BatchNorm, which starts with weight 1 and bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


Indices = int | Sequence[int] | None
Own = TypeVar("Own", bound="Classifier")  # typing.Self is Python 3.11's


class FeatureInfo(list):
    """One dict a feature map, finest first, as timm describes them.

    `num_chs` is its channels, `reduction` the pixels of the input's side that one of its positions
    stands for, and `module` the name of the module that puts it out.
    """

    def channels(self) -> list[int]:
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        return [info["module"] for info in self]


class Stage(nn.Sequential):
    """Blocks one after another; for backward it can keep the inputs of the blocks alone."""

    grad_checkpointing = False  # `Classifier.set_grad_checkpointing` sets it

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.recomputes(x):
            return self.recomputed(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def recomputes(self, x: Tensor) -> bool:
        """Whether blocks are computed a second time in backward: not while torch.fx traces."""
        return self.grad_checkpointing and torch.is_grad_enabled() and isinstance(x, Tensor)

    @torch.jit.unused
    def recomputed(self, x: Tensor) -> Tensor:
        for block in self:
            x = recomputed(block, x)
        return x


class Classifier(nn.Module):
    """Features, pooling and one linear layer: (N, 3, H, W) → (N, num_classes).

    A subclass calls `_describe_classifier` in its constructor, names its last layer in `head`, and
    gives `forward_features`, `forward_head` and `_feature_maps`.

    Attributes:
        num_classes: rows of the last layer; 0 where there is none, and the network puts out the
            pooled features.
        num_features: channels of the last feature map, so the columns of the last layer.
        head_hidden_size: the same number, under timm's newer name.
        global_pool: "avg", or "" where `reset_classifier` took pooling away.
        feature_info: a `FeatureInfo` of the feature maps, in the order of `forward_intermediates`.
        grad_checkpointing: as `set_grad_checkpointing` left it.
        frozen: names of the modules that do not train, as `freeze` left them.
    """

    head: str
    arch: str
    frozen: tuple[str, ...] = ()
    if TYPE_CHECKING:
        ksize: tuple[int, ...] | None
    attention_note = ""  # what `described_network` has to say of a user's own layer

    def _describe_classifier(
        self, num_classes: int, num_features: int, maps: Iterable[tuple[int, int, str]]
    ) -> None:
        self.head_names = (f"{self.head}.weight", f"{self.head}.bias")
        names = ("num_chs", "reduction", "module")
        self.num_classes = check_num_classes(num_classes)
        self.num_features = self.head_hidden_size = num_features
        self.global_pool = "avg"
        self.grad_checkpointing = False
        self.feature_info = FeatureInfo(dict(zip(names, each, strict=True)) for each in maps)

    def _describe_attention(self, attention: Attention | None, **model_kwargs: Any) -> None:
        """Sets what a checkpoint says of the attention and of the constructor's arguments."""
        self.attention = attention.name if attention else "none"
        self.model_kwargs = model_kwargs
        if attention is not None and attention.sha256 is not None:
            self.model_kwargs["attention_sha256"] = attention.sha256

    def train(self: Own, mode: bool = True) -> Own:
        """Switches as nn.Module does, but for what is frozen: it stays in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def _last_layer(self) -> nn.Module:
        """A new last layer: Linear as torch initialises it, Identity for no classes."""
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))  # type: ignore[operator]

    def get_classifier(self) -> nn.Module:
        """The last layer: nn.Linear, or nn.Identity where `num_classes` is 0."""
        return self.get_submodule(self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new last layer in the place of the old one, in place.

        Args:
            num_classes: its rows; 0 for none, so that the network puts out features.
            global_pool: "avg" or None for pooled features (N, C); "" for the feature map
                (N, C, h, w), which only `num_classes` 0 can take.

        Raises:
            ValueError: one line, for another pooling, or classes without pooling.
        """
        num_classes = check_num_classes(num_classes)
        pool = "avg" if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise ValueError(f"global_pool {pool!r} is not known here: use 'avg', or '' for none")
        if not pool and num_classes:
            raise ValueError(f"{num_classes} classes need pooled features: use global_pool='avg'")
        self.num_classes, self.global_pool = num_classes, pool
        weight = next(self.parameters())
        layer = self._last_layer().to(weight.device, weight.dtype).train(self.training)
        parent, _, name = self.head.rpartition(".")
        setattr(self.get_submodule(parent), name, layer)
        self._initialise_last_layer()

    def _initialise_last_layer(self) -> None:
        """Gives the last layer the values that training begins with, where they are not torch's."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters' names by which timm counts the layers from the input.

        Args:
            coarse: count stages in the place of blocks.

        Returns:
            Stem and blocks; the last layer is what they leave over. The count is that of
            `layer_scales`.
        """
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for backward, which computes the rest again.

        Training then needs less memory and about a third more time. Results stay the same bit for
        bit, and so do BatchNorm's running statistics: the second pass does not count.
        """
        self.grad_checkpointing = bool(enable)
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = self.grad_checkpointing

    def _feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """The maps that `feature_info` describes, and then the network's last feature map."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps on the way to the last one.

        Args:
            x: (N, 3, H, W).
            indices: which of `feature_info`, counted from the end where negative; a whole number n
                for the last n; None for all.
            norm: of no effect, as each map comes out of a block that ends with its normalisation.
            stop_early: with `intermediates_only`, compute nothing beyond the last of them.
            output_fmt: "NCHW", the only one there is.
            intermediates_only: return the list alone.

        Returns:
            (the last feature map, as `forward_features` gives it; the list of maps), or the list.

        Raises:
            ValueError: one line, for an index or a format that there is none of.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not known here: use 'NCHW'")
        chosen = take_indices(indices, len(self.feature_info))
        maps = []
        for i, last in enumerate(self._feature_maps(x)):
            if i in chosen:
                maps.append(last)
            if stop_early and intermediates_only and i == max(chosen):
                break
        return maps if intermediates_only else (last, maps)


class FeatureMaps(nn.Module):
    """A network without its head: (N, 3, H, W) → a list of feature maps, finest first.

    Args:
        network: taken over, and its last layer removed; its weights are under `network.` here.
        out_indices: as `forward_intermediates` takes them.

    Attributes:
        feature_info: a `FeatureInfo` of what comes out.
    """

    def __init__(self, network: Classifier, out_indices: Indices = None):
        super().__init__()
        self.out_indices = take_indices(out_indices, len(network.feature_info))
        self.feature_info = FeatureInfo(network.feature_info[i] for i in self.out_indices)
        network.reset_classifier(0)
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.forward_intermediates(
            x, self.out_indices, stop_early=True, intermediates_only=True
        )


def take_indices(indices: Indices, count: int) -> list[int]:
    """Which of `count` feature maps are meant, in ascending order; a ValueError for others."""
    if indices is None:
        return list(range(count))
    numbers = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not numbers or not all(-count <= i < count for i in numbers):
        raise ValueError(
            f"feature maps {indices!r} are not there: use some of 0 to {count - 1}, or the number"
            f" of maps from the last, at most {count}"
        )
    return sorted({i % count for i in numbers})


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which only x is kept for backward."""
    if torch.compiler.is_compiling():  # there the graph writes the statistics once by itself
        return checkpoint(block, x, use_reentrant=False)
    twice = (nullcontext(), unchanged_statistics(block))
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: twice)


@contextmanager
def unchanged_statistics(block: nn.Module) -> Iterator[None]:
    """While open, BatchNorm's running statistics in `block` change in copies that are dropped.

    Copies, as autograd refuses tensors that were written to after it had kept them.
    """
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    before = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)


def drop_branch(x: Tensor, rate: float) -> Tensor:
    """Sets the whole of x to 0 for some images, and divides the others by the share that is kept.

    Args:
        x: (N, C, H, W), a block's branch before it is added to the shortcut.
        rate: probability of each image to lose it, below 1.
    """
    mask = x.new_empty((len(x), 1, 1, 1)).bernoulli_(1 - rate)
    return x * mask.div_(1 - rate)


DROP_PATH = {"timm": "drop_path_rate", "torchvision": "stochastic_depth_prob"}  # their arguments


def set_drop_path(network: nn.Module, rate: float) -> None:
    """Gives the blocks their rates: from 0 at the first, in equal parts, to `rate` at the last.

    Blocks without a shortcut count, and lose nothing. Evaluation is not changed. A library's
    network must have been built with `rate`.

    Raises:
        ValueError: `rate` is not from 0 to below 1, or not that of a library's network.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a rate of stochastic depth is from 0 to below 1, such as 0.05: {rate}")
    blocks = [m for m in network.modules() if hasattr(type(m), "drop_path")]
    if not isinstance(network, Classifier):
        own = getattr(network, "model_kwargs", {}).get("arguments", {})
        built = max(own.get(name, 0) for name in DROP_PATH.values())
        if rate != built:
            raise ArgumentError(
                f"`drop_path={rate:g}`: the network was built with {built:g}, which stays: leave it"
                " out",
                drop_path=f"{rate:g}",
            )
    for number, block in enumerate(blocks):
        cast(Any, block).drop_path = rate * number / max(1, len(blocks) - 1)
