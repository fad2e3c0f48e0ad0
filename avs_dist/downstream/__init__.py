"""What the codes of a codebook are good for: heads on frozen codes, trained on one modality and tested on others.

All heads are trained in plain torch on one process: they are small, and the encoder has already done its work.
"""
