"""nas predict explain: drawing and JSON of a saved predictor, both methods, bad input."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from predictors.registry import load_predictor, make_predictor
from search_spaces.registry import load_space

ARCH = "|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|skip_connect~0|nor_conv_1x1~1|avg_pool_3x3~2|"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: predictor's name -> the folder of one fitted to convolutions counted."""
    space = load_space("nas-bench-201")
    rng = np.random.default_rng(0)
    graphs = list(dict.fromkeys(space.graph(space.sample(rng)) for _ in range(40)))
    y = np.array([sum("conv" in op for op in graph.ops) + 0.1 * rng.normal() for graph in graphs])
    settings = {"carl": {"width": 8, "layers": 1, "epochs": 3, "device": "cpu"}}

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        predictor = make_predictor(name, "nas-bench-201", space.vocabulary, **settings.get(name, {}))
        predictor.fit(graphs, y, rng=np.random.default_rng(0)).save(folder)
        return folder

    return make


def test_critical_parts_of_carl(nas, saved, tmp_path):
    folder = saved("carl")
    command = ("predict", "explain", folder, "--arch", ARCH, "--out", "e.svg", "--method", "critical", "--json")
    status, out, _ = nas(*command)
    assert status == 0
    result = json.loads(out)
    space = load_space("nas-bench-201")
    graph = space.graph(space.decode(ARCH))
    nodes, edges = load_predictor(folder).importances([graph])
    assert result["method"] == "critical"
    assert result["arch"] == ARCH
    assert [n["operation"] for n in result["nodes"]] == list(graph.ops)
    np.testing.assert_allclose([n["importance"] for n in result["nodes"]], nodes[0], atol=1e-6)
    for edge in result["edges"]:
        assert edge["importance"] == pytest.approx(edges[0, edge["from"], edge["to"]], abs=1e-6)
    assert len(result["edges"]) == graph.adjacency.sum()
    assert ElementTree.parse(tmp_path / "e.svg").getroot().tag.endswith("svg")


def test_ablation_of_a_gaussian_process(nas, saved, tmp_path):
    folder = saved("gp-graf")
    status, out, _ = nas("predict", "explain", folder, "--arch", ARCH, "--out", "e.svg", "--json")
    assert status == 0
    result = json.loads(out)
    assert result["method"] == "ablation"
    importance = {n["operation"]: n["importance"] for n in result["nodes"]}
    assert importance["none"] == 0
    assert importance["nor_conv_3x3"] > abs(importance["avg_pool_3x3"])
    text = (tmp_path / "e.svg").read_text()
    assert "supports" in text
    assert "by gp-graf" in text


def test_people_see_the_operations_in_order(nas, saved):
    status, out, _ = nas("predict", "explain", saved("gp-graf"), "--arch", ARCH, "--out", "e.svg")
    assert status == 0
    assert "ablation" in out
    assert "e.svg" in out
    assert out.index("nor_conv_3x3") < out.index("skip_connect")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "|nor_conv_3x3~0|", "--out", "e.svg"], "NAS-Bench-201 cell"),
        (["--arch", ARCH.replace("avg_pool_3x3", "avg_pool"), "--out", "e.svg"], "avg_pool_3x3"),
        (["--arch", ARCH, "--out", "e.png"], "e.svg"),
        (["--arch", ARCH, "--out", "e.svg", "--method", "critical"], "ablation"),
        (["--arch", ARCH, "--out", "e.svg", "--method", "deletion"], "a method of explanation"),
        (["--arch", ARCH, "--out", "e.svg", "--space", "nas-bench-101"], "nas-bench-201"),
    ],
)
def test_bad_input_is_named(arguments, message, nas, saved, tmp_path):
    status, _, error = nas("predict", "explain", saved("gp-graf"), *arguments)
    assert status == 2
    assert message in " ".join(error.split())
    assert not (tmp_path / "e.svg").exists()


def test_a_folder_without_a_predictor(nas, tmp_path):
    status, _, error = nas("predict", "explain", tmp_path, "--arch", ARCH, "--out", "e.svg")
    assert status == 2
    assert "predictor.json" in error
