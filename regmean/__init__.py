"""RegMean: merging language models by the inner products of their linear layers' inputs (Jin et al., ICLR 2023)."""
