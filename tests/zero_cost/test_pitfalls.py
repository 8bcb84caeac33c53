"""What public implementations stumble over, each with the answer that is defined here."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zero_cost
from search_spaces import load_space
from zero_cost import UserError, score
from zero_cost.definition import proxy


def batch(count: int = 8, seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator), torch.randint(10, (count,), generator=generator)


class Small(nn.Module):
    """Convolution, norm, activation, pooling, head; the parts are given."""

    def __init__(self, norm: nn.Module | None = None, act: nn.Module | None = None, classes: int = 10, width: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(width)
        self.act, self.act2 = act or nn.ReLU(), act or nn.ReLU()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.act2(self.second(self.act(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


class Functional(Small):
    def forward(self, x):
        x = F.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


class InPlace(Small):
    """In-place forms of the same function, and an addition into a convolution's output."""

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu_())
        x += 0
        return self.head(F.relu(x, inplace=True).mean((2, 3)))


@pytest.mark.parametrize("kind", [Functional, InPlace])
def test_functional_and_in_place_activations_count_like_modules(kind):
    data = [batch(), batch(seed=1)]
    expected, found = score(Small(), data), score(kind(), data)
    assert not {"nwot", "fisher", "grad-norm", "swap", "gradsign"} & set(found.reasons)
    leaf_modules_only = {"meco", "meco-opt", "dextr"}  # by definition: outputs of modules
    for name in set(expected) - leaf_modules_only:
        assert found[name] == pytest.approx(expected[name], rel=1e-6, nan_ok=True), name


def test_codes_are_read_before_an_in_place_relu():
    """ReLU6 and LeakyReLU leave signs that are only right before the call."""

    class Leaky(Small):
        def forward(self, x):
            return self.head(F.leaky_relu(self.first(x), -0.5, inplace=True).mean((2, 3)))  # folds the negative half

    model, (inputs, labels) = Leaky(), batch(4)
    codes = (model.first(inputs) > 0).flatten(1).double()
    kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
    assert score(model, (inputs, labels), "nwot")["nwot"] == pytest.approx(float(torch.logdet(kernel)))


def test_a_model_without_relu_has_no_code():
    found = score(Small(act=nn.Tanh()), batch(), ["nwot", "nwot-live", "swap", "linear-regions", "grad-norm"])
    assert math.isnan(found["nwot"])
    assert found.reasons["nwot"] == found.reasons["linear-regions"] == "the model calls no ReLU"
    assert "ReLU" in found.reasons["swap"]
    assert set(found.reasons) == {"nwot", "nwot-live", "swap", "linear-regions"}


def test_nwot_of_equal_samples_is_singular_and_says_so():
    inputs, labels = batch()
    inputs[1] = inputs[0]
    found = score(Small(), (inputs, labels), "nwot")
    assert math.isnan(found["nwot"])
    assert "singular" in found.reasons["nwot"]


def test_nwot_live_leaves_out_what_the_output_does_not_need():
    class Dead(Small):
        def forward(self, x):
            F.relu(self.first(x))
            return super().forward(x)

    data = batch()
    found, plain = score(Dead(), data, ["nwot", "nwot-live"]), score(Small(), data, ["nwot", "nwot-live"])
    assert found["nwot-live"] == pytest.approx(plain["nwot-live"])
    assert plain["nwot-live"] == plain["nwot"]
    assert found["nwot"] != pytest.approx(plain["nwot"])


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_swap_saturates_at_the_number_of_patterns(samples):
    assert score(Small(width=32), batch(samples, size=16), "swap")["swap"] == 2**samples


def test_batch_norm_uses_the_batch_also_where_the_model_is_in_eval_mode():
    model = Small()
    with torch.no_grad():
        model.norm.running_mean.fill_(5)
    trained = score(model.train(), batch())
    evaluated = score(model.eval(), batch())
    assert dict(trained) == pytest.approx(dict(evaluated), nan_ok=True)


def test_batch_norm_without_running_statistics_still_has_a_zen_score():
    expected = score(Small(nn.BatchNorm2d(6)), batch(), "zen")["zen"]
    found = score(Small(nn.BatchNorm2d(6, track_running_stats=False)), batch(), "zen")
    assert found["zen"] == pytest.approx(expected, rel=1e-6)


