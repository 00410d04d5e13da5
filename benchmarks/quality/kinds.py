"""The SAEs that are compared."""

from dataclasses import dataclass, field
from typing import Any

from sae_lens_flex.saes.budgets import doubling_budgets

# The schemes of the one SAE, by how its loss weighs the budgets.
SCHEMES = ("even", "half_on_k", "rising", "doubling", "doubling_half_on_k", "every_eighth")
# SAEs that are trained for one k each. "topk" is SAELens's, trained by this package's kernels.
FAMILIES = ("topk", "batchtopk", "matryoshka")


@dataclass(frozen=True)
class Kind:
    """
    An SAE to train.

    Args:
        name (str): What results call it.
        architecture (str): SAELens's name.
        k (int): Latents kept in training.
        budgets (list[int]): Budgets that it is measured at.
        fields (dict[str, Any]): Fields of its config.
    """

    name: str
    architecture: str
    k: int
    budgets: list[int]
    fields: dict[str, Any] = field(default_factory=dict)


def scheme_fields(scheme: str, k: int) -> dict[str, Any]:
    """Return `budgets` and `level_weights` of a scheme, with c_j for the weight of budget j.

    even: c_j = 1 / k for every j of 1..k, as in the paper.
    half_on_k: half of that, and 1/2 more on k.
    rising: c_j in proportion to j.
    doubling: even over 1, 2, 4, ... k, as in MSAE (arXiv 2502.20578).
    doubling_half_on_k: half of that, and 1/2 more on k.
    every_eighth: even over 8, 16, ... k.
    """
    if scheme == "even":
        return {}
    if scheme == "half_on_k":
        return {"level_weights": [1.0] * (k - 1) + [k + 1.0]}
    if scheme == "rising":
        return {"level_weights": [float(j) for j in range(1, k + 1)]}
    budgets = doubling_budgets(k)
    if scheme == "doubling":
        return {"budgets": budgets}
    if scheme == "doubling_half_on_k":
        n = len(budgets)
        return {"budgets": budgets, "level_weights": [1.0] * (n - 1) + [n + 1.0]}
    if scheme == "every_eighth":
        return {"budgets": [*range(8, k, 8), k]}
    raise ValueError(f"scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")


def make_kinds(names: list[str], k: int, d_sae: int, budgets: list[int]) -> list[Kind]:
    """Return the kinds of these names: a scheme, "topk", or "topk_8" for one k.

    Args:
        names: of SCHEMES or FAMILIES, the latter also with a k.
        k: the largest budget.
        d_sae: latents in the dictionary.
        budgets: that are measured; a family is trained for each.
    """
    kinds = []
    for name in names:
        family, _, number = name.partition("_")
        if family not in FAMILIES:
            fields = scheme_fields(name, k)
            kinds.append(Kind(name, "hierarchical_topk", k, budgets, fields))
            continue
        for own in [int(number)] if number else budgets:
            if family == "topk":
                # The largest one is also measured cut to fewer latents.
                measured = budgets if own == k else [own]
                kinds.append(Kind(f"topk_{own}", "flex_topk", own, measured))
                continue
            architecture, fields = "batchtopk", {}
            if family == "matryoshka":
                architecture = "matryoshka_batchtopk"
                fields = {"matryoshka_widths": [d_sae // n for n in (16, 8, 4, 2, 1)]}
            kinds.append(Kind(f"{family}_{own}", architecture, own, [own], fields))
    return kinds
