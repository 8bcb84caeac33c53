"""Which dimension of a tensor holds the channels that a normalisation is made for."""

from __future__ import annotations

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.primitives.primitive import LAYOUTS


def channel_dim(channels: int, layout: str, supported: tuple[str, ...] = LAYOUTS) -> int:
    """1 for `channels-first` [B, C, ...], -1 for `tokens` [..., C].

    Errors: UserError if there is no channel or the layout is not among `supported`.
    """
    if channels < 1:
        raise UserError(channels, "at least one channel")
    if layout not in supported:
        raise UserError(
            layout, f"a layout that this normalisation has ({one_of(supported)})", nearest(layout, supported)
        )
    return 1 if layout == "channels-first" else -1


def divides(parts: int, channels: int, what: str) -> int:
    """`parts`. Errors: UserError unless it is a positive divisor of `channels`."""
    if parts < 1 or channels % parts:
        smaller = max((d for d in range(1, min(max(parts, 1), channels) + 1) if channels % d == 0), default=1)
        raise UserError(parts, f"{what}: a divisor of {channels} channels", str(smaller))
    return parts
