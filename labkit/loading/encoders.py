"""Which configs are of models that see their prompts in both directions, and which class of transformers they have."""

from __future__ import annotations

from typing import Any

ENCODERS = frozenset({
    "albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert", "gte",
    "jina_embeddings_v3", "modernbert", "nomic_bert", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl",
})  # fmt: skip
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
HEADS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def architecture(config: Any) -> str:
    """The first name that a config gives; empty if it gives none."""
    return str((getattr(config, "architectures", None) or ("",))[0])


def is_encoder(config: Any) -> bool:
    """Whether a model with this config sees its prompts in both directions, and so generates nothing."""
    if getattr(config, "use_bidirectional_attention", None) is True or getattr(config, "is_causal", True) is False:
        return True
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return False
    return config.model_type in ENCODERS and not architecture(config).endswith(GENERATES)


def has_classes(config: Any) -> bool:
    """Whether it has a classifier in place of a head for tokens."""
    return architecture(config).endswith(tuple(HEADS))


def auto_class(config: Any) -> Any:
    """The class of transformers that makes an encoder, or a decoder with classes."""
    import transformers

    name = architecture(config)
    return getattr(transformers, next((auto for ending, auto in HEADS.items() if name.endswith(ending)), "AutoModel"))
