"""Backbone, audio encoders and the normalisation over ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

from avs_dist.modules.audio import LogMelCNN, VGGish, build_audio_encoder
from avs_dist.modules.backbone import Backbone
from avs_dist.modules.dropout import ClipDropPath
from avs_dist.modules.norm import WorldBatchNorm2d, synchronise_batchnorm
from avs_dist.modules.tpavi import TPAVI
from avs_dist.world import gather_rows

WORLD = 2


class NormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = synchronise_batchnorm(
            nn.Sequential(
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU),
            )
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"])


class TPAVINet(nn.Module):
    def __init__(self, implementation: str, key: str = "audio") -> None:
        super().__init__()
        self.block = TPAVI(4, 6, time_aligned=True, key=key, implementation=implementation)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.block(batch["x"], batch["audio"], batch["valid"])


class GatherNet(nn.Module):
    """Every row meets every row of all ranks; the ranks hold different numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        rows = self.layer(batch["audio"][batch["valid"]])
        everyone, first = gather_rows(rows)
        assert torch.equal(everyone[first : first + len(rows)], rows)
        return (rows[:, None] - everyone).square().sum((1, 2)).exp().log1p()


NETS = {
    "batch_norm": NormNet,
    "tpavi_rank_t": lambda: TPAVINet("rank_t"),
    "tpavi_literal": lambda: TPAVINet("literal"),
    "tpavi_both_keys": lambda: TPAVINet("rank_t", key="both"),
    "gather_rows": GatherNet,
}


def global_batch() -> dict[str, Tensor]:
    torch.manual_seed(5)
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[0, 2] = valid[1, 1:] = False  # the ranks hold different numbers of tokens
    return {
        "image": torch.randn(4, 3, 6, 5, dtype=torch.float64) + 2.0,
        "x": torch.randn(4, 3, 4, 3, 2, dtype=torch.float64),
        "audio": torch.randn(4, 3, 6, dtype=torch.float64),
        "valid": valid,
    }


