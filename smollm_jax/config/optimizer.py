"""Define the settings of the optimizer and of its learning rate schedule."""

from dataclasses import dataclass
from typing import Literal

from smollm_jax.config.fields import check_fields, setting
from smollm_jax.runtime.errors import require

DecayShape = Literal["linear", "cosine", "1-sqrt"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers, AdamW for embedding, head and norms, under one learning rate."""
    learning_rate: float | None = setting(6e-4, "above 0", resume="schedule")
    """Peak learning rate. Default of sft: by the size of the model."""
    schedule: Literal["linear", "constant", "cosine", "wsd"] = setting("linear", resume="schedule")
    """After the warm-up: linear or cosine decay to the end, constant, or wsd (stable, then a decay)."""
    warmup_steps: int | None = setting(None, "0 or more", resume="schedule")
    """Steps of linear warm-up. Default: the recipe's, at most a tenth of the steps."""
    decay_steps: int | None = setting(None, "0 or more", resume="schedule")
    """Steps of the decay of wsd. Default: a fifth of the steps."""
    decay_shape: DecayShape = setting("linear", resume="schedule")
    """Shape of the decay of wsd. 1-sqrt falls fast at first: one minus the root of the decay's share."""
    final_learning_rate: float = setting(0.0, "0 or more", resume="schedule")
    """Learning rate at the end of a decay."""
    beta1: float = setting(0.9, "in [0, 1)")
    beta2: float = setting(0.95, "in [0, 1)")
    epsilon: float = setting(1e-8, "above 0")
    weight_decay: float = setting(0.01, "0 or more")  # Decoupled weight decay, without norm weights.
    clip_norm: float = setting(1.0, "above 0")  # Global gradient norm above which gradients are scaled down.
    muon_momentum: float = setting(0.95, "in [0, 1)")
    muon_weight_decay: float | None = setting(None, "0 or more")
    """Weight decay of what Muon updates. Default: the value of --weight-decay."""
    adamw_share: float = setting(1.0, "above 0")
    """Learning rate of what AdamW updates beside muon, as a share of the learning rate."""
    z_loss: float = setting(0.0, "0 or more")
    """Weight of the squared log-partition in the loss, which keeps logits small (0: none; 1e-4 is usual)."""
    ema: float = setting(0.0, "in [0, 1)")
    """Decay per step of a moving average of the weights, evaluated and exported beside them (0: none)."""
    max_bad_steps: int = setting(10, "above 0", resume="free")
    """Stop after this many steps in a row without finite gradients. Such steps change nothing."""

    @property
    def schedule_name(self) -> str:
        """Return the schedule with the shape of its decay if that is not linear."""
        return self.schedule if self.decay_shape == "linear" else f"{self.schedule} ({self.decay_shape} decay)"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("muon_momentum", "muon_weight_decay", "adamw_share"):
            value = getattr(self, name)
            used = self.optimizer == "muon" or value == getattr(OptimizerConfig, name)
            require(used, f"{name}={value} belongs to --optimizer muon; {self.optimizer} came")
        peak, final, schedule = self.learning_rate, self.final_learning_rate, self.schedule
        fits = peak is None or final <= peak
        require(fits, f"final_learning_rate={final} must not be above learning_rate={peak}")
        decays = final == 0 or schedule != "constant"
        require(decays, f"final_learning_rate={final} belongs to a schedule that decays; constant came")
        decay_fits = self.decay_steps is None or schedule == "wsd"
        require(decay_fits, f"decay_steps={self.decay_steps} belongs to --schedule wsd; {schedule} came")
        shape_fits = self.decay_shape == "linear" or schedule == "wsd"
        require(shape_fits, f"decay_shape={self.decay_shape} belongs to --schedule wsd; {schedule} came")

    @property
    def name(self) -> str:
        """Return the optimizer, and what else is trained with."""
        name = {"adamw": "AdamW", "muon": "Muon"}[self.optimizer]
        return name + f", z-loss {self.z_loss:g}" * (self.z_loss > 0) + f", EMA {self.ema:g}" * (self.ema > 0)

    @property
    def description(self) -> str:
        """Return the optimizer and its constants as a card shows them."""
        adamw = f"AdamW, betas {self.beta1:g} and {self.beta2:g}, epsilon {self.epsilon:g}"
        if self.optimizer == "adamw":
            return adamw
        share = "" if self.adamw_share == 1 else f", {self.adamw_share:g} of the learning rate"
        decay = "" if self.muon_weight_decay is None else f", weight decay {self.muon_weight_decay:g}"
        return f"Muon, momentum {self.muon_momentum:g}{decay}; for embedding, head and norms {adamw}{share}"
