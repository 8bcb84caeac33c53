"""BatchNorm and GroupNorm of [N, C, ...] with a residual sum and an activation after.

y = act((x - mean) / sqrt(var + eps) * weight + bias + residual). groups 0 is BatchNorm: statistics over samples and
positions, or the given ones in evaluation. Eager functions and launchers of `planes_triton`, `groups_triton` and
`partials_triton`. Statistics are float32 (float64 for float64); only x, the residual where the activation needs it, and
the statistics are kept for backward.

Bytes, with T those of x: groups that fit in registers 2 T forward and 3 T backward; others, and batches, 3 T and 5 T
(less what the cache still holds: the last pass walks backwards); evaluation 2 T and 3 T; each way T more for reading
a residual, and T for its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.handwritten.activations import ACTIVATIONS
from kernels.handwritten.launch import (
    aligned,
    arranged,
    ceil_div,
    empty_as,
    is_channels_last,
    kernels,
    mode,
    on_device,
    persistent_programs,
    power_of_two,
    warps_for,
    wide,
)

LARGEST_FORWARD, LARGEST_BACKWARD = 16384, 8192  # elements of a group held in registers
NARROWEST = 64  # bytes of adjacent channels below which channels_last groups are not read one by one


def _per_channel(value: Tensor | None, x: Tensor, default: float) -> Tensor:
    """A parameter [C], float32 at least, to broadcast along [N, C, S]."""
    if value is None:
        return x.new_full((), default)
    return value.to(x.dtype)[None, :, None]


def _spread(statistic: Tensor, x: Tensor, groups: int) -> Tensor:
    """[C] or [N * groups] to broadcast along [N, C, S]."""
    if not groups:
        return statistic.to(x.dtype)[None, :, None]
    return statistic.view(x.shape[0], groups, 1).repeat_interleave(x.shape[1] // groups, 1)


def _reduce(value: Tensor, groups: int) -> Tensor:
    """The mean of [N, C, S] over what shares statistics."""
    return value.unflatten(1, (groups, -1)).mean((2, 3)).flatten() if groups else value.mean((0, 2))


def _flat(x: Tensor) -> Tensor:
    return wide(x.flatten(2) if x.dim() > 2 else x[:, :, None]).contiguous()


def eager_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    groups: int,
    eps: float,
    act: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and biased variance ([C], or [N * groups]; empty where they were given)."""
    z = _flat(x)
    if mean is None or var is None:
        mean = _reduce(z, groups)
        var = _reduce((z - _spread(mean, z, groups)).square(), groups)
        found = mean, var
    else:
        found = z.new_empty(0), z.new_empty(0)
    z = (z - _spread(mean, z, groups)) * torch.rsqrt(_spread(var, z, groups) + eps)
    z = z * _per_channel(weight, z, 1.0) + _per_channel(bias, z, 0.0)
    z = z if residual is None else z + _flat(residual)
    y = ACTIVATIONS[act].forward(z, alpha).view(x.shape)
    return arranged(y, x), *found


def eager_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    fixed: bool,
    groups: int,
    eps: float,
    act: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, the residual's gradient (empty without one), dweight and dbias [C], wide. fixed: the statistics are given."""
    z = _flat(x)
    rstd = torch.rsqrt(_spread(var, z, groups) + eps)
    xhat = (z - _spread(mean, z, groups)) * rstd
    scale = _per_channel(weight, z, 1.0)
    z = xhat * scale + _per_channel(bias, z, 0.0)
    z = z if residual is None else z + _flat(residual)
    dz = ACTIVATIONS[act].backward(_flat(dy), z, alpha)
    dweight, dbias = (dz * xhat).sum((0, 2)), dz.sum((0, 2))
    dresidual = x.new_empty(0) if residual is None else arranged(dz.view(x.shape), x)
    dz = dz * scale
    if not fixed:
        mean_dz, mean_product = _reduce(dz, groups), _reduce(dz * xhat, groups)
        dz = dz - _spread(mean_dz, z, groups) - xhat * _spread(mean_product, z, groups)
    return arranged((dz * rstd).view(x.shape), x), dresidual, dweight, dbias


