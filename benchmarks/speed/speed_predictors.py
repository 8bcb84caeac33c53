"""Neural predictors against torch-geometric's sparse way and against one training after another; features and GP.

    python -m benchmarks.speed.speed_predictors [--data ../shared/data] [--json] [--epochs 200] [--repeats 3]

One core (set OMP_NUM_THREADS=1), all in one run. Trainings are timed over a few epochs and scaled to `--epochs`, since
all epochs cost the same; predictions on samples and scaled to the whole table; what was scaled is printed.

* Ten seeds of CAP's fine-tuning (GIN 3 x 128, BPR) on 424 graphs of NAS-Bench-101, in the published batches of 10 and
  in ours of n / 16: one stack of ten against ten one after another, and against torch-geometric's sparse GIN with its
  DataLoader, ten one after another.
* Prediction of 423,624 graphs by one such network: dense chunks against torch-geometric's DataLoader in large batches.
* `gp-graf` fitted to 469 labels of NAS-Bench-201 and predicting all 15,625; path features of all NAS-Bench-101 graphs.

The floor is the multiply-adds of the weights (times 2, times 3 for training: forward and the two products of backward)
over the rate of a plain matrix product of the same shape, measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from predictors.graphs import GraphTable, as_table
from predictors.neural.batch import graph_batch
from predictors.neural.cap import Cap
from predictors.neural.training import predict
from predictors.path_features import path_features
from predictors.registry import make_predictor
from search_spaces.registry import load_space

SEEDS, LABELS, WIDTH, LAYERS = 10, 424, 128, 3
BATCHES = (10, LABELS // 16)  # CAP's, and this project's default
ALL_101, ALL_201 = 423_624, 15_625


def in_turn(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each action, all of them once per repeat, after one round to warm up.

    By the processor's clock, which other processes do not advance.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            begin = time.process_time()
            action()
            if repeat:
                times[name].append(time.process_time() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def nas_bench_101(data: Path) -> tuple[GraphTable, np.ndarray]:
    """All graphs of the table of text notations, and their accuracies."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(data / "nas-bench-101" / "accuracy.parquet")
    texts = table["arch"].to_pylist()
    accuracy = table[next(name for name in table.column_names if "test" in name)].to_numpy()
    vocabulary = load_space("nas-bench-101").vocabulary
    code = {op: i for i, op in enumerate(vocabulary)}
    ops = np.full((len(texts), 7), -1, np.int8)
    adjacency, mask = np.zeros((len(texts), 7, 7), bool), np.zeros((len(texts), 7), bool)
    upper = {n: np.triu_indices(n, 1) for n in range(2, 8)}
    for row, text in enumerate(texts):
        bits, _, names = text.partition(":")
        codes = [code[op] for op in ("input", *filter(None, names.split(",")), "output")]
        n = len(codes)
        ops[row, :n], mask[row, :n] = codes, True
        adjacency[row][upper[n]] = np.frombuffer(bits.encode(), np.uint8) == ord("1")
    return GraphTable(vocabulary, ops, adjacency, mask, np.zeros_like(ops)), accuracy


class SparseGin(nn.Module):
    """The same network as a user of torch-geometric writes it."""

    def __init__(self, operations: int):
        from torch_geometric.nn import GINConv

        super().__init__()
        self.embedding = nn.Embedding(operations, WIDTH)
        mlps = [
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(LAYERS)
        ]
        self.convolutions = nn.ModuleList(GINConv(mlp) for mlp in mlps)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(LAYERS))
        block = lambda: (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.PReLU())  # noqa: E731
        self.head = nn.Sequential(nn.Dropout(0.15), *block(), *block(), nn.Linear(WIDTH, 1))

    def forward(self, data) -> torch.Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.embedding(data.x)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x, data.edge_index))
            x = torch.relu(x) if i < LAYERS - 1 else x
        return self.head(global_mean_pool(x, data.batch)).squeeze(1)


