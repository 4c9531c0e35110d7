"""Define the settings of training on pairs of answers."""

from dataclasses import dataclass
from typing import Literal

from smollm_jax.config.fields import check_fields, setting
from smollm_jax.runtime.errors import require

# means over pairs in the metrics. A reward is beta times a log-prob less the reference's
FIGURES = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected",
)  # fmt: skip
PairLoss = Literal["sigmoid", "ipo", "apo_zero"]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """The loss of pairs of a chosen and a rejected answer, with --data-kind pairs."""

    pair_loss: PairLoss = "sigmoid"
    """sigmoid: DPO (arXiv 2305.18290); ipo: 2310.12036, by mean log-probs; apo_zero: 2408.06266."""
    # alignment-handbook, recipes/smollm2/dpo, for UltraFeedback and a learning rate of 1e-6
    beta: float = setting(0.5, "above 0")
    """Weight of the distance from the reference model: a larger beta stays closer to it."""
    label_smoothing: float = setting(0.0, "0 or more")
    """Share of pairs taken to be labelled the wrong way round, below 0.5. For sigmoid."""

    def __post_init__(self) -> None:
        check_fields(self)
        smoothing = self.label_smoothing
        require(smoothing < 0.5, f"label_smoothing={smoothing} must be below 0.5, where a label says nothing")
        fits = smoothing == 0 or self.pair_loss == "sigmoid"
        require(fits, f"label_smoothing={smoothing} is for --pair-loss sigmoid; {self.pair_loss} came")
