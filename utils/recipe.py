"""A training recipe as one frozen value: what a script proposes and flags override."""

from dataclasses import asdict, dataclass, fields, replace


@dataclass(frozen=True)
class Recipe:
    """The numbers of a classification run. Each field is a flag of the same name.

    Epochs count from 0; the batch is the global one, whatever the number of devices.
    """

    arch: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str  # "step", "exp" or "cosine", see utils.schedule
    lr_step: int = 30
    lr_decay: float = 0.1
    warmup_epochs: float = 0.0
    img_size: int = 224
    crop_pct: float = 0.875  # evaluation: 224 out of 256
    min_scale: float = 0.08  # training: the smallest crop's share of the area
    hflip: float = 0.5

    def override(self, **values) -> "Recipe":
        """A recipe with the given values; None leaves a field as it is."""
        return replace(self, **{k: v for k, v in values.items() if v is not None})

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """The recipe saved with a run; fields that it did not know yet take their defaults."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})
