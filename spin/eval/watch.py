"""A warning for the known failure of the SPIN loss."""

from collections import deque

import numpy as np

from spin.infra import distributed


class ForgettingWatch:
    """Warns once if a policy is forgetting how to denoise, the known failure of the SPIN loss.

    The criterion: averaged over WINDOW steps, both errors exceed the opponent's, and the excess on
    real images is more than half of that on generated ones.
    """

    WINDOW = 50
    WARNING = (
        "the error on real images (DPO: preferred ones) has risen by more than half as much as the "
        "one on generated images. The policy is forgetting how to denoise, however good its loss; "
        "how much of that it bears is a matter of degree: see tutorial/00_the_map.md, 'Reading the "
        "picture'"
    )

    def __init__(self, name: str, log: list[dict]):
        """name: the model's. log: the run's so far, in which the model may have begun."""
        self.name = name
        self.deltas = deque(maxlen=self.WINDOW)  # (delta_data, delta_gen) of the last steps
        self.warned = False
        for line in log:
            if line["model"] == name and "delta_data" in line:
                self.deltas.append((line["delta_data"], line["delta_gen"]))
                self.warned = self.warned or self.is_forgetting()

    def update(self, step: int, line: dict) -> None:
        """Take a step's line of the log. SFT's has no deltas."""
        if "delta_data" not in line or self.warned:
            return
        self.deltas.append((line["delta_data"], line["delta_gen"]))
        if self.is_forgetting():
            distributed.print0(f"warning: {self.name}, step {step}: {self.WARNING}")
            self.warned = True

    def is_forgetting(self) -> bool:
        if len(self.deltas) < self.WINDOW:
            return False
        delta_data, delta_gen = np.mean(self.deltas, axis=0)
        return delta_data > delta_gen / 2 > 0