def test_zen_over_repeats_is_the_mean_and_follows_the_running_average():
    class Even(nn.Module):
        """The same magnitude everywhere, so that the variance is known."""

        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.norm(x).mean((2, 3)))

    model = Even()
    one, many = (score(model, batch(16, size=32)[0], "zen", repeats=r)["zen"] for r in (1, 30))
    assert one == pytest.approx(many, abs=0.1)  # N(0, 1) inputs have variance 1, where the average starts
    # without weights before the norm only the inputs differ: log of 3 * 32 * 32 * gamma * E|N(0, 1)|
    assert one == pytest.approx(math.log(3 * 32 * 32 * 0.01 * math.sqrt(2 / math.pi)), abs=0.05)


def test_synflow_beyond_single_precision():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(30)])

        def forward(self, x):
            return self.layers(x)

    model = Deep()
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.fill_(-1.0)
    found = score(model, torch.zeros(2, 64), ["synflow", "synflow-forward", "logsynflow"])
    assert found["synflow"] == pytest.approx(30 * 64.0**31)  # 5e57
    assert found["synflow-forward"] == pytest.approx(31 * math.log(64))


def test_synflow_skips_every_normalisation_and_keeps_biases():
    """So no gradient is negative, and the forward form is exact where there are no biases."""
    data = batch()
    for norm in (nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6), nn.Identity()):
        model = Small(norm)
        assert score(model, data, "synflow")["synflow"] == pytest.approx(score(Small(), data, "synflow")["synflow"])
    with torch.no_grad():
        for parameter in (model.first.bias, model.second.bias, model.head.bias):
            parameter.zero_()
    found = score(model, data, ["synflow", "synflow-forward"])
    assert found["synflow"] == pytest.approx(3 * math.exp(found["synflow-forward"]))  # Euler: R for each of 3 layers


