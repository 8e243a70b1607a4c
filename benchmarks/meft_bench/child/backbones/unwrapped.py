"""transformers' model inside of a model that PEFT has wrapped."""

from typing import Any


def base_of(model: Any) -> Any:
    """Return transformers' model, which PEFT may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def num_prepended(model: Any) -> int:
    """Return the number of virtual tokens that PEFT puts before those of a row.

    Prompts of prefix tuning are keys and values, and no tokens.
    """
    configs = getattr(model, "peft_config", {})
    return sum(
        getattr(config, "num_virtual_tokens", 0) or 0
        for config in (configs.values() if isinstance(configs, dict) else ())
        if config.is_prompt_learning and config.peft_type.value != "PREFIX_TUNING"
    )
