"""The published MLP recipes, as rows of data.

A row without suffix is lightly's head or the paper's; `_solo` marks solo-learn's recipe for the
same method, where it differs, with the widths of its CIFAR configs.
"""

from __future__ import annotations

from typing import Any

from headplug.heads.mlp import MLPHead


def _row(
    summary: str, paper: str, source: str, hidden_dim: int | None, output_dim: int, **options: Any
) -> dict[str, Any]:
    """One entry; `source` is a class of lightly's heads, or "method:Class.attribute" of solo."""
    if source:
        package = "solo.methods." if ":" in source else "lightly.models.modules.heads:"
        source = package + source
    return {
        "builder": MLPHead,
        "summary": summary,
        "paper": f"arXiv {paper}",
        "source": source,
        "preset": {"hidden_dim": hidden_dim, "output_dim": output_dim, **options},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "mlp": {
        "builder": MLPHead,
        "summary": "the builder of every MLP head here, with plain defaults",
    },
    "simclr": _row(
        "SimCLR's projector as in lightly: batch norm after both layers",
        "2002.05709", "SimCLRProjectionHead", 2048, 128, output_norm="batch",
    ),
    "simclr_plain": _row(
        "linear, activation, linear: the papers' and solo-learn's SimCLR projector",
        "2002.05709", "simclr:SimCLR.projector", None, 128, norm="none",
    ),
    "simclr_v2": _row(
        "SimCLR v2's deeper projector, with batch norm after all three layers",
        "2006.10029", "SimCLRProjectionHead", 2048, 128, num_layers=3, output_norm="batch",
    ),
    "moco_v2": _row(
        "MoCo v2's projector, without norm; solo-learn's for MoCo v2+ and ReSSL, too",
        "2003.04297", "MoCoProjectionHead", 2048, 128, norm="none",
    ),
    "moco_v3": _row(
        "MoCo v3's projector as in lightly: its last norm has scale and shift",
        "2104.02057", "MoCoProjectionHead", 4096, 256, num_layers=3, output_norm="batch",
    ),
    "moco_v3_solo": _row(
        "the authors' MoCo v3 projector for ResNets: two layers, no bias",
        "2104.02057", "mocov3:MoCoV3.projector", 4096, 256, bias=False,
        output_norm="batch_no_affine",
    ),
    "moco_v3_predictor_solo": _row(
        "MoCo v3's predictor for ResNets, without any bias",
        "2104.02057", "mocov3:MoCoV3.predictor", 4096, 256, bias=False,
    ),
    "moco_v3_vit_solo": _row(
        "the authors' MoCo v3 projector for ViTs: three layers, no bias",
        "2104.02057", "mocov3:MoCoV3.projector", 4096, 256, num_layers=3, bias=False,
        output_norm="batch_no_affine",
    ),
    "moco_v3_vit_predictor_solo": _row(
        "MoCo v3's predictor for ViTs, with a norm at its end",
        "2104.02057", "mocov3:MoCoV3.predictor", 4096, 256, bias=False,
        output_norm="batch_no_affine",
    ),
    "byol": _row("BYOL's projector", "2006.07733", "BYOLProjectionHead", 4096, 256),
    "byol_predictor": _row(
        "BYOL's predictor, behind its projector", "2006.07733", "BYOLPredictionHead", 4096, 256,
    ),
    "byol_solo": _row(
        "BYOL's and NNBYOL's projector with a bias before the norm",
        "2006.07733", "byol:BYOL.projector", 4096, 256, bias=True,
    ),
    "byol_predictor_solo": _row(
        "BYOL's and NNBYOL's predictor with a bias before the norm",
        "2006.07733", "byol:BYOL.predictor", 4096, 256, bias=True,
    ),
    "simsiam": _row(
        "SimSiam's projector: three layers, the last norm without scale and shift",
        "2011.10566", "SimSiamProjectionHead", 2048, 2048, num_layers=3,
        output_norm="batch_no_affine",
    ),
    "simsiam_predictor": _row(
        "SimSiam's bottleneck predictor", "2011.10566", "SimSiamPredictionHead", 512, 2048,
    ),
    "simsiam_solo": _row(
        "SimSiam's and NNSiam's projector with an untrained bias at its end",
        "2011.10566", "simsiam:SimSiam.projector", 2048, 2048, num_layers=3,
        output_norm="batch_no_affine", output_bias="frozen",
    ),
    "barlow_twins": _row(
        "Barlow Twins' wide projector, and VICRegL's for whole images",
        "2103.03230", "BarlowTwinsProjectionHead", 8192, 8192, num_layers=3,
    ),
    "barlow_twins_solo": _row(
        "Barlow Twins' projector with a bias before each norm",
        "2103.03230", "barlow_twins:BarlowTwins.projector", 2048, 2048, num_layers=3, bias=True,
    ),
    "vicreg": _row(
        "VICReg's wide expander", "2105.04906", "VICRegProjectionHead", 8192, 8192, num_layers=3,
    ),
    "vicreg_solo": _row(
        "VICReg's expander with a bias before each norm",
        "2105.04906", "vicreg:VICReg.projector", 2048, 2048, num_layers=3, bias=True,
    ),
    "vicregl_local": _row(
        "VICRegL's projector for maps (batch, height, width, channels)",
        "2210.01571", "VicRegLLocalProjectionHead", 8192, 8192, num_layers=3, norm="layer",
    ),
    "vibcreg_solo": _row(
        "VIbCReg's expander with GELU",
        "2109.00783", "vibcreg:VIbCReg.projector", 2048, 2048, num_layers=3, bias=True,
        activation="gelu",
    ),
    "vibcreg_iternorm_solo": _row(
        "VIbCReg's expander with iterative normalisation at its end",
        "2109.00783", "vibcreg:VIbCReg.projector", 2048, 2048, num_layers=3, bias=True,
        activation="gelu", output_norm="iternorm",
    ),
    "whitening": _row(
        "W-MSE's projector with its whitening: no feature can collapse",
        "2007.06346", "", 1024, 64, bias=True, output_norm="whitening",
    ),
    "wmse_solo": _row(
        "W-MSE's narrow projector, in front of its whitening",
        "2007.06346", "wmse:WMSE.projector", 1024, 64, bias=True,
    ),
    "nnclr": _row(
        "NNCLR's projector: three layers, batch norm after each",
        "2104.14548", "NNCLRProjectionHead", 2048, 256, num_layers=3, output_norm="batch",
    ),
    "nnclr_predictor": _row(
        "NNCLR's predictor", "2104.14548", "NNCLRPredictionHead", 4096, 256,
    ),
    "nnclr_solo": _row(
        "NNCLR's projector with a bias before each norm",
        "2104.14548", "nnclr:NNCLR.projector", 2048, 256, num_layers=3, output_norm="batch",
        bias=True,
    ),
    "nnclr_predictor_solo": _row(
        "NNCLR's predictor with a bias before the norm",
        "2104.14548", "nnclr:NNCLR.predictor", 4096, 256, bias=True,
    ),
    "all4one_solo": _row(
        "All4One's projector: NNCLR's with a bias before each norm",
        "2303.09417", "all4one:All4One.projector", 2048, 256, num_layers=3, output_norm="batch",
        bias=True,
    ),
    "all4one_predictor_solo": _row(
        "either of All4One's two predictors", "2303.09417", "all4one:All4One.predictor", 4096, 256,
        bias=True,
    ),
    "swav": _row(
        "SwAV's projector; normalise its output before the prototypes",
        "2006.09882", "SwaVProjectionHead", 2048, 128,
    ),
    "swav_solo": _row(
        "SwAV's projector with a bias before the norm",
        "2006.09882", "swav:SwAV.projector", 2048, 128, bias=True,
    ),
    "deepcluster_v2_solo": _row(
        "DeepCluster v2's projector, in front of its prototypes",
        "2006.09882", "deepclusterv2:DeepClusterV2.projector", 2048, 128, bias=True,
    ),
    "smog": _row(
        "SMoG's projector: the last norm without scale and shift",
        "2207.06167", "SMoGProjectionHead", 2048, 128, output_norm="batch_no_affine",
    ),
    "smog_predictor": _row(
        "SMoG's predictor, behind its projector", "2207.06167", "SMoGPredictionHead", 2048, 128,
    ),
    "tico": _row("TiCo's projector", "2206.10698", "TiCoProjectionHead", 4096, 256),
    "msn": _row(
        "MSN's projector: three layers with GELU",
        "2204.07141", "MSNProjectionHead", 2048, 256, num_layers=3, activation="gelu",
    ),
    "mmcr": _row(
        "MMCR's projector: three layers without any bias",
        "2303.03307", "MMCRProjectionHead", 8192, 512, num_layers=3, bias=False,
    ),
    "densecl": _row(
        "DenseCL's projector, for vectors and for maps with channels last",
        "2011.09157", "DenseCLProjectionHead", 2048, 128, norm="none",
    ),
    "lejepa": _row(
        "LeJEPA's narrow projector", "2511.08544", "LeJEPAProjectionHead", 2048, 64, num_layers=3,
    ),
    "lewm": _row(
        "LeWorldModel's projector with GELU (experimental in lightly)",
        "2603.19312", "LeWMProjectionHead", 2048, 192, activation="gelu",
    ),
    "low_rank": _row(
        "a linear map of rank hidden_dim: how much of a head is its rank",
        "2110.09348", "", 64, 128, activation="identity", norm="none", bias=False,
    ),
    "orthogonal": _row(
        "a fixed random rotation to fewer features: how much of a head is training",
        "2110.09348", "", None, 128, num_layers=1, bias=False, init="orthogonal", freeze=True,
    ),
}  # fmt: skip
