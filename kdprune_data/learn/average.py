"""The moving average of what is learned (`--ema`)."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average(AveragedModel):
    """The moving average of weights and of buffers, norm statistics among them; it begins with the weights after the first step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch's stub lacks it
        super().__init__(model, multi_avg_fn=mean, use_buffers=True)
        self._mean = mean

    def follow(self, model: nn.Module) -> None:
        """A step on. As `update_parameters`, which sends the number of steps to the device each time, and waits until it is there."""
        if self.n_averaged == 0:
            self.update_parameters(model)
            return
        pairs = list(zip(*([*net.parameters(), *net.buffers()] for net in (self.module, model)), strict=True))
        for floating in (True, False):  # buffers that count are no floats
            if some := [(own.detach(), new.detach()) for own, new in pairs if own.is_floating_point() is floating]:
                self._mean([own for own, _ in some], [new for _, new in some], self.n_averaged)
        self.n_averaged += 1
