"""What may vary: each kind of variable has a shape and conditions."""

from __future__ import annotations

from searchlab._scalars import Choice, Integer, Real
from searchlab._variable import ActiveBelow, ActiveIf, Condition, Variable, normals, reflect
from searchlab._vectors import Affine, Ordered, Simplex, Subset

__all__ = [
    "ActiveBelow",
    "ActiveIf",
    "Affine",
    "Choice",
    "Condition",
    "Integer",
    "Ordered",
    "Real",
    "Simplex",
    "Subset",
    "Variable",
    "normals",
    "reflect",
]
