"""rosa: from the genome around a gene's start to gene vectors, variant effects and expression in single cells."""
from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(__name__, {
    "Enformer": "enformer", "embed_genes": "embedding", "embed_bins": "embedding",
    "KmerEncoder": "encoders", "BorzoiEncoder": "encoders", "GCEncoder": "simple_vectors",
    "kmer_vectors": "simple_vectors", "gc_vectors": "simple_vectors", "identity_vectors": "simple_vectors",
    "promoter_windows": "simple_vectors",
    "Proteins": "proteins", "read_proteins": "proteins", "one_protein_each": "proteins",
    "ESM2": "protein_vectors", "embed_proteins": "protein_vectors",
    "variant_effect": "effects", "variant_vectors": "effects", "VariantEffects": "effects",
    "mutagenesis": "in_silico", "Mutagenesis": "in_silico",
    "encode": "sequence", "decode": "sequence", "reverse_complement": "sequence", "one_hot": "sequence",
    "Genome": "genome", "Interval": "intervals",
    "Annotation": "annotation", "read_annotation": "annotation",
    "Variants": "vcf", "read_variants": "vcf",
    "pair_with_windows": "variants", "allele_codes": "variants", "personal_codes": "variants",
    "log_normalize": "expression", "quantile_bins": "expression", "rank_order": "expression",
    "pseudobulk": "expression", "read_expression": "expression", "fetch_census": "expression",
    "hold_out_grid": "hold_outs", "HoldOutGrid": "hold_outs", "region_sets": "hold_outs", "families_of": "hold_outs",
    "Rosa": "rosa", "compare_vectors": "scores", "published_figures": "scores",
    "Windows": "windows", "tss_windows": "windows", "start_table": "windows",
})
