"""Adaptive Balance of BatchNorm (AdaB2N) for continual learning: task-weighted batch statistics, adaptive momentum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.norm_layout import channel_dim
from search_spaces.primitives.primitive import Primitive


class AdaB2N(nn.Module):
    """BatchNorm of [B, C, ...] whose training statistics weigh tasks instead of samples.

    `set_tasks(tasks)` before a forward pass says of which task (0, 1, ...) each sample is; tasks seen so far get the
    weights w_t = (exp(theta_t) + n_t) / sum, n_t the samples of task t in the batch, and a sample w_t / n_t. A task
    missing from the batch keeps its share, as in the published code. Mean and variance about that mean follow from
    these; without tasks they are those of BatchNorm. The running values (biased variance) take the share eta: 1 / n for
    kappa = 0, momentum for kappa = 1, else eta <- eta / (eta + (1 - momentum)^kappa), first momentum^kappa.
    `loss` after a forward pass in training: mean squared distances of the batch's mean and variance from the running
    ones. Evaluation is BatchNorm's. Parameters: weight [C] 1, bias [C] 0, theta [tasks] 0.
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    eta: Tensor
    seen: Tensor

    def __init__(self, channels: int, tasks: int = 1, kappa: float = 1.0, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.tasks, self.kappa, self.momentum, self.eps = tasks, kappa, momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.theta = nn.Parameter(torch.zeros(tasks))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("eta", torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(0))
        self.batch_tasks: Tensor | None = None
        self.loss: Tensor | None = None

    def set_tasks(self, tasks: Tensor | None) -> None:
        """tasks: int64 [B] of the next batches, None for equal samples."""
        self.batch_tasks = tasks
        if tasks is not None:
            self.seen.copy_(torch.maximum(self.seen, tasks.max().to(self.seen) + 1))

    def sample_weights(self, tasks: Tensor) -> Tensor:
        """[B]: the share of each sample in the batch statistics."""
        seen = int(self.seen)
        counts = torch.bincount(tasks, minlength=seen)
        shares = self.theta[:seen].exp() + counts
        return (shares / shares.sum())[tasks] / counts[tasks]

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        shape = (1, -1) + (1,) * (x.dim() - 2)
        if self.training:
            mean, variance = self.batch_statistics(y, shape)
            self.update(mean, variance)
        else:
            mean, variance = self.running_mean, self.running_var
        y = (y - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)

    def batch_statistics(self, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(mean, variance), each [C]."""
        if self.batch_tasks is None:
            share = torch.full_like(x[:, 0].flatten(1)[:, 0], 1 / x.shape[0])
        else:
            share = self.sample_weights(self.batch_tasks).to(x.dtype)
        mean = share @ x.flatten(2).mean(2)
        return mean, share @ (x - mean.view(shape)).square().flatten(2).mean(2)

    @torch.compiler.disable
    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running values and set `loss`."""
        with torch.no_grad():
            count = int(self.batches.add_(1))
            if self.kappa == 0:
                self.eta.fill_(1 / count)
            elif self.kappa == 1:
                self.eta.fill_(self.momentum)
            elif count == 1:
                self.eta.fill_(self.momentum**self.kappa)
            else:
                self.eta.copy_(self.eta / (self.eta + (1 - self.momentum) ** self.kappa))
            self.running_mean += self.eta * (mean - self.running_mean)
            self.running_var += self.eta * (variance - self.running_var)
            targets = self.running_mean.clone(), self.running_var.clone()
        distances = (mean - targets[0]).square().mean(), (variance - targets[1]).square().mean()
        self.loss = distances[0] + distances[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"loss": None}  # a tensor with a history can neither be copied nor stored

    def reset_running_stats(self) -> None:
        """The running values as they begin; the tasks seen stay."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches.zero_()
        self.eta.zero_()

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, tasks={self.tasks}, kappa={self.kappa}, momentum={self.momentum}"


def set_tasks(model: nn.Module, tasks: Tensor | None) -> None:
    """Tell every AdaB2N of a model the tasks [B] of the next batch. Errors: UserError for a task that none knows."""
    for module in model.modules():
        if isinstance(module, AdaB2N):
            if tasks is not None and not 0 <= int(tasks.min()) <= int(tasks.max()) < module.theta.numel():
                raise UserError(int(tasks.max()), f"tasks from 0 to {module.theta.numel() - 1}")
            module.set_tasks(tasks)


def adab2n_loss(model: nn.Module) -> Tensor:
    """The sum of the AdaB2N losses of the last training batch, to be added to the task's loss times a factor.

    Errors: UserError if there was no such batch.
    """
    losses = [m.loss for m in model.modules() if isinstance(m, AdaB2N) and m.loss is not None]
    if not losses:
        raise UserError(type(model).__name__, "a model with AdaB2N after a forward pass in training")
    return torch.stack(losses).sum()


def adab2n(
    channels: int, *, layout: str = "channels-first", tasks: int = 1, kappa: float = 1.0, momentum: float = 0.1
) -> nn.Module:
    """AdaB2N for at most `tasks` tasks. Errors: UserError unless tasks >= 1 and 0 <= kappa <= 1."""
    channel_dim(channels, layout, ("channels-first",))
    if tasks < 1:
        raise UserError(tasks, "at least one task", "1")
    if not 0 <= kappa <= 1:
        raise UserError(kappa, "kappa between 0 and 1", str(min(max(kappa, 0), 1)))
    return AdaB2N(channels, tasks, kappa, momentum)


PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "adab2n",
        "normalisation",
        "BatchNorm with samples weighted by (exp(theta_t) + n_t) / n_t of their task; running share eta by kappa",
        "Lyu et al., Overcoming Recency Bias of Normalization Statistics in Continual Learning (NeurIPS 2023, arXiv "
        "2310.08855): Adaptive Balance of BN, and its published code",
        adab2n,
        ("channels-first",),
        parameters="weight [C] 1, bias [C] 0, theta [tasks] 0",
        needs=("running-statistics", "batch"),
    ),
)
