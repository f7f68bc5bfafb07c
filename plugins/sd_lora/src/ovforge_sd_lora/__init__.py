"""LoRA, LoCon, LoHa, LoKr and DoRA adapters on OpenVINO models: fused, or switched while running."""
