"""scGenePT: the effect of perturbations on expression, predicted with what is written about genes."""
from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(__name__, {
    "PerturbationData": "perturbseq",
    "perturbation_of": "conditions", "published_label": "conditions",
    "PerturbationSplit": "splits", "split_conditions": "splits", "custom_split": "splits",
    "family_split": "families", "similarity_split": "families", "similarity_families": "families",
    "leakage_of": "leakage", "perturbation_folds": "folds",
    "perturbation_baselines": "baselines", "PerturbationBaselines": "baselines",
    "gears_baseline": "gears",
    "go_annotations": "texts", "go_texts": "texts", "read_texts": "texts", "merge_texts": "texts",
    "text_vectors": "language", "tfidf_vectors": "language", "go_vectors": "language",
    "ScGenePTModel": "model", "ScGenePT": "scgenept", "published_tables": "knowledge",
    "Pairs": "training", "train_pairs": "training", "predict_values": "prediction",
    "evaluate_published": "evaluation", "evaluate_which": "reverse",
    "fetch_model": "published", "reproduce": "reproduction",
})