def test_fisher_with_and_without_the_weights_of_a_channel():
    class Wide(nn.Module):
        """All channels of all layers have 5 weights."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 10)

        def forward(self, x):
            return self.b(self.a(x).relu())

    found = score(Wide(), (torch.randn(6, 5), torch.arange(6)), ["fisher", "fisher-channels"])
    assert found["fisher"] == pytest.approx(5 * found["fisher-channels"])


def test_zico_needs_two_batches_and_says_so_when_a_loader_ends_early():
    model, data = Small(), [batch(), batch(seed=1)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(8)), batch_size=8)
    assert "two batches" in score(model, loader, "zico").reasons["zico"]
    assert not score(model, data, "zico").reasons
    with pytest.raises(UserError, match="at least one batch"):
        score(model, [], "zico")


def test_zico_ignores_layers_and_entries_without_variation():
    class Half(Small):
        def forward(self, x):
            return super().forward(x) + 0 * self.head(x.mean((2, 3)).repeat(1, 2))

    data = [batch(), batch()]  # no entry varies
    assert score(Small(), data, "zico")["zico"] == 0
    assert math.isfinite(score(Half(), [batch(), batch(seed=1)], "zico")["zico"])


def test_jacov_counts_equal_samples_without_complex_numbers():
    inputs, labels = batch(6)
    inputs[1] = inputs[0]
    model = Small(nn.GroupNorm(2, 6))  # samples do not meet
    value = score(model, (inputs, labels), "jacov")["jacov"]
    assert value < -0.9e5  # an eigenvalue 0 costs 1 / 1e-5
    assert math.isfinite(value)


def test_a_constant_jacobian_row_is_no_value():
    class Sum(nn.Module):
        def forward(self, x):
            return x.flatten(1).sum(1, keepdim=True).expand(-1, 10)

    found = score(Sum(), batch(), "jacov")
    assert math.isnan(found["jacov"])
    assert "constant" in found.reasons["jacov"]


def test_epe_nas_leaves_out_classes_of_one_sample():
    inputs, _ = batch(4)
    assert "no class" in score(Small(), (inputs, torch.arange(4)), "epe-nas").reasons["epe-nas"]
    pairs = score(Small(), (inputs, torch.tensor([0, 0, 1, 2])), "epe-nas")
    assert pairs["epe-nas"] > 0


def test_containers_are_no_features():
    """Wrapping a module changes nothing."""
    data = batch()
    wrapped = Small()
    wrapped.first = nn.Sequential(nn.Sequential(wrapped.first))
    assert score(wrapped, data, "meco")["meco"] == pytest.approx(score(Small(), data, "meco")["meco"])


def test_ntk_of_equal_samples_is_capped_and_finite():
    inputs, labels = batch(4)
    inputs[1] = inputs[0]
    model = Small(nn.GroupNorm(2, 6))
    assert score(model, (inputs, labels), "ntk-condition")["ntk-condition"] == pytest.approx(-(2.0**23) / 4)


def test_shared_modules_count_once_per_weight_and_once_per_call():
    class Twice(Small):
        def forward(self, x):
            x = self.second(self.second(self.first(x)).relu()).relu()
            return self.head(x.mean((2, 3)))

    class Unrolled(Small):
        def __init__(self):
            super().__init__()
            self.third = nn.Conv2d(6, 6, 3, padding=1)
            self.third.load_state_dict(self.second.state_dict())

        def forward(self, x):
            x = self.third(self.second(self.first(x)).relu()).relu()
            return self.head(x.mean((2, 3)))

    shared, unrolled = score(Twice(), batch()), score(Unrolled(), batch())
    assert shared["nwot"] == pytest.approx(unrolled["nwot"])
    assert shared["macs"] == unrolled["macs"]
    assert shared["fisher"] == pytest.approx(unrolled["fisher"], rel=1e-6)
    assert shared["plain"] == pytest.approx(unrolled["plain"], rel=1e-5)  # W (g' + g'') = W g' + W g''
    assert shared["l2-norm"] < unrolled["l2-norm"]


def test_the_identity_stage_of_az_nas_has_no_value():
    class Staged(Small):
        def stages(self):
            return ["first", "norm2", "second"]

        def __init__(self):
            super().__init__()
            self.norm2 = nn.Identity()

        def forward(self, x):
            return self.head(self.second(self.norm2(self.first(x))).mean((2, 3)))

    found = score(Staged(), batch())
    assert "identity" in found.reasons["az-trainability"]
    assert math.isfinite(found["az-expressivity"])
    assert "stages" in score(Small(), batch()).reasons["az-expressivity"]
    assert math.isfinite(score(Small(), batch(), stages=["first", "second"])["az-trainability"])


def test_higher_is_better_everywhere():
    reversed_names = {name for name, found in zero_cost.PROXIES.items() if found.sign < 0}
    found = score(Small(), [batch(), batch(seed=1)], reversed_names)
    assert {"ntk-condition", "hash-redundancy"} <= reversed_names
    assert set(found.reasons) == {"spectrum"}  # of implicit networks
    assert all(found[name] <= 0 for name in reversed_names - {"spectrum"})


@proxy("bad", needs=("logits",), formula="1 / 0", source="a test")
def infinite(captured):
    return captured.logits.new_tensor(1.0) / 0


def test_a_value_that_is_not_finite_is_nan_with_a_reason():
    found = score(Small(), batch(), [infinite])
    assert math.isnan(found["bad"])
    assert found.reasons["bad"] == "not finite: inf"


CELLS = load_space("nas-bench-201")


def test_a_network_has_its_own_operations_only():
    """Not all operations with a mask, which would give every cell the same parameters."""
    rng = np.random.default_rng(0)
    for arch in [CELLS.sample(rng) for _ in range(4)]:
        model = CELLS.build(arch, channels=4, cells_per_stage=1)
        found = score(model, torch.zeros(2, 3, 8, 8), ["params", "l2-norm"])
        assert found["params"] == CELLS.cost(arch, channels=4, cells_per_stage=1)["params"]
        convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(convolutions) == 1 + 3 * sum(o in (2, 3) for o in arch) + 2 * 3 + 1
        assert found["l2-norm"] == pytest.approx(sum(float(w.detach().norm()) for w in convolutions), rel=1e-6)


def test_cells_without_convolutions_and_without_connection():
    """Without convolutions the stem and the reductions still have ReLUs; without connection all samples are alike."""
    names = ["nwot", "nwot-live", "grad-norm", "jacov", "live-macs"]
    skips, nothing = (CELLS.build((o,) * 6, channels=4, cells_per_stage=1) for o in (1, 0))
    assert not score(skips, batch(size=16), names).reasons
    found = score(nothing, batch(size=16), names)
    assert "singular" in found.reasons["nwot"]
    assert "does not depend on the input" in found.reasons["jacov"]
    assert found["live-macs"] == 0


def test_scoring_keeps_no_activation_alive():
    model, data = Small(), [batch(), batch(seed=1)]

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    score(model, data)
    before = tensors()
    for _ in range(3):
        score(model, data)
    assert tensors() == before


def test_jacov_of_unrelated_samples_is_minus_their_number():
    """All eigenvalues are 1 where the gradients are uncorrelated: the batch sets the scale."""

    class Quadratic(nn.Module):
        def forward(self, x):
            return (x * x).sum(1, keepdim=True) / 2  # J = x

    for count in (4, 16):
        signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(32)] for i in range(1, count + 1)])
        found = score(Quadratic(), signs, "jacov")["jacov"]  # rows of a Hadamard matrix, of mean 0
        assert found == pytest.approx(-count, rel=1e-4)


def test_gradients_by_sample_see_batch_norm_as_a_norm_of_each_map():
    model, (inputs, labels) = Small().double(), batch(6)
    expected = 0.0
    signs = []
    for n in range(6):
        loss = F.cross_entropy(model(inputs[n : n + 1].double()), labels[n : n + 1])
        signs.append(torch.autograd.grad(loss, [model.first.weight, model.second.weight, model.head.weight]))
    expected = sum(float(torch.stack(layer).sign().sum(0).abs().sum()) for layer in zip(*signs))
    whole = torch.autograd.grad(F.cross_entropy(model(inputs.double()), labels), [model.first.weight])[0]
    assert score(model, (inputs.double(), labels), "gradsign")["gradsign"] == expected
    assert not torch.allclose(whole, sum(s[0] for s in signs) / 6)  # samples meet in the batch's statistics


def test_tuples_and_flat_outputs_are_no_feature_maps():
    class Mixed(nn.Module):
        """A leaf that returns a tuple, a leaf that returns rows, and one feature map."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.map, self.row, self.state = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.GRUCell(4, 4)
            self.steps = nn.GRU(4, 4, batch_first=True)

        def forward(self, x):
            x = self.map(x)
            return self.row(self.steps(x.flatten(2).transpose(1, 2))[0][:, -1])

    model, (inputs, _) = Mixed(), batch(4)
    rows = model.map(inputs[:1])[0].flatten(1).detach().double()
    expected = float(torch.linalg.eigvalsh(torch.corrcoef(rows))[0])
    assert score(model, inputs, "meco")["meco"] == pytest.approx(expected, rel=1e-4)


def test_proxies_of_classes_refuse_other_tasks():
    """Instead of a constant for all architectures."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    pixels = torch.randint(5, (4, 8, 8))
    found = score(model, (batch(4)[0], pixels), ["epe-nas", "hash-accuracy", "snip"])
    assert found.reasons == dict.fromkeys(("epe-nas", "hash-accuracy"), "needs one class label per sample")


def test_a_gpu_is_asked_to_repeat_itself_in_single_precision():
    seen = []

    class Looks(Small):
        def forward(self, x):
            convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
            seen.append(
                (convolutions.deterministic, convolutions.benchmark, convolutions.allow_tf32, products.allow_tf32)
            )
            return super().forward(x)

    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark = True
    try:
        score(Looks(), batch(), ["grad-norm"])
        assert set(seen) == {(True, False, False, False)}
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before[1]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == (before[0], before[2])


def test_a_shuffled_loader_follows_the_seed_and_leaves_the_random_state():
    inputs, labels = batch(32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    first = score(Small(), loader, "grad-norm", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    assert dict(score(Small(), loader, "grad-norm", seed=1)) == dict(first)
    assert dict(score(Small(), loader, "grad-norm", seed=2)) != dict(first)
