"""The papers in which merge methods are described, for model cards.

fold, passthrough, nearswap, nuslerp, multislerp, karcher and arcee_fusion have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv."""

    title: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


_TASK_ARITHMETIC = Paper("Editing Models with Task Arithmetic", "2212.04089")
_TIES = Paper("TIES-Merging: Resolving Interference When Merging Models", "2306.01708")
_DARE = Paper(
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", "2311.03099"
)
_DELLA = Paper("DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", "2406.11617")
_BREADCRUMBS = Paper("Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", "2312.06795")
_RAM = Paper("Behavior Knowledge Merge in Reinforced Agentic Models", "2601.13572")

PAPERS: Mapping[str, tuple[Paper, ...]] = {
    "linear": (
        Paper(
            "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
            "inference time",
            "2203.05482",
        ),
    ),
    "task_arithmetic": (_TASK_ARITHMETIC,),
    "ties": (_TIES,),
    "dare_linear": (_DARE,),
    "dare_ties": (_DARE, _TIES),
    "della_linear": (_DELLA,),
    "della": (_DELLA,),
    "breadcrumbs": (_BREADCRUMBS,),
    "breadcrumbs_ties": (_BREADCRUMBS, _TIES),
    "model_stock": (Paper("Model Stock: All we need is just a few fine-tuned models", "2403.19522"),),
    "sce": (Paper("FuseChat: Knowledge Fusion of Chat Models", "2408.07990"),),
    "ram": (_RAM,),
    "ramplus_tl": (_RAM,),
}
