"""Configs of tiny autoencoders by class: those that several entries of the zoo share, and long ones."""

BLOCKS_2D = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
}
ATTENTION_2D = {
    **BLOCKS_2D,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}
SPATIAL = {**ATTENTION_2D, "block_out_channels": (32, 32, 32), "norm_num_groups": 8}  # 32 groups in the decoder
ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "down_block_out_channels": (8, 16, 16),
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "up_block_out_channels": (8, 16, 24),
    "layers_per_up_block": 2,
    "norm_num_groups": 4,
}
DC = {
    "latent_channels": 4,
    "attention_head_dim": 8,  # linear attention, as in the true sizes: a plane has more cells than a head has channels
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 16),
    "decoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
}
DC_CONV = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
DC_SHUFFLE = {
    "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
    "decoder_act_fns": ("relu", "relu", "silu"),
}
HUNYUAN_IMAGE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "sample_size": 64,
}
HUNYUAN_DCAE = {
    "latent_channels": 4,
    "block_out_channels": (16, 16, 32),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}
HUNYUAN_VIDEO = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
WAN22 = {
    **WAN,
    "decoder_base_dim": 12,
    "dim_mult": [1, 1, 2, 2],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
QWEN21 = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 8,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "scale_factor_spatial": 4,
}
LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "patch_size": 2,
}
LTX091 = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (False, False, False, False),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
    "patch_size": 1,
}
LTX095 = {
    **LTX091,
    "block_out_channels": (8, 8, 8, 8, 8),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "layers_per_block": (1, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, True, True),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 8,
}
LTX2 = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "patch_size": 1,
    "decoder_causal": False,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 8,
}
MOCHI = {
    "latent_channels": 4,
    "encoder_block_out_channels": (32, 32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "spatial_expansions": (1, 2, 2),  # one less than the true sizes: channels come in 32 groups, so this one is slow
}
COSMOS = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8, 16, 16),
    "decode_block_out_channels": (8, 8, 16, 16),
    "attention_resolutions": (8,),
    "resolution": 64,
    "num_layers": 1,
}
KANDINSKY = {
    "latent_channels": 4,
    "encoder_block_out_channels": (4, 8, 16, 16),
    "decoder_block_out_channels": (4, 8, 16, 16),
    "layers_per_block": 1,
}
CONSISTENCY = {
    "scaling_factor": 1,
    "encoder_block_out_channels": (8, 16, 16),
    "encoder_down_block_types": ("DownEncoderBlock2D",) * 3,
    "encoder_norm_num_groups": 4,
    "decoder_block_out_channels": (8, 16, 16),
    "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 3,
    "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 3,
    "decoder_layers_per_block": 1,
    "decoder_norm_num_groups": 4,
}
# A plane of this class is square. Its encoder takes 14 pixels a cell, its decoder gives 16, so pictures are resized.
# Its third encoder, siglip2, cannot be made with transformers 5.
RAE = {
    "encoder_hidden_size": 64,
    "encoder_num_hidden_layers": 1,
    "encoder_input_size": 70,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 64,
}
MINIMAX = {
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "spatial_downsample_factors": (2, 2),
    "temporal_downsample_factors": (2, 2),
    "norm_num_groups": 4,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_attention_head_dim": 8,
    "decoder_num_register_tokens": 2,
    "decoder_ffn_mult": 2,
    "latents_mean": (0.0,) * 4,
    "latents_std": (1.0,) * 4,
}
VIDTOK_FSQ = {
    "is_causal": False,
    "ch": 8,
    "ch_mult": [1, 2, 2],
    "z_channels": 6,
    "double_z": False,
    "num_res_blocks": 1,
    "regularizer": "fsq",
}
