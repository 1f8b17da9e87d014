"""The model class beside a checkpoint whose layers have different numbers of experts."""

from __future__ import annotations

from typing import Any

from searchlab.errors import ConfigError
from searchlab.spaces.experts.families import Family

__all__ = ["module_text"]

_TEXT = '''"""A {name} whose layers have different numbers of experts.

Written by searchlab beside the weights. `expert_counts` in config.json says how many experts each
layer has. Load it with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

import copy

from transformers import {name}

COUNT_KEYS = {keys!r}


class PrunedForCausalLM({name}):
    """The stock class with fewer experts in some of its layers."""

    def __init__(self, config):
        super().__init__(config)
        for layer, count in config.expert_counts.items():
            block = self.get_submodule("{layers}." + str(layer) + ".{block}")
            own = copy.deepcopy(config)
            for key in COUNT_KEYS:
                setattr(own, key, count)
            for part in ("{router}", "{experts}"):
                setattr(block, part, type(getattr(block, part))(own))
        self.post_init()
'''


def module_text(family: Family, config: dict[str, Any]) -> str:
    """The module's text.

    Raises:
        ConfigError: config.json does not name the model's class, or one that is no identifier.
    """
    names = config.get("architectures") or []
    if len(names) != 1 or not str(names[0]).isidentifier():
        raise ConfigError(
            f"architectures {names!r} in config.json; allowed: one class, so that one with "
            "different numbers of experts per layer can extend it"
        )
    return _TEXT.format(
        name=names[0],
        keys=family.count_keys,
        layers=family.layers,
        block=family.block,
        router=family.router,
        experts=family.experts,
    )