def sparse_data(table: GraphTable, y: np.ndarray | None = None) -> list:
    """Undirected torch-geometric graphs."""
    found = []
    for row, graph in enumerate(table):
        data = graph.to_pyg(table.vocabulary)
        data.edge_index = torch.cat([data.edge_index, data.edge_index.flip(0)], 1)
        if y is not None:
            data.y = torch.tensor([float(y[row])])
        found.append(data)
    return found


def sparse_training(data: list, operations: int, batch: int, epochs: int) -> None:
    """One seed: AdamW, BPR, the DataLoader's shuffled batches."""
    from torch_geometric.loader import DataLoader

    model = SparseGin(operations)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    for _ in range(epochs):
        for part in DataLoader(data, batch, shuffle=True):
            scores = model(part)
            difference = scores[:, None] - scores[None]
            better = part.y[:, None] > part.y[None]
            loss = 2 * (nn.functional.softplus(-difference) * better).sum() / len(scores) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def sparse_prediction(model: SparseGin, data: list) -> torch.Tensor:
    from torch_geometric.loader import DataLoader

    return torch.cat([model(part) for part in DataLoader(data, 1024)])


def multiply_adds(nodes: float) -> float:
    """Of one graph of so many nodes: the MLPs of all layers, and the head."""
    return nodes * LAYERS * 2 * WIDTH * 2 * WIDTH + 2 * WIDTH * WIDTH + WIDTH


