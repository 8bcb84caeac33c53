"""Figures of an evaluation show its numbers."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from torch import nn

from nas.plots import svg
from nas.training.data import Dataset, Split
from nas.training.evaluation import Evaluation, evaluate_model
from nas.training.evaluation.plots import WIDEST_LABEL, confusion_figure, reliability_figure
from search_spaces.common.errors import UserError


def evaluation(classes: int, images: int = 400) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = 3 * nn.functional.one_hot(labels, classes) + 1.5 * torch.randn(images, classes, generator=generator)
    part = Split(logits[:, :, None, None], labels)
    names = tuple(f"a class with the long name {k}" for k in range(classes))
    data = Dataset("made-up", part, part, part, names, (0.0,) * classes, (1.0,) * classes)
    return evaluate_model(nn.Flatten(), data, latency=False)


def test_every_count_of_ten_classes_is_written():
    found = evaluation(10)
    axes = confusion_figure(found, "abcdefghij").axes[0]
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): int(t.get_text()) for t in axes.texts}
    counts = np.array(found.confusion)
    assert written == {(i, j): counts[i, j] for i, j in zip(*np.nonzero(counts), strict=True)}
    assert [t.get_text() for t in axes.get_yticklabels()] == list("abcdefghij")
    right, wrong = (image.get_array() for image in axes.images)
    assert np.allclose(right.diagonal(), found.class_accuracy)
    assert right.mask.sum() == 90
    shares = 100 * counts / counts.sum(1, keepdims=True)
    assert np.allclose(wrong.compressed(), shares[(counts > 0) & ~np.eye(10, dtype=bool)])


def test_a_hundred_classes_have_names_that_do_not_overlap():
    figure = confusion_figure(evaluation(100, 3000))
    axes = figure.axes[0]
    assert not axes.texts
    labels = axes.get_yticklabels()
    assert len(labels) == 100
    assert all(len(t.get_text()) <= WIDEST_LABEL for t in labels)
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in labels]
    assert all(low.y1 <= high.y0 + 0.5 for high, low in itertools.pairwise(boxes))
    whole = figure.bbox
    for box in (*boxes, axes.yaxis.label.get_window_extent(), axes.xaxis.label.get_window_extent()):
        assert whole.x0 <= box.x0
        assert box.x1 <= whole.x1
        assert whole.y0 <= box.y0


@pytest.mark.parametrize("classes", [2, 10, 20])
def test_nothing_is_cut_off(classes):
    figure = confusion_figure(evaluation(classes))
    figure.canvas.draw()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1


def test_bars_are_the_bins():
    found = evaluation(10)
    accuracy, amounts = reliability_figure(found).axes
    filled = [b for b in found.bins if b.count]
    bars, gaps = accuracy.containers
    assert np.allclose([bar.get_height() for bar in bars], [b.accuracy for b in filled])
    assert np.allclose([bar.get_x() for bar in bars], [b.low for b in filled])
    spans = [sorted((b.accuracy, b.confidence)) for b in filled]
    assert np.allclose([(gap.get_y(), gap.get_y() + gap.get_height()) for gap in gaps], spans)
    heights = [bar.get_height() for bar in amounts.containers[0]]
    assert np.isclose(sum(heights), 100)
    assert np.isclose(np.dot(heights, [gap.get_height() for gap in gaps]) / 100, found.calibration_error)


def test_svg_and_wrong_names():
    found = evaluation(3)
    for figure in (confusion_figure(found), reliability_figure(found)):
        assert ET.fromstring(svg(figure)).tag.endswith("svg")
    with pytest.raises(UserError, match="3, one for each class"):
        confusion_figure(found, ("a", "b"))
