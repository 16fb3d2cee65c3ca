"""A teacher that runs beside its student: it is shown the very pixels that the student is, and what it says is not kept."""

from __future__ import annotations

import torch
from torch import Tensor

from kdprune_data.errors import SourceError
from kdprune_data.learn.inference import Predictor


class Teacher:
    """A network that says what it thinks of a batch: in eval mode, without gradients, in the numbers of its own weights (float32)."""

    def __init__(self, predictor: Predictor) -> None:
        self._normalisation = predictor.normalisation
        net = predictor.net.to(predictor.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self._net = net.eval().requires_grad_(False)
        self._asked = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits, float of shape (n, c), of a batch as it was rendered: uint8 of shape (n, 3, s, s), on the teacher's device.

        Raises SourceError when those of the first batch are no finite numbers: a GPU would wait to have every batch looked at.
        """
        with torch.no_grad():  # not inference_mode, whose tensors take no part in a student's gradients
            logits: Tensor = self._net(self._normalisation.apply(pixels))
        if not self._asked and not bool(torch.isfinite(logits).all()):
            raise SourceError("the live teacher's logits are not finite numbers: its weights are broken; use another")
        self._asked = True
        return logits
