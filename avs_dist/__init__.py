"""avs_dist: training system for audio-visual segmentation and cross-modal codebooks."""

__version__ = "0.1.0"
