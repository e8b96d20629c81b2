"""`model_type` strings of config.json that need special handling."""

STATIC = "pt_deploy_static"
"""Static student (a sum of embeddings), see `models.static`."""

CONVOLUTIONAL = frozenset(
    {
        *("bit", "convnext", "convnextv2", "efficientnet", "hgnet_v2", "mobilenet_v1"),
        *("mobilenet_v2", "poolformer", "pp_lcnet", "regnet", "resnet", "textnet"),
    }
)
"""Convolutional networks."""
