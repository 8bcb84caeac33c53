"""The functions that exported source is put together from, as text: what a layer does not use is not written."""

DIMS = {
    "channels-first": {
        "batch": "(0, *space)",
        "layer": "(1, *space)",
        "instance": "space",
        "channel": "1",
        "channel-group": "1",
    },
    "tokens": {"batch": "(0, 1)", "layer": "(1, 2)", "instance": "1", "channel": "2", "channel-group": "2"},
}
HELPERS = {
    "wide": '''
def wide(x: Tensor) -> Tensor:
    """Half precision as float32, in which statistics are taken."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
''',
    "mean": '''
def mean(x: Tensor, dims) -> Tensor:
    """The mean over `dims`, which stay as dimensions of size 1."""
    return wide(x).mean(dims, keepdim=True)
''',
    "variance": '''
def variance(x: Tensor, dims) -> Tensor:
    """The biased variance over `dims`, which stay as dimensions of size 1."""
    x = wide(x)
    return (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True)
''',
    "mean_square": '''
def mean_square(x: Tensor, dims) -> Tensor:
    """The mean of squares over `dims`, which stay as dimensions of size 1."""
    return wide(x).square().mean(dims, keepdim=True)
''',
    "mean_absolute": '''
def mean_absolute(x: Tensor, dims) -> Tensor:
    """The mean of absolute values over `dims`, which stay as dimensions of size 1."""
    return wide(x).abs().mean(dims, keepdim=True)
''',
    "signed_log": '''
def signed_log(x: Tensor, eps: float) -> Tensor:
    """sign(x) log(|x| + eps)."""
    return x.sign() * (x.abs() + eps).log()
''',
    "signed_sqrt": '''
def signed_sqrt(x: Tensor, eps: float) -> Tensor:
    """sign(x) sqrt(|x| + eps)."""
    return x.sign() * (x.abs() + eps).sqrt()
''',
    "gaussian": '''
def gaussian(x: Tensor) -> Tensor:
    """exp(-x^2)."""
    return (-x * x).exp()
''',
    "guarded": '''
def guarded(x: Tensor, eps: float) -> Tensor:
    """A divisor, moved away from zero by eps."""
    return torch.where(x < 0, x - eps, x + eps)
''',
}
OVER_GROUP = {
    ("channels-first", "group"): '''
def over_group(moment, x: Tensor, groups: int) -> Tensor:
    """A moment over space and the channels of a group, repeated for each channel: [B, C, 1, ...]."""
    found = moment(x.unflatten(1, (groups, -1)).flatten(2), 2)
    return found.expand(-1, -1, x.shape[1] // groups).reshape(x.shape[:2] + (1,) * (x.dim() - 2))
''',
    ("channels-first", "channel-group"): '''
def over_channel_group(moment, x: Tensor, groups: int) -> Tensor:
    """A moment over the channels of a group, repeated for each channel."""
    grouped = x.unflatten(1, (groups, -1))
    return moment(grouped, 2).expand_as(grouped).flatten(1, 2)
''',
    ("tokens", "group"): '''
def over_group(moment, x: Tensor, groups: int) -> Tensor:
    """A moment over all tokens and the channels of a group, repeated for each channel: [B, 1, C]."""
    found = moment(x.unflatten(2, (groups, -1)), (1, 3))
    return found.expand(-1, -1, -1, x.shape[2] // groups).flatten(2)
''',
    ("tokens", "channel-group"): '''
def over_channel_group(moment, x: Tensor, groups: int) -> Tensor:
    """A moment over the channels of a group, repeated for each channel."""
    grouped = x.unflatten(2, (groups, -1))
    return moment(grouped, 3).expand_as(grouped).flatten(2)
''',
}
