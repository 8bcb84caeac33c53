"""Each proxy by itself, straight from its formula: own forward, own backward, hooks on modules, deep copies.

Slow on purpose; nothing is shared with `zero_cost`. Every function takes (model, inputs, labels) and leaves `model`.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

OWN_DRAWS = 0x9E3779B1  # where the toolkit's own seeds start


def ready(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).train()
    model.zero_grad()
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def loss_gradients(model, inputs, labels) -> list[tuple[torch.Tensor, torch.Tensor]]:
    model = ready(model)
    F.cross_entropy(model(inputs), labels).backward()
    return [
        (m.weight.detach(), torch.zeros_like(m.weight) if m.weight.grad is None else m.weight.grad)
        for m in layers(model)
    ]


def grad_norm(model, inputs, labels):
    return sum(float(g.norm()) for _, g in loss_gradients(model, inputs, labels))


def snip(model, inputs, labels):
    """By the gradient to a mask of ones on every weight."""
    model = ready(model)
    masks = []
    for module in layers(model):
        mask = torch.ones_like(module.weight, requires_grad=True)
        masks.append(mask)
        weight = module.weight.detach()
        if isinstance(module, nn.Conv2d):
            module.forward = lambda x, m=module, w=weight, k=mask: F.conv2d(
                x, w * k, m.bias, m.stride, m.padding, m.dilation, m.groups
            )
        else:
            module.forward = lambda x, m=module, w=weight, k=mask: F.linear(x, w * k, m.bias)
    F.cross_entropy(model(inputs), labels).backward()
    return sum(float(mask.grad.abs().sum()) for mask in masks if mask.grad is not None)


def plain(model, inputs, labels):
    return sum(float((w.double() * g.double()).sum()) for w, g in loss_gradients(model, inputs, labels))


def l2_norm(model, inputs=None, labels=None):
    return sum(float(m.weight.detach().norm()) for m in layers(model))


def grasp(model, inputs, labels):
    """Two forward passes: a constant gradient, then backward through its product with the gradient."""
    model = ready(model)
    weights = [m.weight for m in layers(model)]
    constant = torch.autograd.grad(F.cross_entropy(model(inputs), labels), weights, allow_unused=True)
    moving = torch.autograd.grad(F.cross_entropy(model(inputs), labels), weights, create_graph=True, allow_unused=True)
    sum((c * g).sum() for c, g in zip(constant, moving) if c is not None).backward()
    return sum(float((-w.detach() * w.grad).double().sum()) for w in weights if w.grad is not None)


def fisher(model, inputs, labels, weighted=True):
    model = ready(model)
    outputs = []
    handles = [
        m.register_forward_hook(lambda m, _, out: (out.retain_grad(), outputs.append((m, out)))[:0] or None)
        for m in layers(model)
    ]
    F.cross_entropy(model(inputs), labels).backward()
    for handle in handles:
        handle.remove()
    score = 0.0
    for module, a in outputs:
        if a.grad is None:
            continue
        product = a.detach() * a.grad
        per_channel = (product.flatten(2).sum(2) if product.dim() > 2 else product) ** 2
        values = 0.5 * per_channel.mean(0)
        # broadcast over the shape of the weight, as the released code does
        score += float(
            (values.view(-1, *[1] * (module.weight.dim() - 1)) * torch.ones_like(module.weight)).sum()
            if weighted
            else values.sum()
        )
    return score


def knas(model, inputs, labels):
    """The mean entry of the Gram matrix of the samples' gradients."""
    model = ready(model)
    weights = [m.weight for m in layers(model)]
    losses = F.cross_entropy(model(inputs), labels, reduction="none")
    rows = []
    for one in losses:
        found = torch.autograd.grad(one, weights, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([torch.zeros(w.numel()) if g is None else g.flatten() for w, g in zip(weights, found)]))
    stacked = torch.stack(rows).double()
    return float((stacked @ stacked.T).mean())


def zico(model, batches):
    per_batch = [loss_gradients(model, x, y) for x, y in batches]
    score = 0.0
    for layer in range(len(per_batch[0])):
        grads = np.stack([found[layer][1].double().flatten().numpy() for found in per_batch])
        std, mean = grads.std(0), np.abs(grads).mean(0)
        kept = std > 0
        total = (mean[kept] / std[kept]).sum()
        if total > 0:
            score += math.log(total)
    return score


