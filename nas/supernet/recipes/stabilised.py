"""Recipes that keep skip connections from winning, or judge operations by what they contribute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nas.supernet.recipe import Recipe
from nas.supernet.recipes.darts import DARTS_V1, PC_DARTS
from nas.supernet.settings import Freezing, Shapley

LISTED: tuple[Recipe, ...] = (
    replace(
        DARTS_V1,
        name="darts-minus",
        source="Chu et al., DARTS-, ICLR 2021 (arXiv 2009.01027); Meituan-AutoML/DARTS- 66ec8a5",
        auxiliary_skip=1.0,
    ),
    replace(
        DARTS_V1,
        name="oles",
        source="Jiang et al., Operation-Level Early Stopping, NeurIPS 2023; PasaLab/oles 20ecf3e",
        freezing=Freezing(),
    ),
    replace(
        PC_DARTS,
        name="shapley-nas",
        source="Xiao et al., Shapley-NAS, CVPR 2022 (arXiv 2206.09811); Euphoria16/Shapley-NAS ccbc396",
        edge_normalisation=False,
        solver="shapley",
        alpha_rate=DARTS_V1.alpha_rate,
        alpha_warmup_epochs=25,
        shapley=Shapley(),
    ),
)

_SHAPLEY = "Euphoria16/Shapley-NAS ccbc396, train_search.py"
# Where the settings stand in which a recipe differs from darts-v1.
SOURCES: dict[str, Mapping[str, str]] = {
    "darts-minus": {
        "auxiliary_skip": "Meituan-AutoML/DARTS- 66ec8a5, src/search/model_search.py: FactorizedReduce where it halves",
        "auxiliary_skip_decay": "Meituan-AutoML/DARTS- 66ec8a5, src/utils.py",
    },
    "oles": {
        "freezing_steps, freezing_threshold": "PasaLab/oles 20ecf3e, train_search.py: --count, --patience",
    },
    "shapley-nas": {
        "batch_size, learning_rate, final_rate, alpha_warmup_epochs, solver": _SHAPLEY,
        "shapley_permutations, shapley_images, shapley_truncation, shapley_momentum, shapley_step": _SHAPLEY,
        "shapley_deviations": f"{_SHAPLEY}, shap_estimation",
        "partial": "Euphoria16/Shapley-NAS ccbc396, model_search.py: k 4 and no edge normalisation",
    },
}
