"""The SAEs that are compared."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sae_lens_flex.saes.budgets import doubling_budgets

# The schemes of the one SAE, by how its loss weighs the budgets.
SCHEMES = (
    "even",
    "half_on_k",
    "quarter_on_k",
    "rising",
    "doubling",
    "doubling_sqrt",
    "doubling_rising",
    "doubling_half_on_k",
    "every_eighth",
)
# SAEs that are trained for one k each. "topk" is SAELens's, "batchtopk" and "matryoshka" are its
# BatchTopK and Matryoshka BatchTopK. This package's kernels train them all.
FAMILIES = ("topk", "batchtopk", "matryoshka")


@dataclass(frozen=True)
class Kind:
    """
    An SAE to train.

    Args:
        name (str): What results call it.
        architecture (str): SAELens's name, or this package's.
        k (int): Latents kept in training.
        budgets (list[int]): Budgets that it is measured at.
        fields (dict[str, Any]): Fields of its config.
        longer (int): How many times as long as the others it is trained, at their learning rate.
    """

    name: str
    architecture: str
    k: int
    budgets: list[int]
    fields: dict[str, Any] = field(default_factory=dict)
    longer: int = 1


def scheme_fields(scheme: str, k: int) -> dict[str, Any]:
    """Return `budgets` and `level_weights` of a scheme, with c_j for the weight of budget j.

    even: c_j = 1 / k for every j of 1..k, as in the paper.
    half_on_k: half of that, and 1/2 more on k.
    quarter_on_k: three quarters of that, and 1/4 more on k.
    rising: c_j in proportion to j.
    doubling: even over 1, 2, 4, ... k, as in MSAE (arXiv 2502.20578).
    doubling_sqrt: over these, c_j in proportion to sqrt(j).
    doubling_rising: over these, c_j in proportion to j. Of `even`, the budgets from j/2 to j have
        a share of the loss that is in proportion to j; here j alone has it.
    doubling_half_on_k: half of `doubling`, and 1/2 more on k.
    every_eighth: even over 8, 16, ... k.
    """
    if scheme == "even":
        return {}
    if scheme == "half_on_k":
        return {"level_weights": [1.0] * (k - 1) + [k + 1.0]}
    if scheme == "quarter_on_k":
        return {"level_weights": [1.0] * (k - 1) + [k / 3 + 1.0]}
    if scheme == "rising":
        return {"level_weights": [float(j) for j in range(1, k + 1)]}
    budgets = doubling_budgets(k)
    if scheme == "doubling":
        return {"budgets": budgets}
    if scheme == "doubling_sqrt":
        return {"budgets": budgets, "level_weights": [math.sqrt(j) for j in budgets]}
    if scheme == "doubling_rising":
        return {"budgets": budgets, "level_weights": [float(j) for j in budgets]}
    if scheme == "doubling_half_on_k":
        n = len(budgets)
        return {"budgets": budgets, "level_weights": [1.0] * (n - 1) + [n + 1.0]}
    if scheme == "every_eighth":
        return {"budgets": [*range(8, k, 8), k]}
    raise ValueError(f"scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")


class Entry(NamedTuple):
    """
    What is to be trained with one seed.

    Args:
        name: of a kind, or the rank of a scheme: "best_1".
        longer: as in Kind.
        seed: of the initial weights and the order of the activations.
    """

    name: str
    longer: int
    seed: int

    @property
    def rank(self) -> int | None:
        """The n of "best_n", None for the name of a kind."""
        return int(self.name[5:]) if self.name.startswith("best_") else None


def make_plan(words: list[str], budgets: list[int]) -> list[Entry]:
    """Return what is to be trained, in the order of `words`.

    Args:
        words: each a name, "x" and how many times as long it is trained if not once, "@" and a seed
            if not 0: "even", "topk@1", "topk_8x3@2". A name is a scheme, a family for one k
            ("topk_8"), a family for each budget ("topk"), or "best_2": the second best of the
            schemes before it that are not in the plan with this seed by their own name.
        budgets: that are measured.

    Raises:
        ValueError: for a word that is none of these.
    """
    plan = []
    for word in words:
        match = re.fullmatch(r"([a-z_]+?)(_\d+)?(?:x(\d+))?(?:@(\d+))?", word)
        name, number, longer, seed = match.groups() if match else ("", None, None, None)
        is_family = name in FAMILIES
        is_scheme = name in SCHEMES and not number
        if not (is_family or is_scheme or (name == "best" and number)):
            names = ", ".join((*SCHEMES, *FAMILIES, "best_1"))
            raise ValueError(f"kinds has {word!r}, expected one of {names} (also topk_8, even@1)")
        names = [name + (number or "")]
        if is_family and not number:
            names = [f"{name}_{own}" for own in budgets]
        plan += [Entry(each, int(longer or 1), int(seed or 0)) for each in names]
    return list(dict.fromkeys(plan))


def make_kind(name: str, k: int, d_sae: int, budgets: list[int], longer: int = 1) -> Kind:
    """Return the kind of this name: a scheme, or a family with its k ("topk_8").

    Args:
        name: of the kind.
        k: the largest budget.
        d_sae: latents in the dictionary.
        budgets: that are measured.
        longer: as in Kind.
    """
    full_name = name if longer == 1 else f"{name}_x{longer}"
    family, _, number = name.partition("_")
    if family not in FAMILIES:
        fields = scheme_fields(name, k)
        return Kind(full_name, "hierarchical_topk", k, budgets, fields, longer)
    own = int(number)
    if family == "topk":
        # The largest one is also measured cut to fewer latents.
        return Kind(full_name, "flex_topk", own, budgets if own == k else [own], longer=longer)
    architecture, fields = "flex_batchtopk", {}
    if family == "matryoshka":
        architecture = "flex_matryoshka_batchtopk"
        # As in SynthSAEBench (arXiv 2602.14687), whose SAEs have 4096 latents.
        fields = {
            "matryoshka_widths": [d_sae // n for n in (32, 8, 2, 1)],
            "use_matryoshka_aux_loss": True,
        }
    return Kind(full_name, architecture, own, [own], fields, longer)