def without_batch_norm(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double().train()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d):
                setattr(parent, name, nn.Identity())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    return model


def flow(model, inputs):
    model = without_batch_norm(model)
    total = model(torch.ones(1, *inputs.shape[1:], dtype=torch.float64)).sum()
    model.zero_grad()
    total.backward()
    pairs = [(m.weight.detach(), m.weight.grad) for m in layers(model) if m.weight.grad is not None]
    return float(total), pairs


def synflow(model, inputs, labels=None):
    return sum(float((w * g).abs().sum()) for w, g in flow(model, inputs)[1])


def logsynflow(model, inputs, labels=None):
    return sum(float((w * torch.log(1 + g)).abs().sum()) for w, g in flow(model, inputs)[1])


def synflow_forward(model, inputs, labels=None):
    return math.log(flow(model, inputs)[0])


def input_jacobian(model, inputs) -> np.ndarray:
    model, x = ready(model), inputs.clone().requires_grad_()
    y = model(x)
    y.backward(torch.ones_like(y))
    return x.grad.reshape(len(x), -1).double().numpy()


def jacov(model, inputs, labels=None):
    values = np.linalg.eigvalsh(np.corrcoef(input_jacobian(model, inputs))).clip(0)
    return float(-np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5)))


def epe_nas(model, inputs, labels, classes=10):
    rows, scores = input_jacobian(model, inputs), {}
    for c in set(labels.tolist()):
        chosen = rows[labels.numpy() == c]
        if len(chosen) > 1:
            matrix = np.corrcoef(chosen)
            scores[c] = np.log(np.abs(matrix) + 1e-5).sum() / (len(matrix) if classes > 100 else 1)
    if classes <= 100:
        return sum(abs(s) for s in scores.values())
    return sum(abs(a - b) for a in scores.values() for b in scores.values()) / len(scores)


def relu_codes(model, inputs) -> list[torch.Tensor]:
    """[B, units] bool per ReLU module call."""
    model, found = ready(model), []
    handles = [
        m.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten(1) > 0))
        for m in model.modules()
        if isinstance(m, nn.ReLU)
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def nwot_kernel(model, inputs) -> np.ndarray:
    kernel = np.zeros((len(inputs), len(inputs)))
    for codes in relu_codes(model, inputs):
        c = codes.double().numpy()
        kernel += c @ c.T + (1 - c) @ (1 - c).T
    return kernel


def nwot(model, inputs, labels=None):
    return float(np.linalg.slogdet(nwot_kernel(model, inputs))[1])


def swap(model, inputs, labels=None, samples=16):
    """Different rows of the matrix units x samples, row by row."""
    rows = torch.cat([codes[:samples].T for codes in relu_codes(model, inputs)])
    return len(torch.unique(rows, dim=0))


def linear_regions(model, inputs, labels=None):
    return len(torch.unique(torch.cat(relu_codes(model, inputs), 1), dim=0))


def gradsign(model, inputs, labels, samples=16):
    """A batch of one for every sample."""
    model = ready(model)
    signs = [0.0] * len(layers(model))
    for n in range(min(samples, len(inputs))):
        model.zero_grad()
        F.cross_entropy(model(inputs[n : n + 1]), labels[n : n + 1]).backward()
        for i, module in enumerate(layers(model)):
            if module.weight.grad is not None:
                signs[i] = signs[i] + module.weight.grad.sign()
    return sum(float(s.abs().sum()) for s in signs if isinstance(s, torch.Tensor))


def ntk(model, inputs, samples=16) -> np.ndarray:
    """Gradients of each sample's summed logits by jacrev-free loops: one graph for each."""
    rows = []
    for n in range(min(samples, len(inputs))):
        copied = ready(model)
        copied(inputs[:samples])[n].sum().backward()
        rows.append(torch.cat([m.weight.grad.flatten() for m in layers(copied) if m.weight.grad is not None]))
    stacked = torch.stack(rows).double().numpy()
    return stacked @ stacked.T


def leaf_maps(model, inputs) -> list[np.ndarray]:
    model, found = ready(model), []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, _, out: found.append(out[0].detach().clone()))
    model(inputs)
    return [f.flatten(1).double().numpy() for f in found if f.dim() >= 2]


