"""The Triton kernels of the fused pass; they know no optimizer and no torch.nn. Imported as ``fused_dals.kernels``."""
