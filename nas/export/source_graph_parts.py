"""Graph convolutions in plain torch, as text: with the parameters and values of those of torch_geometric.

Their definitions: GCN (Kipf and Welling, ICLR 2017, equation 2), GAT (Velickovic et al., ICLR 2018, equations 1-5),
GIN (Xu et al., ICLR 2019, equation 4.1), ChebNet (Defferrard et al., NeurIPS 2016, equation 4, largest eigenvalue
taken as 2), GraphSAGE (Hamilton et al., NeurIPS 2017, mean aggregation), ARMA (Bianchi et al., 2021, equation 9) and
k-GNN (Morris et al., AAAI 2019, equation 2).
"""

FUNCTIONS = {
    "arriving": '''
def arriving(messages: Tensor, target: Tensor, nodes: int) -> Tensor:
    """For each node the sum of the messages [edges, ...] that arrive there."""
    return messages.new_zeros(nodes, *messages.shape[1:]).index_add(0, target, messages)
''',
    "propagate": '''
def propagate(x: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """For each node the weighted sum of its neighbours."""
    return arriving(weight[:, None] * x[source], target, len(x))
''',
    "with_loops": '''
def with_loops(edge_index: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Sources and targets of the edges, with one loop at every node."""
    source, target = edge_index[:, edge_index[0] != edge_index[1]]
    loops = torch.arange(nodes, device=edge_index.device)
    return torch.cat([source, loops]), torch.cat([target, loops])
''',
    "symmetric": '''
def symmetric(source: Tensor, target: Tensor, ends: Tensor, x: Tensor) -> Tensor:
    """The weights 1 / sqrt(d_source d_target) of all edges, degrees counted at `ends`; 0 where a degree is 0."""
    degree = arriving(x.new_ones(len(ends)), ends, len(x))
    scale = torch.where(degree > 0, degree.clamp(min=1).rsqrt(), 0)
    return scale[source] * scale[target]
''',
    "glorot": '''
def glorot(*shape: int) -> nn.Parameter:
    """Uniform weights by the sum of the last two sizes (Glorot and Bengio, AISTATS 2010, equation 16)."""
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
''',
}
NEEDS = {
    "GCNConv": ("arriving", "propagate", "with_loops", "symmetric"),
    "GATConv": ("arriving", "with_loops", "glorot"),
    "GINConv": ("arriving",),
    "ChebConv": ("arriving", "propagate", "symmetric"),
    "SAGEConv": ("arriving",),
    "ARMAConv": ("arriving", "propagate", "symmetric", "glorot"),
    "GraphConv": ("arriving",),
}
CONVOLUTIONS = {
    "GCNConv": '''
class GCNConv(nn.Module):
    """A linear map, then the sum over neighbours and itself, scaled by both degrees (Kipf and Welling 2017)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.lin = nn.Linear(inputs, outputs, bias=False)
        nn.init.xavier_uniform_(self.lin.weight)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = with_loops(edge_index, len(x))
        weight = symmetric(source, target, target, x)
        return propagate(self.lin(x), source, target, weight) + self.bias
''',
    "GATConv": '''
class GATConv(nn.Module):
    """Attention of every node to its neighbours and itself, in several heads (Velickovic et al. 2018)."""

    def __init__(self, inputs: int, head_width: int, heads: int):
        super().__init__()
        self.att_src = glorot(1, heads, head_width)
        self.att_dst = glorot(1, heads, head_width)
        self.bias = nn.Parameter(torch.zeros(heads * head_width))
        self.lin = nn.Linear(inputs, heads * head_width, bias=False)
        nn.init.xavier_uniform_(self.lin.weight)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        nodes, heads = len(x), self.att_src.shape[1]
        source, target = with_loops(edge_index, nodes)
        x = self.lin(x).unflatten(1, (heads, -1))
        scores = (x * self.att_src).sum(-1)[source] + (x * self.att_dst).sum(-1)[target]
        scores = nn.functional.leaky_relu(scores, 0.2)
        # Softmax over the edges that arrive at a node; its largest score is taken off for the exponential's sake.
        lowest = scores.new_full((nodes, heads), -torch.inf)
        largest = lowest.scatter_reduce(0, target[:, None].expand(-1, heads), scores.detach(), "amax")
        scores = (scores - largest[target]).exp()
        attention = scores / (arriving(scores, target, nodes) + 1e-16)[target]
        return arriving(attention[:, :, None] * x[source], target, nodes).flatten(1) + self.bias
''',
    "GINConv": '''
class GINConv(nn.Module):
    """A linear map of the node plus the sum of its neighbours (Xu et al. 2019)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("eps", torch.zeros(1))
        self.nn = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        return self.nn(arriving(x[source], target, len(x)) + (1 + self.eps) * x)
''',
    "ChebConv": '''
class ChebConv(nn.Module):
    """The first two Chebyshev polynomials of the scaled Laplacian, each with a linear map (Defferrard et al. 2016)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.lins = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for _ in range(2))
        for linear in self.lins:
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index[:, edge_index[0] != edge_index[1]]
        weight = -symmetric(source, target, source, x)
        return self.lins[0](x) + self.lins[1](propagate(x, source, target, weight)) + self.bias
''',
    "SAGEConv": '''
class SAGEConv(nn.Module):
    """Linear maps of the mean of the neighbours and of the node itself (Hamilton et al. 2017)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.lin_l = nn.Linear(inputs, outputs)
        self.lin_r = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        count = arriving(x.new_ones(len(target)), target, len(x)).clamp(min=1)
        return self.lin_l(arriving(x[source], target, len(x)) / count[:, None]) + self.lin_r(x)
''',
    "ARMAConv": '''
class ARMAConv(nn.Module):
    """An autoregressive moving average filter of one layer: neighbours plus the node itself (Bianchi et al. 2021)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = glorot(1, 1, outputs, outputs)  # for further layers; one has no use for it
        self.init_weight = glorot(1, inputs, outputs)
        self.root_weight = glorot(1, 1, inputs, outputs)
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, outputs))
        ACT_LINE

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        weight = symmetric(source, target, target, x)
        out = propagate(x @ self.init_weight[0], source, target, weight)
        out = out + x @ self.root_weight[0, 0] + self.bias[0, 0]
        return ACT_CALL
''',
    "GraphConv": '''
class GraphConv(nn.Module):
    """Linear maps of the sum of the neighbours and of the node itself (Morris et al. 2019)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.lin_rel = nn.Linear(inputs, outputs)
        self.lin_root = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        return self.lin_rel(arriving(x[source], target, len(x))) + self.lin_root(x)
''',
}