def least_correlation(rows: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.nan_to_num(np.atleast_2d(np.corrcoef(rows)), posinf=0, neginf=0)
    return float(np.linalg.eigvalsh(matrix).min())


def meco(model, inputs, labels=None):
    return sum(least_correlation(rows) for rows in leaf_maps(model, inputs))


def meco_opt(model, inputs, labels=None):
    score = 0.0
    for rows in leaf_maps(model, inputs):
        count = min(8, len(rows))
        score += least_correlation(rows[[i * len(rows) // count for i in range(count)]]) * len(rows) / count
    return score


def initialise(model, generator, deviation):
    """In place, in the order of the modules: weights ~ N(0, deviation(fan in)^2), biases 0, BatchNorm 1 and 0."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * deviation(fan_in))
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
                module.running_mean.zero_()
                module.running_var.fill_(1)


def zen(model, inputs, seed=0):
    """Two forwards; the running variances that BatchNorm itself keeps."""
    model, generator = ready(model), torch.Generator().manual_seed(OWN_DRAWS + seed)
    initialise(model, generator, lambda fan_in: 1.0)
    shape = (min(16, len(inputs)), *inputs.shape[1:])
    x, other = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    features = []
    model.pool.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    with torch.no_grad():
        model(x)
        model(x + 1e-2 * other)
    score = math.log(float((features[0] - features[1]).abs().sum((1, 2, 3)).mean()))
    return score + sum(
        math.log(math.sqrt(float(m.running_var.mean()))) for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    )


def az_nas(model, inputs, seed=0) -> dict[str, float]:
    """Stage by stage on networks with `stem` and `cells`: entropies, then each cell's own vector-Jacobian product."""
    model, generator = ready(model), torch.Generator().manual_seed(OWN_DRAWS + seed)
    initialise(model, generator, lambda fan_in: math.sqrt(2 / fan_in))
    x = torch.randn(inputs.shape, generator=generator)
    features = [model.stem(x).detach()]
    for cell in model.cells:
        features.append(cell(features[-1]).detach())
    entropies = []
    for f in features:
        values = np.linalg.eigvalsh(np.cov(f.transpose(0, 1).flatten(1).double().numpy(), bias=True))
        share = values / values.sum()
        entropies.append(-(share * np.log(share + 1e-8)).sum())
    terms = []
    for cell, before in zip(model.cells, features):
        leaf = before.clone().requires_grad_()
        after = cell(leaf)
        sign = torch.randint(2, after.shape, generator=generator) * 2.0 - 1
        received = torch.autograd.grad(after, leaf, sign)[0]
        if received.shape[2] != sign.shape[2]:
            received = F.pixel_unshuffle(received, 2)
        correlations = torch.einsum("nchw,ndhw->cd", received.double(), sign.double())
        s = float(torch.linalg.svdvals(correlations)[0]) / (len(sign) * sign.shape[2] * sign.shape[3])
        terms.append(-s - 1 / (s + 1e-6) + 2)
    return {
        "az-expressivity": sum(entropies),
        "az-progressivity": min(np.diff(entropies)),
        "az-trainability": sum(terms) / len(terms),
    }


def dextr(model, inputs, labels=None, points=16, step=1e-4):
    """Central differences around the circle; for smooth networks."""
    model, maps = ready(model), leaf_maps(model, inputs)
    ratios = [s[-1] / s[0] for s in (np.linalg.svd(rows, compute_uv=False) for rows in maps) if s[0] > 0]
    x = inputs[0]
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(OWN_DRAWS)).to(x)
    y = y - x * (x * y).sum() / (x * x).sum()
    y = y * x.norm() / y.norm()

    def curve(shift):
        t = torch.arange(points, dtype=x.dtype).view(-1, 1, 1, 1) * (2 * math.pi / points) + shift
        with torch.no_grad():
            return model(x * t.cos() + y * t.sin()).numpy()

    before, here, after = curve(-step), curve(0.0), curve(step)
    v, a = (after - before) / (2 * step), (after - 2 * here + before) / step**2
    normal = a - v * ((v * a).sum(1) / (v * v).sum(1))[:, None]  # the part of the acceleration that turns
    k = math.log1p(np.mean(np.linalg.norm(normal, axis=1) / (v * v).sum(1)))
    s = math.log1p(sum(ratios))
    return s * k / (s + k)