class _Shape:
    """The sizes of a launch over [N, C, S]."""

    def __init__(self, x: Tensor, groups: int):
        self.samples, self.channels = x.shape[0], x.shape[1]
        self.positions = x.numel() // (self.samples * self.channels)
        self.groups, self.width = groups, self.channels // max(groups, 1)
        self.last = is_channels_last(x)
        self.itemsize, self.x = x.element_size(), x
        # A tile of about 2048: along positions, or along channels where these are innermost.
        if self.last:
            self.block_c = min(power_of_two(self.channels), 64)
            self.block_s = min(power_of_two(self.positions), 2048 // self.block_c)
        else:
            self.block_s = min(power_of_two(self.positions), 1024)
            self.block_c = min(power_of_two(self.channels), max(1, 2048 // self.block_s // 2))
        # Positions are split where samples and channels alone would leave the device idle.
        blocks = self.samples * ceil_div(self.channels, self.block_c)
        most = ceil_div(self.positions, self.block_s)
        wanted = min(ceil_div(persistent_programs(x), blocks), most)
        self.length = ceil_div(most, wanted) * self.block_s
        self.splits = ceil_div(self.positions, self.length)
        self.grid = (blocks * self.splits,)

    def fits(self, largest: int) -> bool:
        """Whether groups are read one by one into registers."""
        tile = power_of_two(self.width) * power_of_two(self.positions)
        narrow = self.last and self.width * self.itemsize < NARROWEST and self.width < self.channels
        return self.groups > 0 and tile <= largest and not narrow

    @property
    def tile(self) -> dict[str, int | bool]:
        """Compile-time arguments of kernels over tiles of channels and positions."""
        return {"LAST": self.last, "SC": aligned(self.positions), "BC": self.block_c, "BS": self.block_s}

    @property
    def group_tile(self) -> dict[str, int | bool]:
        """Compile-time arguments of kernels over whole groups."""
        block_c, block_s = power_of_two(self.width), power_of_two(self.positions)
        return {
            "LAST": self.last,
            "SC": aligned(self.positions),
            "BC": block_c,
            "BS": block_s,
            "num_warps": warps_for(block_c * block_s, 512),
        }

    def rows(self, by_group: bool, splits: int) -> tuple[int, int, int, int, int, int, int]:
        """rows, items and the addressing of `items_of` for partial sums [N, splits, C]."""
        n, c, g, k = self.samples, self.channels, self.groups, self.width
        return (n * g, splits * k, g, splits * c, k, k, c) if by_group else (c, n * splits, c, 0, 1, 1, c)


def _parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    weight = torch.ones(channels, device=x.device) if weight is None else weight.contiguous()
    return weight, torch.zeros(channels, device=x.device) if bias is None else bias.contiguous()


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    groups: int,
    eps: float,
    act: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager_forward`: one kernel for groups in registers and in evaluation, else three."""
    if mode(x) == "eager":
        return eager_forward(x, residual, weight, bias, mean, var, groups, eps, act, alpha)
    x = arranged(x, x)
    residual = None if residual is None else arranged(residual, x)
    weight, bias = _parameters(x, weight, bias)
    shape, y = _Shape(x, groups), empty_as(x)
    other = x if residual is None else residual
    sizes = (shape.channels, shape.positions)
    flags = {"ACT": act, "RESIDUAL": residual is not None}
    found = x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    with on_device(x):
        if mean is None or var is None:
            rows, items, *addressing = shape.rows(groups > 0, shape.splits)
            mean = x.new_empty(rows, dtype=torch.float32)
            var = torch.empty_like(mean)
            found = mean, var
            if shape.fits(LARGEST_FORWARD):
                grid = (shape.samples * groups,)
                kernels("groups").group_forward[grid](
                    x,
                    other,
                    weight,
                    bias,
                    y,
                    mean,
                    var,
                    *sizes,
                    groups,
                    shape.width,
                    eps,
                    alpha,
                    **flags,
                    **shape.group_tile,
                )
                return y, mean, var
            parts = x.new_empty(shape.samples * shape.splits * shape.channels, dtype=torch.float32)
            squares = torch.empty_like(parts)
            kernels("partials").moments[shape.grid](x, parts, squares, *sizes, shape.length, shape.splits, **shape.tile)
            count = float(x.numel() // rows)
            lengths = (shape.positions, shape.length, shape.splits, count)
            kernels("partials").merge_moments[(ceil_div(rows, 16),)](
                parts, squares, mean, var, rows, items, *addressing, *lengths, BI=64, BR=16
            )
        kernels("planes").apply[shape.grid](
            x,
            other,
            mean,
            var,
            weight,
            bias,
            y,
            *sizes,
            max(groups, 1),
            shape.length,
            shape.splits,
            eps,
            alpha,
            BATCH=groups == 0,
            **flags,
            **shape.tile,
        )
    return y, *found


def backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    fixed: bool,
    groups: int,
    eps: float,
    act: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eager_backward`: two kernels for groups in registers and in evaluation, three for batches, else four."""
    if mode(x) == "eager":
        return eager_backward(dy, x, residual, weight, bias, mean, var, fixed, groups, eps, act, alpha)
    x = arranged(x, x)
    dy, residual = arranged(dy, x), None if residual is None else arranged(residual, x)
    weight, bias = _parameters(x, weight, bias)
    shape, dx = _Shape(x, groups), empty_as(x)
    dresidual = x.new_empty(0) if residual is None else empty_as(x)
    resident = not fixed and shape.fits(LARGEST_BACKWARD)
    splits = 1 if resident else shape.splits
    sums = x.new_empty(shape.samples * splits * shape.channels, dtype=torch.float32)
    products = torch.empty_like(sums)
    dweight, dbias = (x.new_empty(shape.channels, dtype=torch.float32) for _ in range(2))
    tensors = (dy, x, x if residual is None else residual, mean, var, weight, bias)
    results = (dx, dx if residual is None else dresidual)
    sizes = (shape.channels, shape.positions, max(groups, 1))
    cuts = (shape.length, shape.splits)
    flags = {"ACT": act, "RESIDUAL": residual is not None}
    with on_device(x):
        if resident:
            kernels("groups").group_backward[(shape.samples * groups,)](
                *tensors, *results, sums, products, *sizes, shape.width, eps, alpha, **flags, **shape.group_tile
            )
        else:
            flags["BATCH"] = groups == 0
            kernels("planes").grad_sums[shape.grid](
                *tensors, *results, sums, products, *sizes, *cuts, eps, alpha, FIXED=fixed, **flags, **shape.tile
            )
        rows, items, *addressing = shape.rows(False, splits)
        kernels("partials").fold[(ceil_div(rows, 16),)](
            sums, products, weight, dbias, dweight, rows, items, *addressing, WEIGHTED=False, BI=64, BR=16
        )
        if not resident and not fixed:
            total, product = dbias, dweight
            if groups:
                rows, items, *addressing = shape.rows(True, splits)
                total, product = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
                kernels("partials").fold[(ceil_div(rows, 16),)](
                    sums, products, weight, total, product, rows, items, *addressing, WEIGHTED=True, BI=64, BR=16
                )
            count = float(x.numel() // rows)
            kernels("planes").grad_apply[shape.grid](
                *tensors, total, product, *results, *sizes, *cuts, count, eps, alpha, **flags, **shape.tile
            )
    return dx, dresidual, dweight, dbias