def gemm_rate(rows: int, repeats: int = 5) -> float:
    """Multiply-adds per second of [rows, 128] x [128, 256]."""
    x, w = torch.randn(rows, WIDTH), torch.randn(WIDTH, 2 * WIDTH)
    times = max(1, 20_000 // rows)

    def many() -> None:
        for _ in range(times):
            torch.mm(x, w)

    return times * rows * WIDTH * 2 * WIDTH / in_turn({"mm": many}, repeats)["mm"]


def training(table: GraphTable, accuracy: np.ndarray, batch: int, epochs: int, repeats: int) -> dict[str, float]:
    """Seconds of ten seeds at `epochs`, three ways, and the floor."""
    orders = [np.random.default_rng(seed).permutation(len(table))[:LABELS] for seed in range(SEEDS)]
    timed = 4
    sparse = sparse_data(table.take(orders[0]), accuracy[orders[0]])
    # From-scratch weights: fine-tuning all of them costs the same, whatever they start from.
    settings = Cap.Settings(mode="scratch", epochs=timed, batch=batch, device="cpu")

    def fit(count: int) -> None:
        problems = [(table.take(order), accuracy[order], None, None) for order in orders[:count]]
        Cap("nas-bench-101", table.vocabulary, settings).fit_many(problems, [np.random.default_rng(0)] * count)

    seconds = in_turn(
        {
            "stacked": lambda: fit(SEEDS),
            "alone": lambda: fit(1),
            "sparse": lambda: sparse_training(sparse, len(table.vocabulary), batch, timed),
        },
        repeats,
    )
    scale = epochs / timed
    nodes = float(table.take(orders[0]).mask.sum(1).mean())
    work = 3 * SEEDS * LABELS * epochs * multiply_adds(nodes)
    return {
        "stacked_seconds": seconds["stacked"] * scale,
        "one_after_another_seconds": seconds["alone"] * scale * SEEDS,
        "sparse_seconds": seconds["sparse"] * scale * SEEDS,
        "floor_seconds": work / gemm_rate(int(batch * nodes)),
    }


def prediction(table: GraphTable, sample: int, repeats: int) -> dict[str, float]:
    """Seconds of predicting the whole table, two ways, and the floor; the sparse graphs are made beforehand."""
    rows = np.random.default_rng(0).permutation(len(table))[:sample]
    part = table.take(rows)
    fitted = Cap("nas-bench-101", table.vocabulary, Cap.Settings(mode="scratch", epochs=1, device="cpu"))
    fitted.fit(part.take(np.arange(50)), np.arange(50.0), rng=np.random.default_rng(0))
    model, data = SparseGin(len(table.vocabulary)).eval(), sparse_data(part.take(np.arange(min(sample, 8192))))
    seconds = in_turn(
        {
            "dense": lambda: fitted.predict(part),
            "network": lambda: predict(fitted._model, 1, graph_batch(part, part.part_names)),
            "sparse": lambda: sparse_prediction(model, data),
        },
        repeats,
    )
    nodes = float(part.mask.sum(1).mean())
    return {
        "dense_seconds": seconds["dense"] * ALL_101 / len(part),
        "sparse_seconds": seconds["sparse"] * ALL_101 / len(data),
        "floor_seconds": ALL_101 * multiply_adds(nodes) / gemm_rate(4096 * 7),
    }


def closed_form(table: GraphTable, repeats: int) -> dict[str, float]:
    """Seconds of the path features of all NAS-Bench-101 graphs and of gp-graf on NAS-Bench-201 at 469 labels."""
    space = load_space("nas-bench-201")
    cells = as_table([space.graph(arch) for arch in space], space.vocabulary)
    order = np.random.default_rng(0).permutation(len(cells))[:469]
    y = path_features(cells)[0][order].sum(1) + np.random.default_rng(1).normal(size=469)

    def process() -> None:
        predictor = make_predictor("gp-graf", space.name, space.vocabulary)
        predictor.fit(cells.take(order), y, rng=np.random.default_rng(0)).predict(cells)

    seconds = in_turn({"features": lambda: path_features(table), "gp": process}, repeats)
    return {"path_features_seconds": seconds["features"], "gp_graf_seconds": seconds["gp"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public tables")
    parser.add_argument("--epochs", type=int, default=200, help="epochs that trainings are scaled to")
    parser.add_argument("--sample", type=int, default=32_768, help="graphs that predictions are timed on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, accuracy = nas_bench_101(arguments.data)
    result = {
        "training": {batch: training(table, accuracy, batch, arguments.epochs, arguments.repeats) for batch in BATCHES},
        "prediction": prediction(table, arguments.sample, arguments.repeats),
        "closed_form": closed_form(table, arguments.repeats),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    p, c = result["prediction"], result["closed_form"]
    print(
        f"ten seeds of CAP's fine-tuning, {LABELS} graphs, {arguments.epochs} epochs (scaled from 4, one seed for ten):"
    )
    for batch, t in result["training"].items():
        print(f"  batch {batch:<3} stacked          {t['stacked_seconds']:8.1f} s")
        for name, label in (("one_after_another", "one after another"), ("sparse", "torch-geometric, sparse")):
            seconds = t[f"{name}_seconds"]
            print(f"  {label:<26} {seconds:8.1f} s   {seconds / t['stacked_seconds']:.2f} times")
        share = t["floor_seconds"] / t["stacked_seconds"]
        print(f"  floor                      {t['floor_seconds']:8.1f} s   {share:.0%} reached")
    print(f"prediction of {ALL_101:,} graphs by one network (scaled from {arguments.sample:,} and 8,192):")
    print(f"  dense                      {p['dense_seconds']:8.1f} s")
    times, share = p["sparse_seconds"] / p["dense_seconds"], p["floor_seconds"] / p["dense_seconds"]
    print(f"  torch-geometric, sparse    {p['sparse_seconds']:8.1f} s   {times:.2f} times")
    print(f"  floor                      {p['floor_seconds']:8.1f} s   {share:.0%} reached")
    print(f"path features of {len(table):,} graphs: {c['path_features_seconds']:.2f} s (bar 5)")
    print(f"gp-graf, 469 labels, {ALL_201:,} predictions: {c['gp_graf_seconds']:.2f} s (bar 5)")


if __name__ == "__main__":
    main()