def train_once(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Output, summed gradients and buffers after one pass over this rank's share of the batch."""
    torch.manual_seed(1)
    net = NETS[name]().double()
    batch = {key: value.chunk(world)[rank] for key, value in global_batch().items()}
    for key in ("image", "x", "audio"):
        batch[key] = batch[key].clone().requires_grad_()
    out = net(batch)
    (out * torch.linspace(-1, 1, out[:1].numel(), dtype=torch.float64).view_as(out[:1])).sin().sum().backward()
    result = {"out": out.detach()}
    result |= {f"input {k}": batch[k].grad for k in ("image", "x", "audio") if batch[k].grad is not None}
    for key, parameter in net.named_parameters():
        if world > 1:
            dist.all_reduce(parameter.grad)
        result[f"grad {key}"] = parameter.grad
    return result | {f"buffer {k}": b for k, b in net.named_buffers()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save({name: train_once(name, rank, WORLD) for name in NETS}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", NETS)
def test_two_ranks_equal_one_process(name, ranks):
    want = train_once(name, 0, 1)
    for key, value in want.items():
        if key == "out" or key.startswith("input"):
            got = torch.cat([r[name][key] for r in ranks])
        else:
            got = ranks[0][name][key]
            assert torch.equal(got, ranks[1][name][key]), key
        torch.testing.assert_close(got, value, atol=1e-10, rtol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_on_one_process_is_the_native_one(training):
    x = torch.randn(4, 3, 5, 5)
    native, ours = nn.BatchNorm2d(3), synchronise_batchnorm(nn.BatchNorm2d(3))
    assert isinstance(ours, WorldBatchNorm2d)
    for _ in range(2):
        torch.testing.assert_close(ours.train(training)(x), native.train(training)(x))
    assert native.state_dict().keys() == ours.state_dict().keys()
    for key, value in native.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_batch_norm_of_channels_last_maps_rounds_no_more_than_float32_must():
    """That of torch loses a digit in the gradients on a CPU, and one process would train worse than several."""
    x = (torch.randn(16, 8, 48, 48) + 3.0).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(16, 8, 48, 48).to(memory_format=torch.channels_last)
    ours, exact = WorldBatchNorm2d(8), nn.BatchNorm2d(8).double()
    x_exact = x.detach().double().requires_grad_()
    got = torch.autograd.grad((ours(x) * weight).sum(), [x, *ours.parameters()])
    want = torch.autograd.grad((exact(x_exact) * weight.double()).sum(), [x_exact, *exact.parameters()])
    for g, w in zip(got, want, strict=True):
        assert ((g.double() - w).norm() / w.norm()).item() < 1e-6
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_synchronising_keeps_names_parameters_and_fused_activations():
    model = timm.create_model("mobilenetv3_small_050", features_only=True).eval()
    names, x = set(model.state_dict()), torch.randn(1, 3, 64, 64)
    want = model(x)
    parameters = {id(p) for p in model.parameters()}
    synchronise_batchnorm(model)
    assert set(model.state_dict()) == names
    assert {id(p) for p in model.parameters()} == parameters
    assert all(isinstance(m, WorldBatchNorm2d) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    for got, expected in zip(model(x), want, strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="without weights"):
        synchronise_batchnorm(nn.BatchNorm2d(3, affine=False))


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet10t", [64, 128, 256, 512]), ("resnet18", [64, 128, 256, 512]), ("pvt_v2_b0", [32, 64, 160, 256])],
)
def test_backbone_gives_four_stages_channels_last(name, channels):
    backbone = Backbone(name)
    assert backbone.channels == channels
    features = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)


def test_published_backbones_have_the_published_widths():
    assert Backbone("resnet50").channels == [256, 512, 1024, 2048]
    assert timm.create_model("pvt_v2_b5", features_only=True).feature_info.channels() == [64, 128, 320, 512]
    backbone = Backbone("pvt_v2_b0")
    assert not any(type(m).__name__ == "DropPath" for m in backbone.modules())  # of timm: ours draws by clip
    assert max(m.rate for m in backbone.modules() if isinstance(m, ClipDropPath)) == pytest.approx(0.1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet10t", "pvt_v2_b0"])
def test_backbone_loads_local_weights(name, suffix, tmp_path):
    whole = timm.create_model(name)  # with its classifier, as files in circulation are
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(whole.state_dict(), path)
    loaded = Backbone(name, str(path)).model.state_dict()
    # feature extraction renames stages.0 to stages_0
    want = {k.replace("stages.", "stages_"): v for k, v in whole.state_dict().items()}
    assert {k for k in want if not k.startswith(("fc.", "head."))} == set(loaded)
    for key, value in loaded.items():
        assert torch.equal(value, want[key]), key


def test_backbone_loads_the_names_of_the_original_release(tmp_path):
    """The published PVT file numbers its parts patch_embed1..4 and block1..4."""
    state = timm.create_model("pvt_v2_b0").state_dict()
    original = {}
    for key, value in state.items():
        key = key.replace("patch_embed.", "patch_embed1.").replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
        for stage in range(4):
            key = key.replace(f"stages.{stage}.downsample", f"patch_embed{stage + 1}")
            key = key.replace(f"stages.{stage}.blocks", f"block{stage + 1}")
            key = key.replace(f"stages.{stage}.norm", f"norm{stage + 1}")
        original[key] = value
    torch.save(original, tmp_path / "pvt.pth")
    loaded = Backbone("pvt_v2_b0", str(tmp_path / "pvt.pth")).model.state_dict()
    assert torch.equal(loaded["stages_3.norm.weight"], state["stages.3.norm.weight"])
    assert torch.equal(loaded["stages_2.blocks.1.mlp.fc1.weight"], state["stages.2.blocks.1.mlp.fc1.weight"])


def test_backbone_errors_name_key_and_file(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    incomplete = {k: v for k, v in state.items() if not k.startswith("layer3.")}
    save_file(incomplete, tmp_path / "incomplete.safetensors")
    with pytest.raises(ValueError, match=r"model\.backbone\.weights.*incomplete.*Missing.*layer3"):
        Backbone("resnet10t", str(tmp_path / "incomplete.safetensors"))
    save_file(state | {"layer9.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"more\.safetensors.*Unexpected.*layer9"):
        Backbone("resnet10t", str(tmp_path / "more.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"model\.backbone\.weights.*nowhere"):
        Backbone("resnet10t", str(tmp_path / "nowhere.pth"))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"model\.backbone\.weights.*junk"):
        Backbone("resnet10t", str(tmp_path / "junk.pth"))
    with pytest.raises(ValueError, match=r"model\.backbone\.name.*resnet10x"):
        Backbone("resnet10x")
    with pytest.raises(ValueError, match=r"model\.backbone\.name.*strides"):
        Backbone("vit_tiny_patch16_224")


def test_offline_hub_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"huggingface\.co/timm/pvt_v2_b0.*set model\.backbone\.weights"):
        Backbone("pvt_v2_b0", "hub")


def test_vggish_is_the_published_network():
    encoder = VGGish()
    shapes = {k: tuple(v.shape) for k, v in encoder.state_dict().items() if k.endswith("weight")}
    assert shapes == {
        "features.0.weight": (64, 1, 3, 3),
        "features.3.weight": (128, 64, 3, 3),
        "features.6.weight": (256, 128, 3, 3),
        "features.8.weight": (256, 256, 3, 3),
        "features.11.weight": (512, 256, 3, 3),
        "features.13.weight": (512, 512, 3, 3),
        "embeddings.0.weight": (4096, 12288),
        "embeddings.2.weight": (4096, 4096),
        "embeddings.4.weight": (128, 4096),
    }
    assert not encoder.train().training
    assert not any(p.requires_grad for p in encoder.parameters())
    mel = torch.randn(2, 96, 64, requires_grad=True)
    out = encoder(mel)
    assert out.shape == (2, 128)
    assert out.min() >= 0
    assert not out.requires_grad
    # the first linear layer reads time, then pitch, then channels (NHWC order)
    features = encoder.features(mel[:, None])
    flat = torch.stack([features[:, :, t, m] for t in range(6) for m in range(4)], 1).flatten(1)
    torch.testing.assert_close(encoder.embeddings(flat), out)


def test_vggish_weights_come_from_a_local_file(tmp_path):
    with pytest.raises(ValueError, match=r"model\.audio\.weights.*vggish-10086976\.pth"):
        build_audio_encoder("vggish", None)
    torch.save({"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth.*missing"):
        build_audio_encoder("vggish", str(tmp_path / "part.pth"))
    source = VGGish()
    torch.save(source.state_dict(), tmp_path / "vggish.pth")
    loaded = build_audio_encoder("vggish", str(tmp_path / "vggish.pth"))
    assert torch.equal(loaded.embeddings[4].weight, source.embeddings[4].weight)


def test_log_mel_cnn_is_small_and_hears_the_difference_of_two_pitches():
    encoder = build_audio_encoder("logmel_cnn", None)
    assert isinstance(encoder, LogMelCNN)
    assert sum(p.numel() for p in encoder.parameters()) < 1_000_000
    mel = torch.full((2, 96, 64), -4.6)
    mel[0, :, 10] = mel[1, :, 50] = 2.0
    low, high = encoder(mel)
    assert low.shape == (128,)
    assert (low - high).abs().max() > 1e-2


def test_only_the_backbone_imports_timm():
    root = Path(__file__).resolve().parents[1]
    importing = [p.name for p in (root / "avs_dist").rglob("*.py") if "import timm" in p.read_text()]
    assert importing == ["backbone.py"]
